"""How a program's graph becomes arrays: built by MLX in each step, or launched as recorded."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.cuda.addresses import Addresses, in_force
from zmlx.backend.cuda.side_by_side import side_by_side
from zmlx.graph.nodes import Graph, Value
from zmlx.graph.operations import built
from zmlx.graph.probing import WrongResult, deviation
from zmlx.graph.replayed import Replayed
from zmlx_autopatch import speech

#: Recordings that are kept: one is left behind whenever buffers have grown.
_KEPT = 8

#: Largest deviation of a recording from MLX's graph of the same kernels, which is none at all but
#: where MLX's own operations before and after them are fused otherwise.
_DEVIATIONS = {mx.float32: 1e-3, mx.float16: 0.05, mx.bfloat16: 0.05}

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
        with in_force(self.addresses), side_by_side():
            return built(self.graph, arrays)


class Recorded:
    """A graph whose kernels are recorded, for each form of its arrays.

    The first step of a form is built by MLX, as all are of a form that cannot be recorded. The
    second one runs in both ways, and must give the same.

    Args:
        build: builds it.
        buffers: inputs of its graph that are read, and written, where they lie.
    """

    def __init__(self, build: Build, buffers: Sequence[Value]) -> None:
        self._build = build
        self._buffers = buffers
        self._compiled = mx.compile(build)
        self._seen: set[_Form] = set()
        self._lock = threading.Lock()
        self._refused: set[_Form] = set()
        self._replayed: dict[_Form, Replayed] = {}

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily."""
        if for_kernels(has_reference=False) != "cuda":
            return self._compiled(*arrays)
        form = arrays[0].dtype, tuple([array.shape for array in arrays])
        replayed = self._replayed.get(form)
        if replayed is None:
            if form in self._seen:
                with self._lock:
                    replayed = self._replayed.get(form) or self._recording(form, arrays)
            self._seen.add(form)
        return self._compiled(*arrays) if replayed is None else replayed(*arrays)

    def _recording(self, form: _Form, arrays: Sequence[mx.array]) -> Replayed | None:
        if form in self._refused:
            return None
        build = self._build
        try:
            replayed = Replayed(build.graph, arrays, self._buffers, build.addresses)
            self._try(replayed, arrays)
        except Exception as refusal:  # noqa: BLE001 - whatever it is, MLX can build the step
            self._refused.add(form)
            if speech.level() == "debug" or isinstance(refusal, WrongResult):
                speech.say(f"zmlx: a decode step is not recorded: {refusal}")
            return None
        while len(self._replayed) >= _KEPT:
            del self._replayed[next(iter(self._replayed))]
        self._replayed[form] = replayed
        return replayed

    def _try(self, replayed: Replayed, arrays: Sequence[mx.array]) -> None:
        """Compare a recording with the same kernels launched by MLX, on the arrays of a step.

        What a step writes into buffers is the same each time, so it may run more than once.

        Raises:
            WrongResult: a result is another one.
        """
        truths = self._compiled(*arrays)
        mx.eval(truths)  # before the other one writes into the same buffers
        found = replayed(*arrays)
        mx.eval(found)
        for result, truth in zip(found, truths, strict=True):
            if mx.array_equal(result, truth, equal_nan=True).item():
                continue
            error = deviation(result, truth)
            if not error <= _DEVIATIONS.get(truth.dtype, 0.0):
                raise WrongResult(
                    f"its graph differs from MLX's of the same kernels by {error:.2g}"
                )
