"""How arrays lie in memory: what of a graph is a view of what, and what has to be copied.

The rules are those by which MLX 0.32.4 sets strides and flags when it evaluates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Ints = Sequence[int]


def row_strides(shape: Ints) -> tuple[int, ...]:
    """Return the strides of a row-contiguous array, in elements."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def contiguity(shape: Ints, strides: Ints) -> tuple[int, bool, bool]:
    """Return the elements without those that are repeated, and whether rows, columns are whole."""
    rows = columns = True
    size, step = 1, 1
    for length, stride in zip(shape, strides, strict=True):
        columns &= stride == step or length == 1
        step *= length
        size *= length if stride > 0 else 1
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        rows &= stride == step or length == 1
        step *= length
    return size, rows, columns


@dataclass(frozen=True)
class Layout:
    """Where an array's elements are in its buffer.

    Attributes:
        shape: of the array.
        strides: in elements, for each axis.
        data_size: elements of the buffer from its first to its last one that it uses.
        contiguous: whether these have no holes.
        rows: whether they are in row order, as MLX sees it; `columns`: in column order.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    data_size: int
    contiguous: bool
    rows: bool
    columns: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def last_is_whole(self) -> bool:
        """Whether rows can be read one after the other: what softmax asks for."""
        return self.contiguous and (not self.strides or self.strides[-1] == 1)


def whole(shape: Ints) -> Layout:
    """Return the layout of a new array."""
    strides = row_strides(shape)
    _, rows, columns = contiguity(shape, strides)
    return Layout(tuple(shape), strides, prod(shape), True, rows, columns)


def broadcast(at: Layout, shape: Ints) -> Layout:
    """Return the layout of an array that is broadcast."""
    missing = len(shape) - len(at.shape)
    strides = [0] * missing
    strides += [0 if n == 1 else s for n, s in zip(at.shape, at.strides, strict=True)]
    grown = prod(shape) > at.size
    return Layout(
        tuple(shape),
        tuple(strides),
        at.data_size,
        at.contiguous,
        at.rows and not grown,
        at.columns and not grown,
    )


def transposed(at: Layout, axes: Ints) -> Layout:
    """Return the layout of an array with its axes in another order."""
    shape = tuple(at.shape[axis] for axis in axes)
    strides = tuple(at.strides[axis] for axis in axes)
    rows, columns = at.rows, at.columns
    if at.contiguous and at.data_size == at.size:
        _, rows, columns = contiguity(shape, strides)
    return Layout(shape, strides, at.data_size, at.contiguous, rows, columns)


def squeezed(at: Layout, axes: Ints) -> Layout:
    """Return the layout without axes of length 1."""
    kept = [axis for axis in range(len(at.shape)) if axis not in axes]
    shape, strides = ([of[axis] for axis in kept] for of in (at.shape, at.strides))
    return Layout(tuple(shape), tuple(strides), at.data_size, at.contiguous, at.rows, at.columns)


def expanded(at: Layout, axes: Ints) -> Layout:
    """Return the layout with new axes of length 1."""
    shape, strides = list(at.shape), list(at.strides)
    for axis in axes:
        shape.insert(axis, 1)
        strides.insert(axis, 1)
    return Layout(tuple(shape), tuple(strides), at.data_size, at.contiguous, at.rows, at.columns)


def sliced(at: Layout, shape: Ints, steps: Ints) -> Layout:
    """Return the layout of a part of an array."""
    strides = tuple(s * step for s, step in zip(at.strides, steps, strict=True))
    reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    used = sum(r for r in reach if r > 0) - sum(r for r in reach if r < 0) + 1
    size, rows, columns = contiguity(shape, strides)
    return Layout(tuple(shape), strides, used, size == used, rows, columns)


def split(at: Layout, shape: Ints) -> Layout:
    """Return the layout of one of the parts that an array is split into."""
    size, rows, columns = contiguity(shape, at.strides)
    contiguous = at.contiguous
    if size == 1:
        contiguous = True
    elif size != at.data_size:
        contiguous &= rows or columns
    return Layout(tuple(shape), at.strides, size, contiguous, rows, columns)


def strided(at: Layout, shape: Ints, strides: Ints) -> Layout:
    """Return the layout that `as_strided` gives."""
    reach = sum(abs(s) * (n - 1) for s, n in zip(strides, shape, strict=True)) + 1
    size, rows, columns = contiguity(shape, strides)
    forward = all(s >= 0 or n == 1 for s, n in zip(strides, shape, strict=True))
    return Layout(tuple(shape), tuple(strides), reach, forward and size == reach, rows, columns)


def reshaped(at: Layout, shape: Ints) -> Layout | None:
    """Return the layout of an array that is reshaped in place; None if it has to be copied."""
    size = prod(shape)
    if size == 0 or at.rows:
        strides: tuple[int, ...] = row_strides(shape)
    elif not at.shape:
        strides = (0,) * len(shape)
    else:
        found = _fitted(at, shape)
        if found is None:
            return None
        strides = found
    columns = at.columns
    if at.rows:
        columns = size <= 1 or size == max(shape, default=1)
    return Layout(tuple(shape), strides, at.data_size, at.contiguous, at.rows, columns)


def _fitted(at: Layout, shape: Ints) -> tuple[int, ...] | None:
    lengths, steps = [at.shape[0]], [at.strides[0]]
    for length, stride in zip(at.shape[1:], at.strides[1:], strict=True):
        if length == 1:
            continue
        if stride * length != steps[-1]:
            lengths.append(length)
            steps.append(stride)
        else:
            lengths[-1] *= length
            steps[-1] = stride
    strides: list[int] = []
    at_axis = 0
    for length in shape:
        if at_axis < len(lengths) and lengths[at_axis] % length == 0:
            lengths[at_axis] //= length
            strides.append(lengths[at_axis] * steps[at_axis])
            at_axis += lengths[at_axis] == 1
        elif length == 1:
            strides.append(strides[-1])
        else:
            return None
    return tuple(strides)


def combined(inputs: Sequence[Layout], shape: Ints) -> Layout:
    """Return the layout of what an elementwise operation makes."""
    arrays = [at for at in inputs if at.data_size != 1]
    if not arrays:
        return inputs[0] if inputs and inputs[0].shape == tuple(shape) else whole(shape)
    first = arrays[0]
    same = (
        all(at.rows for at in arrays)
        or all(at.columns for at in arrays)
        or (len(arrays) == 1 and first.contiguous)
    )
    return first if same and first.shape == tuple(shape) else whole(shape)
