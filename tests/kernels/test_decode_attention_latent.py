"""Latent attention from its Metal source: against the operations that mlx-lm's models call."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend import current, launch, strict
from zmlx.backend.strict import launch as strict_launch
from zmlx.kernels.decode_attention_latent import (
    decode_attention_latent,
    decode_attention_latent_reference,
)
from zmlx.kernels.rope import Rope

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16


@pytest.fixture(autouse=True)
def from_source(monkeypatch):
    """On the CPU, run sources in the emulator; on a GPU they run anyway."""
    if current() == "cpu":
        monkeypatch.setenv("ZMLX_BACKEND", "emulator")


def normal(*shape, seed=1, dtype=F32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def arrays(batch=1, heads=5, size=64, rotated=32, capacity=50, dtype=F32):
    """Return q, q_pe, latent, k_pe, latents, rope_keys."""
    shapes = (
        (batch, heads, size),
        (batch, heads, rotated),
        (batch, size),
        (batch, rotated),
        (batch, 1, capacity, size),
        (batch, 1, capacity, rotated),
    )
    found = [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    mx.eval(found)
    return found


def state(write, length=None, position=7):
    return mx.array([write, write + 1 if length is None else length, position], mx.int32)


def stock(q, q_pe, latent, k_pe, latents, rope_keys, at, *, scale, norm, rope):
    """Compute as `glm4_moe_lite.py` and `deepseek_v3.py` of mlx-lm do for one token."""
    write, length, position = at.tolist()
    latent = mx.fast.rms_norm(latent, norm, 1e-6)
    options = {"traditional": rope.traditional, "base": rope.base, "scale": rope.scale}
    q_pe, k_pe = (
        mx.fast.rope(x, rope.dims, offset=position, **options)
        for x in (q_pe[:, :, None], k_pe[:, None, None])
    )
    latents, rope_keys = latents[...], rope_keys[...]
    latents[:, 0, write] = latent
    rope_keys[:, 0, write] = k_pe[:, 0, 0]
    held, turned = latents[:, :, :length], rope_keys[:, :, :length]
    pe_scores = (q_pe * scale) @ turned.swapaxes(-1, -2)
    out = mx.fast.scaled_dot_product_attention(
        q[:, :, None], held, held, scale=scale, mask=pe_scores
    )
    return out[:, :, 0], latents, rope_keys


def error(found, truth):
    truth = truth.astype(F32)
    return mx.max(mx.abs(found.astype(F32) - truth)).item() / mx.max(mx.abs(truth)).item()


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("heads", "size", "rotated", "capacity", "length"),
    [
        (20, 512, 64, 70, 65),
        (1, 32, 8, 40, 1),
        (9, 96, 24, 40, 33),
        (16, 128, 64, 300, 290),
        (3, 256, 16, 10, 10),
    ],
)
def test_every_size_and_dtype(heads, size, rotated, capacity, length, dtype):
    given = arrays(1, heads, size, rotated, capacity, dtype)
    at = state(length - 1)
    options = {"scale": 0.1, "rope": Rope(rotated, traditional=True)}
    norm = 1 + normal(size, seed=9, dtype=dtype) / 4
    truths = stock(*(x.astype(F32) for x in given), at, norm=norm.astype(F32), **options)
    stocks = stock(*given, at, norm=norm, **options)
    mx.eval(truths, stocks)
    out = decode_attention_latent(*given, at, norm=norm, **options)
    mx.eval(out)
    least = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}[dtype]
    for found, truth, theirs in zip((out, *given[4:]), truths, stocks, strict=True):
        assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
        assert error(found, truth) <= max(error(theirs, truth), least)


@pytest.mark.parametrize("splits", [1, 2, None])
@pytest.mark.parametrize("length", [31, 32, 33, 256, 257, 600])
def test_every_length_and_split(length, splits):
    given = arrays(batch=2, capacity=601)
    states = mx.array([[length - 1, length, 3], [0, max(1, length - 40), 5]], mx.int32)
    truths = decode_attention_latent_reference(*given, states, scale=0.2, rope=Rope(32))
    mx.eval(truths)
    out = decode_attention_latent(*given, states, scale=0.2, rope=Rope(32), splits=splits)
    mx.eval(out)
    for found, truth in zip((out, *given[4:]), truths, strict=True):
        assert error(found, truth) < 2e-6


def test_nothing_else_is_written_and_nothing_beyond_the_length_read():
    *new, latents, rope_keys = arrays(batch=2, heads=20, capacity=100)
    beyond = (mx.arange(100) >= 71)[None, None, :, None]
    caches = [mx.where(beyond, mx.nan, x) for x in (latents, rope_keys)]
    before = [x + 0 for x in caches]
    mx.eval(caches, before)
    out = decode_attention_latent(*new, *caches, state(40, 71), scale=0.1)
    assert not mx.any(mx.isnan(out)).item()
    rest = (mx.arange(100) != 40)[:, None]
    for found, was, row in zip(caches, before, new[2:], strict=True):
        assert mx.array_equal(found[:, 0, 40], row).item()
        same = (mx.where(rest, x, 0) for x in (found, was))
        assert mx.array_equal(*same, equal_nan=True).item()


def test_arrays_that_are_parts_of_larger_ones():
    heads, size, rotated = 4, 64, 32
    q, q_pe = mx.split(normal(2, heads, size + rotated), [size], axis=-1)
    latent, k_pe = mx.split(normal(2, size + rotated, seed=2), [size], axis=-1)
    whole = normal(2, 1, 90, size + rotated, seed=3)
    mx.eval(q, q_pe, latent, k_pe, whole)
    caches = whole[:, :, :77, :size], whole[:, :, :77, size:]
    norm = 1 + normal(size, seed=4) / 4
    options = {"scale": 0.125, "norm": norm, "rope": Rope(rotated)}
    truths = decode_attention_latent_reference(q, q_pe, latent, k_pe, *caches, state(50), **options)
    mx.eval(truths)
    out = decode_attention_latent(q, q_pe, latent, k_pe, *caches, state(50), **options)
    assert error(out, truths[0]) < 2e-6
    assert error(whole[:, :, :77, :size], truths[1]) < 2e-6
    assert error(whole[:, :, :77, size:], truths[2]) < 2e-6


def test_rows_with_gaps_give_nan():
    *new, latents, rope_keys = arrays()
    with_gaps = mx.stack([rope_keys, rope_keys], axis=-1)[..., 0]
    mx.eval(with_gaps)
    out = decode_attention_latent(*new, latents, with_gaps, state(3), scale=1.0)
    assert mx.all(mx.isnan(out)).item()


NAMES = ("q", "q_pe", "latent", "k_pe", "latents", "rope_keys", "state")
BAD = [
    ({"q": (1, 5, 32)}, r"q has shape \(1, 5, 32\); it takes \(1, Hq, 64\)"),
    ({"q_pe": (1, 4, 32)}, r"q_pe has shape \(1, 4, 32\); it takes \(1, 5, 32\)"),
    ({"latent": (1, 1, 64)}, r"latent has shape \(1, 1, 64\); it takes \(1, 64\)"),
    ({"k_pe": (2, 32)}, r"k_pe has shape \(2, 32\)"),
    ({"latents": (1, 2, 50, 64)}, r"latents have shape \(1, 2, 50, 64\); they take \(B, 1, C, R\)"),
    ({"rope_keys": (1, 1, 49, 32)}, r"rope_keys have shape .*they take \(1, 1, 50, P\)"),
    ({"state": (2, 3)}, r"state has shape \(2, 3\); it takes \(3,\) or \(1, 3\)"),
    (
        {"q_pe": (1, 5, 66), "k_pe": (1, 66), "rope_keys": (1, 1, 50, 66)},
        r"rope_keys have 66 elements of .*float32; they take up to 64",
    ),
]


@pytest.mark.parametrize(("shapes", "text"), BAD)
def test_shapes_that_do_not_fit(shapes, text):
    given = dict(zip(NAMES, (*arrays(), state(3)), strict=True))
    for name, shape in shapes.items():
        given[name] = mx.zeros(shape, given[name].dtype)
    with pytest.raises(ValueError, match=text):
        decode_attention_latent(*given.values(), scale=1.0)


def test_options_that_do_not_fit():
    given = (*arrays(), state(3))
    for options, text in (
        ({"norm": mx.ones(32)}, r"norm has shape \(32,\)"),
        ({"rope": Rope(64)}, "rope rotates 64 elements; there are 32"),
        ({"splits": 1000}, "splits=1000; give a number from 1 to"),
    ):
        with pytest.raises(ValueError, match=text):
            decode_attention_latent(*given, scale=1.0, **options)


@pytest.mark.parametrize("index", range(7))
def test_dtypes_that_do_not_fit(index):
    given = [*arrays(), state(3)]
    given[index] = given[index].astype(F16)
    with pytest.raises(TypeError, match=r"cast one of them|it takes int32"):
        decode_attention_latent(*given, scale=1.0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_apples_compiler_would_take_it(dtype, monkeypatch):
    try:
        strict.find()
    except strict.ClangUnavailable as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    monkeypatch.setitem(launch._BACKENDS, "emulator", "zmlx.backend.strict")
    launch.forget()
    before = strict_launch._looked.cache_info()
    for splits in (1, 2):
        for options in ({}, {"norm": mx.ones(64), "rope": Rope(32), "after": mx.ones(1)}):
            given = arrays(capacity=70, dtype=dtype)
            decode_attention_latent(*given, state(3), scale=1.0, splits=splits, **options)
    after = strict_launch._looked.cache_info()
    assert after.hits + after.misses > before.hits + before.misses
    launch.forget()
