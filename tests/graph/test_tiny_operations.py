"""Every operation of tiny programs against MLX on the CPU, bit by bit but for sums.

Functions of several outputs hold many operations at once: each program is compiled once.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny_cases import agree, holds, program_of

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
WHOLE = (mx.int32, mx.uint32, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int64, mx.uint64)
#: largest error of a function of one number, relative to the largest result
ROUNDING = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def normal(*shape, dtype=mx.float32, seed=0, scale=1.0):
    array = (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)
    mx.eval(array)
    return array


def whole(*shape, dtype=mx.int32, seed=0, low=None, high=50):
    low = (
        (0 if dtype in (mx.uint8, mx.uint16, mx.uint32, mx.uint64) else -50) if low is None else low
    )
    array = mx.random.randint(low, high, shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(array)
    return array


def special(dtype):
    return mx.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -2.5, 0.5], dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_arithmetic_is_exact(dtype):
    def function(x, y):
        return (
            x + y,
            x - y,
            x * y,
            x / y,
            x * y + x,
            mx.maximum(x, y),
            mx.minimum(x, y),
            -x,
            mx.abs(x),
            mx.square(x),
            mx.floor(x),
            mx.ceil(x),
            mx.round(x),
            mx.sign(x),
            mx.sqrt(mx.abs(x)),
            mx.where(x > y, x, y),
            mx.where(mx.isnan(x), 0, x),
            x // y,
            mx.remainder(x, y),
        )

    x = mx.concatenate([normal(61, dtype=dtype, scale=4), special(dtype)])
    y = mx.concatenate([normal(61, dtype=dtype, seed=1), special(dtype)[::-1] + 1])
    holds(function, x, y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_functions_are_within_rounding(dtype):
    def function(x):
        small = x / 8
        return (
            mx.exp(x),
            mx.log(mx.abs(x)),
            mx.log2(mx.abs(x)),
            mx.log10(mx.abs(x)),
            mx.log1p(mx.abs(x)),
            mx.expm1(x),
            mx.sin(x),
            mx.cos(x),
            mx.tanh(x),
            mx.sinh(small),
            mx.cosh(small),
            mx.arcsin(small),
            mx.arccos(small),
            mx.arctan(x),
            mx.arcsinh(x),
            mx.arctanh(small),
            mx.erf(x),
            mx.rsqrt(mx.abs(x)),
            mx.sigmoid(x),
            mx.power(mx.abs(x), small),
            mx.logaddexp(x, small),
            mx.arctan2(x, small),
        )

    holds(function, normal(57, dtype=dtype, scale=2), tolerance=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_are_exact(dtype):
    def function(x, y):
        return (
            x + y,
            x - y,
            x * y,
            x // y,
            x % y,
            mx.maximum(x, y),
            mx.minimum(x, y),
            mx.abs(x),
            mx.sign(x),
            x & y,
            x | y,
            x ^ y,
            x << (y & mx.array(3, dtype)),
            x >> (y & mx.array(3, dtype)),
            mx.power(x, y & mx.array(3, dtype)),
            mx.where(x == y, x, y),
            mx.floor(x),
            x.astype(mx.bfloat16),
            x.astype(mx.float32),
            x.astype(mx.int16),
        )

    holds(function, whole(37, dtype=dtype), whole(37, dtype=dtype, seed=1, low=1, high=9))


def test_truth_values_and_comparisons():
    def function(x, y):
        a, b = x > y, x <= 0
        return (
            a,
            b,
            a & b,
            a | b,
            mx.logical_not(a),
            mx.logical_and(a, b),
            mx.logical_or(a, b),
            x == y,
            x != y,
            x < y,
            x >= y,
            a.astype(mx.float32) * 2,
            x.astype(mx.bool_),
            mx.where(a, b, a),
            mx.array_equal(x, y, equal_nan=True),
        )

    x = mx.concatenate([special(mx.float32), normal(9)])
    holds(function, x, mx.concatenate([special(mx.float32), normal(9, seed=1)]))


@pytest.mark.parametrize(
    "given", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.bool_], ids=str
)
def test_casts(given):
    x = (mx.abs(normal(40, scale=40)) if given == mx.uint8 else normal(40, scale=40)).astype(given)
    wanted = (mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.int64, mx.int16, mx.bool_)
    holds(lambda x: tuple(x.astype(d) + mx.array(0, d) for d in wanted), x)


def test_views_change_nothing():
    def function(x):
        flipped = mx.swapaxes(x, 0, 2)
        parts = mx.split(x, [2, 5], axis=-1)
        return (
            flipped,
            flipped.reshape(7, -1)[:, 1:9:3],
            x[:, ::-1, 1:6:2],
            mx.flatten(flipped, 0, 1),
            mx.unflatten(mx.flatten(x), 0, (3, 5, -1)),
            mx.expand_dims(x, (0, 2)).squeeze(0),
            mx.broadcast_to(x[:, :, :1], (3, 5, 4)),
            *parts,
            x.view(mx.int32),
            mx.transpose(flipped, (1, 0, 2)).reshape(105)[17:90].reshape(73, 1),
        )

    holds(function, normal(3, 5, 7))


def test_pieces_are_put_together():
    def function(x, y):
        state = mx.zeros((3, 9, 4), dtype=x.dtype)
        state[:, 2:7] = x
        return (
            mx.concatenate([x, y], axis=1),
            mx.concatenate([x[..., :1], y[:, :5, :2], x], axis=-1),
            mx.concatenate([x.reshape(-1), y.reshape(-1)])[3:],
            mx.pad(x, [(1, 0), (0, 2), (3, 1)], constant_values=2),
            state,
            mx.stack([x, x + 1], axis=1),
        )

    holds(function, normal(3, 5, 4), normal(3, 6, 4, seed=1))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32], ids=str)
def test_least_and_largest_are_exact(dtype):
    def function(x):
        return (
            x.max(axis=-1),
            x.min(axis=0, keepdims=True),
            x.max(),
            x.min(axis=(0, 2)),
            mx.argmax(x, axis=-1, keepdims=True),
            mx.argmin(x, axis=0),
            mx.argmax(x, axis=1),
        )

    x = (20 * normal(3, 5, 70)).astype(dtype)
    holds(function, x)
    if dtype != mx.int32:
        holds(lambda x: (x.max(axis=-1), x.min(axis=-1)), special(dtype).reshape(2, 4))


@pytest.mark.parametrize("shape", [(3, 40), (1, 1000), (2, 5, 3), (1, 8), (4, 257)], ids=str)
def test_sums(shape):
    def function(x):
        return (
            x.sum(axis=-1),
            x.sum(axis=0),
            x.sum(keepdims=True),
            mx.prod(x, axis=-1),
            mx.softmax(x, axis=-1, precise=True),
            mx.softmax(x, axis=0),
            mx.logsumexp(x, axis=-1),
            mx.mean(x, axis=-1, keepdims=True),
        )

    for dtype in FLOATS:
        x = (1 + normal(*shape) / 16).astype(dtype)
        wide = [y.astype(dtype) for y in function(x.astype(mx.float32))]
        holds(function, x, expected=lambda x, w=wide: w, tolerance=ROUNDING[dtype])


def test_sums_of_whole_numbers_and_truth_values():
    def function(x, small):
        return (
            x.sum(axis=-1),
            x.sum(axis=0),
            small.sum(axis=1),
            (x > 0).sum(axis=1),
            mx.all(x > -45, axis=-1),
            mx.any(x > 45, axis=0),
            mx.all(x > -100),
            mx.any(x > 100),
            mx.prod(small[:, :5], axis=-1),
            x.astype(mx.int64).sum(axis=-1),
        )

    holds(function, whole(3, 45), whole(3, 45, dtype=mx.int8, high=4, low=-4))


def test_a_long_row_is_reduced_by_all_threads():
    x, flags = normal(1, 5000, seed=2), normal(1500) > 3.5

    def function(x, flags):
        return x.max(), x.min(), mx.any(flags), mx.all(flags), (x > 0).sum(), mx.argmax(x)

    program = holds(function, x, flags)
    assert program.threads == 512
    holds(lambda x: x - x.mean(), normal(777), tolerance=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32, mx.uint8], ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (3, 7), (1, 1024), (5, 33)], ids=str)
def test_sorts_are_stable_and_nan_comes_last(dtype, shape):
    few = (3 * normal(*shape)).astype(mx.int32)  # many are equal
    x = mx.abs(few).astype(dtype)
    if dtype in FLOATS:
        x = mx.where(few == 2, mx.array(np.nan, dtype), few.astype(dtype))
        x = mx.where(few == 0, mx.array(-0.0, dtype), x)
        mx.eval(x)

    def function(x):
        return (
            mx.argsort(x, axis=-1),
            mx.argpartition(x, kth=-2, axis=-1)[..., -2:],
            mx.argsort(x, axis=0),
            mx.sort(x, axis=-1),
            mx.partition(x, kth=0, axis=0),
            mx.topk(x, 2, axis=-1),
        )

    plain = np.array(x.astype(mx.float32))
    order, down = (mx.array(np.argsort(plain, axis=a, kind="stable")) for a in (-1, 0))
    ascending = mx.take_along_axis(x, order, axis=-1)
    right = (
        order.astype(mx.uint32),
        order[..., -2:].astype(mx.uint32),
        down.astype(mx.uint32),
        ascending,
        mx.take_along_axis(x, down, axis=0),
        ascending[..., -2:],
    )
    holds(function, x, expected=lambda x: right)


def test_lookups():
    def function(x, where, rows, table):
        return (
            mx.take_along_axis(x, where, axis=-1),
            mx.take_along_axis(x, mx.argsort(x, axis=0)[:2], axis=0),
            x[rows],
            mx.take(x, rows, axis=1),
            table[rows],
            table[mx.argmax(x, axis=-1)],
            mx.put_along_axis(x, where[:, :1], mx.array(-1.0), axis=-1),
            mx.arange(3, 12, 2) + rows[:1],
            mx.arange(5).astype(mx.float32) * 0.5,
        )

    x, where = normal(4, 6), mx.array([[0, -1, 2], [5, 3, 1], [-6, 2, 2], [4, 0, 1]])
    rows = mx.array([3, 0, -2], dtype=mx.int32)
    table = normal(20_000, 6, seed=3)
    holds(function, x, where, rows, table)


def test_updates_along_an_axis():
    x, where = normal(3, 5), mx.array([[1, -2], [0, 4], [3, 1]])
    holds(lambda x, w: mx.put_along_axis(x, w, x[:, :2] * 2, axis=1), x, where)


@pytest.mark.parametrize("dtype", [mx.float32, mx.int32], ids=str)
def test_scans(dtype):
    def function(x):
        return (
            mx.cumsum(x, axis=-1),
            mx.cumsum(x, axis=0, reverse=True, inclusive=False),
            mx.cummax(x, axis=-1),
            mx.cummin(x, axis=-1, reverse=True),
            mx.cumprod(x[:, :5], axis=-1, inclusive=False),
        )

    holds(
        function, (4 * normal(3, 77)).astype(dtype), tolerance=1e-5 if dtype == mx.float32 else None
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("padding", [0, 2])
def test_short_convolutions(dtype, padding):
    weight = normal(40, 3, 1, dtype=dtype, seed=1)
    x = normal(2, 4, 40, dtype=dtype)

    def function(x):
        return mx.conv1d(x, weight, groups=40, padding=padding)

    right = mx.conv1d(
        x.astype(mx.float32), weight.astype(mx.float32), groups=40, padding=padding
    ).astype(dtype)
    holds(function, x, expected=lambda x: right, tolerance=ROUNDING[dtype])


def test_float32_products_are_not_fused_with_sums():
    x, y = normal(300), normal(300, seed=1)
    program = holds(lambda x, y: (x * y - x, mx.square(x) + y), x, y)
    assert "tiny_product(" in program.definition.source
    assert "__fmul_rn" in program.definition.header


def test_strided_inputs_are_made_contiguous():
    x = normal(6, 10)
    program = program_of(lambda x: x * 2, x)
    turned = mx.swapaxes(normal(10, 6, seed=4), 0, 1)
    agree(program(turned)[0], turned * 2)
