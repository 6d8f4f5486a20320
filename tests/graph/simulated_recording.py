"""A recording without a GPU: its launches one by one, on an arena of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from zmlx.backend.cuda.recording import ALIGNED, ARENA, BYTES, FIXED, Part
from zmlx.graph.nodes import Node, Value
from zmlx.graph.planning import Steps
from zmlx.graph.segments import Segments

#: What is in an arena where nothing was written.
POISON = 0xFB


class SimulatedRecording:
    """Launches with what a plan gives them, and nothing else.

    Attributes:
        runs: how often it was launched.
    """

    def __init__(self, parts: Segments, found: Steps) -> None:
        self.parts, self.found, self.runs = parts, found, 0
        self._arena = np.full(found.size, POISON, np.uint8)

    def __call__(self, inputs: Sequence[mx.array], buffers: Sequence[mx.array]) -> list[mx.array]:
        self.runs += 1
        mx.eval(inputs, buffers)
        self._arena[:] = POISON
        for part, array in zip(self.found.inputs, inputs, strict=True):
            assert (array.shape, array.dtype) == (part.shape, part.dtype)
            self._write(part, array)
        for node, (launch, arguments) in zip(self.parts.launches, self.found.launches, strict=True):
            told = [argument for argument in arguments if argument.base != BYTES]
            given = told[: len(node.inputs)]
            arrays = [
                self._read(value, argument, buffers)
                for value, argument in zip(node.inputs, given, strict=True)
            ]
            made = launch(*arrays)
            mx.eval(made)
            for value, argument, array in zip(
                node.outputs, told[len(node.inputs) :], made, strict=True
            ):
                assert argument.base == ARENA
                self._write(Part(argument.offset, value.shape, value.dtype), array)
        return [self._array(part.offset, part.shape, part.dtype) for part in self.found.results]

    def _write(self, part: Part, array: mx.array) -> None:
        assert part.offset % ALIGNED == 0
        raw = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))
        assert raw.size == part.bytes
        self._arena[part.offset : part.offset + part.bytes] = raw

    def _read(self, value: Value, argument: Any, buffers: Sequence[mx.array]) -> mx.array:
        place = self.parts.places[value]
        if argument.base == ARENA:
            base = argument.offset - place.offset * value.dtype.size
            memory = self._array(base, place.base.shape, place.base.dtype)
        else:
            held = self.found.fixed if argument.base == FIXED else buffers
            memory = held[argument.index]
        if place.at.rows and memory.size == value.size:
            # The very array: a kernel may write into it.
            return memory if memory.shape == value.shape else memory.reshape(value.shape)
        return mx.as_strided(memory, value.shape, place.at.strides, place.offset)

    def _array(self, offset: int, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        raw = self._arena[offset : offset + prod(shape) * dtype.size]
        return mx.array(raw).view(dtype).reshape(shape)


def arguments_of(parts: Segments, found: Steps) -> list[tuple[Node, tuple[Any, ...]]]:
    """Return each launch with what its kernel is given."""
    pairs = zip(parts.launches, found.launches, strict=True)
    return [(node, arguments) for node, (_, arguments) in pairs]
