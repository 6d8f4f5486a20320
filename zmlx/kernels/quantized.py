"""Products with affine-quantized weights.

A weight is stored as `q` (unsigned, `bits` wide, packed) with a scale `s` and a bias `b` for every
`group_size` inputs: w[n, k] = s[n, g] * q[n, k] + b[n, g], g = k // group_size (the affine mode of
`mlx.core.quantize`). All sums here run in float32 over the unrounded activations.

    quantized_matmul            y[m, n] = sum_k x[m, k] w[n, k] + bias[n]
    quantized_glu               y = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
    gather_quantized_matmul     y[t, j] = x[t, j] @ w[indices[t, j]].T
    gather_quantized_glu        the gated product of the experts in indices[t]
    gather_quantized_combine    y[t] = sum_j weights[t, j] * h[t, j] @ w[indices[t, j]].T
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.kernels.spec import KernelSpec, Sample, register


def _dequantized(w: mx.array, scales: mx.array, biases: mx.array, size: int, bits: int) -> mx.array:
    return mx.dequantize(
        w, scales.astype(mx.float32), biases.astype(mx.float32), group_size=size, bits=bits
    )


def _promoted(*arrays: mx.array | None) -> mx.Dtype:
    """Return the dtype that a stock operation on these arrays has."""
    present = [array for array in arrays if array is not None]
    zero = mx.zeros((), present[0].dtype)
    for array in present[1:]:
        zero = zero + mx.zeros((), array.dtype)
    return zero.dtype


def _activate(activation: str, gate: mx.array) -> mx.array:
    if activation == "silu":
        return gate * mx.sigmoid(gate)
    if activation == "gelu":
        return gate * (1 + mx.erf(gate / 2**0.5)) / 2
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    raise ValueError(f"activation {activation!r}: expected silu, gelu or gelu_tanh")


def _matmul_reference(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    y = x.astype(mx.float32) @ _dequantized(w, scales, biases, group_size, bits).T
    y = y if bias is None else y + bias.astype(mx.float32)
    return y.astype(_promoted(x, scales, bias))


def _glu_reference(
    x: mx.array,
    gate_w: mx.array,
    gate_scales: mx.array,
    gate_biases: mx.array,
    up_w: mx.array,
    up_scales: mx.array,
    up_biases: mx.array,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
    *,
    activation: str,
    gate_group_size: int,
    gate_bits: int,
    up_group_size: int,
    up_bits: int,
) -> mx.array:
    wide = x.astype(mx.float32)
    gate = wide @ _dequantized(gate_w, gate_scales, gate_biases, gate_group_size, gate_bits).T
    up = wide @ _dequantized(up_w, up_scales, up_biases, up_group_size, up_bits).T
    gate = gate if gate_bias is None else gate + gate_bias.astype(mx.float32)
    up = up if up_bias is None else up + up_bias.astype(mx.float32)
    y = _activate(activation, gate) * up
    return y.astype(_promoted(x, gate_scales, up_scales, gate_bias, up_bias))


def _gather_matmul_reference(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    indices: mx.array,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    chosen = _dequantized(w, scales, biases, group_size, bits)[indices]
    return (x.astype(mx.float32) @ chosen.swapaxes(-1, -2)).astype(_promoted(x, scales))


def _gather_glu_reference(
    x: mx.array,
    indices: mx.array,
    gate_w: mx.array,
    gate_scales: mx.array,
    gate_biases: mx.array,
    up_w: mx.array,
    up_scales: mx.array,
    up_biases: mx.array,
    *,
    activation: str,
    gate_group_size: int,
    gate_bits: int,
    up_group_size: int,
    up_bits: int,
) -> mx.array:
    wide = x.astype(mx.float32)[:, None, None, :]
    gate = _dequantized(gate_w, gate_scales, gate_biases, gate_group_size, gate_bits)[indices]
    up = _dequantized(up_w, up_scales, up_biases, up_group_size, up_bits)[indices]
    product = _activate(activation, wide @ gate.swapaxes(-1, -2)) * (wide @ up.swapaxes(-1, -2))
    return product.squeeze(-2).astype(_promoted(x, gate_scales, up_scales))


def _gather_combine_reference(
    h: mx.array,
    indices: mx.array,
    weights: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    chosen = _dequantized(w, scales, biases, group_size, bits)[indices]
    y = (h.astype(mx.float32)[:, :, None, :] @ chosen.swapaxes(-1, -2)).squeeze(-2)
    y = (y * weights.astype(mx.float32)[..., None]).sum(axis=-2)
    return y.astype(_promoted(h, scales, weights))


# Sizes of the samples: one group and a half-filled vector of rows, so that tails run.
_ROWS, _EXPERTS, _TOP_K, _TOKENS = 19, 3, 2, 2


def _normal(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _quantized(
    *shape: int, group_size: int, bits: int, scale_dtype: mx.Dtype, seed: int
) -> tuple[mx.array, mx.array, mx.array]:
    weight = _normal(*shape, dtype=mx.float32, seed=seed)
    w, scales, biases = mx.quantize(weight, group_size, bits)
    return w, scales.astype(scale_dtype), biases.astype(scale_dtype)


def _matmul_sample(*, group_size: int, bits: int, dtype: mx.Dtype, scale_dtype: mx.Dtype) -> Sample:
    inputs = 3 * group_size
    weight = _quantized(
        _ROWS, inputs, group_size=group_size, bits=bits, scale_dtype=scale_dtype, seed=1
    )
    x = _normal(_TOKENS, inputs, dtype=dtype, seed=2)
    bias = _normal(_ROWS, dtype=scale_dtype, seed=3)
    return Sample((x, *weight, bias), {"group_size": group_size, "bits": bits})


def _glu_options(activation: str, group_size: int, bits: int) -> dict[str, Any]:
    return {
        "activation": activation,
        "gate_group_size": group_size,
        "gate_bits": bits,
        "up_group_size": group_size,
        "up_bits": bits,
    }


def _glu_sample(
    *, group_size: int, bits: int, dtype: mx.Dtype, scale_dtype: mx.Dtype, activation: str
) -> Sample:
    inputs = 3 * group_size
    gate, up = (
        _quantized(_ROWS, inputs, group_size=group_size, bits=bits, scale_dtype=scale_dtype, seed=n)
        for n in (1, 2)
    )
    x = _normal(_TOKENS, inputs, dtype=dtype, seed=3)
    return Sample((x, *gate, *up), _glu_options(activation, group_size, bits))


def _experts(group_size: int, bits: int, scale_dtype: mx.Dtype, seed: int) -> tuple[mx.array, ...]:
    return _quantized(
        _EXPERTS,
        _ROWS,
        3 * group_size,
        group_size=group_size,
        bits=bits,
        scale_dtype=scale_dtype,
        seed=seed,
    )


def _indices() -> mx.array:
    return mx.array([[2, 0], [1, 2]], dtype=mx.uint32)


def _gather_matmul_sample(
    *, group_size: int, bits: int, dtype: mx.Dtype, scale_dtype: mx.Dtype
) -> Sample:
    x = _normal(_TOKENS, _TOP_K, 1, 3 * group_size, dtype=dtype, seed=2)
    weight = _experts(group_size, bits, scale_dtype, 1)
    return Sample((x, *weight, _indices()), {"group_size": group_size, "bits": bits})


def _gather_glu_sample(
    *, group_size: int, bits: int, dtype: mx.Dtype, scale_dtype: mx.Dtype, activation: str
) -> Sample:
    x = _normal(_TOKENS, 3 * group_size, dtype=dtype, seed=3)
    gate, up = (_experts(group_size, bits, scale_dtype, seed) for seed in (1, 2))
    return Sample((x, _indices(), *gate, *up), _glu_options(activation, group_size, bits))


def _gather_combine_sample(
    *, group_size: int, bits: int, dtype: mx.Dtype, scale_dtype: mx.Dtype
) -> Sample:
    h = _normal(_TOKENS, _TOP_K, 3 * group_size, dtype=dtype, seed=2)
    weights = mx.array([[0.75, 0.25], [0.5, 0.5]], dtype=mx.float32)
    weight = _experts(group_size, bits, scale_dtype, 1)
    return Sample((h, _indices(), weights, *weight), {"group_size": group_size, "bits": bits})


_WEIGHT = "w (N, K * bits / 32) uint32; scales, biases (N, K / group_size) float"
_EXPERT_WEIGHT = "w (E, N, K * bits / 32) uint32; scales, biases (E, N, K / group_size) float"

QUANTIZED_MATMUL = register(
    KernelSpec(
        name="quantized_matmul",
        domain="quant",
        formula="y = x @ (s * q + b).T + bias",
        shapes=("x (..., K) float", _WEIGHT, "bias (N,) float, optional", "y (..., N)"),
        reference=_matmul_reference,
        sample=_matmul_sample,
        contract={"cpu": "tighter"},
        native="quantized_matmul",
    )
)

QUANTIZED_GLU = register(
    KernelSpec(
        name="quantized_glu",
        domain="quant",
        formula="y = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)",
        shapes=("x (..., K) float", "gate and up: " + _WEIGHT, "y (..., N)"),
        reference=_glu_reference,
        sample=_glu_sample,
        contract={"cpu": "tighter"},
        native="quantized_glu",
    )
)

GATHER_QUANTIZED_MATMUL = register(
    KernelSpec(
        name="gather_quantized_matmul",
        domain="moe",
        formula="y[t, j] = x[t, j] @ w[indices[t, j]].T",
        shapes=("x (..., M, K) float", _EXPERT_WEIGHT, "indices (...) int", "y (..., M, N)"),
        reference=_gather_matmul_reference,
        sample=_gather_matmul_sample,
        contract={"cpu": "tighter"},
        native="gather_quantized_matmul",
    )
)

GATHER_QUANTIZED_GLU = register(
    KernelSpec(
        name="gather_quantized_glu",
        domain="moe",
        formula="y[t, j] = act(x[t] @ gate[i].T) * (x[t] @ up[i].T), i = indices[t, j]",
        shapes=(
            "x (T, K) float",
            "indices (T, k) int",
            "gate and up: " + _EXPERT_WEIGHT,
            "y (T, k, N)",
        ),
        reference=_gather_glu_reference,
        sample=_gather_glu_sample,
        contract={"cpu": "tighter"},
        native="gather_quantized_glu",
    )
)

GATHER_QUANTIZED_COMBINE = register(
    KernelSpec(
        name="gather_quantized_combine",
        domain="moe",
        formula="y[t] = sum_j weights[t, j] * (h[t, j] @ w[indices[t, j]].T)",
        shapes=(
            "h (T, k, K) float",
            "indices (T, k) int",
            "weights (T, k) float",
            _EXPERT_WEIGHT,
            "y (T, N)",
        ),
        reference=_gather_combine_reference,
        sample=_gather_combine_sample,
        contract={"cpu": "tighter"},
        native="gather_quantized_combine",
    )
)
