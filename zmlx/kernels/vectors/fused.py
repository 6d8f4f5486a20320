"""Kernels of the registry on GPUs: few rows by the kernels of this package, more by stock's.

Each takes what compiles kernels and then the arguments of its reference in
`zmlx.kernels.quantized` or `zmlx.kernels.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from zmlx.kernels.rows import FLOATS
from zmlx.kernels.vectors import plain
from zmlx.kernels.vectors.experts import (
    expert_combination,
    expert_gated_product,
    expert_products,
)
from zmlx.kernels.vectors.linear import Compile, gated_product, products
from zmlx.kernels.vectors.replayed import Replayed
from zmlx.kernels.vectors.weights import Weight, result_dtype

#: Vectors above which stock's products with a matrix take over.
MOST_ROWS = 8
#: Chosen experts, of all vectors together, above which stock's gathered products take over.
MOST_CHOSEN = 64

Part = mx.array | None
#: Mode, group size and bits.
Packing = tuple[str, int, int]


def few_rows(x: mx.array, *_: Part) -> bool:
    """Return whether the kernels take vectors x (..., K): there are few, of a dtype they know."""
    return x.size <= MOST_ROWS * x.shape[-1] and x.dtype in FLOATS


def few_chosen(x: mx.array, indices: mx.array, *_: Part) -> bool:
    """Return the same of vectors for which experts are chosen."""
    return indices.size <= MOST_CHOSEN and x.dtype in FLOATS


def _weight(parts: Sequence[Any], packing: Packing) -> Weight:
    """Return a weight of w, scales, biases and bias."""
    w, scales, biases, bias = parts
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
    return _weight(gate, packings[0]), _weight(up, packings[1])


def _linear(
    x: mx.array,
    w: mx.array,
    scales: Part = None,
    biases: Part = None,
    bias: Part = None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> tuple[mx.array, Weight]:
    return x, _weight((w, scales, biases, bias), (mode, group_size, bits))


def _matmul(compile: Compile, *arrays: Any, **packing: Any) -> mx.array:
    x, weight = _linear(*arrays, **packing)
    return products(x, [weight], compile=compile)[0]


def _stock_matmul(*arrays: Any, **packing: Any) -> mx.array:
    return plain.product(plain.stock, *_linear(*arrays, **packing))


def _pair(
    x: mx.array,
    gate_w: mx.array,
    gate_scales: Part,
    gate_biases: Part,
    up_w: mx.array,
    up_scales: Part,
    up_biases: Part,
    gate_bias: Part = None,
    up_bias: Part = None,
    **packing: Any,
) -> tuple[mx.array, Weight, Weight]:
    gate = (gate_w, gate_scales, gate_biases, gate_bias)
    return x, *_sides(gate, (up_w, up_scales, up_biases, up_bias), packing)


def _glu(compile: Compile, *arrays: Any, activation: str, **packing: Any) -> mx.array:
    return gated_product(*_pair(*arrays, **packing), activation, compile=compile)


def _stock_glu(*arrays: Any, activation: str, **packing: Any) -> mx.array:
    return plain.gated(plain.stock, *_pair(*arrays, **packing), activation)


def _one_vector_each(x: mx.array, indices: mx.array) -> mx.array | None:
    """Return x (..., k, K), or (..., K) if all that are chosen share it, of x (..., M, K)."""
    if x.shape[-2] == 1 and indices.ndim:
        if x.shape[:-2] == indices.shape:
            return x.squeeze(-2)
        if x.shape[:-2] == (*indices.shape[:-1], 1):
            return x.squeeze((-3, -2))
    return None


def _gather_matmul(
    compile: Compile,
    x: mx.array,
    w: mx.array,
    scales: Part,
    biases: Part,
    indices: mx.array,
    **packing: Any,
) -> mx.array:
    vectors, weight = _one_vector_each(x, indices), _linear(x, w, scales, biases, **packing)[1]
    if vectors is None:
        return plain.gathered(x, weight, indices)
    return expert_products(vectors, indices, weight, compile=compile)[..., None, :]


def _stock_gather_matmul(
    x: mx.array, w: mx.array, scales: Part, biases: Part, indices: mx.array, **packing: Any
) -> mx.array:
    return plain.gathered(x, _linear(x, w, scales, biases, **packing)[1], indices)


def _gather_glu(
    compile: Compile, x: mx.array, indices: mx.array, *parts: Any, activation: str, **packing: Any
) -> mx.array:
    _, gate, up = _pair(x, *parts, **packing)
    return expert_gated_product(x, indices, gate, up, activation, compile=compile)


def _stock_gather_glu(
    x: mx.array, indices: mx.array, *parts: Any, activation: str, **packing: Any
) -> mx.array:
    _, gate, up = _pair(x, *parts, **packing)
    return plain.gated(plain.stock, x[..., None, :], gate, up, activation, indices)


def _gather_combine(
    compile: Compile,
    h: mx.array,
    indices: mx.array,
    weights: mx.array,
    *parts: Any,
    **packing: Any,
) -> mx.array:
    _, down = _linear(h, *parts, **packing)
    return expert_combination(h, indices, weights, down, compile=compile)


def _stock_gather_combine(
    h: mx.array, indices: mx.array, weights: mx.array, *parts: Any, **packing: Any
) -> mx.array:
    return plain.combination(plain.stock, h, indices, weights, _linear(h, *parts, **packing)[1])


def _expert_sides(
    arrays: tuple[Any, ...], packings: tuple[Packing | None, Packing]
) -> tuple[Weight | None, Weight]:
    """Return gate, or None, and up of four parts each."""
    gate, up = packings
    first = None if gate is None else _weight(arrays[:4], gate)
    return first, _weight(arrays[4:], up)


def _expert_glu(
    compile: Compile,
    x: mx.array,
    indices: mx.array,
    *arrays: Part,
    activation: str,
    packings: tuple[Packing | None, Packing],
) -> mx.array:
    sides = _expert_sides(arrays, packings)
    return expert_gated_product(x, indices, *sides, activation, compile=compile)


def stock_expert_glu(
    x: mx.array,
    indices: mx.array,
    *arrays: Part,
    activation: str,
    packings: tuple[Packing | None, Packing],
) -> mx.array:
    """Return the gated products of the chosen experts by stock's operations."""
    sides = _expert_sides(arrays, packings)
    return plain.gated(plain.stock, x[..., None, :], *sides, activation, indices)


def _expert_matmul(
    compile: Compile, h: mx.array, indices: mx.array, *down: Any, packing: Packing
) -> mx.array:
    return expert_products(h, indices, _weight(down, packing), compile=compile)


def stock_expert_matmul(h: mx.array, indices: mx.array, *down: Any, packing: Packing) -> mx.array:
    """Return the products of the chosen experts' own vectors by stock's operations."""
    return plain.product(plain.stock, h, _weight(down, packing), indices)


def _expert_combine(
    compile: Compile,
    h: mx.array,
    indices: mx.array,
    scores: mx.array,
    *down: Any,
    packing: Packing,
    keeps_dtype: bool = False,
) -> mx.array:
    weight = _weight(down, packing)
    dtype = result_dtype(h, weight) if keeps_dtype else None
    return expert_combination(h, indices, scores, weight, dtype=dtype, compile=compile)


def stock_expert_combine(
    h: mx.array,
    indices: mx.array,
    scores: mx.array,
    *down: Any,
    packing: Packing,
    keeps_dtype: bool = False,
) -> mx.array:
    """Return the weighted sum of those by stock's operations."""
    weight = _weight(down, packing)
    dtype = result_dtype(h, weight) if keeps_dtype else None
    return plain.combination(plain.stock, h, indices, scores, weight, dtype=dtype)


def _few_gathered(x: mx.array, w: mx.array, s: Part, b: Part, indices: mx.array) -> bool:
    return few_chosen(x, indices)


Function = Callable[..., mx.array]
#: x @ w.T [+ bias]
matmul: Function = Replayed(_matmul, _stock_matmul, few_rows)
#: act(x @ gate.T) * (x @ up.T)
glu: Function = Replayed(_glu, _stock_glu, few_rows)
#: x @ w[indices].T, where x (..., M, K) has the axes of the indices before M, or 1
gather_matmul: Function = Replayed(_gather_matmul, _stock_gather_matmul, _few_gathered)
#: the gated products of the chosen experts
gather_glu: Function = Replayed(_gather_glu, _stock_gather_glu, few_chosen)
#: the weighted sum of the chosen experts' products
gather_combine: Function = Replayed(_gather_combine, _stock_gather_combine, few_chosen)
#: the gated products of the chosen experts, with their biases, or without a gate
expert_glu: Function = Replayed(_expert_glu, stock_expert_glu, few_chosen)
#: the products of the chosen experts' own vectors, with their biases
expert_matmul: Function = Replayed(_expert_matmul, stock_expert_matmul, few_chosen)
#: the weighted sum of those
expert_combine: Function = Replayed(_expert_combine, stock_expert_combine, few_chosen)
