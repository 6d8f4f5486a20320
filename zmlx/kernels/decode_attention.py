"""Attention of one new token over a cache of keys and values, which it writes itself.

    q' = rope(norm(q)), k' = rope(norm(k));  keys[w] = k', values[w] = v
    s_j = scale * q' . keys[j],  p = softmax(s, sink),  out = sum_j p_j values[j]

`norm` is the RMSNorm over a head, `rope` the rotary position embedding of `mx.fast.rope`; both may
be left out. `j` runs over the first `length` positions of the buffers, or the last `window` of
them. `w`, `length` and the position come from an array on the device, so a recorded graph serves
every token.

It stands for what models do with `mx.fast.rms_norm`, `mx.fast.rope`, the update of a cache and
`mx.fast.scaled_dot_product_attention`: normalised and rotated heads are rounded to their dtype as
there, everything else is computed in float32.

Keys and values are read once for all query heads that share them. The positions are split over
threadgroups, whose sums are combined: on CUDA by the last threadgroup that arrives, in the same
launch; elsewhere, where no threadgroup may rely on what another one wrote, by a second launch.
CUDA's tensor cores compute it where queries and caches have the same 16 bits and their sizes fit
(`fits_tensor_cores`). In recordings, on devices of compute capability 9.0 and later, few blocks
along the positions are then a cluster, which adds up in each other's shared memory, to the same
numbers (`attention_clusters`).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.capability import has_tensor_cores
from zmlx.kernels.attention_launch import Layout, fits_tensor_cores, launched
from zmlx.kernels.attention_source import Variant
from zmlx.kernels.rope import Rope, bits, kind_of, rope_template
from zmlx.kernels.rows import SIMD, check_floats, check_vectors, wide

__all__ = ["Rope", "decode_attention", "decode_attention_reference"]


def decode_attention_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    state: mx.array,
    *,
    scale: float,
    q_norm: mx.array | None = None,
    k_norm: mx.array | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    sinks: mx.array | None = None,
    window: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute what `decode_attention` does with MLX's operations, without writing in place.

    The arguments are those of `decode_attention`.

    Returns:
        The output, and the caches after the write.
    """
    batch, capacity = keys.shape[0], keys.shape[2]
    write, length, position = mx.broadcast_to(state, (batch, 3)).moveaxis(-1, 0)
    if q_norm is not None:
        q = mx.fast.rms_norm(q, q_norm.astype(q.dtype), eps)
    if k_norm is not None:
        k = mx.fast.rms_norm(k, k_norm.astype(k.dtype), eps)
    if rope is not None:
        q, k = rope(q, position), rope(k, position)
    places = mx.arange(capacity)
    here = (places == write[:, None])[:, None, :, None]
    keys = mx.where(here, k[:, :, None], keys)
    values = mx.where(here, v[:, :, None], values)
    seen = places < length[:, None]
    if window is not None:
        seen &= places >= length[:, None] - window
    out = _attend(q, keys, values, seen[:, None, None], scale, sinks)
    return out, keys, values


def _attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    seen: mx.array,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    batch, kv_heads, _, size = keys.shape
    grouped = wide(q).reshape(batch, kv_heads, -1, size) * scale
    scores = grouped @ wide(keys).swapaxes(-1, -2)
    scores = mx.where(seen, scores, -mx.inf)
    if sinks is not None:
        column = mx.broadcast_to(wide(sinks).reshape(1, kv_heads, -1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., : keys.shape[2]]
    # Beyond the length a buffer may hold anything.
    held = mx.where(seen.swapaxes(-1, -2), wide(values), 0)
    return (weights @ held).reshape(batch, q.shape[1], -1).astype(q.dtype)


def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    state: mx.array,
    *,
    scale: float,
    q_norm: mx.array | None = None,
    k_norm: mx.array | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    sinks: mx.array | None = None,
    window: int | None = None,
    after: mx.array | None = None,
    splits: int | None = None,
    counters: mx.array | None = None,
    shape: Sequence[int] | None = None,
) -> mx.array:
    """Attend to a cache with one new token of each sequence, whose key and value it writes there.

    `keys` and `values` are changed **in place**, which MLX does not know: whatever reads them later
    has to depend on the result, and whatever read them before must be named in `after`, or be done.
    Nobody else may hold the same buffers. There is no gradient. On the CPU it runs in the emulator.

    Args:
        q: (B, Hq, D) float32, float16 or bfloat16, as the projection gives them; any strides.
        k: (B, Hkv, D) in the dtype of `keys`; any strides. Hq is a multiple of Hkv.
        v: (B, Hkv, Dv) in the dtype of `keys`; any strides.
        keys: (B, Hkv, C, D) float32, float16 or bfloat16, a row of D elements without gaps and a
            multiple of 16 bytes (of a buffer with gaps all results are NaN).
        values: (B, Hkv, C, Dv) in the same dtype, likewise.
        state: (3,) or (B, 3) int32: the index that is written, the length after the write (from 1
            to C, and more than the index), and the position for `rope`.
        scale: what scores are multiplied by.
        q_norm: (D,) weight of the RMSNorm of query heads; None for no norm.
        k_norm: (D,) weight of that of key heads.
        eps: added to the mean squares.
        rope: the rotary embedding; None for none.
        sinks: (Hq,) float, a score of each head that only takes its share of the softmax.
        window: attend only to the last `window` positions of the buffers, which must be in order.
        after: an array that is computed before this runs, and not read.
        splits: threadgroups for the positions of one sequence and head; by default what fills a
            large GPU, and no more than a cluster has where contexts are short. 2, 4 and 8 are one
            cluster where there may be clusters.
        counters: (N,) int32 zeros, 17 for each sequence and group of up to 8 query heads that share
            a kv head; they are zeros again afterwards. Two launches that may run at once, as those
            of one evaluation may if neither needs the other's result, need different ones; by
            default each launch has new ones, at the price of another kernel. Used on CUDA only.
        shape: of the result, if it is wanted in another of as many elements.

    Returns:
        (B, Hq, Dv) in the dtype of `q`.

    Raises:
        TypeError: a dtype that it does not take.
        ValueError: shapes that do not fit, or numbers out of range; the text says which.
        zmlx_autopatch.variables.VariableError: ZMLX_BACKEND asks for a reference, which could not
            write in place.
    """
    _check_arrays(q, k, v, keys, values, state)
    _check_options(q, keys, q_norm, k_norm, rope, sinks)
    backend = for_kernels(has_reference=False)
    numbers = (("SCALE", bits(scale)), ("EPS", bits(eps)), *rope_template(rope))
    tensor = (
        backend == "cuda"
        and fits_tensor_cores(q, keys, values.shape[3], (q_norm, k_norm), rope, numbers)
        and has_tensor_cores()
    )
    layout = Layout.of(q, keys, values.shape[3], state, window=window, splits=splits, tensor=tensor)
    variant = Variant(
        q_norm=q_norm is not None,
        k_norm=k_norm is not None,
        rope=kind_of(rope),
        multiplied=rope is not None and rope.multiplier != 1.0,
        sinks=sinks is not None,
        after=after is not None,
        form=layout.form(backend),
        tensor=tensor,
        cluster=layout.cluster,
    )
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "keys": keys,
        "values": values,
        "state": state,
        "q_weight": q_norm,
        "k_weight": k_norm,
        "freqs": None if rope is None else rope.freqs,
        "sinks": sinks,
        "counters": counters,
        "after": after,
    }
    return launched(variant, layout, backend, arrays, numbers, shape)


# ---- checks --------------------------------------------------------------------------------------


def _check_arrays(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    state: mx.array,
) -> None:
    check_floats(q=q, keys=keys)
    for name, array in (("k", k), ("v", v), ("values", values)):
        if array.dtype != keys.dtype:
            raise TypeError(f"{name} is {array.dtype} and keys are {keys.dtype}; cast one of them")
    if state.dtype != mx.int32:
        raise TypeError(f"state is {state.dtype}; it takes int32")
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"keys have shape {keys.shape} and values {values.shape}; they take "
            "(B, Hkv, C, D) and (B, Hkv, C, Dv)"
        )
    batch, kv_heads, capacity, size = keys.shape
    wanted = {
        "q": (q, (batch, "a multiple of Hkv", size)),
        "k": (k, (batch, kv_heads, size)),
        "v": (v, (batch, kv_heads, values.shape[3])),
    }
    for name, (array, shape) in wanted.items():
        heads_fit = array.ndim == 3 and kv_heads and array.shape[1] % kv_heads == 0
        if name != "q":
            heads_fit = heads_fit and array.shape[1] == kv_heads
        if not heads_fit or not array.shape[1] or array.shape[::2] != shape[::2]:
            raise ValueError(
                f"{name} has shape {array.shape}; with keys of {keys.shape} it takes "
                f"({', '.join(map(str, shape))})"
            )
    if state.shape not in ((3,), (batch, 3)):
        raise ValueError(f"state has shape {state.shape}; it takes (3,) or ({batch}, 3)")
    if not (batch and capacity):
        raise ValueError(f"keys of shape {keys.shape} hold nothing")
    _check_sizes(keys.dtype, (("keys", size), ("values", values.shape[3])))


def _check_sizes(dtype: mx.Dtype, sizes: Sequence[tuple[str, int]]) -> None:
    for name, size in sizes:
        if size * dtype.size % 16 or not SIMD <= size <= 256:
            raise ValueError(
                f"{name} have heads of {size} elements of {dtype}; they take 32 to 256 elements "
                "that fill a multiple of 16 bytes"
            )


def _check_options(
    q: mx.array,
    keys: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    rope: Rope | None,
    sinks: mx.array | None,
) -> None:
    size = keys.shape[3]
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_vectors(size, **{name: weight})
    if rope is not None and rope.dims > size:
        raise ValueError(f"rope rotates {rope.dims} elements; heads have {size}")
    if sinks is not None:
        check_floats(sinks=sinks)
        if sinks.shape != (q.shape[1],):
            raise ValueError(
                f"sinks has shape {sinks.shape}; {q.shape[1]} heads need ({q.shape[1]},)"
            )
