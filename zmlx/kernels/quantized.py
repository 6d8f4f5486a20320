"""Products with the weights of linear layers, quantized or not.

How a weight is stored is its mode. In affine mode it is `q` (unsigned, `bits` wide, packed) with a
scale `s` and a bias `b` for every `group_size` inputs: w[n, k] = s[n, g] * q[n, k] + b[n, g],
g = k // group_size (`mlx.core.quantize`). In the modes mxfp4, nvfp4 and mxfp8 `q` are small floats
and there is no bias: w[n, k] = s[n, g] * q[n, k]. In mode dense `w` are floats and nothing else.
All sums here run in float32 over the unrounded activations. On GPUs the kernels of
`zmlx.kernels.vectors` compute products with few rows.

    lookup                      y[t] = w[indices[t]], the values of some rows
    quantized_matmul            y[m, n] = sum_k x[m, k] w[n, k] + bias[n]
    quantized_glu               y = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
    gather_quantized_matmul     y[t, j] = x[t, j] @ w[indices[t, j]].T
    gather_quantized_glu        the gated product of the experts in indices[t]
    gather_quantized_combine    y[t] = sum_j weights[t, j] * h[t, j] @ w[indices[t, j]].T
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.kernels.rows import wide
from zmlx.kernels.spec import KernelSpec, Sample, register
from zmlx.kernels.vectors import fused

#: How a weight is stored: mode, group size, bits. The last two are 0 for plain floats.
Packing = tuple[str, int, int]

#: parts of a weight that its mode has not
Part = mx.array | None


def _dense(w: mx.array, scales: Part, biases: Part, packing: Packing) -> mx.array:
    """Return a weight's values as float32."""
    mode, group_size, bits = packing
    if mode == "dense":
        return w.astype(mx.float32)
    assert scales is not None
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dense = mx.dequantize(w, scales, biases, group_size=group_size, bits=bits, mode=mode)
    return dense.astype(mx.float32)


def _promoted(*arrays: mx.array | None) -> mx.Dtype:
    """Return the dtype that a stock operation on these arrays has."""
    present = [array for array in arrays if array is not None]
    zero = mx.zeros((), present[0].dtype)
    for array in present[1:]:
        zero = zero + mx.zeros((), array.dtype)
    return zero.dtype


def _deciding(w: mx.array, scales: Part, mode: str) -> mx.array | None:
    """Return the part of a weight that decides on a product's dtype, if there is one."""
    return {"affine": scales, "dense": w}.get(mode)


def _activate(activation: str, gate: mx.array) -> mx.array:
    if activation == "silu":
        return gate * mx.sigmoid(gate)
    if activation == "gelu":
        return gate * (1 + mx.erf(gate / 2**0.5)) / 2
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    raise ValueError(f"activation {activation!r}: expected silu, gelu or gelu_tanh")


def _lookup_reference(
    indices: mx.array,
    w: mx.array,
    scales: Part,
    biases: Part,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    deciding = _deciding(w, scales, mode)
    y = _dense(w, scales, biases, (mode, group_size, bits))[indices]
    return y.astype(mx.bfloat16 if deciding is None else deciding.dtype)


#: Terms of a product above which they would take too much memory one by one: 64 MB.
_MOST_TERMS = 2**24


def _products(x: mx.array, w: mx.array) -> mx.array:
    """Return `x @ w.T`, small ones in float32: with rows MLX's own has 19 bits on CUDA (TF32)."""
    if x.size * w.shape[0] > _MOST_TERMS:
        return x @ w.T
    return (x[..., None, :] * w).sum(axis=-1)


def _matmul_reference(
    x: mx.array,
    w: mx.array,
    scales: Part = None,
    biases: Part = None,
    bias: Part = None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    y = _products(wide(x), _dense(w, scales, biases, (mode, group_size, bits)))
    y = y if bias is None else y + bias.astype(mx.float32)
    return y.astype(_promoted(x, _deciding(w, scales, mode), bias))


def _glu_reference(
    x: mx.array,
    gate_w: mx.array,
    gate_scales: Part,
    gate_biases: Part,
    up_w: mx.array,
    up_scales: Part,
    up_biases: Part,
    gate_bias: Part = None,
    up_bias: Part = None,
    *,
    activation: str,
    gate_group_size: int,
    gate_bits: int,
    up_group_size: int,
    up_bits: int,
    gate_mode: str = "affine",
    up_mode: str = "affine",
) -> mx.array:
    vectors = wide(x)
    gate_packing, up_packing = (
        (gate_mode, gate_group_size, gate_bits),
        (up_mode, up_group_size, up_bits),
    )
    gate = _products(vectors, _dense(gate_w, gate_scales, gate_biases, gate_packing))
    up = _products(vectors, _dense(up_w, up_scales, up_biases, up_packing))
    gate = gate if gate_bias is None else gate + gate_bias.astype(mx.float32)
    up = up if up_bias is None else up + up_bias.astype(mx.float32)
    deciding = (_deciding(gate_w, gate_scales, gate_mode), _deciding(up_w, up_scales, up_mode))
    y = _activate(activation, gate) * up
    return y.astype(_promoted(x, *deciding, gate_bias, up_bias))


def _gather_matmul_reference(
    x: mx.array,
    w: mx.array,
    scales: Part,
    biases: Part,
    indices: mx.array,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    chosen = _dense(w, scales, biases, (mode, group_size, bits))[indices]
    y = wide(x) @ chosen.swapaxes(-1, -2)
    return y.astype(_promoted(x, _deciding(w, scales, mode)))


def _gather_glu_reference(
    x: mx.array,
    indices: mx.array,
    gate_w: mx.array,
    gate_scales: Part,
    gate_biases: Part,
    up_w: mx.array,
    up_scales: Part,
    up_biases: Part,
    *,
    activation: str,
    gate_group_size: int,
    gate_bits: int,
    up_group_size: int,
    up_bits: int,
    gate_mode: str = "affine",
    up_mode: str = "affine",
) -> mx.array:
    vectors = wide(x)[:, None, None, :]
    gate_packing, up_packing = (
        (gate_mode, gate_group_size, gate_bits),
        (up_mode, up_group_size, up_bits),
    )
    gate = _dense(gate_w, gate_scales, gate_biases, gate_packing)[indices]
    up = _dense(up_w, up_scales, up_biases, up_packing)[indices]
    product = _activate(activation, vectors @ gate.swapaxes(-1, -2)) * (
        vectors @ up.swapaxes(-1, -2)
    )
    deciding = (_deciding(gate_w, gate_scales, gate_mode), _deciding(up_w, up_scales, up_mode))
    return product.squeeze(-2).astype(_promoted(x, *deciding))


def _gather_combine_reference(
    h: mx.array,
    indices: mx.array,
    weights: mx.array,
    w: mx.array,
    scales: Part,
    biases: Part,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    chosen = _dense(w, scales, biases, (mode, group_size, bits))[indices]
    y = (wide(h)[:, :, None, :] @ chosen.swapaxes(-1, -2)).squeeze(-2)
    y = (y * wide(weights)[..., None]).sum(axis=-2)
    return y.astype(_promoted(h, _deciding(w, scales, mode), weights))


# Sizes of the samples: one group and a half-filled vector of rows, so that tails run.
_ROWS, _EXPERTS, _TOP_K, _TOKENS = 19, 3, 2, 2


def _normal(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _inputs(packing: Packing) -> int:
    """Return the inputs of a sample: three groups, or no multiple of anything."""
    return 3 * max(32, packing[1]) if packing[1] else 77


def _weight(
    *shape: int, packing: Packing, scale_dtype: mx.Dtype, seed: int
) -> tuple[mx.array, Part, Part]:
    mode, group_size, bits = packing
    weight = _normal(*shape, dtype=mx.float32, seed=seed)
    if mode == "dense":
        return weight.astype(scale_dtype), None, None
    w, scales, *biases = mx.quantize(weight, group_size, bits, mode)
    if biases:
        return w, scales.astype(scale_dtype), biases[0].astype(scale_dtype)
    return w, scales, None


def _form(packing: Packing) -> dict[str, Any]:
    mode, group_size, bits = packing
    return {"group_size": group_size, "bits": bits, "mode": mode}


def _lookup_sample(*, packing: Packing, scale_dtype: mx.Dtype) -> Sample:
    weight = _weight(_ROWS, _inputs(packing), packing=packing, scale_dtype=scale_dtype, seed=1)
    return Sample((mx.array([[3, -1], [0, _ROWS - 1]]), *weight), _form(packing))


def _matmul_sample(*, packing: Packing, dtype: mx.Dtype, scale_dtype: mx.Dtype) -> Sample:
    weight = _weight(_ROWS, _inputs(packing), packing=packing, scale_dtype=scale_dtype, seed=1)
    x = _normal(_TOKENS, _inputs(packing), dtype=dtype, seed=2)
    bias = _normal(_ROWS, dtype=scale_dtype, seed=3)
    return Sample((x, *weight, bias), _form(packing))


def _glu_options(activation: str, packing: Packing) -> dict[str, Any]:
    form = _form(packing)
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in form.items()}
    return {"activation": activation, **both}


def _glu_sample(
    *, packing: Packing, dtype: mx.Dtype, scale_dtype: mx.Dtype, activation: str
) -> Sample:
    gate, up = (
        _weight(_ROWS, _inputs(packing), packing=packing, scale_dtype=scale_dtype, seed=seed)
        for seed in (1, 2)
    )
    x = _normal(_TOKENS, _inputs(packing), dtype=dtype, seed=3)
    return Sample((x, *gate, *up), _glu_options(activation, packing))


def _experts(packing: Packing, scale_dtype: mx.Dtype, seed: int) -> tuple[mx.array, Part, Part]:
    shape = (_EXPERTS, _ROWS, _inputs(packing))
    return _weight(*shape, packing=packing, scale_dtype=scale_dtype, seed=seed)


def _indices() -> mx.array:
    return mx.array([[2, 0], [1, 2]], dtype=mx.uint32)


def _gather_matmul_sample(*, packing: Packing, dtype: mx.Dtype, scale_dtype: mx.Dtype) -> Sample:
    x = _normal(_TOKENS, _TOP_K, 1, _inputs(packing), dtype=dtype, seed=2)
    return Sample((x, *_experts(packing, scale_dtype, 1), _indices()), _form(packing))


def _gather_glu_sample(
    *, packing: Packing, dtype: mx.Dtype, scale_dtype: mx.Dtype, activation: str
) -> Sample:
    x = _normal(_TOKENS, _inputs(packing), dtype=dtype, seed=3)
    gate, up = (_experts(packing, scale_dtype, seed) for seed in (1, 2))
    return Sample((x, _indices(), *gate, *up), _glu_options(activation, packing))


def _gather_combine_sample(*, packing: Packing, dtype: mx.Dtype, scale_dtype: mx.Dtype) -> Sample:
    h = _normal(_TOKENS, _TOP_K, _inputs(packing), dtype=dtype, seed=2)
    weights = mx.array([[0.75, 0.25], [0.5, 0.5]], dtype=mx.float32)
    weight = _experts(packing, scale_dtype, 1)
    return Sample((h, _indices(), weights, *weight), _form(packing))


_WEIGHT = (
    "w (N, K * bits / 32) uint32; scales (N, K / group_size) float, in modes mxfp4, nvfp4 and mxfp8"
    " uint8; biases like scales, only in affine mode; in mode dense w (N, K) float alone"
)
#: sums in float32 and one rounding, wherever it runs
_EVERYWHERE = {"cpu": "tighter", "metal": "tighter", "cuda": "tighter"}
_EXPERT_WEIGHT = "for each of E experts: " + _WEIGHT

LOOKUP = register(
    KernelSpec(
        name="lookup",
        domain="quant",
        formula="y[t] = s * q[indices[t]] + b",
        shapes=("indices (...) int", _WEIGHT, "y (..., K)"),
        reference=_lookup_reference,
        sample=_lookup_sample,
        contract={"cpu": "tighter"},
        native="lookup",
    )
)

QUANTIZED_MATMUL = register(
    KernelSpec(
        name="quantized_matmul",
        domain="quant",
        formula="y = x @ (s * q + b).T + bias",
        shapes=("x (..., K) float", _WEIGHT, "bias (N,) float, optional", "y (..., N)"),
        reference=_matmul_reference,
        sample=_matmul_sample,
        contract=_EVERYWHERE,
        native="quantized_matmul",
        fused=fused.matmul,
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
        contract=_EVERYWHERE,
        native="quantized_glu",
        fused=fused.glu,
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
        contract=_EVERYWHERE,
        native="gather_quantized_matmul",
        fused=fused.gather_matmul,
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
        contract=_EVERYWHERE,
        native="gather_quantized_glu",
        fused=fused.gather_glu,
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
        contract=_EVERYWHERE,
        native="gather_quantized_combine",
        fused=fused.gather_combine,
    )
)
