"""Attention of one new token over a cache of latents (MLA), which it writes itself.

    c' = norm(c),  r' = rope(r),  p' = rope(p);  latents[w] = c', rope_keys[w] = r'
    s_j = scale * (q . latents[j] + p' . rope_keys[j]),  out = sum_j softmax(s)_j latents[j]

This is the decode step of DeepSeek's multi-head latent attention with the key projection absorbed
into the query: `q` are query heads in the space of latents, `p` their rotated parts, `c` and `r`
the new token's latent and rotated key, which all heads share. mlx-lm computes the second product
first, rounds it to the dtype and gives it to `mx.fast.scaled_dot_product_attention` as a mask; here
all of it is in float32.

Otherwise it is as `decode_attention`, of which `state`, `after`, `splits` and `counters` are known.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.capability import has_tensor_cores
from zmlx.kernels.attention_launch import Layout, latents_fit_tensor_cores, launched
from zmlx.kernels.attention_source import Variant
from zmlx.kernels.rope import Rope, bits, kind_of, rope_template
from zmlx.kernels.rows import SIMD, check_floats, check_vectors, wide

#: Most elements of a latent, and of the rotated part of a key, that threadgroup memory holds.
LATENT = 512
ROPE_KEY = 64


def decode_attention_latent_reference(
    q: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    k_pe: mx.array,
    latents: mx.array,
    rope_keys: mx.array,
    state: mx.array,
    *,
    scale: float,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute what `decode_attention_latent` does with MLX's operations, not in place.

    The arguments are those of `decode_attention_latent`.

    Returns:
        The output, and the caches after the write.
    """
    batch, _, capacity, _ = latents.shape
    write, length, position = mx.broadcast_to(state, (batch, 3)).moveaxis(-1, 0)
    if norm is not None:
        latent = mx.fast.rms_norm(latent, norm.astype(latent.dtype), eps)
    k_pe = k_pe[:, None]
    if rope is not None:
        q_pe, k_pe = rope(q_pe, position), rope(k_pe, position)
    places = mx.arange(capacity)
    here = (places == write[:, None])[:, None, :, None]
    latents = mx.where(here, latent[:, None, None], latents)
    rope_keys = mx.where(here, k_pe[:, :, None], rope_keys)
    seen = (places < length[:, None])[:, None]
    # Beyond the length a buffer may hold anything.
    held = mx.where(seen.swapaxes(-1, -2), wide(latents[:, 0]), 0)
    scores = wide(q) @ held.swapaxes(-1, -2)
    scores += wide(q_pe) @ wide(rope_keys[:, 0]).swapaxes(-1, -2)
    weights = mx.softmax(mx.where(seen, scores * scale, -mx.inf), axis=-1)
    return (weights @ held).astype(q.dtype), latents, rope_keys


def decode_attention_latent(
    q: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    k_pe: mx.array,
    latents: mx.array,
    rope_keys: mx.array,
    state: mx.array,
    *,
    scale: float,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    after: mx.array | None = None,
    splits: int | None = None,
    counters: mx.array | None = None,
    shape: Sequence[int] | None = None,
) -> mx.array:
    """Attend to a cache of latents with one new token of each sequence, which it writes there.

    `latents` and `rope_keys` are changed **in place**; what `decode_attention` says of that holds.

    Args:
        q: (B, Hq, R) float32, float16 or bfloat16: query heads times the absorbed projection.
        q_pe: (B, Hq, P) in the dtype of `q`: the parts of query heads that are rotated.
        latent: (B, R) in the dtype of `latents`: the new latent, before its norm.
        k_pe: (B, P) in the dtype of `latents`: the part of the new key that is rotated.
        latents: (B, 1, C, R) float32, float16 or bfloat16, R at most 512.
        rope_keys: (B, 1, C, P) in the same dtype, P at most 64. Of both, rows have no gaps and are
            multiples of 16 bytes (of buffers with gaps all results are NaN).
        state: (3,) or (B, 3) int32: the index that is written, the length after the write, and the
            position for `rope`.
        scale: what scores are multiplied by.
        norm: (R,) weight of the RMSNorm of the new latent; None for no norm.
        eps: added to its mean square.
        rope: the rotary embedding of `q_pe` and `k_pe`; None for none.
        after: an array that is computed before this runs, and not read.
        splits: threadgroups for the positions of one sequence and group of heads.
        counters: as of `decode_attention`.
        shape: of the result, if it is wanted in another of as many elements.

    Returns:
        (B, Hq, R) in the dtype of `q`.

    Raises:
        TypeError: a dtype that it does not take.
        ValueError: shapes that do not fit, or numbers out of range; the text says which.
        zmlx_autopatch.variables.VariableError: ZMLX_BACKEND asks for a reference.
    """
    _check_arrays(q, q_pe, latent, k_pe, latents, rope_keys, state)
    if norm is not None:
        check_vectors(latents.shape[3], norm=norm)
    if rope is not None and rope.dims > rope_keys.shape[3]:
        raise ValueError(f"rope rotates {rope.dims} elements; there are {rope_keys.shape[3]}")
    backend = for_kernels(has_reference=False)
    size, rope_size = latents.shape[3], rope_keys.shape[3]
    numbers = (("SCALE", bits(scale)), ("EPS", bits(eps)), *rope_template(rope))
    tensor = (
        backend == "cuda"
        and latents_fit_tensor_cores(q, latents, rope, numbers)
        and has_tensor_cores()
    )
    layout = Layout.of(q, latents, size, state, rope_size=rope_size, splits=splits, tensor=tensor)
    variant = Variant(
        q_norm=False,
        k_norm=norm is not None,
        rope=kind_of(rope),
        multiplied=rope is not None and rope.multiplier != 1.0,
        sinks=False,
        after=after is not None,
        form=layout.form(backend),
        latent=True,
        tensor=tensor,
        cluster=layout.cluster,
    )
    arrays = {
        "q": q,
        "q_pe": q_pe,
        "k": latent,
        "k_pe": k_pe,
        "keys": latents,
        "rope_keys": rope_keys,
        "state": state,
        "k_weight": norm,
        "freqs": None if rope is None else rope.freqs,
        "counters": counters,
        "after": after,
    }
    return launched(variant, layout, backend, arrays, numbers, shape)


def _check_arrays(
    q: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    k_pe: mx.array,
    latents: mx.array,
    rope_keys: mx.array,
    state: mx.array,
) -> None:
    check_floats(q=q, latents=latents)
    if q_pe.dtype != q.dtype:
        raise TypeError(f"q_pe is {q_pe.dtype} and q is {q.dtype}; cast one of them")
    for name, array in (("latent", latent), ("k_pe", k_pe), ("rope_keys", rope_keys)):
        if array.dtype != latents.dtype:
            raise TypeError(
                f"{name} is {array.dtype} and latents are {latents.dtype}; cast one of them"
            )
    if state.dtype != mx.int32:
        raise TypeError(f"state is {state.dtype}; it takes int32")
    if latents.ndim != 4 or latents.shape[1] != 1 or not latents.size:
        raise ValueError(f"latents have shape {latents.shape}; they take (B, 1, C, R)")
    batch, _, capacity, size = latents.shape
    if rope_keys.ndim != 4 or rope_keys.shape[:3] != latents.shape[:3]:
        raise ValueError(
            f"rope_keys have shape {rope_keys.shape}; with latents of {latents.shape} they take "
            f"({batch}, 1, {capacity}, P)"
        )
    if q.ndim != 3 or not q.shape[1] or q.shape[::2] != (batch, size):
        raise ValueError(f"q has shape {q.shape}; it takes ({batch}, Hq, {size})")
    rotated = rope_keys.shape[3]
    wanted: dict[str, tuple[mx.array, list[tuple[int, ...]]]] = {
        "q_pe": (q_pe, [(batch, q.shape[1], rotated)]),
        "latent": (latent, [(batch, size)]),
        "k_pe": (k_pe, [(batch, rotated)]),
        "state": (state, [(3,), (batch, 3)]),
    }
    for name, (array, shapes) in wanted.items():
        if array.shape not in shapes:
            raise ValueError(
                f"{name} has shape {array.shape}; it takes {' or '.join(map(str, shapes))}"
            )
    for name, length, most in (("latents", size, LATENT), ("rope_keys", rotated, ROPE_KEY)):
        if length * latents.dtype.size % 16 or not length <= most:
            raise ValueError(
                f"{name} have {length} elements of {latents.dtype}; they take up to {most} that "
                "fill a multiple of 16 bytes"
            )
    if size < SIMD:
        raise ValueError(f"latents have {size} elements; they take {SIMD} to {LATENT}")
