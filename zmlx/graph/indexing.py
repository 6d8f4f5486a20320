"""Slices, gathers and scatters of a graph, as the indexing that MLX's Python has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from zmlx.graph.nodes import Value


def _slices(start: Sequence[int], stop: Sequence[int], strides: Sequence[int]) -> tuple[slice, ...]:
    """Return Python's slices; one that runs backwards to the first element ends at -1 in MLX."""
    return tuple(
        slice(a, None if step < 0 and b < 0 else b, step)
        for a, b, step in zip(start, stop, strides, strict=True)
    )


def _slice(state: Any, inputs: Sequence[mx.array], _: Any) -> mx.array:
    return inputs[0][_slices(*state)]


def _slice_update(state: Any, inputs: Sequence[mx.array], _: Any) -> mx.array:
    kind, *where = state
    array, update = inputs
    return _updated(array, _slices(*where), update, kind)


def _updated(array: mx.array, where: Any, update: mx.array, kind: int) -> mx.array:
    """Return `array` with `update` put, or added and so on, at an index."""
    at = array.at[where]
    if kind == 4:
        # Assignment changes the Python object, and this array belongs to the caller.
        fresh = array.astype(array.dtype)
        fresh[where] = update
        return fresh
    return (at.maximum, at.minimum, at.add, at.multiply)[kind](update)


def _dynamic_slice(state: Any, inputs: Sequence[mx.array], _: Any) -> mx.array:
    axes, size = state
    return mx.slice(inputs[0], inputs[1], list(axes), list(size))


def _dynamic_slice_update(state: Any, inputs: Sequence[mx.array], _: Any) -> mx.array:
    array, update, start = inputs
    return mx.slice_update(array, update, start, list(state[0]))


def _leading(array: mx.array, axes: Sequence[int]) -> tuple[mx.array, list[int]]:
    """Return the array with the gathered axes in front, and the permutation that put them there."""
    order = [*axes, *(axis for axis in range(array.ndim) if axis not in axes)]
    moved = array if order == list(range(array.ndim)) else mx.transpose(array, order)
    return moved, order


def _whole(array: mx.array, axes: Sequence[int], sizes: Sequence[int]) -> bool:
    """Return whether windows of these sizes are one long on the gathered axes and else full."""
    return all(
        size == (1 if axis in axes else array.shape[axis]) for axis, size in enumerate(sizes)
    )


def _gather(state: Any, inputs: Sequence[mx.array], outputs: Sequence[Value]) -> mx.array | None:
    axes, sizes = state
    array, *indices = inputs
    if not _whole(array, axes, sizes):
        return None
    moved, _ = _leading(array, axes)
    found = mx.take(moved, indices[0], axis=0) if len(indices) == 1 else moved[tuple(indices)]
    return mx.reshape(found, outputs[0].shape)


def _scatter(state: Any, inputs: Sequence[mx.array], _: Any) -> mx.array | None:
    kind, axes = state
    array, *indices, update = inputs
    sizes = update.shape[update.ndim - array.ndim :]
    if not _whole(array, axes, sizes):
        return None
    moved, order = _leading(array, axes)
    rest = moved.shape[len(axes) :]
    result = _updated(moved, tuple(indices), update.reshape(*indices[0].shape, *rest), kind)
    return mx.transpose(result, [order.index(axis) for axis in range(array.ndim)])


def _scatter_axis(state: Any, inputs: Sequence[mx.array], _: Any) -> mx.array | None:
    kind, axis = state
    # There is no sum along an axis in Python.
    array, indices, values = inputs
    return mx.put_along_axis(array, indices, values, axis) if kind == 1 else None


#: Name of a primitive -> how to run it: (state, inputs, outputs) -> the array; None if it cannot.
INDEXING = {
    "DynamicSlice": _dynamic_slice,
    "DynamicSliceUpdate": _dynamic_slice_update,
    "Gather": _gather,
    "GatherAxis": lambda state, inputs, _: mx.take_along_axis(inputs[0], inputs[1], state[0]),
    "Scatter": _scatter,
    "ScatterAxis": _scatter_axis,
    "Slice": _slice,
    "SliceUpdate": _slice_update,
}
