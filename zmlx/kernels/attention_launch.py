"""How attention for one new token is spread over threadgroups, and launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from zmlx.backend.capability import architecture
from zmlx.backend.cuda.launching import takes_clusters
from zmlx.backend.definition import CudaBody, Definition
from zmlx.backend.launch import launcher
from zmlx.kernels import (
    attention_latent_source,
    attention_latent_tensor_source,
    attention_source,
    attention_tensor_source,
)
from zmlx.kernels.attention_clusters import SIZES
from zmlx.kernels.attention_latent_tensor_source import MOST_THREADS, SLICE
from zmlx.kernels.attention_source import AHEAD, CHUNK, THREADS, Variant
from zmlx.kernels.attention_tensor_source import WARPS
from zmlx.kernels.rope import Rope
from zmlx.kernels.rows import SIMD

#: Threadgroups among which positions are split: one for each multiprocessor of a large GPU.
THREADGROUPS = 132
#: Fewest positions that are worth a threadgroup.
LEAST = 32
#: Most query heads of a threadgroup: their sums are held in registers.
HEADS = 8
#: Bytes of threadgroup memory in which the sums of simdgroups meet.
_MEETING = 16384
#: Bytes of sums that one threadgroup adds up at most, if it need not.
_FLAT = 49152
#: On tensor cores: most elements of keys and values, of which registers hold whole tiles.
_TENSOR_SIZE, _TENSOR_VALUE_SIZE = 192, 128
#: Positions of a tile there of latents, of which each warp of a block has some elements.
_LATENT_TILE = 32
#: Tiles that are worth a block there: with fewer there are more parts to add up.
_TILES = 4
#: Up to this capacity tiles are asked for before it is known which hold anything.
_AT_ONCE = 1024
#: Most positions that one cluster works on by default, of heads, of latents, and of both where
#: there are too many rows for clusters of eight: with more, more blocks are faster (DECODE.md).
CLUSTERED, CLUSTERED_LATENTS, CLUSTERED_FEW = 2048, 1024, 512
#: Most elements there for which a block has room for what others of its cluster give it.
_CLUSTER_SIZE = 128
#: Counters of those who arrive: of all, and of up to sixteen times sixteen threadgroups.
_COUNTERS_OF_A_ROW = 17
#: Counters that are made, which is enough for most; small arrays would lie in memory of the host.
COUNTERS = 4096


@dataclass(frozen=True)
class Layout:
    """How the work is spread.

    Attributes:
        batch: sequences.
        kv_heads: heads of the cache.
        shared: query heads for each of them.
        heads: query heads of a threadgroup.
        splits: threadgroups along the positions.
        size: elements of a key.
        value_size: elements of a value.
        rope_size: elements of the part of a key that lies apart, 0 where there is none.
        window: most positions that are read, 0 for all.
        dtype: of the cache.
        q_dtype: of queries and of the result.
        state_step: numbers from one sequence's state to the next one's.
        tile: positions that a warp, or for latents a block, has at a time on CUDA's tensor cores;
            0 elsewhere.
        at_once: the first tiles are read without waiting for the state.
        cluster: threadgroups of a cluster: all those along the positions, or 1 without clusters.
    """

    batch: int
    kv_heads: int
    shared: int
    heads: int
    splits: int
    size: int
    value_size: int
    rope_size: int
    window: int
    dtype: mx.Dtype
    q_dtype: mx.Dtype
    state_step: int
    tile: int = 0
    at_once: bool = False
    cluster: int = 1

    @classmethod
    def of(
        cls,
        q: mx.array,
        keys: mx.array,
        value_size: int,
        state: mx.array,
        *,
        rope_size: int = 0,
        window: int | None = None,
        splits: int | None = None,
        tensor: bool = False,
    ) -> Layout:
        """Lay out a call, for CUDA's tensor cores if `tensor`.

        On a device that has clusters there are as many splits where they may be one as where they
        may not, so that results are the same (`may_cluster`).

        Raises:
            ValueError: `splits` or `window` is out of range.
        """
        if window is not None and window < 1:
            raise ValueError(f"window={window}; give a positive number, or None")
        batch, kv_heads, capacity, size = keys.shape
        shared = q.shape[1] // kv_heads
        groups = -(-shared // HEADS)
        heads = -(-shared // groups)
        # A kernel is made for its splits: there are few numbers of them, although buffers grow.
        room = _power_of_two(capacity)
        seen = min(room, window or room)
        tile = _tile(seen, max(size, value_size), rope_size) if tensor else 0
        least = tile or LEAST
        fits = tensor and (rope_size > 0 or max(size, value_size) <= _CLUSTER_SIZE)
        if splits is None:
            least = (2 if rope_size else _TILES) * tile or LEAST
            splits = max(1, min(THREADGROUPS // (batch * kv_heads * groups), -(-seen // least)))
            most = CLUSTERED_LATENTS if rope_size else CLUSTERED
            fits &= seen <= (most if splits >= SIZES[-1] else CLUSTERED_FEW)
            if fits and has_clusters():
                splits = max(size for size in (1, *SIZES) if size <= splits)
        elif not 1 <= splits <= CHUNK - 2:
            raise ValueError(f"splits={splits}; give a number from 1 to {CHUNK - 2}")
        splits = min(splits, -(-seen // least))
        return cls(
            batch=batch,
            kv_heads=kv_heads,
            shared=shared,
            heads=heads,
            splits=splits,
            size=size,
            value_size=value_size,
            rope_size=rope_size,
            window=window or 0,
            dtype=keys.dtype,
            q_dtype=q.dtype,
            state_step=0 if state.ndim == 1 else 3,
            tile=tile,
            at_once=tensor and not window and room <= _AT_ONCE,
            cluster=splits if fits and splits in SIZES and may_cluster() else 1,
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
        """Sequences times groups of heads: what parts are added up in."""
        return self.batch * self.kv_heads * self.groups

    @property
    def counters(self) -> int:
        """How many counters there must be."""
        return self.rows * _COUNTERS_OF_A_ROW

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.batch, self.kv_heads * self.shared, self.value_size

    @property
    def sums(self) -> tuple[int, ...]:
        """Shape of the parts: sums over values, the maximum, the sum of weights, two unused."""
        return self.rows, self.splits, self.heads, self.value_size + 4

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        if self.tile and self.rope_size:
            return SIMD * (-(-self.size // SLICE) + 1)
        return SIMD * WARPS if self.tile else THREADS

    @property
    def template(self) -> tuple[tuple[str, mx.Dtype | int], ...]:
        """Values of the sources' templates."""
        numbers = self._tensor_numbers if self.tile else self._numbers
        common = {
            "D": self.size,
            "DV": self.value_size,
            "KV_HEADS": self.kv_heads,
            "SHARED": self.shared,
            "GROUPS": self.groups,
            "HEADS": self.heads,
            "SPLITS": self.splits,
            "WINDOW": self.window,
            "COUNTERS": _COUNTERS_OF_A_ROW,
            "STEP": self.state_step,
        }
        return (("T", self.dtype), ("Q", self.q_dtype), *common.items(), *numbers.items())

    @property
    def _tensor_numbers(self) -> dict[str, int]:
        return {
            **({"E": self.rope_size} if self.rope_size else {"WARPS": WARPS}),
            "KEYS": self.tile,
            "AT_ONCE": int(self.at_once),
            "BATCHED": int(self.batch > 1),
        }

    @property
    def _numbers(self) -> dict[str, int]:
        padded = _power_of_two(self.heads)
        simdgroups = THREADS // SIMD
        # As many heads as there is room for meet at once.
        meeting = padded
        while meeting > 1 and simdgroups * meeting * self.value_size * 4 > _MEETING:
            meeting //= 2
        a_load = 16 // self.dtype.size
        k_lanes, k_vectors = _lanes(self.size // a_load)
        v_lanes, v_vectors = _lanes(self.value_size // a_load)
        p_vectors = -(-self.rope_size // (a_load * k_lanes))
        query = self.size + self.rope_size
        if self.rope_size:  # whole vectors for all lanes
            query = k_vectors * k_lanes * a_load + self.rope_size
        staged = self.heads * query + self.size + self.rope_size
        return {
            "THREADS": THREADS,
            "CHUNK": CHUNK,
            # Queries in threadgroup memory are read less often if they meet more rows.
            "AHEAD": max(1, (2 * AHEAD if self.rope_size else AHEAD) // k_vectors),
            "V_AHEAD": max(1, AHEAD // v_vectors),
            "E": self.rope_size,
            "K_LANES": k_lanes,
            "K_VECTORS": k_vectors,
            "P_VECTORS": p_vectors,
            "V_LANES": v_lanes,
            "V_VECTORS": v_vectors,
            "PADDED": padded,
            "PASS": meeting,
            "SCRATCH": -(-max(staged, simdgroups * meeting * self.value_size) // 4) * 4,
            "LEAST": LEAST,
            "FLAT": max(2, _FLAT // (4 * self.heads * self.value_size)),
        }

    def form(self, backend: str) -> str:
        """Return which form of the source a backend runs (`Variant.form`)."""
        if self.splits == self.cluster:
            return "whole"
        return "joined" if backend == "cuda" else "parts"


def launched(
    variant: Variant,
    layout: Layout,
    backend: str,
    arrays: Mapping[str, mx.array | None],
    numbers: tuple[tuple[str, int], ...],
    shape: Sequence[int] | None = None,
) -> mx.array:
    """Launch attention.

    Args:
        variant: which source.
        layout: how it is spread.
        backend: where it runs.
        arrays: input -> array, None where the variant has no such input or, for counters, where
            new ones are to be made.
        numbers: further values of the template.
        shape: of the result, if it is wanted in another of as many elements.

    Raises:
        ValueError: the counters given are none, or too few.
    """
    given = dict(arrays)
    if variant.form == "joined":
        counters = given["counters"]
        if counters is None:  # on a GPU two launches of one stream may run at once
            counters = new_counters(layout.counters)
        given["counters"] = _checked(counters, layout.counters)
    wanted = layout.out if shape is None else tuple(shape)
    shapes = {"out": wanted, "sums": layout.sums}
    dtypes = {"out": layout.q_dtype, "sums": mx.float32}
    template = (*layout.template, *numbers)
    found = launcher(_definition(variant), backend)(
        inputs=[array for name in variant.inputs if (array := given[name]) is not None],
        output_shapes=[shapes[name] for name in variant.outputs],
        output_dtypes=[dtypes[name] for name in variant.outputs],
        grid=(layout.splits * layout.threads, *layout.grid),
        threadgroup=(layout.threads, 1, 1),
        template=template,
    )
    if variant.form != "parts":
        return found[0]
    state = given["state"]
    assert state is not None
    [out] = launcher(_combination(), backend)(
        inputs=[found[0], state],
        output_shapes=[wanted],
        output_dtypes=[layout.q_dtype],
        grid=(layout.heads * THREADS, *layout.grid),
        threadgroup=(THREADS, 1, 1),
        template=layout.template,
    )
    return out


def has_clusters() -> bool:
    """Whether blocks of the CUDA device can be clusters: from compute capability 9.0 on."""
    return architecture() >= 90


def may_cluster() -> bool:
    """Whether launches on CUDA may be of clusters of blocks: in recordings, where there are any.

    MLX gives graphs that it has built other kernels later, and an update of CUDA's may leave a node
    with the clusters of the kernel before.
    """
    return takes_clusters() and has_clusters()


def fits_tensor_cores(
    q: mx.array,
    keys: mx.array,
    value_size: int,
    norms: tuple[mx.array | None, mx.array | None],
    rope: Rope | None,
    numbers: tuple[tuple[str, int], ...],
) -> bool:
    """Return whether attention over heads may run on CUDA's tensor cores, if there are any.

    Queries and caches have to be of the same 16 bits, heads no larger than registers allow, the
    two elements of a pair that is rotated in the same lane, and `numbers` ones that MLX can put
    into the name of a kernel.
    """
    weights = {weight.dtype for weight in norms if weight is not None}
    return (
        q.dtype == keys.dtype != mx.float32
        and keys.shape[3] <= _TENSOR_SIZE
        and value_size <= _TENSOR_VALUE_SIZE
        and len(weights) < 2
        and (rope is None or rope.traditional or rope.dims % 64 == 0)
        and all(number >= 0 for _, number in numbers)
    )


def latents_fit_tensor_cores(
    q: mx.array, latents: mx.array, rope: Rope | None, numbers: tuple[tuple[str, int], ...]
) -> bool:
    """Return whether latent attention may run on CUDA's tensor cores; see `fits_tensor_cores`."""
    return (
        q.dtype == latents.dtype != mx.float32
        and (rope is None or rope.traditional or rope.dims % 64 == 0)
        and all(number >= 0 for _, number in numbers)
    )


def _tile(positions: int, size: int, rope_size: int) -> int:
    """Return how many positions a warp works on: more where there are many, and rows are short."""
    if rope_size:
        return _LATENT_TILE
    return 32 if positions > _AT_ONCE and size <= 64 else 16


def _lanes(vectors: int) -> tuple[int, int]:
    """Return how many lanes read a row of so many vectors, and how many vectors each reads."""
    lanes = min(SIMD, _power_of_two(vectors))
    return lanes, -(-vectors // lanes)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


@cache
def _definition(variant: Variant) -> Definition:
    source = attention_latent_source if variant.latent else attention_source
    tensor = attention_latent_tensor_source if variant.latent else attention_tensor_source
    body = None
    if variant.tensor:
        # Nine warps: one of the four parts of a multiprocessor has registers for three of them.
        threads = MOST_THREADS if variant.latent else 0
        body = CudaBody(
            tensor.attention(variant),
            tensor.header(variant),
            architecture=90 if variant.cluster > 1 else 80,
            cluster=variant.cluster,
            threads=threads,
        )
    return Definition(
        name="decode_attention_latent" if variant.latent else "decode_attention",
        input_names=variant.inputs,
        output_names=variant.outputs,
        source=source.attention(variant),
        header=attention_source.HEADER,
        ensure_row_contiguous=False,
        updated_inputs=variant.updated,
        partial_outputs=variant.form != "whole",
        cuda=body,
    )


@cache
def _combination() -> Definition:
    return Definition(
        name="decode_attention_combination",
        input_names=("sums", "state"),
        output_names=("out",),
        source=attention_source.combination(),
    )


def new_counters(number: int = COUNTERS) -> mx.array:
    """Return counters for launches of which no two run at once.

    Args:
        number: how many are needed; there are `COUNTERS` at least.
    """
    return mx.zeros((max(COUNTERS, number),), mx.int32)


def _checked(counters: mx.array, number: int) -> mx.array:
    if counters.dtype != mx.int32 or counters.ndim != 1 or counters.size < number:
        raise ValueError(
            f"counters are {counters.dtype} {counters.shape}; they take at least {number} int32"
        )
    return counters
