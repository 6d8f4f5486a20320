"""From launches of a graph to a plan of what each kernel is given, down to the bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from zmlx.backend.cuda.recording import (
    ARENA,
    BUFFER,
    BYTES,
    FIXED,
    Argument,
    Kernel,
    Part,
    Plan,
)
from zmlx.graph.arena import Arena
from zmlx.graph.launches import Launch, NotRecordable
from zmlx.graph.layout import Layout
from zmlx.graph.nodes import Node, Value
from zmlx.graph.placing import Placed
from zmlx.graph.segments import Segments

#: Axes of which a kernel is told: as MLX passes shapes.
_AXES = 10


@dataclass(frozen=True)
class Steps:
    """Launches with all that they are given.

    Attributes:
        launches: each with the arguments of its kernel, in their order.
        inputs: where the copied values go, in the segments' order.
        results: where the results are, in the segments' order.
        fixed: the constants that are read.
        size: of the arena, in bytes.
    """

    launches: tuple[tuple[Launch, tuple[Argument, ...]], ...]
    inputs: tuple[Part, ...]
    results: tuple[Part, ...]
    fixed: tuple[mx.array, ...]
    size: int


def steps(parts: Segments, constants: Mapping[Value, mx.array]) -> Steps:
    """Give every value of the recorded launches a place.

    Args:
        parts: of the graph.
        constants: its constants.

    Raises:
        NotRecordable: a launch would be given a copy of something.
    """
    return _Layout(parts, constants).steps()


def plan(parts: Segments, found: Steps) -> Plan:
    """Return what is recorded: the launches with their compiled kernels.

    Raises:
        zmlx.backend.cuda.nvrtc.CompileError: a kernel cannot be compiled ahead of MLX.
    """
    binaries: dict[tuple[Any, ...], tuple[bytes, str]] = {}
    kernels = []
    for node, (launch, arguments) in zip(parts.launches, found.launches, strict=True):
        given = tuple((value.dtype, value.ndim) for value in node.inputs)
        key = launch.kernel, given, launch.dtypes, tuple(map(tuple, launch.template or ()))
        if key not in binaries:
            binaries[key] = launch.kernel.binary(given, launch.dtypes, launch.template)
        kernels.append(Kernel(binaries[key], launch.blocks, launch.block, arguments))
    buffers = len(parts.buffers)
    return Plan(tuple(kernels), found.inputs, found.results, buffers, found.fixed, found.size)


class _Layout:
    """Where everything is, while the launches are gone through."""

    def __init__(self, parts: Segments, constants: Mapping[Value, mx.array]) -> None:
        self._parts = parts
        self._constants = constants
        self._arena = Arena()
        self._at: dict[Value, int] = {}
        self._fixed: dict[Value, int] = {}
        self._last: dict[Value, int] = {}
        for number, node in enumerate(parts.launches):
            for value in node.inputs:
                self._last[parts.places[value].base] = number
        self._last.update(dict.fromkeys(parts.results, len(parts.launches)))

    def steps(self) -> Steps:
        inputs = tuple(map(self._taken, self._parts.copied))
        launches = []
        for number, node in enumerate(self._parts.launches):
            launch = node.arguments[0]
            for value in node.outputs:
                self._taken(value)
            launches.append((launch, tuple(self._arguments(node, launch))))
            for value in [v for v in self._at if self._last.get(v, number) == number]:
                self._arena.give_back(self._at.pop(value))
        results = tuple(Part(self._at[v], v.shape, v.dtype) for v in self._parts.results)
        fixed = tuple(mx.contiguous(self._constants[value]) for value in self._fixed)
        return Steps(tuple(launches), inputs, results, fixed, self._arena.size)

    def _taken(self, value: Value) -> Part:
        self._at[value] = self._arena.take(value.size * value.dtype.size)
        return Part(self._at[value], value.shape, value.dtype)

    def _arguments(self, node: Node, launch: Launch) -> Iterator[Argument]:
        """Return what a kernel is given, in the order of MLX's signature."""
        kernel = launch.kernel
        for name, value in zip(kernel.input_names, node.inputs, strict=True):
            place = self._parts.places[value]
            if kernel.ensure_row_contiguous and not place.at.rows:
                raise NotRecordable(f"{name} of {kernel.name} has to be copied first")
            if name in kernel.early and place.base not in self._constants:
                raise NotRecordable(f"{kernel.name} reads {name} while it may be written")
            yield self._address(place)
            for what in kernel.asked(name) if value.ndim else ():
                yield Argument(BYTES, value=_told(place.at, what))
        for value in node.outputs:
            yield Argument(ARENA, offset=self._at[value])

    def _address(self, place: Placed) -> Argument:
        base, offset = place.base, place.offset * place.base.dtype.size
        if base in self._at:
            return Argument(ARENA, offset=self._at[base] + offset)
        if base in self._constants:
            return Argument(FIXED, self._fixed.setdefault(base, len(self._fixed)), offset)
        return Argument(BUFFER, self._parts.buffers.index(base), offset)


def _told(at: Layout, what: str) -> bytes:
    """Return what MLX passes of an array's layout: 10 numbers, or how many there are."""
    if what == "ndim":
        return struct.pack("=i", len(at.shape))
    numbers, kind = (at.shape, "i") if what == "shape" else (at.strides, "q")
    return struct.pack(f"={_AXES}{kind}", *_padded(numbers))


def _padded(numbers: Sequence[int]) -> list[int]:
    if len(numbers) > _AXES:
        raise NotRecordable(f"an array of {len(numbers)} axes")
    return [*numbers, *[0] * (_AXES - len(numbers))]
