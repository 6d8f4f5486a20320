"""Decode attention as a kernel that a plan can try before it relies on it.

It is not in the registry: a kernel there is a function of its arrays, and this one writes into two
of them. The probe gives it copies, and looks at what is in them afterwards.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.kernels.decode_attention import decode_attention, decode_attention_reference
from zmlx.kernels.rope import Rope
from zmlx.kernels.spec import KernelSpec, Sample

_HEADS, _KV_HEADS, _CAPACITY, _LENGTH = 4, 2, 40, 33


def _launched(
    compile: object,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    norm: mx.array,
    *,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    del compile  # the attention chooses its form by itself, for where kernels run
    keys, values = keys + 0, values + 0
    out = decode_attention(q, k, v, keys, values, _state(), **_options(norm, scale))
    written = mx.depends([keys, values], [out])
    return out, written[0], written[1]


def _reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    norm: mx.array,
    *,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    # On a GPU products in float32 may be of fewer bits.
    with mx.stream(mx.cpu):
        return decode_attention_reference(q, k, v, keys, values, _state(), **_options(norm, scale))


def _options(norm: mx.array, scale: float) -> dict[str, Any]:
    return {"scale": scale, "q_norm": norm, "k_norm": norm, "rope": Rope(norm.size)}


def _state() -> mx.array:
    return mx.array([_LENGTH - 1, _LENGTH, _LENGTH - 1], mx.int32)


def _sample(*, head_dim: int, dtype: mx.Dtype) -> Sample:
    def normal(*shape: int, seed: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)

    cache = (1, _KV_HEADS, _CAPACITY, head_dim)
    heads = (normal(1, n, head_dim, seed=n) for n in (_HEADS, _KV_HEADS, _KV_HEADS + 1))
    q, k, v = (array[:, :n] for array, n in zip(heads, (_HEADS, _KV_HEADS, _KV_HEADS), strict=True))
    buffers = (normal(*cache, seed=8), normal(*cache, seed=9))
    norm = 1 + normal(head_dim, seed=10) / 4
    return Sample((q, k, v, *buffers, norm), {"scale": head_dim**-0.5})


DECODE_ATTENTION = KernelSpec(
    name="decode_attention",
    domain="attention",
    formula="keys[w] = rope(norm(k)), values[w] = v; softmax(scale rope(norm(q)) keys.T) values",
    shapes=("q (1, Hq, D) float", "k, v (1, Hkv, D) float", "keys, values (1, Hkv, C, D) float"),
    reference=_reference,
    sample=_sample,
    contract={"metal": "tighter", "cuda": "tighter"},
    fused=_launched,
    tolerance={"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3},
)
