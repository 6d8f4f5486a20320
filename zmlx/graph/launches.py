"""The launches of kernels that a graph comes to on CUDA, as a graph of their own.

Where `zmlx.graph.operations.built` launches kernels, here each becomes a node "FusedLaunch"; what
is left are MLX's own operations. So it is known what a step gives to whom, down to every argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.backend.cuda.ahead import Kernel
from zmlx.backend.cuda.launching import InForce, in_force
from zmlx.backend.definition import Template
from zmlx.graph.nodes import Graph, Node
from zmlx.graph.operations import FUSED, built, emit
from zmlx.graph.placing import alone, views
from zmlx.graph.recording import Call, Recorder
from zmlx.graph.trace import trace_with

LAUNCH = f"{FUSED}Launch"
#: Elements of a constant that is computed once, in place of an operation in every step.
_MOST_FOLDED = 65_536

_Size = tuple[int, int, int]


class NotRecordable(RuntimeError):
    """A step has to be built anew each time; the text says why."""


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: which one.
        shapes: of its outputs.
        dtypes: of its outputs.
        grid: threads along x, y and z.
        threadgroup: threads of a block.
        template: names and values.
    """

    kernel: Kernel
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    grid: _Size
    threadgroup: _Size
    template: Template | None

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Launch it, lazily."""
        found: list[mx.array] = self.kernel.run(
            inputs=list(arrays),
            output_shapes=self.shapes,
            output_dtypes=self.dtypes,
            grid=self.grid,
            threadgroup=self.threadgroup,
            template=self.template,
        )
        return found

    @property
    def block(self) -> _Size:
        """Threads of a block, as MLX lays them out: no more than the grid has."""
        x, y, z = map(min, self.threadgroup, self.grid)
        return x, y, z

    @property
    def blocks(self) -> _Size:
        """Blocks along x, y and z."""
        x, y, z = (-(-g // t) for g, t in zip(self.grid, self.threadgroup, strict=True))
        return x, y, z


def traced_launches(graph: Graph, arrays: Sequence[mx.array], *, clusters: bool = False) -> Graph:
    """Return a graph of launches and MLX's operations that computes the same.

    Args:
        graph: as `built` takes it.
        arrays: one for each input; only shapes and dtypes matter.
        clusters: launches may be of clusters of blocks.

    Raises:
        NotRecordable: a launch is of a kind that is not recorded.
        zmlx.graph.trace.TraceError: it cannot be traced.
    """

    @contextmanager
    def noting(recorder: Recorder) -> Iterator[list[Call]]:
        def through(kernel: Kernel) -> Any:
            return recorder.recording(kernel.run, partial(_described, kernel))

        with in_force(InForce(through=through, clusters=clusters)):
            yield []

    traced, _ = trace_with(noting, lambda *given: built(graph, given), *arrays)
    return _folded(traced)


def _described(
    kernel: Kernel,
    *,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: _Size,
    threadgroup: _Size,
    template: Template | None = None,
    init_value: float | None = None,
    verbose: bool = False,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[str, tuple[mx.array, ...], tuple[Any, ...]]:
    del verbose
    if init_value is not None or stream is not None:
        what = "a stream of its own" if init_value is None else "outputs with a first value"
        raise NotRecordable(f"the launch of {kernel.name} has {what}")
    arrays = tuple(x if isinstance(x, mx.array) else mx.array(x) for x in inputs)
    shapes = tuple(map(tuple, output_shapes))
    launch = Launch(kernel, shapes, tuple(output_dtypes), grid, threadgroup, template)
    return LAUNCH, arrays, (launch,)


def _folded(graph: Graph) -> Graph:
    """Return the graph with what follows from constants computed, if it takes little memory."""
    held = dict(graph.constants)
    kept: list[Node] = []
    for node in graph.nodes:
        if node.op == LAUNCH or not all(value in held for value in node.inputs):
            kept.append(node)
            continue
        values = (*node.inputs, *node.outputs)
        small = all(value.size <= _MOST_FOLDED for value in values)
        if small or views(node, [alone(value) for value in node.inputs]) is not None:
            held.update(zip(node.outputs, emit(node, [held[v] for v in node.inputs]), strict=True))
        else:
            kept.append(node)
    return Graph(graph.inputs, graph.outputs, held, ()).with_nodes(kept)
