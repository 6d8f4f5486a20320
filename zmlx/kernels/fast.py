"""What a decode step calls between its products, most of it from `mlx.core.fast`.

    rms_norm    y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i]
    logsumexp   y = log(sum_i exp(x[i]))
    rope        (x[i], x[i + d/2]) turned by the angle (t + offset) * scale * f[i]
    scaled_dot_product_attention    softmax(scale * q k^T + mask) v, H heads over G key heads

On the CPU stock MLX computes each as a dozen or more separate operations, in the dtype of the
activations. Formulas and arguments are those of the functions of the same names in mlx.core.fast.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx

from zmlx.kernels import rows
from zmlx.kernels.spec import KernelSpec, Sample, register
from zmlx.kernels.vocabulary import launch_logsumexp


def _rms_norm_reference(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    wide = x.astype(mx.float32)
    y = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.astype(mx.float32)
    return y.astype(x.dtype if weight is None else mx.result_type(x, weight))


def _logsumexp_reference(x: mx.array) -> mx.array:
    wide = rows.wide(x)
    largest = wide.max(axis=-1, keepdims=True)
    return (mx.log(mx.exp(wide - largest).sum(axis=-1, keepdims=True)) + largest).astype(x.dtype)


def _rope_reference(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
) -> mx.array:
    half = dims // 2
    if freqs is None:
        inverse = mx.exp(-mx.arange(half) * (math.log(cast(float, base)) / half))
    else:
        inverse = 1 / freqs.astype(mx.float32)
    start = mx.array(offset).reshape(-1, *[1] * (a.ndim - 2))
    angles = ((mx.arange(a.shape[-2]) + start) * scale)[..., None] * inverse
    cosines, sines = mx.cos(angles), mx.sin(angles)
    wide = a.astype(mx.float32)
    if traditional:
        one, two = wide[..., 0:dims:2], wide[..., 1:dims:2]
    else:
        one, two = wide[..., :half], wide[..., half:dims]
    turned = [one * cosines - two * sines, one * sines + two * cosines]
    if traditional:
        y = mx.stack(turned, axis=-1).reshape(*a.shape[:-1], dims)
    else:
        y = mx.concatenate(turned, axis=-1)
    return mx.concatenate([y, wide[..., dims:]], axis=-1).astype(a.dtype)


def _attention_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    if sinks is not None:
        raise ValueError("the reference takes no sinks")
    repeats = q.shape[1] // k.shape[1]
    wide = [mx.repeat(part.astype(mx.float32), repeats, axis=1) for part in (k, v)]
    scores = (q.astype(mx.float32) * scale) @ wide[0].swapaxes(-1, -2)
    if isinstance(mask, str):
        length, keys = scores.shape[-2:]
        mask = mx.arange(keys - length, keys)[:, None] >= mx.arange(keys)
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    elif mask is not None:
        scores = scores + mask.astype(mx.float32)
    y = mx.softmax(scores, axis=-1) @ wide[1]
    return y.astype(mx.result_type(q, k, v))


def _normal(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _rms_norm_sample(*, dtype: mx.Dtype) -> Sample:
    x = _normal(2, 3, 37, dtype=dtype, seed=1)
    return Sample((x, _normal(37, dtype=dtype, seed=2), 1e-5))


def _logsumexp_sample(*, dtype: mx.Dtype) -> Sample:
    return Sample((_normal(2, 9001, dtype=dtype, seed=1),))


def _rope_sample(*, dtype: mx.Dtype, traditional: bool) -> Sample:
    x = _normal(2, 3, 2, 40, dtype=dtype, seed=1)
    options = {"traditional": traditional, "base": 1e4, "scale": 0.5, "offset": 3}
    return Sample((x, 36), options)


def _attention_sample(*, dtype: mx.Dtype) -> Sample:
    q = _normal(1, 6, 3, 40, dtype=dtype, seed=1)
    k, v = (_normal(1, 2, 21, 40, dtype=dtype, seed=seed) for seed in (2, 3))
    return Sample((q, k, v), {"scale": 0.2, "mask": "causal"})


RMS_NORM = register(
    KernelSpec(
        name="rms_norm",
        domain="norms",
        formula="y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i]",
        shapes=("x (..., D) float", "w (D,) float or None", "y (..., D)"),
        reference=_rms_norm_reference,
        sample=_rms_norm_sample,
        contract={"cpu": "tighter"},
        native="rms_norm",
    )
)

LOGSUMEXP = register(
    KernelSpec(
        name="logsumexp",
        domain="reductions",
        formula="y = log(sum_i exp(x[i]))",
        shapes=("x (..., V) float", "y (..., 1)"),
        reference=_logsumexp_reference,
        sample=_logsumexp_sample,
        contract={"metal": "tighter", "cuda": "tighter", "cpu": "tighter"},
        native="log_sum_exp",
        fused=launch_logsumexp,
    )
)

ROPE = register(
    KernelSpec(
        name="rope",
        domain="rope",
        formula="(x[i], x[i + d/2]) turned by the angle (t + offset) * scale * f[i]",
        shapes=("x (B, ..., T, D) float", "offset int or (B,) int", "y like x"),
        reference=_rope_reference,
        sample=_rope_sample,
        contract={"cpu": "tighter"},
        native="rope",
    )
)

ATTENTION = register(
    KernelSpec(
        name="scaled_dot_product_attention",
        domain="attention",
        formula="y = softmax(scale * q k^T + mask) v",
        shapes=(
            "q (B, H, L, D) float",
            "k (B, G, S, D), v (B, G, S, E) float",
            "mask None, 'causal', or bool or float that broadcasts to (B, H, L, S)",
            "y (B, H, L, E)",
        ),
        reference=_attention_reference,
        sample=_attention_sample,
        contract={"cpu": "tighter"},
        native="scaled_dot_product_attention",
    )
)
