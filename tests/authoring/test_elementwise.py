"""Elementwise operations: values, gradients and transformations on every backend."""

from __future__ import annotations

import threading
import timeit

import mlx.core as mx
import numpy as np
import pytest

import zmlx.elementwise
from zmlx import autograd, elementwise, msl
from zmlx.api import elementwise as make
from zmlx.authoring.formula.errors import FormulaError, NotDifferentiable

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
SHAPES = [(1,), (7,), (8,), (3, 5), (257,), (2, 3, 4, 5)]
ROUNDING = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}

softplus = make("log(1 + exp(x))", name="softplus")
cube = make("x * x * x", name="cube", grad_expr="g * 3 * x * x", use_output=False)
weighted = elementwise.map(name="weighted", expr="a * x + b * tanh(x)", input_names=["x", "a", "b"])


def close(result: mx.array, truth: mx.array, dtype: mx.Dtype = mx.float32) -> bool:
    assert result.shape == truth.shape
    assert result.dtype == dtype
    tolerance = ROUNDING[dtype]
    return bool(mx.allclose(result.astype(mx.float32), truth, rtol=tolerance, atol=tolerance))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_in_every_dtype_and_odd_shapes(dtype, backend):
    for shape in SHAPES:
        x = mx.random.normal(shape).astype(dtype)
        wide = x.astype(mx.float32)
        assert close(softplus(x), mx.log(1 + mx.exp(wide)), dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_sixteen_bits_are_rounded_once(dtype, backend):
    x = mx.random.normal((1000,)).astype(dtype)
    truth = mx.log(1 + mx.exp(x.astype(mx.float32))).astype(dtype)
    # Two roundings of float32 apart is at most one of 16 bits, and seldom.
    assert mx.mean(softplus(x) == truth).item() > 0.99


def test_many_elements_that_no_thread_count_divides(backend):
    x = mx.random.normal((3, 87_383))
    assert x.size > 1 << 18
    assert close(cube(x), x * x * x)


def test_empty_and_zero_dimensional_arrays(backend):
    assert softplus(mx.zeros((0,))).shape == (0,)
    assert softplus(mx.zeros((3, 0, 2), mx.float16)).shape == (3, 0, 2)
    assert softplus(mx.zeros((3, 0, 2), mx.float16)).dtype == mx.float16
    assert softplus(mx.array(0.0)).item() == pytest.approx(np.log(2), rel=1e-6)
    assert mx.grad(lambda x: cube(x))(mx.array(2.0)).item() == 12


def non_contiguous() -> list[mx.array]:
    x = mx.random.normal((6, 10))
    return [x.T, x[:, ::2], x[::-1], mx.broadcast_to(x[:, :1], (6, 10)), x[1:, 3:]]


@pytest.mark.parametrize("contiguous", [True, False])
def test_arrays_that_are_not_contiguous(contiguous, backend):
    op = elementwise.unary(
        name="strided", expr="2 * x + 1", ensure_row_contiguous=contiguous, cache=False
    )
    both = elementwise.binary(
        name="strided_both", expr="a - 2 * b", ensure_row_contiguous=contiguous
    )
    for x in non_contiguous():
        other = mx.random.normal(x.shape)
        assert close(op(x), 2 * x + 1)
        assert close(both(x, other), x - 2 * other)
        assert close(mx.grad(lambda v: op(v).sum())(x), mx.full(x.shape, 2.0))


WHOLE = [mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64]


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_stay_whole(dtype, backend):
    op = elementwise.unary(name="whole", expr="x * x % 7 + (x >> 1)")
    x = mx.array([0, 1, 2, 5, 9, 11], dtype)
    result = op(x)
    assert result.dtype == dtype
    assert result.tolist() == [v * v % 7 + (v >> 1) for v in x.tolist()]


def test_whole_numbers_are_cut_at_the_end_and_floats_are_kept(backend):
    double = elementwise.unary(name="doubled", expr="2 * x")
    assert double(mx.array([100, -100], mx.int8)).tolist() == [-56, 56]
    half = elementwise.unary(name="half_of", expr="x * 0.5f")
    assert half(mx.array([3, -3])).tolist() == [1.5, -1.5]
    assert half(mx.array([3, -3])).dtype == mx.float32
    add = elementwise.binary(name="add_any", expr="a + b")
    assert add(mx.array([True]), mx.array([True])).tolist() == [2]
    logic = elementwise.binary(name="and_not", expr="a && !b")
    result = logic(mx.array([True, True]), mx.array([True, False]))
    assert result.dtype == mx.bool_
    assert result.tolist() == [False, True]
    mixed = add(mx.array([1.5], mx.float16), mx.array([2]))
    assert (mixed.dtype, mixed.item()) == (mx.float16, 3.5)
    assert add(mx.array([1], mx.float16), mx.array([1], mx.bfloat16)).dtype == mx.float32


def test_a_mask_of_whole_numbers_beside_floats(backend):
    op = elementwise.map(name="masked", expr="m > 0 ? x : 0.0f", input_names=("x", "m"))
    x, m = mx.array([1.0, 2.0, 3.0]), mx.array([1, 0, 1])
    assert op(x, m).tolist() == [1, 0, 3]
    assert mx.grad(lambda v: (op(v, m) * v).sum())(x).tolist() == [2, 0, 6]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_derived_gradients_are_those_of_mlx(dtype, backend):
    x = mx.random.normal((37,)).astype(dtype)
    wide = x.astype(mx.float32)
    truth = mx.grad(lambda v: mx.logaddexp(v, 0).sum())(wide)
    assert close(mx.grad(lambda v: softplus(v).sum())(x), truth, dtype)


def test_gradients_of_three_arguments_and_of_gradients(backend):
    x, a, b = (mx.random.normal((5, 9)) for _ in range(3))

    def plain(x, a, b):
        return (a * x + b * mx.tanh(x)).sum()

    got = mx.grad(lambda *v: weighted(*v).sum(), argnums=(0, 1, 2))(x, a, b)
    for one, other in zip(got, mx.grad(plain, argnums=(0, 1, 2))(x, a, b), strict=True):
        assert close(one, other)

    def curvature(function):
        return mx.grad(lambda v: mx.grad(lambda w: function(w, a, b).sum())(v).sum())(x)

    assert close(curvature(weighted), curvature(plain))


def test_gradients_against_differences_in_float64(backend):
    text = "x * exp(-a * a) + log(1 + a * a) / (2 + x * x)"
    op = elementwise.map(name="differences", expr=text, input_names=("x", "a"))
    rng = np.random.default_rng(3)
    x, a = rng.normal(size=(2, 31))

    def plain(x, a):
        return x * np.exp(-a * a) + np.log(1 + a * a) / (2 + x * x)

    arrays = mx.array(x.astype(np.float32)), mx.array(a.astype(np.float32))
    dx, da = mx.grad(lambda *v: op(*v).sum(), argnums=(0, 1))(*arrays)
    step = 1e-6
    slope_x = (plain(x + step, a) - plain(x - step, a)) / (2 * step)
    slope_a = (plain(x, a + step) - plain(x, a - step)) / (2 * step)
    np.testing.assert_allclose(np.array(dx), slope_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(da), slope_a, rtol=1e-5, atol=1e-6)


def test_given_gradients_are_taken_as_they_are(backend):
    straight = make("round(x)", name="straight_through", grad_expr="g", use_output=False)
    x = mx.array([0.4, 1.6])
    assert straight(x).tolist() == [0, 2]
    assert mx.grad(lambda v: straight(v).sum())(x).tolist() == [1, 1]
    by_output = make("exp(x)", name="by_output", grad_expr="g * y")
    assert close(mx.grad(lambda v: by_output(v).sum())(x), mx.exp(x))
    prelude = make(
        "kk_silu(x)",
        name="with_prelude",
        grad_expr="g * (s + x * s * (1 - s))",
        grad_prelude="T s = kk_sigmoid(x);",
    )
    truth = mx.grad(lambda v: (v * mx.sigmoid(v)).sum())(x)
    assert close(mx.grad(lambda v: prelude(v).sum())(x), truth)
    # A gradient of a given gradient is derived from it.
    assert (
        mx.grad(lambda v: mx.grad(lambda w: cube(w).sum())(v).sum())(mx.array([2.0])).item() == 12
    )


def test_functions_of_the_default_header(backend):
    op = elementwise.unary(name="silu_of_header", expr="kk_silu(x)", header=msl.DEFAULT_HEADER)
    x = mx.random.normal((33,)) * 4
    assert close(op(x), x * mx.sigmoid(x))
    truth = mx.grad(lambda v: (v * mx.sigmoid(v)).sum())(x)
    assert close(mx.grad(lambda v: op(v).sum())(x), truth)


def test_functions_of_the_users_header_run_on_devices(device):
    header = "inline float twice(float v) { return 2.0f * v; }"
    op = elementwise.unary(name="of_header", expr="twice(x) + 1", header=header)
    x = mx.array([1.0, 2.5])
    assert op(x).tolist() == [3, 6]
    with pytest.raises(NotDifferentiable, match="'twice' has no formula here"):
        mx.grad(lambda v: op(v).sum())(x)
    given = make("twice(x)", name="of_header_given", grad_expr="twice(g)", header=header)
    assert mx.grad(lambda v: given(v).sum())(x).tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"inside mx\.vmap"):
        mx.vmap(op)(x)


def test_an_opaque_formula_without_a_device_runs_in_the_emulator(monkeypatch):
    monkeypatch.delenv("ZMLX_BACKEND", raising=False)
    header = "inline float thrice(float v) { return 3.0f * v; }"
    op = elementwise.unary(name="emulated", expr="thrice(x)", header=header)
    assert op(mx.array([2.0])).item() == 6
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    with pytest.raises(ValueError, match="no reference"):
        op(mx.array([2.0]))


def test_under_compile_vmap_and_jvp(backend):
    x, a, b = (mx.random.normal((4, 6)) for _ in range(3))
    truth = a * x + b * mx.tanh(x)
    compiled = mx.compile(lambda *v: weighted(*v) * 2)
    assert close(compiled(x, a, b), truth * 2)
    assert close(compiled(x + 1, a, b), (a * (x + 1) + b * mx.tanh(x + 1)) * 2)
    grad = mx.compile(mx.grad(lambda v: softplus(v).sum()))
    assert close(grad(x), mx.sigmoid(x))

    assert close(mx.vmap(weighted)(x, a, b), truth)
    assert close(mx.vmap(weighted, in_axes=1, out_axes=1)(x, a, b), truth)
    mixed = mx.vmap(weighted, in_axes=(0, None, 1))(x, a[0], b.T)
    assert close(mixed, a[0] * x + b * mx.tanh(x))
    per_row = mx.vmap(mx.grad(lambda v: softplus(v).sum()))
    assert close(per_row(x), mx.sigmoid(x))
    assert close(mx.grad(lambda v: mx.vmap(softplus)(v).sum())(x), mx.sigmoid(x))

    (value,), (tangent,) = mx.jvp(weighted, [x, a, b], [mx.ones_like(x), b, x])
    assert close(value, truth)
    _, (right,) = mx.jvp(lambda x, a, b: a * x + b * mx.tanh(x), [x, a, b], [mx.ones_like(x), b, x])
    assert close(tangent, right)
    _, (only,) = mx.jvp(lambda v: weighted(x, v, b), [a], [b])
    assert close(only, x * b)
    (_, pulled) = mx.vjp(softplus, [x], [a])
    assert close(pulled[0], a * mx.sigmoid(x))


def test_in_threads(backend):
    op = elementwise.unary(name="threaded", expr="x * x - 1", cache=False)
    failures = []

    def work(seed: int) -> None:
        try:
            x = mx.arange(seed, seed + 50, dtype=mx.float32)
            gradient = mx.grad(lambda v: op(v).sum())
            for dtype in FLOATS:
                assert close(
                    op(x.astype(dtype)), (x * x - 1).astype(dtype).astype(mx.float32), dtype
                )
            assert close(gradient(x), 2 * x)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_nan_and_infinity_go_through_as_in_mlx(backend):
    op = elementwise.binary(name="largest", expr="max(a, b)")
    a, b = mx.array([np.nan, 1.0, -np.inf, 2.0]), mx.array([1.0, np.nan, np.inf, 3.0])
    assert mx.array_equal(op(a, b), mx.maximum(a, b), equal_nan=True)


def test_what_is_called_wrongly_says_so():
    add = elementwise.binary(name="add", expr="a + b")
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(1,\); use mx.broadcast_to"):
        add(mx.zeros((3,)), mx.zeros((1,)))
    with pytest.raises(TypeError, match=r"add takes 2 arrays \(a, b\); got 1"):
        add(mx.zeros((3,)))
    with pytest.raises(TypeError, match="takes mx"):
        add(mx.zeros((3,)), 1.0)
    with pytest.raises(TypeError, match=r"'a' is .*complex64, which Metal does not have"):
        add(mx.zeros((3,), mx.complex64), mx.zeros((3,), mx.complex64))


def test_what_is_made_wrongly_says_so_at_once():
    with pytest.raises(FormulaError, match="unknown name 'y'"):
        elementwise.unary(name="wrong", expr="x + y")
    with pytest.raises(ValueError, match="'my-op' is not a C identifier"):
        make("x", name="my-op")
    with pytest.raises(ValueError, match="'elem' is a name that its source uses"):
        elementwise.map(name="wrong", expr="elem", input_names=["elem"])
    with pytest.raises(ValueError, match="holds a name twice"):
        elementwise.map(name="wrong", expr="x", input_names=["x", "x"])
    with pytest.raises(ValueError, match="name at least one"):
        elementwise.map(name="wrong", expr="1.0f", input_names=[])
    with pytest.raises(TypeError, match="is a string"):
        elementwise.map(name="wrong", expr="x", input_names="x")
    with pytest.raises(FormulaError, match="unknown name 'y'"):
        make("exp(x)", grad_expr="g * y", use_output=False)
    with pytest.raises(ValueError, match="grad_prelude belongs to a grad_expr"):
        make("exp(x)", grad_prelude="float s = x;")
    with pytest.raises(TypeError, match="a formula is a string; got a int"):
        make(3)
    with pytest.warns(DeprecationWarning, match="compute_dtype is ignored"):
        make("x", compute_dtype=mx.float32)


def test_the_module_is_callable_and_equal_calls_share_an_operation():
    op = zmlx.elementwise("x + 1")
    assert op(mx.array([1.0])).item() == 2
    assert isinstance(op, zmlx.elementwise.Elementwise)
    first = elementwise.unary(name="shared", expr="x + 1")
    assert elementwise.unary(name="shared", expr="x + 1") is first
    assert elementwise.unary(name="shared", expr="x + 1", cache=False) is not first
    assert repr(first) == "shared(x) = x + 1"


def test_sources_are_explicit_about_conversions():
    source = softplus.source(mx.bfloat16)
    assert "x_held[turn] = static_cast<float>(x_in[elem]);" in source
    assert "static_cast<O0>(metal::precise::log(1.0f + metal::precise::exp(x)))" in source
    assert "g * zmlx_sigmoid(x)" in softplus.gradient_source()
    with pytest.raises(TypeError, match="takes 1 dtypes; got 2"):
        softplus.source(mx.float32, mx.float32)


def test_a_call_builds_nothing_anew(monkeypatch):
    """What a call costs beyond its MLX operations: no formula, source or function is made."""
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    x = mx.random.normal((8,))
    cube(x)

    def forbidden(*args, **kwargs):
        raise AssertionError("made anew")

    monkeypatch.setattr(mx, "custom_function", forbidden)
    monkeypatch.setattr("zmlx.authoring.pointwise.Pointwise._planned", forbidden)
    cube(x)
    plain = min(timeit.repeat(lambda: x * x * x, number=2000, repeat=5))
    ours = min(timeit.repeat(lambda: cube(x), number=2000, repeat=5))
    # About 5 microseconds against 1; the bound is wide, as other work shares the machine.
    assert ours < 40 * plain


def test_binary_with_given_gradients(backend):
    mul = autograd.binary_from_expr(
        name="k_mul", fwd_expr="a * b", vjp_lhs_expr="g * b", vjp_rhs_expr="g * a"
    )
    a, b = mx.random.normal((2, 11)), mx.random.normal((2, 11))
    assert close(mul(a, b), a * b)
    da, db = mx.grad(lambda *v: mul(*v).sum(), argnums=(0, 1))(a, b)
    assert close(da, b)
    assert close(db, a)
    half = mul(a.astype(mx.float16), b)
    assert half.dtype == mx.float32
    only = mx.grad(lambda v: mul(v, b).sum())(a.astype(mx.bfloat16))
    assert close(only, b, mx.bfloat16)


def test_unary_with_a_gradient_of_the_output(backend):
    exp = autograd.unary_from_expr(name="k_exp_grad", fwd_expr="metal::exp(x)", vjp_expr="g * y")
    x = mx.random.normal((13,))
    assert close(mx.grad(lambda v: exp(v).sum())(x), mx.exp(x))
    only_x = autograd.unary_from_expr(
        name="k_exp_x", fwd_expr="exp(x)", vjp_expr="g * exp(x)", use_output=False
    )
    assert close(mx.grad(lambda v: only_x(v).sum())(x), mx.exp(x))
    with pytest.raises(FormulaError, match="unknown name 'y'"):
        autograd.unary_from_expr(name="k", fwd_expr="x", vjp_expr="g * y", use_output=False)


FORWARD = """
uint elem = thread_position_in_grid.x;
T u = a[elem], v = b[elem];
total[elem] = O(u + v);
product[elem] = O(u * v);
"""
BACKWARD = """
uint elem = thread_position_in_grid.x;
T u = a[elem], v = b[elem], p = cotan_total[elem], q = cotan_product[elem];
da[elem] = O(p + q * v);
db[elem] = O(p + q * u);
"""


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_two_outputs_from_sources(dtype, device):
    op = autograd.nary_from_expr(
        name="sum_and_product",
        fwd_source=FORWARD,
        bwd_source=BACKWARD,
        input_names=["a", "b"],
        output_names=["total", "product"],
    )
    a, b = (mx.random.normal((3, 7)).astype(dtype) for _ in range(2))
    wide = a.astype(mx.float32), b.astype(mx.float32)
    total, product = op(a, b)
    assert close(total, wide[0] + wide[1], dtype)
    assert close(product, wide[0] * wide[1], dtype)

    def loss(a, b):
        total, product = op(a, b)
        return (2 * total + 3 * product).sum()

    da, db = mx.grad(loss, argnums=(0, 1))(a, b)
    assert close(da, 2 + 3 * wide[1], dtype)
    assert close(db, 2 + 3 * wide[0], dtype)
    assert [v.shape for v in op(a[:0], b[:0])] == [(0, 7), (0, 7)]
    assert op(mx.array(2.0), mx.array(3.0))[1].item() == 6
    with pytest.raises(TypeError, match=r"takes 2 arrays \(a, b\); got 1"):
        op(a)
    with pytest.raises(ValueError, match=r"inside mx\.vmap"):
        mx.vmap(op)(a, b)


def test_sources_are_checked_when_they_are_given():
    def make_with(forward=FORWARD, backward=BACKWARD, inputs=("a", "b")):
        return autograd.nary_from_expr(
            name="checked",
            fwd_source=forward,
            bwd_source=backward,
            input_names=list(inputs),
            output_names=["total", "product"],
        )

    make_with()
    with pytest.raises(ValueError, match="fwd_source never writes 'product'"):
        make_with(forward=FORWARD.replace("product", "other"))
    with pytest.raises(ValueError, match="bwd_source never writes 'db'"):
        make_with(backward=BACKWARD.replace("db[", "out["))
    with pytest.raises(FormulaError, match=r"fwd_source: '\(' is never closed"):
        make_with(forward=FORWARD.replace("O(u + v);", "O(u + v;"))
    with pytest.raises(ValueError, match="input_names is empty"):
        make_with(inputs=())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1 << 12, (1 << 12) + 6, (1 << 12) + 1])
def test_arrays_that_are_large_have_several_elements_a_thread(size, dtype, device, monkeypatch):
    monkeypatch.setattr("zmlx.authoring.pointwise._LARGE", 1 << 12)
    x, a, b = (mx.random.normal((size,)).astype(dtype) for _ in range(3))
    wide = [array.astype(mx.float32) for array in (x, a, b)]
    assert close(weighted(x, a, b), wide[1] * wide[0] + wide[2] * mx.tanh(wide[0]), dtype)


@pytest.mark.parametrize("shape", [(1000,), (7, 144), (1009,)])
def test_arrays_too_large_for_a_grid_of_one_row(shape, device, monkeypatch):
    monkeypatch.setattr("zmlx.authoring.pointwise._WIDTH", 256)
    x = mx.random.normal(shape)
    strided = elementwise.unary(name="strided", expr="x + 1", ensure_row_contiguous=False)
    assert mx.array_equal(strided(x.T), x.T + 1)
    assert close(cube(x), x * x * x)
