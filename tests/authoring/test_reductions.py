"""Reductions and row operations on every backend, beside MLX's own."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import pytest

from zmlx import rowwise
from zmlx.api import map_reduce, reduce
from zmlx.authoring.folds import fold
from zmlx.authoring.formula.errors import FormulaError, NotDifferentiable
from zmlx.authoring.formula.formula import formula

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
ROUNDING = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
#: one, odd, a simdgroup and around it, more than a threadgroup and no multiple of it
LENGTHS = [1, 2, 31, 32, 33, 255, 257, 1000, 2049]

row_max = reduce(init="-INFINITY", update="max(acc, v)", name="row_max")
mean = reduce(init="0.0f", update="acc + v", finalize="acc / d", name="row_mean")
softmax = map_reduce(
    pass1={"init": "-INFINITY", "update": "max(acc1, x)", "reduce": "max(a, b)"},
    pass2={"init": "0.0f", "update": "acc2 + exp(x - s1)", "reduce": "a + b"},
    write="exp(x - s1) / s2",
    name="my_softmax",
    threadgroup="auto",
)


def close(result: mx.array, truth: mx.array, dtype: mx.Dtype = mx.float32) -> bool:
    assert result.shape == truth.shape
    assert result.dtype == dtype
    tolerance = ROUNDING[dtype]
    return bool(mx.allclose(result.astype(mx.float32), truth, rtol=tolerance, atol=tolerance))


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_any_length(length, backend):
    x = mx.random.normal((3, length))
    assert mx.array_equal(row_max(x), x.max(-1))
    assert close(mean(x), x.mean(-1))
    assert close(softmax(x), mx.softmax(x, axis=-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_is_accumulated_in_float32(dtype, backend):
    x = (mx.random.normal((2, 3, 700)) + 4).astype(dtype)
    wide = x.astype(mx.float32)
    assert close(mean(x), wide.mean(-1), dtype)
    assert close(softmax(x), mx.softmax(wide, axis=-1), dtype)
    total = reduce(init="0.0f", update="acc + 1.0f", name="how_many")
    assert total(mx.ones((1, 3000), dtype)).astype(mx.float32).item() == pytest.approx(
        3000, rel=8e-3
    )


def test_shapes_with_nothing_in_them(backend):
    assert row_max(mx.zeros((0, 5))).shape == (0,)
    assert row_max(mx.zeros((2, 0))).tolist() == [-np.inf, -np.inf]
    assert mean(mx.zeros((3, 0, 4))).shape == (3, 0)
    assert softmax(mx.zeros((0, 5))).shape == (0, 5)
    assert softmax(mx.zeros((4, 0), mx.float16)).shape == (4, 0)
    assert row_max(mx.array([1.0, 5.0, 2.0])).shape == ()
    assert row_max(mx.array([1.0, 5.0, 2.0])).item() == 5
    with pytest.raises(ValueError, match="takes rows, and a 0-d array has none"):
        row_max(mx.array(1.0))


def test_rows_that_are_not_contiguous(backend):
    x = mx.random.normal((40, 6))
    assert mx.array_equal(row_max(x.T), x.T.max(-1))
    assert close(softmax(x[:, ::2]), mx.softmax(x[:, ::2], axis=-1))
    assert close(mean(mx.broadcast_to(x[:1], (3, 6))), mx.broadcast_to(x[:1].mean(-1), (3,)))


FOLDS = [
    ("0.0f", "acc + v * v", lambda x: (x * x).sum(-1)),
    ("0.0f", "v * v + acc - 2.0f * v", lambda x: (x * x - 2 * x).sum(-1)),
    ("0.0f", "fma(v, v, acc)", lambda x: (x * x).sum(-1)),
    ("10.0f", "acc - v", lambda x: 10 - x.sum(-1)),
    ("2.0f", "acc * v", lambda x: 2 * x.prod(-1)),
    ("INFINITY", "min(abs(v), acc)", lambda x: mx.abs(x).min(-1)),
    ("0.5f", "max(acc, v)", lambda x: mx.maximum(x.max(-1), 0.5)),
    ("-INFINITY", "v > acc ? v : acc", lambda x: x.max(-1)),
    ("INFINITY", "acc <= v ? acc : v", lambda x: x.min(-1)),
    ("-INFINITY", "max(v, max(acc, -v))", lambda x: mx.abs(x).max(-1)),
    ("false", "acc || v > 1", lambda x: (x > 1).any(-1).astype(mx.float32)),
    ("true", "v < 9 && acc", lambda x: (x < 9).all(-1).astype(mx.float32)),
    ("0", "acc + (v > 0)", lambda x: (x > 0).sum(-1).astype(mx.float32)),
]


@pytest.mark.parametrize(("init", "update", "expected"), FOLDS)
def test_folds_are_shared_between_threads(init, update, expected, backend):
    op = reduce(init=init, update=update, name="folded")
    assert "simd_shuffle_xor" in op.source()
    x = mx.random.uniform(0.8, 1.2, (4, 67)) * mx.where(
        mx.random.uniform(shape=(4, 67)) < 0.3, -1, 1
    )
    assert mx.allclose(op(x), expected(x), rtol=2e-5, atol=2e-5)
    assert mx.allclose(op(x[:, :1]), expected(x[:, :1]), rtol=2e-5, atol=2e-5)


SEQUENCES = [
    ("0.0f", "0.5f * acc + v", lambda acc, v: 0.5 * acc + v),
    ("1.0f", "acc / (1 + v * v)", lambda acc, v: acc / (1 + v * v)),
    ("0.0f", "v - acc", lambda acc, v: v - acc),
    ("0.0f", "max(acc + v, 0.0f)", lambda acc, v: max(acc + v, 0.0)),
    ("1.0f", "acc + v * acc", lambda acc, v: acc + v * acc),
    ("0.0f", "v > acc ? v : acc + 1", lambda acc, v: v if v > acc else acc + 1),
]


@pytest.mark.parametrize(("init", "update", "step"), SEQUENCES)
def test_other_updates_go_from_left_to_right(init, update, step, backend):
    op = reduce(init=init, update=update, name="sequence")
    assert "simd_shuffle_xor" not in op.source()
    x = mx.random.normal((300, 13))
    truth = [functools.reduce(step, row, float(init[:3])) for row in np.array(x, np.float64)]
    np.testing.assert_allclose(np.array(op(x)), truth, rtol=1e-4, atol=1e-4)


def test_whole_numbers(backend):
    total = reduce(init="0", update="acc + v", name="total_of_whole")
    assert total(mx.array([[100, 100, 100], [1, -2, 3]], mx.int8)).tolist() == [300, 2]
    assert total(mx.array([[100, 100, 100]], mx.int8)).dtype == mx.int32
    long = total(mx.array([[1 << 40, 5]], mx.int64))
    assert (long.dtype, long.item()) == (mx.int64, (1 << 40) + 5)
    most = reduce(init="-2147483647 - 1", update="max(acc, v)", name="most_of_whole")
    assert most(mx.array([[-7, -3], [16777217, 1]])).tolist() == [-3, 16777217]
    bits = reduce(init="0", update="acc ^ v", name="bits_of_whole")
    x = mx.array(np.arange(1, 101, dtype=np.int32).reshape(2, 50))
    assert bits(x).tolist() == [int(np.bitwise_xor.reduce(row)) for row in np.array(x)]
    some = reduce(init="false", update="acc || v > 2", name="some_of_whole")
    assert some(mx.array([[1, 2], [3, 0]])).tolist() == [False, True]
    assert some(mx.array([[1, 2], [3, 0]])).dtype == mx.bool_
    assert mean(mx.array([[1, 2]])).tolist() == [1.5]
    assert mean(mx.array([[1, 2]])).dtype == mx.float32


def test_nan_is_kept_as_in_mlx(backend):
    x = mx.array([[1.0, np.nan, 2.0], [3.0, 1.0, 2.0]])
    assert mx.array_equal(row_max(x), x.max(-1), equal_nan=True)


def rms_norm(length: int, **kwargs):
    return rowwise.map_reduce(
        name="rms_norm",
        d=length,
        pass1_init="0.0f",
        pass1_update="acc1 + x * x",
        pass1_reduce_op="a + b",
        pass2_init="0.0f",
        pass2_update="acc2",
        pass2_reduce_op="a",
        write_expr="x * rsqrt(s1 / d + 1e-6f) * w",
        input_names=("inp", "w"),
        **kwargs,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_norm_with_weights(dtype, backend):
    op = rms_norm(130)
    x, w = mx.random.normal((2, 3, 130)).astype(dtype), mx.random.normal((130,)).astype(dtype)
    wide, weight = x.astype(mx.float32), w.astype(mx.float32)
    truth = wide * mx.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6) * weight
    assert close(op(x, w), truth, dtype)

    def plain(x, w):
        return (x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w).sum()

    if dtype == mx.float32:
        got = mx.grad(lambda *v: op(*v).sum(), argnums=(0, 1))(x, w)
        for one, other in zip(got, mx.grad(plain, argnums=(0, 1))(x, w), strict=True):
            assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_layer_norm_with_two_outputs_and_values_of_every_form(backend):
    op = rowwise.map_reduce(
        name="layer_norm",
        d=77,
        pass1_init="0.0f",
        pass1_update="acc1 + x",
        pass1_reduce_op="a + b",
        pass2_init="0.0f",
        pass2_update="acc2 + (x - s1 / d) * (inp - s1 / d)",
        pass2_reduce_op="a + b",
        write_expr=["(x - s1 / d) * rsqrt(s2 / d + eps) * w + shift", "x - s1 / d"],
        input_names=("inp", "w", "shift", "eps"),
        output_names=("out", "centred"),
    )
    x, w, shift = mx.random.normal((5, 77)), mx.random.normal((77,)), mx.random.normal((5, 1))
    out, centred = op(x, w, shift, mx.array(1e-5))
    middle = x - x.mean(-1, keepdims=True)
    assert mx.allclose(centred, middle, atol=1e-5)
    truth = middle * mx.rsqrt((middle * middle).mean(-1, keepdims=True) + 1e-5) * w + shift
    assert mx.allclose(out, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threadgroup", [32, 96, 1024])
def test_every_threadgroup_gives_the_same(threadgroup, backend):
    op = rms_norm(777, threadgroup=threadgroup)
    x, w = mx.random.normal((4, 777)), mx.ones((777,))
    assert close(op(x, w), mx.fast.rms_norm(x, w, 1e-6))


def test_a_reduction_that_is_none_of_the_known_ones(backend):
    """1 + s is the product of all 1 + x: associative, with 0 to begin with."""
    op = map_reduce(
        pass1={"init": "0.0f", "update": "acc1 + x + acc1 * x", "reduce": "a + b + a * b"},
        pass2={"init": "1.0f", "update": "acc2", "reduce": "a"},
        write="s1",
        name="compound",
    )
    x = mx.random.uniform(-0.1, 0.1, (2, 70))
    truth = mx.broadcast_to((1 + x).prod(-1, keepdims=True) - 1, x.shape)
    assert mx.allclose(op(x), truth, rtol=1e-4, atol=1e-5)


def test_an_initial_value_counts_once(backend):
    op = map_reduce(
        pass1={"init": "5.0f", "update": "acc1 + x", "reduce": "a + b"},
        pass2={"init": "s1 * 2", "update": "acc2 + 1", "reduce": "a + b"},
        write="s1 + 1000 * s2",
        name="beginnings",
    )
    x = mx.ones((2, 100))
    assert op(x)[:, 0].tolist() == [105 + 1000 * (210 + 100)] * 2


def test_gradients_tangents_batches_and_compilation(backend):
    x, g = mx.random.normal((3, 50)), mx.random.normal((3, 50))

    def plain(v):
        return (mx.softmax(v, axis=-1) * g).sum()

    assert mx.allclose(mx.grad(lambda v: (softmax(v) * g).sum())(x), mx.grad(plain)(x), atol=1e-6)
    slope = mx.grad(lambda v: row_max(v).sum())(x)
    assert mx.array_equal(slope, mx.grad(lambda v: v.max(-1).sum())(x))
    (_,), (tangent,) = mx.jvp(softmax, [x], [g])
    _, (truth,) = mx.jvp(lambda v: mx.softmax(v, axis=-1), [x], [g])
    assert mx.allclose(tangent, truth, atol=1e-6)
    assert close(mx.vmap(softmax)(x), mx.softmax(x, axis=-1))
    assert close(mx.vmap(mean, in_axes=1)(x), x.mean(0))
    norm, w = rms_norm(50), mx.random.normal((50,))
    batched = mx.vmap(norm, in_axes=(0, None))(x[:, None], w)
    assert close(batched[:, 0], mx.fast.rms_norm(x, w, 1e-6))
    compiled = mx.compile(lambda v: softmax(v) + mean(v)[:, None])
    for _ in range(2):
        assert close(compiled(x), mx.softmax(x, axis=-1) + x.mean(-1, keepdims=True))
    sequence = reduce(init="0.0f", update="0.5f * acc + v", name="decayed")
    powers = mx.array([0.5**k for k in range(49, -1, -1)])
    assert close(mx.grad(lambda v: sequence(v).sum())(x), mx.broadcast_to(powers, (3, 50)))


def test_functions_of_the_users_header(device):
    header = "inline float doubled(float v) { return 2.0f * v; }"
    op = map_reduce(
        pass1={"init": "0.0f", "update": "acc1 + doubled(x)", "reduce": "a + b"},
        pass2={"init": "0.0f", "update": "acc2 + 1", "reduce": "a + b"},
        write="s1 / s2",
        name="with_header",
        header=header,
    )
    x = mx.random.normal((2, 300))
    assert mx.allclose(op(x)[:, 0], 2 * x.mean(-1), atol=1e-5)
    with pytest.raises(NotDifferentiable, match="'doubled' has no formula"):
        mx.grad(lambda v: op(v).sum())(x)
    total = reduce(init="0.0f", update="acc + doubled(v)", name="with_header_too", header=header)
    assert mx.allclose(total(x), 2 * x.sum(-1), atol=1e-4)


@pytest.mark.parametrize(
    ("update", "operator", "term"),
    [
        ("acc + v", "+", "v"),
        ("v + acc", "+", "v"),
        ("acc - v", "+", "-v"),
        ("max(v, acc)", "max", "v"),
        ("acc < v ? v : acc", "max", "v"),
        ("acc & int(v)", "&", "int(v)"),
        ("v - acc", None, ""),
        ("acc + acc", None, ""),
        ("acc * 0.5f + v", None, ""),
        ("acc / v", None, ""),
        ("max(acc, v) + v", None, ""),
        ("acc > 0 ? v : acc", None, ""),
        ("v", None, ""),
    ],
)
def test_which_updates_are_folds(update, operator, term):
    found = fold(formula(update, ("acc", "v")).tree, "acc")
    if operator is None:
        assert found is None
    else:
        assert (found.operator, found.term) == (operator, formula(term, ("v",)).tree)


def test_mistakes_are_found_when_the_operation_is_made():
    first = {"init": "0.0f", "update": "acc1 + x", "reduce": "a + b"}
    second = {"init": "0.0f", "update": "acc2 + x", "reduce": "a + b"}
    with pytest.raises(FormulaError, match="unknown name 'x'"):
        reduce(init="0.0f", update="acc + x")
    with pytest.raises(FormulaError, match="unknown name 'v'"):
        reduce(init="v", update="acc + v")
    with pytest.raises(FormulaError, match="unknown name 's2'"):
        map_reduce(pass1=first | {"update": "acc1 + s2"}, pass2=second, write="x")
    with pytest.raises(ValueError, match=r"pass1 takes .*; got \['init'\]"):
        map_reduce(pass1={"init": "0.0f"}, pass2=second, write="x")
    with pytest.raises(ValueError, match=r"folds with 'max' and the reduction 'a \+ b'"):
        map_reduce(pass1=first | {"update": "max(acc1, x)"}, pass2=second, write="x")
    for wrong in (0, 100, 2048, "fast", True):
        with pytest.raises(ValueError, match="a multiple of 32 from 32 to 1024"):
            map_reduce(pass1=first, pass2=second, write="x", threadgroup=wrong)
    with pytest.raises(ValueError, match="d=0"):
        rms_norm(0)
    with pytest.raises(ValueError, match="2 formulas for 1 outputs"):
        _ = rowwise.map_reduce(
            name="two", d=4, pass1_init="0.0f", pass1_update="acc1", pass1_reduce_op="a",
            pass2_init="0.0f", pass2_update="acc2", pass2_reduce_op="a", write_expr=["x", "x"],
        )  # fmt: skip


def test_arrays_that_do_not_fit_are_refused():
    op = rms_norm(8)
    with pytest.raises(ValueError, match=r"rows of 8 elements; got shape \(2, 9\)"):
        op(mx.zeros((2, 9)), mx.zeros((9,)))
    with pytest.raises(ValueError, match=r"'w' has shape \(7,\) beside 'inp' of shape \(2, 8\)"):
        op(mx.zeros((2, 8)), mx.zeros((7,)))
    with pytest.raises(TypeError, match=r"takes 2 arrays \(inp, w\); got 1"):
        op(mx.zeros((2, 8)))
    with pytest.raises(TypeError, match=r"'inp' is .*complex64"):
        op(mx.zeros((2, 8), mx.complex64), mx.zeros((8,)))
