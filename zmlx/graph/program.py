"""The decode step of a model as a program: traced once, rewritten with fused kernels, replayed.

    layout = Layout.of(caches)
    program = DecodeProgram(traced_step(forward, layout), layout)     some tenths of a second, once
    hidden = program(tokens, caches)                                  for every token

What a model does for one token is the same each time, but for the position. The step is traced at
three positions; what differs between the graphs must be the cache's rows and the position as a
number, and those are read from an array afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import mlx.core as mx

from zmlx.graph.building import Build, Recorded
from zmlx.graph.caches import Layout, ProgramRefused, held_arrays, is_plain, leaves
from zmlx.graph.lending import Chain, Kind, advance, lend, place
from zmlx.graph.nodes import Graph, Value
from zmlx.graph.operations import FUSED
from zmlx.graph.probing import MORE, WrongResult, deviation, probe, step_in_float32
from zmlx.graph.rewrite.attention import Fused, Place, fuse_attention
from zmlx.graph.rewrite.clusters import fold_constants, fuse_small
from zmlx.graph.rewrite.experts import fuse_experts
from zmlx.graph.rewrite.products import fuse_products
from zmlx.graph.rewrite.shapes import settled
from zmlx.graph.same import difference
from zmlx.graph.trace import in_order, trace
from zmlx.kernels.attention_launch import COUNTERS, new_counters

#: A model's forward: takes tokens (1, 1) and its caches, returns an array.
Forward = Callable[[mx.array, list[Any]], mx.array]


@dataclass(frozen=True)
class Traced:
    """A step's graph for every position.

    Attributes:
        graph: inputs are tokens, the caches' arrays, a state for each kind of cache, `counters` and
            `after`; outputs are what the forward returns and the arrays of caches that became
            others.
        kinds: the kinds, in the order of their states.
    """

    graph: Graph
    kinds: tuple[Kind, ...]


def traced_step(
    forward: Forward, layout: Layout, dtype: mx.Dtype = mx.int32, *, tried: bool = True
) -> Traced:
    """Trace and rewrite a step of one token.

    Args:
        forward: the model's forward, unpatched.
        layout: its caches.
        dtype: of the tokens.
        tried: whether fused operations are compared with what they stand for; without that nothing
            but small constants is computed.

    Raises:
        ProgramRefused: more than caches and numbers depends on the position, or the caches are not
            used as the program would.
        TraceError: it cannot be traced.
        WrongResult: a kernel does not compute what the model does.
    """
    first, *others = (
        _at(forward, layout, dtype, position, tried=tried) for position in layout.positions()
    )
    for other in others:
        unlike = difference(first.graph, other.graph)
        if unlike is not None:
            raise ProgramRefused(f"the position is used for more than the cache: {unlike}")
    graph = fuse_products(fuse_experts(first.graph))
    if tried:
        probe(first.graph, graph)
    return Traced(settled(fuse_small(fold_constants(graph))), first.kinds)


def _at(forward: Forward, layout: Layout, dtype: mx.Dtype, position: int, *, tried: bool) -> Traced:
    def step(tokens: mx.array, *given: mx.array) -> list[mx.array]:
        caches = layout.caches(position, given)
        hidden = forward(tokens, layout.listed(caches))
        if not isinstance(hidden, mx.array):
            raise ProgramRefused(f"the forward returns a {type(hidden).__name__}, not one array")
        return [hidden, *held_arrays(caches)]

    graph = trace(step, mx.zeros((1, 1), dtype), *layout.inputs(position))
    if tried:
        graph = _in_rows(graph)
    hidden, *held = graph.outputs
    given = graph.inputs[1:]
    places = _places(graph, layout, position)
    if len(held) != len(given):
        raise ProgramRefused("a layer starts to use a cache that was empty")
    for before, after in zip(given, held, strict=True):
        same = before.dtype == after.dtype and before.shape == after.shape
        if before not in places and not same:
            raise ProgramRefused(f"an array of a cache becomes {after.shape} from {before.shape}")
    counters = Value((COUNTERS,), mx.int32, "counters")
    after = Value(hidden.shape, hidden.dtype, "after")
    fused = fuse_attention(graph, position, places, counters, after)
    _check_writes(fused, places)
    if tried and position == layout.positions()[0]:
        states = {place.state: mx.array(place.numbers, mx.int32) for place in places.values()}
        probe(graph, fused.graph, {**states, counters: new_counters()}, fused.written)
    return Traced(fused.graph, tuple(dict.fromkeys(filter(None, layout.kinds))))


def _in_rows(graph: Graph) -> Graph:
    """Return a graph whose constants lie in row order, as kernels read them; most do already."""
    held = {value: mx.contiguous(array) for value, array in graph.constants.items()}
    mx.eval(list(held.values()))
    return Graph(graph.inputs, graph.outputs, held, graph.nodes)


def _check_writes(fused: Fused, places: dict[Value, Place]) -> None:
    """Check that each buffer is written, read by attention alone, and before the result is there.

    The next step waits for the result, and for nothing else.

    Raises:
        ProgramRefused: that is not so.
    """
    graph = fused.graph
    if set(fused.written) != set(places):
        raise ProgramRefused("a cache is read by more than the attention of its layer")
    needed = set(in_order(dict(graph.producers), graph.outputs[:1]))
    for buffer in places:
        readers = graph.consumers.get(buffer, ())
        if not all(node.op.startswith(FUSED) for node in readers):
            raise ProgramRefused("a cache is read by more than the attention of its layer")
        if not readers or not needed.issuperset(readers):
            raise ProgramRefused("a cache is written by a layer that the result does not depend on")


def _places(graph: Graph, layout: Layout, position: int) -> dict[Value, Place]:
    """Return where the token is written in each buffer."""
    states: dict[Kind, Value] = {}
    places: dict[Value, Place] = {}
    values = iter(graph.inputs[1:])
    caches = layout.caches(position, layout.inputs(position))
    for cache, kind, forms in zip(caches, layout.kinds, layout.forms, strict=True):
        held = [next(values) for _ in forms]
        if kind is not None:
            state = states.setdefault(kind, Value((3,), mx.int32, "state"))
            length = min(position + 1, kind[1]) if kind[1] else position + 1
            here = Place(place(cache), length, position, state)
            places.update(dict.fromkeys(held, here))
    return places


class DecodeProgram:
    """A step that is replayed.

    Args:
        traced: the step's graph.
        layout: the caches that it was made for.
        recorded: whether its kernels are recorded as a CUDA graph, where that can be, from the
            second step with buffers of a size on; else MLX builds each step from its own recording.
    """

    def __init__(self, traced: Traced, layout: Layout, *, recorded: bool = False) -> None:
        self.traced = traced
        self.layout = layout
        used = [at for at, forms in enumerate(layout.forms) if forms]
        self._lent = [at for at in used if layout.kinds[at] is not None]
        self._plain = [at for at in used if layout.kinds[at] is None]
        self._used = used if self._plain else self._lent
        self._examples = [layout.kinds.index(kind) for kind in traced.kinds]
        self._in_lists = any(count is not None for count in layout.lists)
        of_caches = zip(traced.graph.inputs[1:], layout.input_kinds(), strict=False)
        buffers = [value for value, kind in of_caches if kind is not None]
        buffers.append(traced.graph.inputs[-2])  # the counters
        build = Build(traced.graph)
        self._replay = Recorded(build, buffers) if recorded else mx.compile(build)

    def __call__(
        self, tokens: mx.array, caches: Sequence[Any], chain: Chain | None = None
    ) -> mx.array:
        """Run a step, lazily, and put its token into the caches.

        Args:
            tokens: int (1, 1).
            caches: of the program's layout; those with keys and values are lent afterwards.
            chain: theirs, if it is known that they are lent.

        Returns:
            What the model's forward returns. If building it raises, the caches hold what they held.
        """
        each = leaves(caches) if self._in_lists else caches
        chain = chain or self.chain(caches)
        states = [chain.state(each[at]) for at in self._examples]
        held = held_arrays([each[at] for at in self._used]) if self._plain else chain.arrays
        assert chain.after is not None, "a chain begins with an array"
        chain.after, *rest = self._replay(tokens, *held, *states, chain.counters, chain.after)
        for at in self._lent:
            advance(each[at])
        chain.others = tuple(rest)
        given = iter(rest)
        for at in self._plain:
            each[at].cache = [next(given) for _ in each[at].cache]
        return chain.after

    def chain(self, caches: Sequence[Any]) -> Chain:
        """Return the chain of a model's caches; those with keys and values are lent then."""
        each = leaves(caches)
        chain = lend([each[at] for at in self._lent])
        if chain.after is None:
            first = self.traced.graph.inputs[-1]
            chain.after = mx.zeros(first.shape, first.dtype)
        return chain

    def goes_on(self, chain: Chain, caches: Sequence[Any]) -> bool:
        """Return whether caches are a chain's, as a step of this program left them."""
        each = leaves(caches) if self._in_lists else caches
        if len(each) != len(self.layout.kinds) or not chain.holds([each[at] for at in self._lent]):
            return False
        plain = [each[at] for at in self._plain]
        return not plain or (
            all(map(is_plain, plain))
            and len(held := held_arrays(plain)) == len(chain.others)
            and all(map(is_, held, chain.others))
        )

    def check(
        self, forward: Forward, tokens: mx.array, caches: Sequence[Any], allowed: float
    ) -> None:
        """Run a step on copies of the caches, and compare it with the forward's.

        Args:
            forward: the model's own.
            tokens: as of a call.
            caches: they stay as they are.
            allowed: root mean square of the difference, relative to that of the result. With more
                it is a question whose the error is, and both are compared with float32: a router
                may choose other experts for a difference in the last digit.

        Raises:
            WrongResult: they differ by more, and the error is this one's; or the result is not
                finite where the forward's is.
        """
        found, stock = (
            _evaluated(run(tokens, copy.deepcopy(list(caches)))) for run in (self, forward)
        )
        error = deviation(found, stock)
        if error <= allowed or not bool(mx.isfinite(stock).all()):
            return
        exact = step_in_float32(forward, tokens, caches)
        ours, theirs = deviation(found, exact), deviation(stock, exact)
        if not ours <= max(allowed, MORE * theirs):
            raise WrongResult(f"its kernels differ from the model's own step by {error:.2g}")


def _evaluated(result: mx.array) -> mx.array:
    """Return a result in float32, computed, so that the caches it was made with can go."""
    result = result.astype(mx.float32)
    mx.eval(result)
    return result
