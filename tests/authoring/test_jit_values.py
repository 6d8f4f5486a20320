"""What jit functions compute, on every backend, against Python's own execution."""

from __future__ import annotations

import math
import types

import mlx.core as mx
import numpy as np
import pytest
from authoring.jit_backends import BACKENDS, anchored

import zmlx.jit_compiler
from zmlx.jit_compiler import jit

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
SCALE = 0.75


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", request.param)
    return request.param


@jit
def hard_swish(x):
    """x * clip(x + 3, 0, 6) / 6."""
    r = min(max(x + 3.0, 0.0), 6.0)
    return x * r / 6.0


@jit
def arithmetic(x, y):
    return -x * y / (abs(y) + 1) + (x - 2 * y) - +x


@jit
def divided(x, y):
    return x // y, x % y


@jit
def powers(x):
    return x**2, x**5, x**-1, x**0, (abs(x) + 1) ** 0.5, 2.0**x, x**2.0, pow(abs(x) + 1, x)


@jit
def compared(x, y):
    return x < y, x <= y, x == y, x != y, x >= y, x > y, -1 < x <= y < 1.5


@jit
def chosen(x, y):
    return (x if x > y else y), (x and y), (x or y), not x, (x > 0 and y > 0) or x < -1


@jit
def branches(x):
    if x < -1:
        r = x * x
    elif x < 0:
        r = 0
    elif x < 1:
        return x
    else:
        r = -x
        if x > 2:
            r = r - 1
    return r + 0.5


@jit
def early(x):
    for i in range(10):
        x = x * 1.5
        if x > 20:
            return i
        if x < -20:
            break
    return x


@jit
def accumulated(x):
    total = 0
    for i in range(1, 9, 2):
        total += x**2 / i
        for j in range(i):
            if j == 3:
                continue
            total -= j * 0.125
            if j > 4:
                break
    return total


@jit
def bounded(x, n: int):
    total = 0.0
    for i in range(n, -2, -1):
        for j in range(0, i, 2):
            total += x * j
        if total > 9:
            return total
    for k in range(n, 12, n):
        total = total * 0.5 + k
    return total


@jit
def locals_of(x, y):
    a, b = x, y
    a, b = b, a + b
    c = d = a * 2
    c += 1
    e: float = c - d
    return a, b, e


@jit
def functions(x):
    u = math.tanh(x) * 0.9
    v = abs(x) + 1.25
    one = mx.exp(u) + np.exp2(u) + math.expm1(u) + mx.log(v) + math.log2(v) + np.log10(v)
    two = math.log1p(v) + math.sqrt(v) + mx.rsqrt(v) + mx.square(u) + mx.reciprocal(v)
    three = math.sin(x) + mx.cos(x) + np.tan(u) + math.asin(u) + mx.arccos(u) + np.arctan(x)
    four = math.sinh(u) + mx.cosh(u) + math.asinh(x) + np.arccosh(v) + math.atanh(u)
    five = math.atan2(u, v) + mx.sigmoid(x) + math.erf(x) + np.logaddexp(u, v) + math.pow(v, u)
    return one, two, three, four, five


@jit
def rounded(x):
    return math.floor(x), mx.ceil(x), math.trunc(x), round(x), int(x), float(int(x)), bool(x)


@jit
def extremes(x, y):
    return min(x, y, 0.5), max(x, y), np.clip(x, -1, 1), np.where(x > y, x, 2), np.sign(x)


@jit
def frozen(x):
    return x * SCALE + math.pi


@jit
def divided_helper(x):
    return x // 0.5


@jit
def locals_helper(x, y):
    return divided_helper(x), y


@jit
def scaled(x, by=3):
    if x > 0:
        return x * by
    return by


@jit
def calling(x, y):
    a, b = locals_helper(y, x)
    return hard_swish(x) - scaled(a) * 2 + b


def grid(n, low=-3.0, high=3.0):
    """Numbers of which none is on a corner."""
    return (np.round(np.linspace(low, high, n) * 64) / 64 + 1 / 256).astype(np.float32)


def python(function):
    """Return the Python function, with every jit function that it calls as Python too."""
    plain = function.__wrapped__
    around = {
        name: python(value) if isinstance(value, zmlx.jit_compiler.JitFunction) else value
        for name, value in plain.__globals__.items()
        if name in plain.__code__.co_names
    }
    around["__builtins__"] = plain.__globals__["__builtins__"]
    return types.FunctionType(plain.__code__, around, plain.__name__, plain.__defaults__)


def expected(function, *arrays):
    """Return what Python computes for every element, one float64 array for each result."""
    rows = []
    for numbers in zip(*(np.asarray(array).tolist() for array in arrays), strict=True):
        result = python(function)(*numbers)
        rows.append([float(v) for v in (result if isinstance(result, tuple) else (result,))])
    return np.array(rows).T


def several(result):
    return (
        [np.array(part.astype(mx.float32)) for part in result]
        if isinstance(result, list)
        else [np.array(result.astype(mx.float32))]
    )


def assert_as_python(function, *arrays, tolerance=2e-5):
    found = several(function(*(mx.array(array) for array in arrays)))
    truths = expected(function, *arrays)
    assert len(found) == len(truths)
    for index, (value, truth) in enumerate(zip(found, truths, strict=True)):
        np.testing.assert_allclose(
            value, truth, rtol=tolerance, atol=tolerance, err_msg=f"result {index}"
        )


ONE = [hard_swish, powers, branches, early, accumulated, functions, rounded, frozen]
TWO = [arithmetic, divided, compared, chosen, locals_of, extremes, calling]


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_one_argument(function):
    assert_as_python(function, grid(101))


@pytest.mark.parametrize("function", TWO, ids=lambda f: f.__name__)
def test_two_arguments(function):
    x = grid(101)
    y = np.random.default_rng(0).permutation(x)
    y[:5] = x[:5]
    assert_as_python(function, x, y)


def test_bounds_of_loops_may_differ_from_element_to_element():
    assert_as_python(bounded, grid(60), (np.arange(60) % 9 + 1).astype(np.int32))


@jit
def left_early(x):
    i = -1
    for i in range(2, 9, 2):
        if x > 0.5 * i:
            continue
        break
    k = i
    for j in range(3):
        if x < -j:
            j = j * 10
            break
        k += j
    if x > 2:
        for i in range(4):
            k += i
    return i, j, k


@jit
def counting(x, n: int):
    i = 100
    for i in range(n):
        if x * i > 3:
            break
        if x < 0:
            i += 50
    return i


def test_what_a_counter_is_after_its_loop():
    assert_as_python(left_early, grid(101))
    assert_as_python(counting, grid(60), (np.arange(60) % 6).astype(np.int32))


def test_a_loop_without_turns_leaves_its_locals_alone():
    n = mx.array([0, 1, -1, -5])

    @jit
    def f(n):
        total = 7
        for i in range(n):
            total += i + 1
        return total

    assert f(n).tolist() == [7, 8, 7, 7]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 17, 64, 1000, 1023, 1024, 4096, 4099])
def test_every_element_is_written_at_any_size(size):
    x = mx.arange(size).astype(mx.float32) - size / 2
    expected = x * mx.clip(x + 3, 0, 6) / 6
    assert mx.allclose(hard_swish(x), expected).item()


def test_a_sum_in_a_loop_adds_up():
    @jit
    def f(x):
        total = 0.0
        for i in range(5):
            total = total + x * i
        return total

    assert f(mx.array([1.0, 2.0, -3.0])).tolist() == [10.0, 20.0, -30.0]


def test_an_if_is_not_ignored():
    @jit
    def f(x):
        if x > 0:
            return x
        return 0.25 * x

    assert f(mx.array([4.0, -4.0, 0.0, 8.0])).tolist() == [4.0, -1.0, 0.0, 8.0]


def test_names_that_are_words_of_metal_or_not_ascii():
    @jit
    def kernel(half, thread, in0_shape, größe, i=2, out0=1):
        device = half + thread
        float4 = device * größe
        for threadgroup in range(2):
            float4 += threadgroup
        vär, v_r, k1 = float4, in0_shape, i
        return vär + v_r + k1 + out0

    x = mx.array([1.0, 2.0, 3.0])
    assert kernel(x, x, x, x).tolist() == [7.0, 14.0, 25.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("function", [hard_swish, accumulated, functions], ids=lambda f: f.__name__)
def test_every_float_dtype_computes_in_float32_and_rounds_once(function, dtype):
    x = mx.array(grid(67)).astype(dtype)
    found = function(x)
    exact = function(x.astype(mx.float32))
    anchored(exact, function, x.astype(mx.float32))
    for value, truth in zip(
        found if isinstance(found, list) else [found],
        exact if isinstance(exact, list) else [exact],
        strict=True,
    ):
        assert value.dtype == dtype
        assert mx.array_equal(value, truth.astype(dtype)).item()


@pytest.mark.parametrize(
    "dtype", [mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32], ids=str
)
def test_whole_numbers_stay_whole(dtype):
    @jit
    def f(a, b):
        return a // b, a % b, a * b - 7, a / b, a & b, min(a, b), a < b, a**2, abs(-a)

    a, b = [7, 100, 5, 90, 3], [2, 7, 9, 4, 3]
    found = f(mx.array(a, dtype), mx.array(b, dtype))
    wide = mx.int64 if dtype in (mx.int64, mx.uint32) else mx.int32
    dtypes = [wide, wide, wide, mx.float32, wide, wide, mx.bool_, wide, wide]
    assert [part.dtype for part in found] == dtypes
    for part, truth in zip(found, expected(f, a, b), strict=True):
        np.testing.assert_allclose(np.array(part), truth, rtol=1e-6)


def test_division_of_whole_numbers_rounds_down_and_by_zero_gives_zero():
    @jit
    def f(a, b):
        return a // b, a % b

    a = [7, -7, 7, -7, 6, -6, 5, -(2**31), -(2**31)]
    b = [2, 2, -2, -2, 3, 3, 0, -1, 7]
    quotient, rest = f(mx.array(a), mx.array(b))
    truth = [(m // n, m % n) if n else (0, 0) for m, n in zip(a, b, strict=True)]
    truth[7] = (-(2**31), 0)  # 2**31 wraps around
    assert list(zip(quotient.tolist(), rest.tolist(), strict=True)) == truth


def test_whole_numbers_wrap_around_and_wide_ones_hold_more():
    @jit
    def f(a):
        return a * 65536 + 5, -a

    assert [part.tolist() for part in f(mx.array([65536, -(2**31)]))] == [
        [5, 5],
        [-65536, -(2**31)],
    ]
    assert f(mx.array([65536], mx.int64))[0].tolist() == [2**32 + 5]


def test_a_float_becomes_the_nearest_whole_number():
    @jit
    def f(x):
        return int(x)

    x = mx.array([1.9, -1.9, 3e9, -3e9, math.inf, -math.inf, math.nan])
    most = 2**31 - 1
    assert f(x).tolist() == [1, -1, most, -(2**31), most, -(2**31), 0]


def test_truth_values():
    @jit
    def f(a, b):
        return a and not b, a + b, a | b, a if b else 2

    a, b = mx.array([True, True, False, False]), mx.array([True, False, True, False])
    found = f(a, b)
    assert [part.dtype for part in found] == [mx.bool_, mx.int32, mx.bool_, mx.int32]
    assert [part.tolist() for part in found] == [
        [False, True, False, False],
        [2, 1, 1, 0],
        [True, True, True, False],
        [1, 2, 0, 2],
    ]


def test_dtypes_that_meet():
    @jit
    def f(a, b):
        return a * b

    def of(a, b):
        product = f(mx.ones((2,), a), mx.ones((2,), b))
        assert product.tolist() == [1, 1]
        return product.dtype

    assert of(mx.float16, mx.bfloat16) == mx.float32
    assert of(mx.bfloat16, mx.float32) == mx.float32
    assert of(mx.int32, mx.bfloat16) == mx.bfloat16
    assert of(mx.int64, mx.float16) == mx.float16
    assert of(mx.bool_, mx.bool_) == mx.int32
    assert f(mx.ones((2,), mx.bfloat16), 2.5).dtype == mx.bfloat16
    assert f(mx.ones((2,), mx.int32), 2.5).dtype == mx.float32


def test_nan_and_infinity():
    @jit
    def f(x, y):
        return max(x, y), min(y, x), x / y, x // y, x % y, math.isnan(x), math.isinf(x / y)

    inf, nan = math.inf, math.nan
    x = mx.array([nan, 1.0, 1.0, -5.0, 5.0, 0.0])
    y = mx.array([1.0, nan, 0.0, inf, -inf, 0.0])
    high, low, ratio, quotient, rest, is_nan, is_inf = (part.tolist() for part in f(x, y))
    assert np.isnan(high[:2]).all()
    assert np.isnan(low[:2]).all()
    assert ratio[2] == inf
    assert math.isnan(ratio[5])
    assert quotient[3:5] == [-5.0 // inf, 5.0 // -inf]
    assert rest[3:5] == [inf, -inf]
    assert is_nan == [True, False, False, False, False, False]
    assert is_inf == [False, False, True, False, False, False]


def test_float_division_rounds_down_where_the_quotient_rounds_up():
    @jit
    def f(x, y):
        return x // y

    # 1 / 0.1 rounds to 10 though 0.1 is stored a little too large.
    assert f(mx.array([1.0, -1.0, 6.0]), mx.array([0.1, 0.1, 0.1])).tolist() == [
        float(np.floor_divide(np.float32(x), np.float32(0.1))) for x in (1, -1, 6)
    ]


def test_functions_at_their_edges():
    @jit
    def f(x):
        return math.expm1(x), math.log1p(x), math.erf(x), mx.sigmoid(x), math.tanh(x)

    x = np.array([1e-6, -1e-6, 3e-4, 0.99, 1.01, 3.9, 60.0, 0.0], np.float32)
    truths = [
        np.expm1(x.astype(float)),
        np.log1p(x.astype(float)),
        [math.erf(v) for v in x.tolist()],
        1 / (1 + np.exp(-x.astype(float))),
        np.tanh(x.astype(float)),
    ]
    for value, truth in zip(f(mx.array(x)), truths, strict=True):
        np.testing.assert_allclose(np.array(value), truth, rtol=2e-6, atol=1e-7)


def test_numbers_around_a_function_are_frozen_when_it_is_decorated(monkeypatch):
    factor = 2.0

    @jit
    def f(x):
        return x * factor * SCALE

    factor = 3.0
    monkeypatch.setitem(globals(), "SCALE", 100.0)
    assert f(mx.array([1.0])).item() == 1.5
    assert f(mx.array([1], mx.int32)).item() == 1.5  # made later, from the same numbers


def test_lambdas_and_annotations():
    double = jit(lambda x: x * 2)

    @jit
    def f(x: float, n: int = 3):
        return x / 2, x**n

    half, power = f(mx.array([3, 4]))  # whole numbers given for a float
    assert half.tolist() == [1.5, 2.0]
    assert power.tolist() == [27.0, 64.0]
    assert double(mx.array([1.5])).tolist() == [3.0]
