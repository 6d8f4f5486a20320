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
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher
from zmlx.kernels import attention_source
from zmlx.kernels.attention_source import CHUNK, THREADS, Variant
from zmlx.kernels.rows import FLOATS, SIMD, check_floats, check_vectors, wide

#: Threadgroups among which positions are split: about one for each multiprocessor of a large GPU.
THREADGROUPS = 132
#: Fewest positions that are worth a threadgroup.
LEAST = 32
#: Most query heads of a threadgroup: their sums are held in registers.
HEADS = 8
#: Bytes of threadgroup memory in which the sums of simdgroups meet.
_MEETING = 16384
#: Bytes of sums that one threadgroup adds up at most, if it need not.
_FLAT = 49152
#: Counters of those who arrive: of all, and of up to sixteen times sixteen threadgroups.
_COUNTERS_OF_A_ROW = 17


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary position embedding, as `mx.fast.rope` computes it.

    Attributes:
        dims: leading elements of a head that are rotated; even.
        traditional: rotate neighbours, not the two halves.
        base: angles are position * base^(-2i/dims); None where `freqs` is given.
        scale: what positions are multiplied by.
        freqs: (dims / 2,) float32, what positions are divided by, in place of `base`.
        multiplier: a number that the rotated elements are multiplied by first, in their dtype, as
            YaRN does.

    Raises:
        ValueError: `dims` is odd or not positive, both or neither of `base` and `freqs` are given,
            `base` is not positive, or `freqs` has another shape.
    """

    dims: int
    traditional: bool = False
    base: float | None = 10000.0
    scale: float = 1.0
    freqs: mx.array | None = None
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.dims < 2 or self.dims % 2:
            raise ValueError(f"rope rotates pairs; dims={self.dims} must be even and positive")
        if (self.base is None) == (self.freqs is None):
            raise ValueError("rope takes either a base or freqs; give one, and None for the other")
        if self.base is not None and self.base <= 0:
            raise ValueError(f"rope: base={self.base} must be positive")
        if self.freqs is not None and self.freqs.shape != (self.dims // 2,):
            raise ValueError(
                f"rope: freqs has shape {self.freqs.shape}; dims={self.dims} needs "
                f"({self.dims // 2},)"
            )

    def __call__(self, heads: mx.array, position: mx.array) -> mx.array:
        """Rotate heads (B, H, D) of one token, with MLX's operations; `position` is (B,) or ()."""
        if self.multiplier != 1.0:
            turned = self.multiplier * heads[..., : self.dims]
            heads = mx.concatenate([turned, heads[..., self.dims :]], axis=-1)
        rotated = mx.fast.rope(
            heads[:, :, None],
            self.dims,
            traditional=self.traditional,
            base=self.base,
            scale=self.scale,
            offset=position,
            freqs=self.freqs,
        )
        return rotated.squeeze(2)


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
            large GPU.
        counters: int32 zeros, at least 16 and one for each sequence and group of heads; they are
            zeros again afterwards. Two launches that may run at once need different ones; by
            default those of one thread and stream share theirs. Used on CUDA only.

    Returns:
        (B, Hq, Dv) in the dtype of `q`.

    Raises:
        TypeError: a dtype that it does not take.
        ValueError: shapes that do not fit, or numbers out of range; the text says which.
        zmlx_autopatch.variables.VariableError: ZMLX_BACKEND asks for a reference, which could not
            write in place.
    """
    _check_arrays(q, k, v, keys, values, state)
    _check_options(q, k, keys, q_norm, k_norm, rope, sinks, window)
    backend = for_kernels(has_reference=False)
    layout = _Layout.of(q, keys, values, window, splits)
    joined = backend == "cuda" and layout.splits > 1
    variant = Variant(
        q_norm=q_norm is not None,
        k_norm=k_norm is not None,
        rope="" if rope is None else "base" if rope.freqs is None else "freqs",
        multiplied=rope is not None and rope.multiplier != 1.0,
        sinks=sinks is not None,
        after=after is not None,
        form="whole" if layout.splits == 1 else "joined" if joined else "parts",
    )
    if joined and counters is None:
        counters = _counters(layout.rows)
    if joined and counters is not None:
        _check_counters(counters, layout.rows)
    given: dict[str, mx.array | None] = {
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
    template = (
        *layout.template,
        ("STEP", 0 if state.ndim == 1 else 3),
        ("SCALE", _bits(scale)),
        ("EPS", _bits(eps)),
        *_rope_template(rope),
    )
    shapes = {"out": layout.out, "sums": layout.sums}
    dtypes = {"out": q.dtype, "sums": mx.float32}
    found = launcher(_definition(variant), backend)(
        inputs=[array for name in variant.inputs if (array := given[name]) is not None],
        output_shapes=[shapes[name] for name in variant.outputs],
        output_dtypes=[dtypes[name] for name in variant.outputs],
        grid=(layout.splits * THREADS, *layout.grid),
        threadgroup=(THREADS, 1, 1),
        template=template,
    )
    if variant.form != "parts":
        return found[0]
    [out] = launcher(_combination(), backend)(
        inputs=[found[0], state],
        output_shapes=[layout.out],
        output_dtypes=[q.dtype],
        grid=(layout.heads * THREADS, *layout.grid),
        threadgroup=(THREADS, 1, 1),
        template=template,
    )
    return out


@dataclass(frozen=True)
class _Layout:
    """How the work is spread.

    Attributes:
        batch: sequences.
        kv_heads: heads of the cache.
        shared: query heads for each of them.
        heads: query heads of a threadgroup.
        splits: threadgroups along the positions.
        size: elements of a key.
        value_size: elements of a value.
        window: most positions that are read, 0 for all.
        dtype: of the cache.
        q_dtype: of queries and of the result.
    """

    batch: int
    kv_heads: int
    shared: int
    heads: int
    splits: int
    size: int
    value_size: int
    window: int
    dtype: mx.Dtype
    q_dtype: mx.Dtype

    @classmethod
    def of(
        cls,
        q: mx.array,
        keys: mx.array,
        values: mx.array,
        window: int | None,
        splits: int | None,
    ) -> _Layout:
        batch, kv_heads, capacity, size = keys.shape
        shared = q.shape[1] // kv_heads
        groups = -(-shared // HEADS)
        heads = -(-shared // groups)
        groups = -(-shared // heads)
        most = -(-min(capacity, window or capacity) // LEAST)
        if splits is None:
            splits = max(1, THREADGROUPS // (batch * kv_heads * groups))
        elif not 1 <= splits <= CHUNK - 2:
            raise ValueError(f"splits={splits}; give a number from 1 to {CHUNK - 2}")
        return cls(
            batch=batch,
            kv_heads=kv_heads,
            shared=shared,
            heads=heads,
            splits=min(splits, most),
            size=size,
            value_size=values.shape[3],
            window=window or 0,
            dtype=keys.dtype,
            q_dtype=q.dtype,
        )

    @property
    def groups(self) -> int:
        """Groups of query heads that share one kv head."""
        return -(-self.shared // self.heads)

    @property
    def grid(self) -> tuple[int, int]:
        """Threadgroups along y and z."""
        return self.kv_heads * self.groups, self.batch

    @property
    def rows(self) -> int:
        """Sequences times groups of heads: what splits are combined in."""
        return self.batch * self.kv_heads * self.groups

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.batch, self.kv_heads * self.shared, self.value_size

    @property
    def sums(self) -> tuple[int, ...]:
        """Shape of the parts: sums over values, the maximum, the sum of weights, two unused."""
        return self.rows, self.splits, self.heads, self.value_size + 4

    @property
    def template(self) -> tuple[tuple[str, mx.Dtype | int], ...]:
        """Values of the sources' templates."""
        padded = _power_of_two(self.heads)
        # As many heads as fit meet at once.
        simdgroups = THREADS // SIMD
        meeting = padded
        while meeting > 1 and simdgroups * meeting * self.value_size * 4 > _MEETING:
            meeting //= 2
        staged = (self.heads + 1) * self.size
        k_lanes, k_vectors = _lanes(self.size * self.dtype.size // 16)
        v_lanes, v_vectors = _lanes(self.value_size * self.dtype.size // 16)
        numbers = {
            "THREADS": THREADS,
            "CHUNK": CHUNK,
            "AHEAD": max(1, attention_source.AHEAD // max(k_vectors, v_vectors)),
            "D": self.size,
            "DV": self.value_size,
            "K_LANES": k_lanes,
            "K_VECTORS": k_vectors,
            "V_LANES": v_lanes,
            "V_VECTORS": v_vectors,
            "KV_HEADS": self.kv_heads,
            "SHARED": self.shared,
            "GROUPS": self.groups,
            "HEADS": self.heads,
            "PADDED": padded,
            "PASS": meeting,
            "SCRATCH": -(-max(staged, simdgroups * meeting * self.value_size) // 4) * 4,
            "SPLITS": self.splits,
            "LEAST": LEAST,
            "WINDOW": self.window,
            "FLAT": max(2, _FLAT // (4 * self.heads * self.value_size)),
            "COUNTERS": _COUNTERS_OF_A_ROW,
        }
        return (("T", self.dtype), ("Q", self.q_dtype), *numbers.items())


def _lanes(vectors: int) -> tuple[int, int]:
    """Return how many lanes read a row of so many vectors, and how many vectors each reads."""
    lanes = min(SIMD, _power_of_two(vectors))
    return lanes, -(-vectors // lanes)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _bits(number: float) -> int:
    """Return a float32's bits as the int that a template takes: numbers as inputs cost more."""
    value: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return value


def _rope_template(rope: Rope | None) -> tuple[tuple[str, int], ...]:
    if rope is None:
        return ()
    return (
        ("DIMS", rope.dims),
        ("TRADITIONAL", int(rope.traditional)),
        ("BASE", 0 if rope.base is None else _bits(math.log2(rope.base))),
        ("ROPE_SCALE", _bits(rope.scale)),
        ("MULTIPLIER", _bits(rope.multiplier)),
    )


@cache
def _definition(variant: Variant) -> Definition:
    return Definition(
        name="decode_attention",
        input_names=variant.inputs,
        output_names=variant.outputs,
        source=attention_source.attention(variant),
        header=attention_source.HEADER,
        ensure_row_contiguous=False,
        updated_inputs=variant.updated,
        partial_outputs=variant.form != "whole",
    )


@cache
def _combination() -> Definition:
    return Definition(
        name="decode_attention_combination",
        input_names=("sums", "state"),
        output_names=("out",),
        source=attention_source.combination(),
    )


class _Counters(threading.local):
    """Counters of one thread, for each stream and number: streams can be compared, not hashed."""

    def __init__(self) -> None:
        self.made: list[tuple[mx.Stream, mx.array]] = []


_COUNTERS = _Counters()


def _counters(number: int) -> mx.array:
    """Return zeros for this thread and stream; small arrays would lie in memory of the host."""
    stream = mx.default_stream(mx.default_device())
    for of, counters in _COUNTERS.made:
        if of == stream and counters.size >= number:
            return counters
    made = mx.zeros((max(1024, number),), mx.int32)
    mx.eval(made)
    _COUNTERS.made.append((stream, made))
    return made


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
    k: mx.array,
    keys: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    rope: Rope | None,
    sinks: mx.array | None,
    window: int | None,
) -> None:
    size = keys.shape[3]
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_vectors(size, **{name: weight})
    if rope is not None and rope.dims > size:
        raise ValueError(f"rope rotates {rope.dims} elements; heads have {size}")
    if rope is not None and rope.freqs is not None and rope.freqs.dtype not in FLOATS:
        raise TypeError(f"rope: freqs is {rope.freqs.dtype}; it takes float32")
    if sinks is not None:
        check_floats(sinks=sinks)
        if sinks.shape != (q.shape[1],):
            raise ValueError(
                f"sinks has shape {sinks.shape}; {q.shape[1]} heads need ({q.shape[1]},)"
            )
    if window is not None and window < 1:
        raise ValueError(f"window={window}; give a positive number, or None")


def _check_counters(counters: mx.array, rows: int) -> None:
    if counters.dtype != mx.int32 or counters.ndim != 1 or counters.size < max(16, rows):
        raise ValueError(
            f"counters are {counters.dtype} {counters.shape}; {rows} groups need at least "
            f"{max(16, rows)} int32"
        )
