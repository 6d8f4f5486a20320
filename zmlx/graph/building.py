"""How a program's graph becomes arrays: built by MLX in each step, or launched as recorded."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.cuda.addresses import Addresses, in_force
from zmlx.graph.nodes import Graph, Value
from zmlx.graph.operations import built
from zmlx.graph.replayed import Replayed
from zmlx_autopatch import speech

#: Dtype of the tokens, and the shapes of the arrays of a step.
_Form = tuple[mx.Dtype, tuple[tuple[int, ...], ...]]


class Build:
    """Builds a graph on arrays, with its constants by address where kernels take them so.

    Args:
        graph: of MLX's operations and fused ones.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._addresses: Addresses | None = None

    @property
    def addresses(self) -> Addresses:
        """Where the constants lie."""
        if self._addresses is None:
            self._addresses = Addresses(self.graph.constants.values())
        return self._addresses

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily."""
        if for_kernels(has_reference=False) != "cuda":
            return built(self.graph, arrays)
        with in_force(self.addresses):
            return built(self.graph, arrays)


class Recorded:
    """A graph whose kernels are recorded, for each form of its arrays.

    The first step of a form is built by MLX, as all are of a form that cannot be recorded.

    Args:
        build: builds it.
        buffers: inputs of its graph that are read, and written, where they lie.
    """

    def __init__(self, build: Build, buffers: Sequence[Value]) -> None:
        self._build = build
        self._buffers = buffers
        self._compiled = mx.compile(build)
        self._seen: set[_Form] = set()
        self._replayed: dict[_Form, Replayed | None] = {}

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily."""
        form = arrays[0].dtype, tuple([array.shape for array in arrays])
        replayed = self._replayed.get(form)
        if replayed is not None:
            return replayed(*arrays)
        if form not in self._replayed:
            if form in self._seen and for_kernels(has_reference=False) == "cuda":
                self._replayed[form] = self._recording(arrays)
                return self(*arrays)
            self._seen.add(form)
        return self._compiled(*arrays)

    def _recording(self, arrays: Sequence[mx.array]) -> Replayed | None:
        try:
            return Replayed(self._build.graph, arrays, self._buffers, self._build.addresses)
        except Exception as refusal:  # noqa: BLE001 - whatever it is, MLX can build the step
            if speech.level() == "debug":
                speech.say(f"zmlx: a decode step is not recorded: {refusal}")
            return None
