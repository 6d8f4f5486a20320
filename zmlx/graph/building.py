"""How a program's graph becomes arrays: built by MLX in each step, or launched as recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.cuda import library
from zmlx.backend.cuda.addresses import Addresses
from zmlx.backend.cuda.launching import InForce, in_force
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
#: Runs steps: takes a graph's inputs and returns its outputs, lazily.
_Steps = Callable[..., list[mx.array]]


class Build:
    """Builds a graph on arrays.

    Args:
        graph: of MLX's operations and fused ones.
        addresses: constants that kernels take by address.
    """

    def __init__(self, graph: Graph, addresses: Addresses | None = None) -> None:
        self.graph = graph
        self._how = InForce(addresses)

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily."""
        if for_kernels(has_reference=False) != "cuda":
            return built(self.graph, arrays)
        with side_by_side(), in_force(self._how):
            return built(self.graph, arrays)


class ByAddress:
    """A graph that MLX builds from its recording, with its constants by address.

    Args:
        graph: as `Build` takes it.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made: tuple[Addresses, _Steps] | None = None

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily.

        Raises:
            zmlx.backend.extension.NativeUnavailable: it cannot be known here where constants lie.
        """
        made = self._made
        if made is None or made[0].moved():
            held = Addresses(self._graph.constants.values())
            made = self._made = held, mx.compile(Build(self._graph, held))
        return made[1](*arrays)


class Recorded:
    """A graph whose kernels are recorded, for each form of its arrays.

    The first step of a form is built by MLX, and so are more while what launches recordings is
    still being compiled. Then a step runs in both ways, and must give the same. Of a form that
    cannot be recorded MLX builds all steps, with constants by address if that gives the same.

    Args:
        build: builds it.
        buffers: inputs of its graph that are read, and written, where they lie.
    """

    def __init__(self, build: Build, buffers: Sequence[Value]) -> None:
        self._graph = build.graph
        self._buffers = buffers
        self._compiled: _Steps = mx.compile(build)
        self._by_address = ByAddress(build.graph)
        self._lock = threading.Lock()
        self._seen: set[_Form] = set()
        self._chosen: dict[_Form, _Steps] = {}

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return the graph's outputs, lazily."""
        if for_kernels(has_reference=False) != "cuda":
            return self._compiled(*arrays)
        form = arrays[0].dtype, tuple([array.shape for array in arrays])
        chosen = self._chosen.get(form)
        if chosen is None and form in self._seen and not library.is_being_built():
            with self._lock:
                chosen = self._chosen.get(form) or self._choose(form, arrays)
        self._seen.add(form)
        return (chosen or self._compiled)(*arrays)

    def _choose(self, form: _Form, arrays: Sequence[mx.array]) -> _Steps:
        """Find what runs the steps of a form from now on."""
        ways: dict[str, Callable[[], _Steps]] = {
            "a decode step is not recorded": lambda: Replayed(self._graph, arrays, self._buffers),
            "constants of a decode step have to be inputs": lambda: self._by_address,
        }
        chosen = self._compiled
        for otherwise, make in ways.items():
            try:
                chosen = self._tried(make(), arrays)
                break
            except Exception as refusal:  # noqa: BLE001 - whatever it is, MLX can build the step
                if speech.level() == "debug" or isinstance(refusal, WrongResult):
                    speech.say(f"zmlx: {otherwise}: {refusal}")
        while len(self._chosen) >= _KEPT:
            del self._chosen[next(iter(self._chosen))]
        self._chosen[form] = chosen
        return chosen

    def _tried(self, steps: _Steps, arrays: Sequence[mx.array]) -> _Steps:
        """Compare steps with the same kernels launched by MLX, on the arrays of one; return them.

        What a step writes into buffers is the same each time, so it may run more than once.

        Raises:
            WrongResult: a result is another one.
        """
        truths = self._compiled(*arrays)
        mx.eval(truths)  # before the other one writes into the same buffers
        found = steps(*arrays)
        mx.eval(found)
        for result, truth in zip(found, truths, strict=True):
            if mx.array_equal(result, truth, equal_nan=True).item():
                continue
            error = deviation(result, truth)
            if not error <= _DEVIATIONS.get(truth.dtype, 0.0):
                raise WrongResult(
                    f"its graph differs from MLX's of the same kernels by {error:.2g}"
                )
        return steps
