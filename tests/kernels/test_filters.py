"""Top-k and top-p of long rows against float64: peaked, flat, tied and masked distributions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from zmlx.backend import current
from zmlx.kernels.filters import TOP_K, TOP_P
from zmlx.kernels.vocabulary import PART

BACKEND = "emulator" if current() == "cpu" else current()
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
INF = float("inf")
LENGTH = 3 * PART + 77

RANDOM = np.random.default_rng(5)
NORMAL = RANDOM.normal(size=LENGTH)


def masked(x):
    x = np.array(x)
    x[RANDOM.random(x.size) < 0.9] = -INF
    return x


DISTRIBUTIONS = {
    "peaked": np.where(np.arange(LENGTH) == 4321, 12.0, NORMAL),
    "flat": NORMAL * 0.1,
    "wide": NORMAL * 6,
    "tied": np.round(NORMAL * 2),
    "equal": np.full(LENGTH, -2.0),
    "two values": np.where(NORMAL > 1, 3.0, -3.0),
    "masked": masked(NORMAL * 3),
    "tied and masked": masked(np.round(NORMAL)),
    "one left": np.where(np.arange(LENGTH) == LENGTH - 1, 0.0, -INF),
    "around zero": np.where(NORMAL > 0, 0.0, -0.0),
}


def logprobs(name, dtype):
    x = DISTRIBUTIONS[name]
    return mx.array((x - np.log(np.exp(x).sum()))[None].astype(np.float32)).astype(dtype)


def call(kernel, x, number, others=-INF):
    y = kernel.implementation(BACKEND)(x, mx.array([number, others], mx.float32))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    return y


def wide(x):
    return np.array(x.astype(mx.float32), np.float64)


def first_largest(x, k):
    """Return which elements of rows are the k largest, of equal ones the first."""
    places = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    kept = np.zeros(x.shape, bool)
    np.put_along_axis(kept, places, values=True, axis=-1)
    return kept


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_top_k_keeps_the_first_of_the_largest(name, dtype):
    x = logprobs(name, dtype)
    for k in (1, 40, PART + 1, LENGTH - 1, LENGTH, LENGTH + 5):
        kept = first_largest(wide(x), k)
        assert kept.sum() == min(k, LENGTH)
        assert np.array_equal(wide(call(TOP_K, x, k)), np.where(kept, wide(x), -INF)), k


def check_top_p(x, p):
    """Compare with float64; of an element whose mass above is p, to rounding, nothing is asked."""
    row = wide(x)[0]
    mass = np.exp(row)
    order = np.argsort(-row, kind="stable")
    above = np.concatenate([[0.0], np.cumsum(mass[order])[:-1]])
    values, firsts = np.unique(-row[order], return_index=True)
    strictly = above[firsts][np.searchsorted(values, -row)] / mass.sum()
    y = wide(call(TOP_P, x, p, 77.0))[0]
    kept = y != 77.0
    assert np.array_equal(y[kept], row[kept])
    clear = np.abs(strictly - p) > 2e-6
    assert np.array_equal(kept[clear], (strictly < p)[clear])
    assert np.array_equal(kept, row >= row[kept].min())  # equal ones together
    return kept


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_top_p_keeps_what_float64_does(name, dtype):
    x = logprobs(name, dtype)
    for p in (0.05, 0.5, 0.9, 0.99, 0.9999):
        check_top_p(x, p)


@pytest.mark.parametrize("dtype", FLOATS)
def test_top_p_of_nothing_and_of_all(dtype):
    x = logprobs("wide", dtype)
    row = wide(x)
    nothing = call(TOP_P, x, 0.0)
    assert np.array_equal(wide(nothing), np.where(row == row.max(), row, -INF))
    everything = wide(call(TOP_P, x, 1.0, 77.0))
    assert np.exp(row[everything == 77.0]).sum() < 2e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 33), (3, PART), (2, 2 * PART - 1)])
def test_each_row_by_itself(shape, dtype):
    x = (mx.random.normal(shape, key=mx.random.key(1)) * 3).astype(dtype)
    rows = x.reshape(-1, shape[-1])
    y = call(TOP_K, x, 5)
    assert np.array_equal(wide(y), np.where(first_largest(wide(x), 5), wide(x), -INF))
    together = call(TOP_P, x, 0.8).reshape(rows.shape)
    for row, whole in zip(rows, together, strict=True):
        assert mx.array_equal(call(TOP_P, row, 0.8), whole)
        check_top_p(row[None], 0.8)


def test_more_parts_than_are_added_up_at_once():
    x = mx.random.normal((1, 130 * PART + 5), key=mx.random.key(6)).astype(mx.bfloat16)
    for k in (3, 200_000, 266_000):
        assert np.array_equal(wide(call(TOP_K, x, k)) > -INF, first_largest(wide(x), k)), k
    check_top_p(x - mx.logsumexp(x.astype(mx.float32)).astype(x.dtype), 0.9)


@pytest.mark.parametrize("columns", [slice(0, 1), slice(7, 9), slice(1800, 2048), slice(250, 260)])
def test_equal_elements_in_every_place_of_a_part(columns):
    """They are counted by lanes, by simdgroups and by the elements of a thread."""
    x = np.full((2, 2 * PART), -1.0, np.float32)
    x[0, columns] = x[1, PART:][columns] = 2.0
    for k in (1, 2, 33, 250, 300, PART - 1, PART + 1, 2 * PART - 5):
        y = call(TOP_K, mx.array(x).astype(mx.bfloat16), k)
        assert np.array_equal(wide(y) > -INF, first_largest(x, k)), k


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_vocabulary(dtype):
    x = (mx.random.normal((1, 128256), key=mx.random.key(4)) * 2.5).astype(dtype)
    x = (x - mx.logsumexp(x, keepdims=True)).astype(dtype)
    kept = check_top_p(x, 0.9)
    assert 1000 < kept.sum() < 60000
    assert np.array_equal(wide(call(TOP_K, x, 40)) > -INF, first_largest(wide(x), 40))


def test_what_they_do_not_take():
    for kernel in (TOP_K, TOP_P):
        with pytest.raises(TypeError, match=r"x is mlx\.core\.int32"):
            call(kernel, mx.zeros((2, 3), mx.int32), 1)
        with pytest.raises(ValueError, match="x has no axes"):
            call(kernel, mx.array(1.0), 1)
        with pytest.raises(ValueError, match=r"wanted is mlx\.core\.float32 \(1,\)"):
            kernel.implementation(BACKEND)(mx.zeros((2, 3)), mx.array([1.0]))
