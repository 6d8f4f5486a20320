"""Gradients of jit functions: against differences of the Python function, and under every
transformation of MLX."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from authoring.jit_backends import BACKENDS, anchored

from zmlx.jit_compiler import jit


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", request.param)
    return request.param


def smooth(x, y):
    u = math.tanh(x) * 0.9
    v = abs(y) + 1.25
    one = math.exp(u) * math.log(v) + math.sin(x) / v - math.cos(y) * math.atan(x)
    two = math.sqrt(v) * math.asin(u) + math.acos(u) + math.atan2(u, v) + math.atanh(u)
    three = math.sinh(u) + math.cosh(u) + math.asinh(x) + math.acosh(v) + math.tan(u)
    four = math.expm1(u) * math.log1p(v) + math.log2(v) + math.log10(v) + math.erf(x)
    return one + two * three + four + v**u + u**3 + v**-2 + v**1.5


def branching(x, y):
    if x > y:
        r = x * y
    elif x > 0:
        r = x / (1 + y * y)
    else:
        return math.sin(x) if y > 0 else y * x * x
    r += min(x, y) * max(x, 0.3) - abs(x - y)
    return r


def looping(x, y):
    total = 0.0
    term = 1.0
    for i in range(1, 9):
        term = term * x / i
        if i % 3 == 0:
            continue
        total += term
        for j in range(i):
            total = total - 0.01 * y * j
            if total < -2:
                break
    return total


def swapping(x, y):
    a, b = x, y
    for _ in range(3):
        a, b = b * x, a + 0.5 * b
    x = a
    return x + b * y


def dividing(x, y):
    return (x * y) % 1.5 + (x // 0.7) * y + 2.5 % (abs(y) + 1) + math.floor(x) * x


inner = jit(branching)


@jit
def pair(a, b):
    return a * b, a - inner(b, a)


def calling(x, y):
    p, q = pair(x * 0.5, y)
    return inner(p, q) + inner(x, 0.25) * 2


def plain_pair(a, b):
    return a * b, a - branching(b, a)


def plain_calling(x, y):
    p, q = plain_pair(x * 0.5, y)
    return branching(p, q) + branching(x, 0.25) * 2


FUNCTIONS = {
    "smooth": (smooth, smooth),
    "branching": (branching, branching),
    "looping": (looping, looping),
    "swapping": (swapping, swapping),
    "dividing": (dividing, dividing),
    "calling": (calling, plain_calling),
}
KERNELS = {name: jit(function) for name, (function, _) in FUNCTIONS.items()}


def points(n=83):
    """Numbers that are on no corner of the functions above."""
    random = np.random.default_rng(1)
    return random.uniform(-2, 2, n).astype(np.float32), random.uniform(-2, 2, n).astype(np.float32)


def differences(function, x, y):
    """Return the derivatives by x and y; NaN where the function bends nearby."""
    h = 1e-5
    rows = []
    for a, b in zip(x.astype(float), y.astype(float), strict=True):
        row = []
        for da, db in ((h, 0), (0, h)):
            low, middle, high = (function(a + s * da, b + s * db) for s in (-1, 0, 1))
            left, right = (middle - low) / h, (high - middle) / h
            bends = abs(left - right) > 1e-2 * (1 + abs(left))
            row.append(math.nan if bends else (left + right) / 2)
        rows.append(row)
    return np.array(rows).T


def assert_close(found, truth, tolerance=2e-3):
    found = np.array(found)
    kept = ~np.isnan(truth)
    assert kept.mean() > 0.9
    np.testing.assert_allclose(found[kept], truth[kept], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_every_argument(name):
    x, y = points()
    kernel = KERNELS[name]
    found = mx.grad(lambda a, b: kernel(a, b).sum(), argnums=(0, 1))(mx.array(x), mx.array(y))
    for value, truth in zip(found, differences(FUNCTIONS[name][1], x, y), strict=True):
        assert_close(value, truth)


@pytest.mark.parametrize("name", ["smooth", "branching", "looping", "calling"])
def test_second_derivatives(name):
    x, y = (mx.array(v) for v in points())
    kernel = KERNELS[name]

    def slope(a, b):
        return mx.grad(lambda c: kernel(c, b).sum())(a)

    anchored(slope(x, y), slope, x, y)
    found = mx.grad(lambda a: slope(a, y).sum())(x)
    h = 2e-2
    ends = [np.array(slope(x + s * h, y), dtype=float) for s in (-2, -1, 1, 2)]
    inner_slope = (ends[2] - ends[1]) / (2 * h)
    outer_slope = (ends[3] - ends[0]) / (4 * h)
    bends = np.abs(inner_slope - outer_slope) > 2e-2 * (1 + np.abs(inner_slope))
    truth = np.where(bends, np.nan, (4 * inner_slope - outer_slope) / 3)
    kept = ~np.isnan(truth)
    assert kept.mean() > 0.8
    np.testing.assert_allclose(np.array(found)[kept], truth[kept], rtol=2e-2, atol=2e-2)


def test_a_cotangent_is_multiplied_in():
    x, y = (mx.array(v) for v in points(19))
    weights = mx.arange(19).astype(mx.float32) - 7
    kernel = KERNELS["branching"]
    _, found = mx.vjp(kernel, [x, y], [weights])
    ones = mx.vjp(kernel, [x, y], [mx.ones((19,))])[1]
    anchored(ones, lambda a, b: mx.vjp(kernel, [a, b], [mx.ones((19,))])[1], x, y)
    for value, one in zip(found, ones, strict=True):
        assert mx.allclose(value, one * weights, atol=1e-6).item()


def test_directional_derivatives(monkeypatch):
    # mx.jvp asks the kernel itself, and MLX's custom kernels have no answer.
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    x, y = (mx.array(v) for v in points(19))
    s, t = mx.sin(x * 5), mx.cos(y * 3)
    kernel = KERNELS["calling"]
    _, [found] = mx.jvp(kernel, [x, y], [s, t])
    by_x, by_y = mx.vjp(kernel, [x, y], [mx.ones((19,))])[1]
    assert mx.allclose(found, by_x * s + by_y * t, atol=1e-5).item()
    # With one argument constant, by that of the other alone.
    _, [one] = mx.jvp(lambda a: kernel(a, y), [x], [s])
    assert mx.allclose(one, by_x * s, atol=1e-5).item()


def test_several_results_add_up():
    x, y = (mx.array(v) for v in points(19))
    weights = mx.cos(x), mx.sin(y)

    def loss(a, b):
        return sum((r * w).sum() for r, w in zip(pair(a, b), weights, strict=True))

    def plain(a, b):
        first, second = plain_pair(a, b)
        return first * math.cos(a0) + second * math.sin(b0)

    found = mx.grad(loss, argnums=(0, 1))(x, y)
    for index, (a0, b0) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        truth = differences(plain, np.array([a0]), np.array([b0]))
        for value, one in zip(found, truth[:, 0], strict=True):
            assert math.isnan(one) or abs(value[index].item() - one) < 2e-3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_the_argument(dtype):
    x, y = (mx.array(v).astype(dtype) for v in points(33))
    wide = x.astype(mx.float32), y.astype(mx.float32)
    kernel = KERNELS["looping"]
    found = mx.vjp(kernel, [x, y], [mx.ones((33,), dtype)])[1]
    exact = mx.vjp(kernel, list(wide), [mx.ones((33,))])[1]
    anchored(exact, lambda a, b: mx.vjp(kernel, [a, b], [mx.ones((33,))])[1], *wide)
    for value, truth in zip(found, exact, strict=True):
        assert value.dtype == dtype
        assert mx.array_equal(value, truth.astype(dtype)).item()


def test_corners_are_those_of_mlx():
    @jit
    def f(x, y):
        return abs(x), max(x, y), min(x, y), x**2

    def stock(x, y):
        return mx.abs(x), mx.maximum(x, y), mx.minimum(x, y), x**2

    x, y = mx.array([0.0, 1.0, -1.0, 2.0]), mx.array([0.0, 1.0, -1.0, 1.0])
    for index in range(4):
        ours = mx.grad(lambda a, b, i=index: f(a, b)[i].sum(), argnums=(0, 1))(x, y)
        theirs = mx.grad(lambda a, b, i=index: stock(a, b)[i].sum(), argnums=(0, 1))(x, y)
        for one, other in zip(ours, theirs, strict=True):
            assert one.tolist() == other.tolist()


def test_what_a_branch_does_not_take_does_not_count():
    @jit
    def f(x):
        return math.log(x) if x > 0 else 0.0

    @jit
    def g(x):
        if x > 0:
            return math.sqrt(x)
        return 0.0

    x = mx.array([0.0, -1.0, 4.0])
    assert mx.grad(lambda a: f(a).sum())(x).tolist() == [0.0, 0.0, 0.25]
    assert mx.grad(lambda a: g(a).sum())(x).tolist() == [0.0, 0.0, 0.25]


def test_powers_at_zero():
    @jit
    def f(x, y):
        return x**y

    x, y = mx.array([0.0, 0.0, 2.0]), mx.array([2.0, 1.0, 3.0])
    by_x, by_y = mx.grad(lambda a, b: f(a, b).sum(), argnums=(0, 1))(x, y)
    assert by_x.tolist() == [0.0, 1.0, 12.0]
    np.testing.assert_allclose(np.array(by_y), [0.0, 0.0, 8 * math.log(2)], rtol=1e-6)


def test_a_loop_of_varying_length():
    @jit
    def power(x, n: int):
        result = 1.0
        for _ in range(n):
            result *= x
        return result

    x, n = mx.array([2.0, 3.0, 0.5, 7.0]), mx.array([3, 2, 1, 0])
    assert mx.grad(lambda a: power(a, n).sum())(x).tolist() == [12.0, 6.0, 1.0, 0.0]


def test_a_number_for_all_elements_has_the_sum_of_their_gradients():
    kernel = KERNELS["branching"]
    x = mx.array(points(57)[0])
    y = mx.array(0.375)
    by_x, by_y = mx.grad(lambda a, b: kernel(a, b).sum(), argnums=(0, 1))(x, y)
    full = mx.full((57,), 0.375)
    gradients = mx.grad(lambda a, b: kernel(a, b).sum(), argnums=(0, 1))
    each_x, each_y = gradients(x, full)
    anchored((each_x, each_y), gradients, x, full)
    assert by_y.shape == ()
    assert mx.allclose(by_x, each_x).item()
    assert mx.allclose(by_y, each_y.sum(), rtol=1e-5).item()


def test_zero_dimensional_arrays():
    kernel = KERNELS["smooth"]
    value = kernel(mx.array(0.5), mx.array(0.25))
    assert value.shape == ()
    assert abs(value.item() - smooth(0.5, 0.25)) < 1e-5
    slope = mx.grad(kernel)(mx.array(0.5), mx.array(0.25))
    assert abs(slope.item() - differences(smooth, np.array([0.5]), np.array([0.25]))[0, 0]) < 1e-3


def test_gradients_of_nothing():
    empty = mx.zeros((0, 3))
    found = mx.grad(lambda a: KERNELS["smooth"](a, empty).sum())(empty)
    assert found.shape == (0, 3)


def test_a_function_that_does_not_depend_on_an_argument():
    @jit
    def f(x, y):
        return x * 2 if y > 0 else 3.0

    x, y = mx.array([1.0, 2.0]), mx.array([1.0, -1.0])
    by_x, by_y = mx.grad(lambda a, b: f(a, b).sum(), argnums=(0, 1))(x, y)
    assert by_x.tolist() == [2.0, 0.0]
    assert by_y.tolist() == [0.0, 0.0]


def test_whole_arguments_take_no_gradient_and_leave_others_theirs():
    @jit
    def f(x, n):
        return x * n, n + 1

    x, n = mx.array([1.0, 2.0]), mx.array([3, 4])
    assert mx.grad(lambda a: f(a, n)[0].sum())(x).tolist() == [3.0, 4.0]


def test_compiled_gradients():
    @jit
    def f(x, y):
        return x * x * y if x > 0 else y

    x, y = (mx.array(v) for v in points(29))

    def slope(a, b):
        return mx.grad(lambda c: f(c, b).sum())(a)

    compiled = mx.compile(slope)
    anchored(slope(x, y), slope, x, y)
    for _ in range(2):
        assert mx.allclose(compiled(x, y), slope(x, y), atol=1e-6).item()


@pytest.mark.parametrize("axes", [(0, 0), (1, 1), (0, 1), (0, None), (None, 0)])
def test_vmap(axes):
    x, y = (mx.array(v[:81]).reshape(9, 9) for v in points(83))
    kernel = KERNELS["branching"]
    one = x if axes[0] is not None else x[2]
    two = y if axes[1] is not None else y[4]
    rows = [kernel(_row(one, axes[0], index), _row(two, axes[1], index)) for index in range(9)]
    found = mx.vmap(kernel, in_axes=axes)(one, two)
    assert mx.allclose(found, mx.stack(rows)).item()
    anchored(found, mx.vmap(kernel, in_axes=axes), one, two)


def _row(array, axis, index):
    return array if axis is None else mx.take(array, index, axis=axis)


def test_vmap_over_a_number_for_all_elements():
    kernel = KERNELS["branching"]
    x, y = mx.array(points(12)[0]).reshape(4, 3), mx.array([0.3, -0.4, 1.1, 0.0])
    rows = mx.stack([kernel(x[index], y[index]) for index in range(4)])
    assert mx.allclose(mx.vmap(kernel)(x, y), rows).item()
    anchored(rows[0], kernel, x[0], y[0])
    same = mx.stack([kernel(x[0], y[index]) for index in range(4)])
    assert mx.allclose(mx.vmap(kernel, in_axes=(None, 0))(x[0], y), same).item()


def test_vmap_of_gradients_and_of_several_results():
    x, y = (mx.array(v).reshape(5, 5) for v in points(25))
    kernel = KERNELS["calling"]

    def slope(a, b):
        return mx.grad(lambda c: kernel(c, b).sum())(a)

    assert mx.allclose(mx.vmap(slope)(x, y), slope(x, y), atol=1e-6).item()
    anchored(slope(x, y), slope, x, y)
    found = mx.vmap(pair, in_axes=(1, 1))(x, y)
    for value, truth in zip(found, pair(x.T, y.T), strict=True):
        assert mx.allclose(value, truth).item()
