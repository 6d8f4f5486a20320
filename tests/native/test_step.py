"""Norms, rotary embeddings and attention: contract `tighter`, and the functions' own semantics."""

from __future__ import annotations

import exact
import mlx.core as mx
import numpy as np
import pytest

from zmlx.backend.cpu import native


@pytest.fixture(params=["avx512_vnni", "avx2", "portable"])
def library(request):
    """Run a test with each set of kernels that this processor has."""
    library = native.load()
    if request.param not in library.available_kernels():
        pytest.skip(f"this processor has no {request.param}")
    before = library.kernels()
    library.set_kernels(request.param)
    yield library
    library.set_kernels(before)


def tighter(ours: mx.array, stock: mx.array, truth: np.ndarray) -> bool:
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
    floor = 4e-7 + exact.rounding(ours.dtype)
    return exact.error(ours, truth) <= max(exact.error(stock, truth), floor)


@pytest.mark.parametrize("dtype", exact.FLOATS)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 576])
def test_rms_norm(library, dtype, width):
    x = exact.normal(3, 5, width, dtype=dtype) * 3
    w = exact.normal(width, dtype=dtype, seed=1)
    x64, w64 = exact.wide(x), exact.wide(w)
    truth = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5)
    assert tighter(library.rms_norm(x, w, 1e-5), mx.fast.rms_norm(x, w, 1e-5), truth * w64)
    assert tighter(library.rms_norm(x, None, 1e-5), mx.fast.rms_norm(x, None, 1e-5), truth)
    # Rows that are not contiguous, and a weight of another dtype.
    turned = x.swapaxes(0, 1)
    w32 = w.astype(mx.float32)
    ours = library.rms_norm(turned, w32, eps=1e-5)
    stock = mx.fast.rms_norm(turned, w32, 1e-5)
    assert tighter(ours, stock, (truth * w64).swapaxes(0, 1))


def turned(x, dims, traditional, base, scale, offset, freqs=None):
    """Turn pairs in float64."""
    half = dims // 2
    inverse = base ** (-np.arange(half) / half) if freqs is None else 1 / exact.wide(freqs)
    start = np.asarray(offset, np.float64).reshape(-1, *[1] * (x.ndim - 2))
    angles = ((np.arange(x.shape[-2]) + start) * scale)[..., None] * inverse
    c, s = np.cos(angles), np.sin(angles)
    y = x.copy()
    one, two = (
        (x[..., 0:dims:2], x[..., 1:dims:2]) if traditional else (x[..., :half], x[..., half:dims])
    )
    first, second = one * c - two * s, one * s + two * c
    if traditional:
        y[..., 0:dims:2], y[..., 1:dims:2] = first, second
    else:
        y[..., :half], y[..., half:dims] = first, second
    return y


@pytest.mark.parametrize("dtype", exact.FLOATS)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(("dims", "width"), [(64, 64), (20, 40), (2, 5)])
def test_rope(library, dtype, traditional, dims, width):
    x = exact.normal(2, 3, 4, width, dtype=dtype)
    for offset in (0, 1000, mx.array(7), mx.array([5, 900])):
        options = {"traditional": traditional, "base": 1e4, "scale": 0.25, "offset": offset}
        ours, stock = library.rope(x, dims, **options), mx.fast.rope(x, dims, **options)
        at = np.array(offset)
        assert tighter(ours, stock, turned(exact.wide(x), dims, traditional, 1e4, 0.25, at))
    freqs = mx.abs(exact.normal(dims // 2, seed=4)) + 1
    options = {"traditional": traditional, "base": None, "scale": 1.0, "offset": 3, "freqs": freqs}
    swapped = x.swapaxes(1, 2)  # as attention has it
    ours, stock = library.rope(swapped, dims, **options), mx.fast.rope(swapped, dims, **options)
    truth = turned(exact.wide(swapped), dims, traditional, 0, 1.0, 3, freqs)
    assert tighter(ours, stock, truth)


def test_rope_of_other_ranks_and_bad_arguments(library):
    options = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 2}
    x = exact.normal(2, 3, 8)
    assert mx.allclose(library.rope(x, 8, **options), mx.fast.rope(x, 8, **options), atol=1e-6)
    with pytest.raises(ValueError, match="rope"):
        library.rope(x, 7, **options)
    with pytest.raises(ValueError, match="rope"):
        library.rope(x, 8, **{**options, "base": None})


def attended(q, k, v, scale, mask):
    """Attend in float64."""
    q, k, v = (exact.wide(part) for part in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeats, 1), np.repeat(v, repeats, 1)
    scores = scale * (q @ k.swapaxes(-1, -2))
    if isinstance(mask, str):
        length, keys = scores.shape[-2:]
        mask = np.arange(keys - length, keys)[:, None] >= np.arange(keys)
    if mask is not None:
        mask = mask if isinstance(mask, np.ndarray) else np.array(mask.astype(mx.float32))
        scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + mask
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return (scores / scores.sum(-1, keepdims=True)) @ v


SHAPES = [
    # heads, key heads, queries, keys, width, value width
    (9, 3, 1, 50, 64, 64),
    (4, 4, 5, 5, 16, 16),
    (8, 2, 3, 40, 40, 24),
    (2, 1, 7, 130, 8, 96),
    (6, 1, 1, 1, 33, 5),
]


@pytest.mark.parametrize("dtype", exact.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "row", "added"])
def test_attention(library, dtype, shape, kind):
    heads, groups, length, keys, width, value_width = shape
    q = exact.normal(2, heads, length, width, dtype=dtype, seed=1)
    # Keys and values as a cache holds them: the first part of a longer buffer.
    buffers = [
        exact.normal(2, groups, keys + 9, w, dtype=dtype, seed=w) for w in (width, value_width)
    ]
    k, v = (buffer[..., :keys, :] for buffer in buffers)
    rng = np.random.default_rng(5)
    mask = {
        "none": None,
        "causal": "causal",
        "bool": mx.array(rng.random((2, 1, length, keys)) < 0.7),
        "row": mx.array(rng.random((1, keys)) < 0.7),
        "added": exact.normal(length, keys, dtype=dtype, seed=6),
    }[kind]
    if kind == "bool":
        mask[..., 0] = True
    if kind == "row":
        mask[..., 0] = True
    scale = width**-0.5
    ours = library.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    stock = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    host = np.array(mask) if isinstance(mask, mx.array) and mask.dtype == mx.bool_ else mask
    assert tighter(ours, stock, attended(q, k, v, scale, host))


def test_a_query_that_may_see_nothing_is_the_mean_as_in_stock(library):
    q, k, v = (exact.normal(1, 2, 3, 16, seed=s) for s in (1, 2, 3))
    mask = mx.array([[[[True] * 3, [False] * 3, [True, False, False]]]])
    ours = library.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    stock = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert mx.allclose(ours, stock, atol=1e-6)
    assert mx.allclose(ours[0, :, 1], v[0].mean(axis=1), atol=1e-6)


def test_nan_reaches_its_own_row_only(library):
    q, k, v = (exact.normal(1, 2, 4, 16, seed=s) for s in (1, 2, 3))
    q[0, 1, 2, 5] = float("nan")
    y = library.scaled_dot_product_attention(q, k, v, scale=0.3)
    nan = np.isnan(np.array(y)).all(-1)
    assert nan[0, 1, 2]
    assert nan.sum() == 1


def test_large_scores_do_not_overflow(library):
    q, k, v = (exact.normal(1, 1, 2, 16, seed=s) * 100 for s in (1, 2, 3))
    y = library.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert exact.error(y, attended(q, k, v, 1.0, None)) < 1e-6


def test_sinks_and_mixed_dtypes_are_the_stock_operation(library):
    q, k, v = (exact.normal(1, 2, 3, 16, seed=s) for s in (1, 2, 3))
    sinks = mx.array([0.5, -0.5])
    ours = library.scaled_dot_product_attention(q, k, v, scale=0.3, sinks=sinks)
    stock = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, sinks=sinks)
    assert mx.array_equal(ours, stock)
    ours = library.scaled_dot_product_attention(q, k.astype(mx.bfloat16), v, scale=0.3)
    assert ours.dtype == mx.float32
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        library.scaled_dot_product_attention(q, k[..., :8], v, scale=0.3)


def test_gradients_compile_and_vmap(library):
    q, k, v = (exact.normal(1, 2, 3, 16, seed=s) for s in (1, 2, 3))
    w = exact.normal(16, seed=4)

    def ours(q, w):
        y = library.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
        y = library.rope(y, 8, traditional=False, base=1e4, scale=1.0, offset=2)
        return library.rms_norm(y, w, 1e-5)

    def stock(q, w):
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
        y = mx.fast.rope(y, 8, traditional=False, base=1e4, scale=1.0, offset=2)
        return mx.fast.rms_norm(y, w, 1e-5)

    for argument in (0, 1):
        grads = [mx.grad(lambda *a, f=f: (f(*a) ** 3).sum(), argument)(q, w) for f in (ours, stock)]
        assert mx.allclose(*grads, rtol=1e-3, atol=1e-4)
    assert mx.allclose(mx.compile(ours)(q, w), stock(q, w), atol=1e-5)
    rows = exact.normal(5, 3, 16)
    norm = mx.vmap(lambda x: library.rms_norm(x, w, 1e-5))(rows)
    assert mx.allclose(norm, mx.fast.rms_norm(rows, w, 1e-5), atol=1e-5)


def test_threads_do_not_change_a_result(library):
    before = library.num_threads()
    q = exact.normal(1, 8, 70, 64, seed=1)
    k, v = (exact.normal(1, 2, 300, 64, seed=s) for s in (2, 3))
    results = []
    for threads in (1, 2, 3):
        library.set_num_threads(threads)
        y = library.scaled_dot_product_attention(q, k, v, scale=0.1)
        mx.eval(y)
        results.append(y)
    library.set_num_threads(before)
    assert all(mx.array_equal(y, results[0]) for y in results)
