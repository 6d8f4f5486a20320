"""Experts with biases, without gates, or with other activations than SiLU and GELU, on GPUs.

    expert_glu        h[t, j] = act(x[t] @ gate.T + bg) * (x[t] @ up.T + bu); without a gate
                      act(x[t] @ up.T + bu)
    expert_matmul     y[t, j] = h[t, j] @ down.T + bd
    expert_combine    y[t] = sum_j scores[t, j] * (h[t, j] @ down.T + bd)

each with the weights of the expert indices[t, j]. How a weight is stored is said in
`zmlx.kernels.quantized`. Sums run in float32, and each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.kernels.quantized import Packing, Part
from zmlx.kernels.rows import wide
from zmlx.kernels.spec import KernelSpec, Sample, register
from zmlx.kernels.vectors import Weight, fused, plain
from zmlx.kernels.vectors.replayed import Replayed
from zmlx.kernels.vectors.weights import result_dtype

_ROWS, _EXPERTS, _TOP_K, _TOKENS = 19, 3, 2, 2


def _weight(parts: tuple[Any, ...], packing: Packing) -> Weight:
    w, scales, biases, bias = parts
    mode, group_size, bits = packing
    return Weight(w, scales, biases, bias, mode, group_size, bits)


def _product(x: mx.array, weight: Weight, indices: mx.array) -> mx.array:
    y = plain.wide(x, weight, indices)
    return y if weight.bias is None else y + weight.bias[indices].astype(y.dtype)


def _glu_reference(
    x: mx.array,
    indices: mx.array,
    *arrays: Part,
    activation: str,
    packings: tuple[Packing | None, Packing],
) -> mx.array:
    vectors = wide(x)[..., None, :]
    gate = None if packings[0] is None else _weight(arrays[:4], packings[0])
    up = _weight(arrays[4:], packings[1])
    first = None if gate is None else _product(vectors, gate, indices)
    y = plain.activated(activation, first, _product(vectors, up, indices))
    return y.astype(result_dtype(x, *([] if gate is None else [gate]), up))


def _matmul_reference(h: mx.array, indices: mx.array, *down: Part, packing: Packing) -> mx.array:
    weight = _weight(down, packing)
    return _product(wide(h), weight, indices).astype(result_dtype(h, weight))


def _combine_reference(
    h: mx.array,
    indices: mx.array,
    scores: mx.array,
    *down: Part,
    packing: Packing,
    keeps_dtype: bool = False,
) -> mx.array:
    weight = _weight(down, packing)
    y = (_product(wide(h), weight, indices) * wide(scores)[..., None]).sum(axis=-2)
    dtype = result_dtype(h, weight)
    return y.astype(dtype if keeps_dtype else mx.result_type(mx.zeros((), dtype), scores))


def _normal(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _inputs(packing: Packing) -> int:
    return 3 * max(32, packing[1]) if packing[1] else 77


def _stored(packing: Packing, dtype: mx.Dtype, biased: bool, seed: int) -> tuple[Part, ...]:
    mode, group_size, bits = packing
    weight = _normal(_EXPERTS, _ROWS, _inputs(packing), dtype=mx.float32, seed=seed)
    bias = _normal(_EXPERTS, _ROWS, dtype=dtype, seed=seed + 9) if biased else None
    if mode == "dense":
        return weight.astype(dtype), None, None, bias
    w, scales, *biases = mx.quantize(weight, group_size, bits, mode)
    if not biases:
        return w, scales, None, bias
    return w, scales.astype(dtype), biases[0].astype(dtype), bias


def _indices() -> mx.array:
    return mx.array([[2, 0], [1, 2]], dtype=mx.uint32)


def _glu_sample(*, packing: Packing, dtype: mx.Dtype, activation: str, biased: bool) -> Sample:
    gated = activation != "relu2"
    gate = _stored(packing, dtype, biased, 1) if gated else (None,) * 4
    up = _stored(packing, dtype, biased, 2)
    x = _normal(_TOKENS, _inputs(packing), dtype=dtype, seed=4)
    options = {"activation": activation, "packings": (packing if gated else None, packing)}
    return Sample((x, _indices(), *gate, *up), options)


def _matmul_sample(*, packing: Packing, dtype: mx.Dtype, biased: bool) -> Sample:
    h = _normal(_TOKENS, _TOP_K, _inputs(packing), dtype=dtype, seed=4)
    return Sample((h, _indices(), *_stored(packing, dtype, biased, 3)), {"packing": packing})


def _combine_sample(*, packing: Packing, dtype: mx.Dtype, biased: bool) -> Sample:
    h, indices, *down = _matmul_sample(packing=packing, dtype=dtype, biased=biased).args
    scores = mx.array([[0.75, 0.25], [0.5, 0.5]], dtype=mx.float32)
    return Sample((h, indices, scores, *down), {"packing": packing, "keeps_dtype": biased})


_CONTRACT = {"metal": "tighter", "cuda": "tighter"}
_BIASED = {"biased": (False, True)}
_WEIGHT = "w (E, N, K) packed or float; scales and biases as of quantized_matmul; bias (E, N)"
_VECTORS = ("h (..., k, K) float", "indices (..., k) int")

EXPERT_GLU = register(
    KernelSpec(
        name="expert_glu",
        domain="moe",
        formula="h[t, j] = act(x[t] @ gate.T + bg) * (x[t] @ up.T + bu), of expert indices[t, j]",
        shapes=(
            "x (..., K) float",
            "indices (..., k) int",
            "of gate, which may be missing, and up: " + _WEIGHT,
            "h (..., k, N)",
        ),
        reference=_glu_reference,
        sample=_glu_sample,
        contract=_CONTRACT,
        fused=fused.expert_glu,
        values={
            "activation": ("silu", "gelu", "gelu_tanh", "clipped_swiglu", "relu2"),
            **_BIASED,
        },
    )
)

EXPERT_MATMUL = register(
    KernelSpec(
        name="expert_matmul",
        domain="moe",
        formula="y[t, j] = h[t, j] @ down.T + bias, of expert indices[t, j]",
        shapes=(*_VECTORS, _WEIGHT, "y (..., k, N)"),
        reference=_matmul_reference,
        sample=_matmul_sample,
        contract=_CONTRACT,
        fused=fused.expert_matmul,
        values=_BIASED,
    )
)

EXPERT_COMBINE = register(
    KernelSpec(
        name="expert_combine",
        domain="moe",
        formula="y[t] = sum_j scores[t, j] * (h[t, j] @ down.T + bias), of expert indices[t, j]",
        shapes=(*_VECTORS, "scores (..., k) float", _WEIGHT, "y (..., N)"),
        reference=_combine_reference,
        sample=_combine_sample,
        contract=_CONTRACT,
        fused=fused.expert_combine,
        values=_BIASED,
    )
)


#: (x, indices, gate's four parts, up's, down's, by name activation and packings) -> (..., k, N)
Outputs = Callable[..., mx.array]


def expert_outputs(backend: str) -> Outputs:
    """Return what computes `expert_glu` and then `expert_matmul`, as one call that is replayed.

    It takes x (..., K), indices (..., k), w, scales, biases and bias of gate, up and down (None for
    what is missing), and by name `activation` and `packings` of the three (None for no gate).

    Raises:
        KernelUnavailable: the backend has no kernels.
    """
    glu, matmul = (spec.implementation(backend) for spec in (EXPERT_GLU, EXPERT_MATMUL))

    def both(first: Any, second: Any) -> Callable[..., mx.array]:
        def outputs(
            x: mx.array,
            indices: mx.array,
            *arrays: Part,
            activation: str,
            packings: tuple[Packing | None, Packing, Packing],
        ) -> mx.array:
            h = first(x, indices, *arrays[:8], activation=activation, packings=packings[:2])
            return second(h, indices, *arrays[8:], packing=packings[2])  # type: ignore[no-any-return]

        return outputs

    stock = both(fused.stock_expert_glu, fused.stock_expert_matmul)
    return _replayed(both(glu, matmul), stock, backend)


def expert_sum(backend: str) -> Outputs:
    """Return the same with `expert_combine` in place of `expert_matmul`.

    It takes scores (..., k) after the indices, and `keeps_dtype` by name.

    Raises:
        KernelUnavailable: the backend has no kernels.
    """
    glu, combine = (spec.implementation(backend) for spec in (EXPERT_GLU, EXPERT_COMBINE))

    def both(first: Any, second: Any) -> Callable[..., mx.array]:
        def weighted(
            x: mx.array,
            indices: mx.array,
            scores: mx.array,
            *arrays: Part,
            activation: str,
            packings: tuple[Packing | None, Packing, Packing],
            keeps_dtype: bool,
        ) -> mx.array:
            h = first(x, indices, *arrays[:8], activation=activation, packings=packings[:2])
            return second(  # type: ignore[no-any-return]
                h, indices, scores, *arrays[8:], packing=packings[2], keeps_dtype=keeps_dtype
            )

        return weighted

    stock = both(fused.stock_expert_glu, fused.stock_expert_combine)
    return _replayed(both(glu, combine), stock, backend)


def _replayed(launched: Outputs, stock: Outputs, backend: str) -> Outputs:
    def fused_ones(_: str, *arrays: Part, **options: Any) -> mx.array:
        return launched(*arrays, **options)

    return partial(Replayed(fused_ones, stock, fused.few_chosen), backend)
