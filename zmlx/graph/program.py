"""The decode step of a model as a program: traced once, rewritten with fused kernels, replayed.

    program = DecodeProgram.of(forward, tokens, caches)     some tenths of a second, once
    hidden = program(tokens, caches)                        for every token

What a model does for one token is the same each time, but for the position. The step is traced at
two positions; what differs between the two graphs must be the cache's rows and the rotary
embedding, and those read the position from an array afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain as chained
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from zmlx.graph.lending import Chain, LentKVCache, buffers, capacity, is_lent, lend
from zmlx.graph.nodes import Graph, Value
from zmlx.graph.operations import emit
from zmlx.graph.rewrite.attention import fuse_attention
from zmlx.graph.rewrite.experts import fuse_experts
from zmlx.graph.rewrite.products import fuse_products
from zmlx.graph.same import difference
from zmlx.graph.trace import trace

#: A model's forward: takes tokens (1, 1) and its caches, returns an array.
Forward = Callable[[mx.array, list[Any]], mx.array]


class ProgramRefused(Exception):
    """A model's step cannot be made a program; the text says why."""


@dataclass(frozen=True)
class Layout:
    """What the caches of a model are, in their order.

    Attributes:
        kinds: KVCache or ArraysCache for each.
        parts: how many arrays each of them holds.
    """

    kinds: tuple[type, ...]
    parts: tuple[int, ...]

    @classmethod
    def of(cls, caches: Sequence[Any]) -> Layout:
        """Return the layout of some caches.

        Raises:
            ProgramRefused: one is of another kind, is empty, or is not as long as the others.
        """
        kinds: list[type] = []
        parts: list[int] = []
        lengths = set()
        for cache in caches:
            if is_lent(cache) or type(cache) is KVCache:
                lengths.add(cache.offset)
                kinds.append(KVCache)
                parts.append(2)
            elif type(cache) is ArraysCache and cache.left_padding is None and _full(cache):
                kinds.append(ArraysCache)
                parts.append(len(cache.cache))
            else:
                raise ProgramRefused(f"a cache of class {type(cache).__name__}")
        if len(lengths) != 1 or lengths == {0}:
            raise ProgramRefused(f"caches of lengths {sorted(lengths)}")
        return cls(tuple(kinds), tuple(parts))

    def copies(self, position: int, arrays: Sequence[mx.array]) -> list[Any]:
        """Return caches of this layout that hold some arrays."""
        given = iter(arrays)
        made: list[Any] = []
        for kind, count in zip(self.kinds, self.parts, strict=True):
            held = [next(given) for _ in range(count)]
            if kind is KVCache:
                cache = KVCache()
                cache.keys, cache.values = held
                cache.offset = position
            else:
                cache = ArraysCache(count)
                cache.cache = held
            made.append(cache)
        return made


def _full(cache: ArraysCache) -> bool:
    return cache.lengths is None and all(isinstance(part, mx.array) for part in cache.cache)


def held_arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Return the arrays of caches in their order; buffers of those that are lent stay lent."""
    parts = (
        buffers(cache)
        if is_lent(cache)
        else (cache.keys, cache.values)
        if type(cache) is KVCache
        else cache.cache
        for cache in caches
    )
    return list(chained.from_iterable(parts))


@dataclass(frozen=True)
class Traced:
    """A step's graph for every position.

    Attributes:
        graph: inputs are tokens, the caches' arrays, `state` and `after`; outputs are the hidden
            states and the arrays that became others.
        kept: for each of the caches' arrays whether it is written in place.
    """

    graph: Graph
    kept: tuple[bool, ...]


def traced_step(forward: Forward, layout: Layout, arrays: Sequence[mx.array]) -> Traced:
    """Trace and rewrite a step of one token.

    Args:
        forward: the model's forward, unpatched.
        layout: its caches.
        arrays: what they hold; only shapes and dtypes matter.

    Raises:
        ProgramRefused: more than caches and rotations depends on the position.
        TraceError: it cannot be traced.
    """
    # Any position does that leaves room in the buffers, and is not another number of the model's.
    room = min(array.shape[2] for array in _buffers_of(layout, arrays))
    positions = (room - 3, room - 2)
    one, other = (_at(forward, layout, arrays, position) for position in positions)
    unlike = difference(one.graph, other.graph)
    if unlike is not None:
        raise ProgramRefused(f"the position is used for more than the cache: {unlike}")
    return Traced(fuse_products(fuse_experts(one.graph)), one.kept)


def _buffers_of(layout: Layout, arrays: Sequence[mx.array]) -> list[mx.array]:
    given = iter(arrays)
    held = [[next(given) for _ in range(count)] for count in layout.parts]
    return [
        array
        for kind, parts in zip(layout.kinds, held, strict=True)
        if kind is KVCache
        for array in parts
    ]


def _at(forward: Forward, layout: Layout, arrays: Sequence[mx.array], position: int) -> Traced:
    def step(tokens: mx.array, *given: mx.array) -> list[mx.array]:
        caches = layout.copies(position, given)
        hidden = forward(tokens, caches)
        return [hidden, *held_arrays(caches)]

    graph = trace(step, mx.zeros((1, 1), mx.int32), *arrays)
    state, after = Value((3,), mx.int32, "state"), Value(graph.outputs[0].shape, mx.float32)
    after = Value(graph.outputs[0].shape, graph.outputs[0].dtype, "after")
    fused = fuse_attention(graph, position, state, after)
    kept = tuple(value in fused.written for value in graph.inputs[1:])
    wanted = [
        value
        for kind, count in zip(layout.kinds, layout.parts, strict=True)
        for value in [kind is KVCache] * count
    ]
    if any(is_buffer and not inside for is_buffer, inside in zip(wanted, kept, strict=True)):
        raise ProgramRefused("a cache is read by more than the attention of its layer")
    return Traced(fused.graph, kept)


class DecodeProgram:
    """A step that is replayed.

    Args:
        traced: the step's graph.
        layout: the caches that it was made for.
    """

    def __init__(self, traced: Traced, layout: Layout) -> None:
        self.traced = traced
        self.layout = layout
        self._replay = mx.compile(partial(_run, traced.graph))

    def __call__(self, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
        """Run a step, lazily, and put its token into the caches.

        Args:
            tokens: int (1, 1).
            caches: of the program's layout; each `KVCache` is lent afterwards.

        Returns:
            What the model's forward returns.
        """
        lent = [cache for cache in caches if isinstance(cache, KVCache)]
        chain = lend(lent)
        position = lent[0].offset
        state, after = _begin(chain, position, self.traced.graph)
        hidden, following, *rest = self._replay(tokens, *held_arrays(caches), state, after)
        chain.after, chain.state, chain.position = hidden, following, position + 1
        self._put(caches, rest)
        return hidden  # type: ignore[no-any-return]

    def _put(self, caches: Sequence[Any], arrays: Sequence[mx.array]) -> None:
        given = iter(arrays)
        for cache in caches:
            if is_lent(cache):
                cache.offset += 1
            else:
                cache.cache = [next(given) for _ in cache.cache]


def _begin(chain: Chain, position: int, graph: Graph) -> tuple[mx.array, mx.array]:
    """Return `state` and `after` for a step; a device array where the last step left one."""
    if chain.state is None or chain.position != position:
        chain.state = mx.array([position, position + 1, position], mx.int32)
    if chain.after is None:
        hidden = graph.inputs[-1]
        chain.after = mx.zeros(hidden.shape, hidden.dtype)
    return chain.state, chain.after


def _run(graph: Graph, *arrays: mx.array) -> list[mx.array]:
    """Build the graph on arrays; those of caches may be longer than the traced ones."""
    held: dict[Value, mx.array] = dict(graph.constants)
    held.update(zip(graph.inputs, arrays, strict=True))
    for node in graph.nodes:
        held.update(zip(node.outputs, emit(node, [held[v] for v in node.inputs]), strict=True))
    hidden, *rest = (held[value] for value in graph.outputs)
    state = arrays[-2]
    return [hidden, state + 1, *rest]
