"""argmax and logsumexp of long rows: any length and number of rows, ties, infinities, NaN."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from zmlx.backend import current
from zmlx.kernels.fast import LOGSUMEXP
from zmlx.kernels.vocabulary import ARGMAX, PART

BACKEND = "emulator" if current() == "cpu" else current()
ROUNDING = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
INF, NAN = float("inf"), float("nan")


def argmax(x):
    return ARGMAX.implementation(BACKEND)(x)


def logsumexp(x):
    return LOGSUMEXP.implementation(BACKEND)(x)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "shape", [(1,), (31,), (1, 2, PART), (1, PART + 1), (3, 30001), (1, 128256), (8, 2 * PART - 1)]
)
def test_shapes(shape, dtype):
    x = (mx.random.normal(shape, key=mx.random.key(shape[-1])) * 5).astype(dtype)
    wide = np.array(x.astype(mx.float32), np.float64)
    found = argmax(x)
    assert (found.shape, found.dtype) == ((*shape[:-1], 1), mx.uint32)
    assert np.array_equal(np.array(found), wide.argmax(-1, keepdims=True))
    truth = np.log(np.exp(wide).sum(-1, keepdims=True))
    y = logsumexp(x)
    assert (y.shape, y.dtype) == ((*shape[:-1], 1), dtype)
    rounding = ROUNDING[dtype]
    assert np.allclose(np.array(y.astype(mx.float32)), truth, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_first_of_several_largest(dtype):
    length = 5 * PART + 77
    places = [{0, length - 1}, {PART - 1, PART}, {3 * PART + 5, 3 * PART + 256 + 4}, {length - 1}]
    x = np.full((len(places) + 1, length), -3.0, np.float32)
    for row, ones in zip(x, places, strict=False):
        row[list(ones)] = 2.5
    found = argmax(mx.array(x).astype(dtype)).flatten().tolist()
    assert found == [0, PART - 1, 3 * PART + 5, length - 1, 0]
    rows = np.argsort(np.random.default_rng(1).random((4, length)), axis=-1) % 100
    found = argmax(mx.array(rows.astype(np.float32)).astype(dtype))
    assert np.array_equal(np.array(found)[:, 0], rows.argmax(-1))


@pytest.mark.parametrize("length", [5, 2 * PART + 3])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_infinities_and_nan(dtype, length):
    last = length - 1
    rows = [{}, {0: NAN}, {last: 7.0}, {2: INF}, {1: NAN, last: 3.0}, {0: NAN, 3: INF}]
    x = np.full((len(rows) + 2, length), -INF, np.float32)
    for row, values in zip(x, rows, strict=False):
        for at, value in values.items():
            row[at] = value
    x[-2] = NAN
    x[-1] = 0
    given = mx.array(x).astype(dtype)
    assert argmax(given).flatten().tolist() == [0, 0, last, 2, 1, 0, 0, 0]
    y = logsumexp(given).astype(mx.float32).flatten().tolist()
    wanted = [-INF, NAN, 7.0, INF, NAN, INF, NAN, np.log(length)]
    assert np.allclose(y, wanted, rtol=ROUNDING[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_argmax_is_mlxs_for_any_row(dtype):
    """Bit for bit, also for what only a broken model gives: MLX takes the first NaN."""
    length = 30 * PART + 1
    x = np.array(mx.random.normal((12, length), key=mx.random.key(3)))
    x[1] = -INF
    x[2, ::3] = NAN
    x[3] = NAN
    x[4] = 0
    x[4, 3] = NAN
    x[5] = 0
    x[5, -1] = INF
    x[6] = -INF
    x[6, [5 * PART + 7, 9 * PART]] = NAN
    x[7, [PART - 1, PART]] = INF
    x[7, [PART + 1, -1]] = -NAN
    x[8, -1] = -NAN
    x[9] = -INF
    x[9, [PART, -1]] = -3e38
    x[10] = -0.0
    x[10, 4 * PART] = 0.0
    x[11] = -1
    x[11, [3, 5]] = [-0.0, 0.0]
    given = mx.array(x).astype(dtype)
    found = argmax(given)
    assert mx.array_equal(found, mx.argmax(given, axis=-1, keepdims=True))
    firsts = found.flatten().tolist()
    assert firsts[1:9] == [0, 0, 0, 3, length - 1, 5 * PART + 7, PART + 1, length - 1]
    assert firsts[10:] == [0, 3]


def test_empty_arrays_are_refused_as_by_stock():
    for kernel in (argmax, logsumexp):
        with pytest.raises(ValueError, match=r"(zero size|empty) array"):
            mx.eval(kernel(mx.zeros((2, 0))))


def test_what_they_do_not_take():
    for kernel in (argmax, logsumexp):
        with pytest.raises(TypeError, match=r"x is mlx\.core\.int32"):
            kernel(mx.zeros((2, 3), mx.int32))
        with pytest.raises(ValueError, match="x has no axes"):
            kernel(mx.array(1.0))
