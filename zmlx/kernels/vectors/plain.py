"""The same products in MLX's operations: as stock computes them, or in float32 as the reference."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from zmlx.kernels.vectors.weights import Weight, result_dtype

#: (x (..., K), weight) -> x @ w.T without bias; with indices (..., k): x (..., k or 1, K)
Multiply = Callable[..., mx.array]


def stock(x: mx.array, weight: Weight, indices: mx.array | None = None) -> mx.array:
    """Multiply with MLX's own operations, which read packed weights; rounds as they do."""
    if indices is not None:
        return gathered(x[..., None, :], weight, indices).squeeze(-2)
    if weight.scales is None:
        return x @ weight.w.T
    mode, group_size, bits = weight.packing
    parts = (weight.w, weight.scales, weight.biases)
    return mx.quantized_matmul(x, *parts, group_size=group_size, bits=bits, mode=mode)


def gathered(x: mx.array, weight: Weight, indices: mx.array) -> mx.array:
    """Return x (..., M, K) @ w[indices].T by MLX's own operations."""
    if weight.scales is None:
        return mx.gather_mm(x, weight.w.swapaxes(-1, -2), rhs_indices=indices)
    mode, group_size, bits = weight.packing
    return mx.gather_qmm(
        x,
        weight.w,
        weight.scales,
        weight.biases,
        rhs_indices=indices,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )


def wide(x: mx.array, weight: Weight, indices: mx.array | None = None) -> mx.array:
    """Multiply in float32, in float64 if x is that, with weights that are unpacked first."""
    w, kind = weight.w.astype(mx.float32), x.dtype if x.dtype == mx.float64 else mx.float32
    if weight.scales is not None:
        affine = weight.mode == "affine"
        w = mx.dequantize(
            weight.w,
            weight.scales.astype(mx.float32) if affine else weight.scales,
            None if weight.biases is None else weight.biases.astype(mx.float32),
            group_size=weight.group_size,
            bits=weight.bits,
            mode=weight.mode,
        )
    w = w.astype(mx.float32).astype(kind)
    if indices is None:
        return x.astype(kind) @ w.T
    return (x.astype(kind)[..., None, :] @ w[indices].swapaxes(-1, -2)).squeeze(-2)


def activated(activation: str, gate: mx.array | None, up: mx.array) -> mx.array:
    """Return act(gate) * up, or act(up) where there is no gate.

    Raises:
        ValueError: an activation that is not known.
    """
    if activation == "clipped_swiglu":
        assert gate is not None
        gate = mx.minimum(gate, 7.0)
        return gate * mx.sigmoid(1.702 * gate) * (mx.clip(up, -7.0, 7.0) + 1)
    a = up if gate is None else gate
    if activation == "silu":
        a = a * mx.sigmoid(a)
    elif activation == "gelu":
        a = a * (1 + mx.erf(a / 2**0.5)) / 2
    elif activation == "gelu_tanh":
        a = 0.5 * a * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (a + 0.044715 * a**3)))
    elif activation == "relu2":
        a = mx.square(mx.maximum(a, 0))
    else:
        raise ValueError(
            f"activation {activation!r}: expected silu, gelu, gelu_tanh, relu2 or clipped_swiglu"
        )
    return a if gate is None else a * up


def _normed(x: mx.array, norm: mx.array | None, eps: float) -> mx.array:
    return x if norm is None else mx.fast.rms_norm(x, norm, eps)


def _biased(y: mx.array, weight: Weight, indices: mx.array | None) -> mx.array:
    if weight.bias is None:
        return y
    return y + (weight.bias if indices is None else weight.bias[indices]).astype(y.dtype)


def product(
    multiply: Multiply,
    x: mx.array,
    weight: Weight,
    indices: mx.array | None = None,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    residual: mx.array | None = None,
) -> mx.array:
    """Return [residual +] norm(x) @ w.T [+ bias], rounded as a stock product is."""
    x = _normed(x, norm, eps)
    y = _biased(multiply(x, weight, indices), weight, indices)
    y = y.astype(result_dtype(x, weight))
    return y if residual is None else residual + y


def gated(
    multiply: Multiply,
    x: mx.array,
    gate: Weight | None,
    up: Weight,
    activation: str,
    indices: mx.array | None = None,
    norm: mx.array | None = None,
    eps: float = 1e-6,
) -> mx.array:
    """Return act(norm(x) @ gate.T) * (norm(x) @ up.T); x has an axis for chosen experts."""
    x = _normed(x, norm, eps)
    sides = [
        None if w is None else _biased(multiply(x, w, indices), w, indices) for w in (gate, up)
    ]
    assert sides[1] is not None
    weights = [w for w in (gate, up) if w is not None]
    return activated(activation, sides[0], sides[1]).astype(result_dtype(x, *weights))


def combination(
    multiply: Multiply,
    h: mx.array,
    indices: mx.array,
    scores: mx.array,
    down: Weight,
    shared: mx.array | None = None,
    residual: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Return sum_j scores[j] * (h[j] @ down[indices[j]].T + bias) [+ shared] [+ residual]."""
    y = _biased(multiply(h, down, indices), down, indices)
    kind = mx.float64 if y.dtype == mx.float64 else mx.float32
    y = (y.astype(kind) * scores.astype(kind)[..., None]).sum(axis=-2)
    y = y.astype(mx.result_type(h, scores, *down.deciding))
    y = y if dtype is None else y.astype(dtype)
    for more in (shared, residual):
        y = y if more is None else y + more
    return y
