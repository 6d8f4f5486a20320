"""A graph that is launched as recorded, between two parts that MLX builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

from zmlx.backend.cuda.recording import Recording, record
from zmlx.graph.launches import traced_launches
from zmlx.graph.nodes import Graph, Value
from zmlx.graph.operations import built
from zmlx.graph.planning import plan, steps
from zmlx.graph.segments import segments


class Replayed:
    """A graph of fused operations, recorded for the shapes of some arrays.

    Args:
        graph: as `built` takes it.
        arrays: one for each input; only shapes and dtypes matter.
        buffers: inputs that are read, and written, where they lie; whoever calls this keeps
            everything else from reading them.

    Raises:
        zmlx.graph.launches.NotRecordable: it has to be built anew each time.
        RuntimeError: it cannot be traced, compiled or recorded here.
    """

    def __init__(self, graph: Graph, arrays: Sequence[mx.array], buffers: Iterable[Value]) -> None:
        kept = tuple(buffers)
        for clusters in (True, False):
            launches = traced_launches(graph, arrays, clusters=clusters)
            of = dict(zip(graph.inputs, launches.inputs, strict=True))
            self._parts = segments(launches, [of[value] for value in kept])
            if not self._parts.leaves_clusters_to_mlx:
                break
        self._inputs = launches.inputs
        self._recording = self._recorded(launches)
        self._head = _function(self._parts.head)
        self._tail = _function(self._parts.tail)

    def _recorded(self, launches: Graph) -> Recording:
        return record(plan(self._parts, steps(self._parts, launches.constants)))

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily."""
        held = dict(zip(self._inputs, arrays, strict=True))
        parts = self._parts
        first = self._head(*[held[value] for value in parts.head.inputs])
        held.update(zip(parts.head.outputs, first, strict=True))
        copied = [_in_rows(held[value]) for value in parts.copied]
        results = self._recording(copied, [held[value] for value in parts.buffers])
        held.update(zip(parts.results, results, strict=True))
        return self._tail(*[held[value] for value in parts.tail.inputs])


def _function(graph: Graph) -> Callable[..., list[mx.array]]:
    """Return a graph as a function of its inputs."""
    if graph.nodes:
        replay: Callable[..., list[mx.array]] = mx.compile(lambda *arrays: built(graph, arrays))
        return replay
    return lambda *arrays: built(graph, arrays)


def _in_rows(array: mx.array) -> mx.array:
    """Return an array in row order; with one axis it is so, as far as it comes from a step."""
    return array if array.ndim < 2 or array.size < 2 else mx.contiguous(array)
