"""The decode step of a model as a program: traced once, rewritten with fused kernels, replayed.

    program = DecodeProgram.of(forward, tokens, caches)     some tenths of a second, once
    hidden = program(tokens, caches)                        for every token

What a model does for one token is the same each time, but for the position. The step is traced at
two positions; what differs between the two graphs must be the cache's rows and the rotary
embedding, and those read the position from an array afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain as chained
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from zmlx.backend import for_kernels
from zmlx.backend.cuda.addresses import Addresses, in_force
from zmlx.graph.lending import Chain, Kind, advance, buffers, is_lent, kind_of, lend, place
from zmlx.graph.nodes import Graph, Value
from zmlx.graph.operations import emit
from zmlx.graph.rewrite.attention import Place, fuse_attention
from zmlx.graph.rewrite.clusters import fold_constants, fuse_small
from zmlx.graph.rewrite.experts import fuse_experts
from zmlx.graph.rewrite.products import fuse_products
from zmlx.graph.rewrite.shapes import settled
from zmlx.graph.same import difference
from zmlx.graph.trace import trace

#: A model's forward: takes tokens (1, 1) and its caches, returns an array.
Forward = Callable[[mx.array, list[Any]], mx.array]


class ProgramRefused(Exception):
    """A model's step cannot be made a program; the text says why."""


#: Positions at which a step is traced: one near the start, one further than any context.
_NEAR, _FAR = 257, 1_000_003


@dataclass(frozen=True)
class Layout:
    """What the caches of a model are, in their order.

    Attributes:
        kinds: the kind of each that has keys and values; None for one of other arrays.
        forms: shapes and dtypes of the arrays of each; of keys and values for any capacity.
    """

    kinds: tuple[Kind | None, ...]
    forms: tuple[tuple[tuple[tuple[int, ...], mx.Dtype], ...], ...]

    @classmethod
    def of(cls, caches: Sequence[Any]) -> Layout:
        """Return the layout of some caches.

        Raises:
            ProgramRefused: one is of another class, is empty, or is not as long as the others.
        """
        kinds, forms, lengths = [], [], set()
        for cache in caches:
            kind = kind_of(cache)
            if kind is None and not _is_plain(cache):
                raise ProgramRefused(f"a cache of class {type(cache).__name__}")
            if kind is not None:
                lengths.add((kind, cache.offset, place(cache)))
            kinds.append(kind)
            held = [array for array in _arrays(cache) if array is not None]
            if len(held) < len(_arrays(cache)):
                raise ProgramRefused("an empty cache")
            forms.append(tuple(_form(array, kind) for array in held))
        if len({kind for kind, *_ in lengths}) != len(lengths) or not lengths:
            raise ProgramRefused("caches of different lengths, or none with keys and values")
        if len({offset for _, offset, _ in lengths}) != 1:
            raise ProgramRefused("caches of different lengths")
        return cls(tuple(kinds), tuple(forms))

    def inputs(self, position: int) -> list[mx.array]:
        """Return arrays of this layout, not computed, with room for a token at a position."""
        made = []
        for kind, forms in zip(self.kinds, self.forms, strict=True):
            for shape, dtype in forms:
                if kind is not None:
                    room = _capacity(kind, position)
                    shape = (*shape[:2], room, shape[3])
                made.append(mx.zeros(shape, dtype))
        return made

    def caches(self, position: int, arrays: Sequence[mx.array]) -> list[Any]:
        """Return caches of this layout that hold some arrays."""
        given = iter(arrays)
        made: list[Any] = []
        for kind, forms in zip(self.kinds, self.forms, strict=True):
            held = [next(given) for _ in forms]
            cache: Any = ArraysCache(len(held)) if kind is None else _empty(kind)
            if kind is None:
                cache.cache = held
            else:
                cache.keys, cache.values = held
                cache.offset = position
                if isinstance(cache, RotatingKVCache):
                    # Any row does that is not the position.
                    turned = (cache.keep + cache.max_size) // 2
                    cache._idx = position if position < cache.max_size else turned
            made.append(cache)
        return made

    def positions(self) -> list[int]:
        """Return positions that see every way in which a model uses these caches."""
        windows = [most for _, most, _ in filter(None, self.kinds) if most]
        near = min([_NEAR, *(most - 3 for most in windows)])
        return [near, near + 1, _FAR]


def _empty(kind: Kind) -> Any:
    make: Any = kind[0]
    return make(*kind[1:]) if kind[1] else make()


def _capacity(kind: Kind, position: int) -> int:
    _, most, _ = kind
    return min(most, position + 3) if most else position + 3


def _is_plain(cache: Any) -> bool:
    return type(cache) is ArraysCache and cache.lengths is None and cache.left_padding is None


def _arrays(cache: Any) -> Sequence[mx.array | None]:
    """Return what a cache holds; buffers of one that is lent stay lent."""
    if is_lent(cache):
        return buffers(cache)
    return cache.cache if kind_of(cache) is None else (cache.keys, cache.values)


def _form(array: mx.array, kind: Kind | None) -> tuple[tuple[int, ...], mx.Dtype]:
    shape = array.shape
    return (shape if kind is None else (*shape[:2], 0, *shape[3:])), array.dtype


def held_arrays(caches: Sequence[Any]) -> list[Any]:
    """Return the arrays of caches in their order; buffers of those that are lent stay lent."""
    return list(chained.from_iterable(_arrays(cache) for cache in caches))


@dataclass(frozen=True)
class Traced:
    """A step's graph for every position.

    Attributes:
        graph: inputs are tokens, the caches' arrays, a state for each kind of cache and `after`;
            outputs are what the forward returns and the arrays of caches that became others.
        kinds: the kinds, in the order of their states.
    """

    graph: Graph
    kinds: tuple[Kind, ...]


def traced_step(forward: Forward, layout: Layout, dtype: mx.Dtype = mx.int32) -> Traced:
    """Trace and rewrite a step of one token.

    Args:
        forward: the model's forward, unpatched.
        layout: its caches.
        dtype: of the tokens.

    Raises:
        ProgramRefused: more than caches and rotations depends on the position.
        TraceError: it cannot be traced.
    """
    first, *others = (_at(forward, layout, dtype, position) for position in layout.positions())
    for other in others:
        unlike = difference(first.graph, other.graph)
        if unlike is not None:
            raise ProgramRefused(f"the position is used for more than the cache: {unlike}")
    graph = fuse_products(fuse_experts(first.graph))
    return Traced(settled(fuse_small(fold_constants(graph))), first.kinds)


def _at(forward: Forward, layout: Layout, dtype: mx.Dtype, position: int) -> Traced:
    def step(tokens: mx.array, *given: mx.array) -> list[mx.array]:
        caches = layout.caches(position, given)
        return [forward(tokens, caches), *held_arrays(caches)]

    graph = trace(step, mx.zeros((1, 1), dtype), *layout.inputs(position))
    hidden = graph.outputs[0]
    places = _places(graph, layout, position)
    fused = fuse_attention(graph, position, places, Value(hidden.shape, hidden.dtype, "after"))
    if len(fused.written) != len(places):
        raise ProgramRefused("a cache is read by more than the attention of its layer")
    return Traced(fused.graph, tuple(dict.fromkeys(filter(None, layout.kinds))))


def _places(graph: Graph, layout: Layout, position: int) -> dict[Value, Place]:
    """Return where the token is written in each buffer."""
    states: dict[Kind, Value] = {}
    places: dict[Value, Place] = {}
    values = iter(graph.inputs[1:])
    for cache, kind in zip(
        layout.caches(position, layout.inputs(position)), layout.kinds, strict=True
    ):
        held = [next(values) for _ in _arrays(cache)]
        if kind is not None:
            state = states.setdefault(kind, Value((3,), mx.int32, "state"))
            length = min(position + 1, kind[1]) if kind[1] else position + 1
            places.update((value, Place(place(cache), length, state)) for value in held)
    return places


class DecodeProgram:
    """A step that is replayed.

    Args:
        traced: the step's graph.
        layout: the caches that it was made for.
    """

    def __init__(self, traced: Traced, layout: Layout) -> None:
        self.traced = traced
        self.layout = layout
        self._replay = mx.compile(self._built)
        self._addresses: Addresses | None = None
        self.lent = [at for at, kind in enumerate(layout.kinds) if kind is not None]
        self._plain = [at for at, kind in enumerate(layout.kinds) if kind is None]
        self._examples = [layout.kinds.index(kind) for kind in traced.kinds]

    def __call__(self, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
        """Run a step, lazily, and put its token into the caches.

        Args:
            tokens: int (1, 1).
            caches: of the program's layout; those with keys and values are lent afterwards.

        Returns:
            What the model's forward returns.
        """
        chain = self.chain(caches)
        first = self.traced.graph.inputs[-1]
        after = mx.zeros(first.shape, first.dtype) if chain.after is None else chain.after
        states = [chain.state(caches[at]) for at in self._examples]
        held = held_arrays(caches) if self._plain else chain.arrays
        hidden, *rest = self._replay(tokens, *held, *states, after)
        chain.after = hidden
        for cache in chain.caches:
            advance(cache)
        given = iter(rest)
        for at in self._plain:
            caches[at].cache = [next(given) for _ in caches[at].cache]
        return hidden

    def _built(self, *arrays: mx.array) -> list[mx.array]:
        """Build the step, once for each capacity of the caches."""
        graph = self.traced.graph
        if for_kernels(has_reference=False) != "cuda":
            return _run(graph, *arrays)
        if self._addresses is None:
            self._addresses = Addresses(graph.constants.values())
        with in_force(self._addresses):
            return _run(graph, *arrays)

    @property
    def count(self) -> int:
        """How many caches there are."""
        return len(self.layout.kinds)

    def chain(self, caches: Sequence[Any]) -> Chain:
        """Return the chain of a model's caches; those with keys and values are lent then."""
        return lend([caches[at] for at in self.lent])

    def check(
        self, forward: Forward, tokens: mx.array, caches: Sequence[Any], allowed: float
    ) -> None:
        """Run a step of copies of the caches, and compare it with the forward's.

        Args:
            forward: the model's own.
            tokens: as of a call.
            caches: they stay as they are.
            allowed: root mean square of the difference, relative to that of the result.

        Raises:
            ProgramRefused: they differ by more, or the result is not finite where the forward's is.
        """
        one, other = (copy.deepcopy(list(caches)) for _ in range(2))
        found, truth = (y.astype(mx.float32) for y in (self(tokens, one), forward(tokens, other)))
        error = float(mx.sqrt(mx.square(found - truth).mean() / mx.square(truth).mean()))
        if not error <= allowed and bool(mx.isfinite(truth).all()):
            raise ProgramRefused(f"its kernels differ from the model's own step by {error:.2g}")


def _run(graph: Graph, *arrays: mx.array) -> list[mx.array]:
    """Build the graph on arrays; those of caches may be longer than the traced ones."""
    held: dict[Value, mx.array] = dict(graph.constants)
    held.update(zip(graph.inputs, arrays, strict=True))
    for node in graph.nodes:
        held.update(zip(node.outputs, emit(node, [held[v] for v in node.inputs]), strict=True))
    return [held[value] for value in graph.outputs]
