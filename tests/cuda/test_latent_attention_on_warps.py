"""Latent attention on tensor cores, lane by lane on the CPU."""

from __future__ import annotations

import mlx.core as mx
import pytest
from attention_on_cpu import run_on_warps
from kernels.test_decode_attention_latent import arrays, error, normal, state, stock
from precompiled import COMPILER

from zmlx.backend import current
from zmlx.kernels import decode_attention_latent as module
from zmlx.kernels.attention_tensor_source import PRIMITIVES
from zmlx.kernels.decode_attention_latent import (
    decode_attention_latent,
    decode_attention_latent_reference,
)
from zmlx.kernels.rope import Rope

pytestmark = pytest.mark.skipif(
    COMPILER is None or current() != "cpu", reason="no g++, or arrays lie in a GPU's memory"
)
F16, BF16 = mx.float16, mx.bfloat16
LEAST = {F16: 1e-3, BF16: 8e-3}


@pytest.fixture(params=["forwards", "backwards"], autouse=True)
def on_warps(monkeypatch, request):
    """In both orders, so that a missing barrier shows."""
    yield from run_on_warps(monkeypatch, module, backwards=request.param == "backwards")


def check(given, at, *, splits=None, norm=None, rope=None):
    """Hold a call to the results in float32, and to be no farther from them than 16 bits are."""
    wide = [x.astype(mx.float32) for x in given]
    options = {"scale": 0.1, "rope": rope}
    truths = decode_attention_latent_reference(
        *wide, at, norm=None if norm is None else norm.astype(mx.float32), **options
    )
    stocks = decode_attention_latent_reference(*given, at, norm=norm, **options)
    mx.eval(truths, stocks)
    out = decode_attention_latent(*given, at, norm=norm, splits=splits, **options)
    for found, truth, theirs in zip((out, *given[4:]), truths, stocks, strict=True):
        assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
        assert error(found, truth) <= max(error(theirs, truth), LEAST[out.dtype])
    return out


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("heads", "size", "rotated", "capacity", "length", "rope"),
    [
        (20, 512, 64, 70, 65, Rope(64, traditional=True)),
        (1, 32, 8, 40, 1, Rope(8, traditional=True, base=5e5)),
        (9, 96, 24, 1030, 33, Rope(18, traditional=True, base=None, freqs=mx.ones(9) * 3)),
        (16, 128, 64, 300, 290, Rope(64, multiplier=1.4)),
        (3, 264, 16, 10, 10, None),
    ],
)
def test_every_size_and_dtype(heads, size, rotated, capacity, length, rope, dtype):
    given = arrays(1, heads, size, rotated, capacity, dtype)
    norm = None if rope is None else 1 + normal(size, seed=9, dtype=dtype) / 4
    check(given, state(length - 1), norm=norm, rope=rope)


def test_it_is_no_farther_from_the_truth_than_models_are():
    given = arrays(1, 20, 512, 64, 300, BF16)
    options = {"scale": 0.1, "rope": Rope(64, traditional=True)}
    norm = 1 + normal(512, seed=9, dtype=BF16) / 4
    wide = [x.astype(mx.float32) for x in given]
    truth = stock(*wide, state(280), norm=norm.astype(mx.float32), **options)[0]
    theirs = stock(*given, state(280), norm=norm, **options)[0]
    mx.eval(truth, theirs)
    out = decode_attention_latent(*given, state(280), norm=norm, **options)
    assert error(out, truth) <= error(theirs, truth)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_it_is_as_exact_as_what_it_gets(dtype):
    """Beyond the rounding of what goes in and comes out, nothing of 16 bits is lost."""
    given = arrays(heads=8, size=128, rotated=64, capacity=300, dtype=dtype)
    wide = (x.astype(mx.float32) for x in given)
    truth, _, _ = decode_attention_latent_reference(*wide, state(290), scale=0.1)
    out = decode_attention_latent(*given, state(290), scale=0.1)
    off = mx.abs(out.astype(mx.float32) - truth)
    half_a_unit = mx.abs(truth) * {F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    assert mx.all(off <= 1.01 * half_a_unit + 1e-5).item()


@pytest.mark.parametrize(("capacity", "splits"), [(601, 1), (601, None), (1100, 3), (1100, 100)])
def test_every_length(capacity, splits):
    """With 100 parts and enough positions they are added up in two steps."""
    given = arrays(batch=2, size=72, rotated=24, capacity=capacity, dtype=BF16)
    for length in (1, 32, 33, 257, capacity):
        states = mx.array([[length - 1, length, 3], [0, max(1, length - 40), 5]], mx.int32)
        check(given, states, rope=Rope(24, traditional=True), splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_ring_is_written_in_the_middle(splits):
    given = arrays(heads=10, size=128, rotated=64, capacity=200, dtype=BF16)
    norm = 1 + normal(128, seed=9) / 4
    for write in range(0, 200, 31):
        check(given, state(write, length=200), rope=Rope(64), norm=norm, splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_else_is_written_and_nothing_beyond_the_length_counts(splits):
    *new, latents, rope_keys = arrays(batch=2, heads=20, capacity=100, dtype=BF16)
    beyond = (mx.arange(100) >= 71)[None, None, :, None]
    caches = [mx.where(beyond, mx.nan, x).astype(BF16) for x in (latents, rope_keys)]
    before = [x + 0 for x in caches]
    mx.eval(caches, before)
    truth, _, _ = decode_attention_latent_reference(*new, *before, state(40, 71), scale=0.1)
    out = decode_attention_latent(*new, *caches, state(40, 71), scale=0.1, splits=splits)
    assert error(out, truth) < 8e-3  # not if there is a NaN
    rest = (mx.arange(100) != 40)[:, None]
    for found, was, row in zip(caches, before, new[2:], strict=True):
        assert mx.array_equal(found[:, 0, 40], row).item()
        same = (mx.where(rest, x, 0) for x in (found, was))
        assert mx.array_equal(*same, equal_nan=True).item()


@pytest.mark.parametrize("shift", [0, 3])
def test_arrays_that_are_parts_of_larger_ones(shift):
    heads, size, rotated = 4, 64, 32
    q, q_pe = mx.split(
        normal(2, heads, size + rotated + shift, dtype=BF16)[..., shift:], [size], -1
    )
    latent, k_pe = mx.split(normal(2, size + rotated + shift, seed=2, dtype=BF16), [size], -1)
    k_pe = k_pe[:, shift:]
    whole = normal(2, 1, 90, size + rotated, seed=3, dtype=BF16)
    norm = (1 + normal(size + shift, seed=4) / 4)[shift:]
    mx.eval(q, q_pe, latent, k_pe, whole, norm)
    caches = whole[:, :, :77, :size], whole[:, :, :77, size:]
    options = {"scale": 0.125, "norm": norm, "rope": Rope(rotated, traditional=True)}
    truths = decode_attention_latent_reference(q, q_pe, latent, k_pe, *caches, state(50), **options)
    mx.eval(truths)
    out = decode_attention_latent(q, q_pe, latent, k_pe, *caches, state(50), **options)
    assert error(out, truths[0]) < 1.6e-2
    assert error(whole[:, :, :77, :size], truths[1]) < 8e-3
    assert error(whole[:, :, :77, size:], truths[2]) < 8e-3


def test_rows_with_gaps_give_nan():
    *new, latents, rope_keys = arrays(dtype=BF16)
    with_gaps = mx.stack([rope_keys, rope_keys], axis=-1)[..., 0]
    mx.eval(with_gaps)
    out = decode_attention_latent(*new, latents, with_gaps, state(3), scale=1.0)
    assert mx.all(mx.isnan(out)).item()


@pytest.mark.parametrize(
    ("dtype", "rope", "takes"),
    [
        (BF16, None, True),
        (mx.float32, None, False),
        (BF16, Rope(24), False),
        (BF16, Rope(24, traditional=True), True),
    ],
    ids=str,
)
def test_what_it_takes(dtype, rope, takes, monkeypatch):
    """What it does not take runs from the Metal text."""
    headers = set()

    def cuda_kernel(*, header, **_):
        headers.add(PRIMITIVES in header)
        return lambda *, output_shapes, output_dtypes, **_: [
            mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)
        ]

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    decode_attention_latent(*arrays(dtype=dtype), state(3), scale=1.0, rope=rope)
    assert headers == {takes}
