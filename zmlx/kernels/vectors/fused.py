"""Kernels of the registry on GPUs: few rows by the kernels of this package, more by stock's.

Each function takes what compiles kernels and then the arguments of its reference in
`zmlx.kernels.quantized`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.kernels.vectors import plain
from zmlx.kernels.vectors.experts import (
    expert_combination,
    expert_gated_product,
    expert_products,
)
from zmlx.kernels.vectors.products import Compile, count, gated_product, products
from zmlx.kernels.vectors.weights import Weight

#: Vectors above which stock's products with a matrix take over.
MOST_ROWS = 8
#: Chosen experts, of all vectors together, above which stock's gathered products take over.
MOST_CHOSEN = 64

Part = mx.array | None


def _weight(w: mx.array, scales: Part, biases: Part, bias: Part, packing: Any) -> Weight:
    mode, group_size, bits = packing
    return Weight(w, scales, biases, bias, mode, group_size, bits)


def _sides(
    gate: tuple[mx.array, Part, Part, Part],
    up: tuple[mx.array, Part, Part, Part],
    options: dict[str, Any],
) -> tuple[Weight, Weight]:
    """Return gate and up of parts and options such as `gate_bits`."""
    packings = [
        (
            options.get(f"{side}_mode", "affine"),
            options[f"{side}_group_size"],
            options[f"{side}_bits"],
        )
        for side in ("gate", "up")
    ]
    return _weight(*gate, packings[0]), _weight(*up, packings[1])


def matmul(
    compile: Compile,
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
    """Return x @ w.T [+ bias]."""
    weight = _weight(w, scales, biases, bias, (mode, group_size, bits))
    if count(x) > MOST_ROWS:
        return plain.product(plain.stock, x, weight)
    return products(x, [weight], compile=compile)[0]


def glu(
    compile: Compile,
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
    **packing: Any,
) -> mx.array:
    """Return act(x @ gate.T) * (x @ up.T)."""
    gate, up = _sides(
        (gate_w, gate_scales, gate_biases, gate_bias),
        (up_w, up_scales, up_biases, up_bias),
        packing,
    )
    if count(x) > MOST_ROWS:
        return plain.gated(plain.stock, x, gate, up, activation)
    return gated_product(x, gate, up, activation, compile=compile)


def gather_matmul(
    compile: Compile,
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
    """Return x @ w[indices].T, where x (..., M, K) has the axes of the indices before M, or 1."""
    weight = _weight(w, scales, biases, None, (mode, group_size, bits))
    leading = x.shape[:-2]
    if x.shape[-2] == 1 and indices.ndim and 0 < indices.size <= MOST_CHOSEN:
        if leading == indices.shape:
            return expert_products(x.squeeze(-2), indices, weight, compile=compile)[..., None, :]
        if leading == (*indices.shape[:-1], 1):  # one vector for all that are chosen for it
            shared = x.squeeze((-3, -2))
            return expert_products(shared, indices, weight, compile=compile)[..., None, :]
    return plain.gathered(x, weight, indices)


def gather_glu(
    compile: Compile,
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
    **packing: Any,
) -> mx.array:
    """Return the gated products of the chosen experts."""
    gate, up = _sides(
        (gate_w, gate_scales, gate_biases, None), (up_w, up_scales, up_biases, None), packing
    )
    if indices.size > MOST_CHOSEN:
        return plain.gated(plain.stock, x[..., None, :], gate, up, activation, indices)
    return expert_gated_product(x, indices, gate, up, activation, compile=compile)


def gather_combine(
    compile: Compile,
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
    """Return the weighted sum of the chosen experts' products."""
    down = _weight(w, scales, biases, None, (mode, group_size, bits))
    if indices.size > MOST_CHOSEN:
        return plain.combination(plain.stock, h, indices, weights, down)
    return expert_combination(h, indices, weights, down, compile=compile)
