"""How many kernels a reduction launches, by how its input lies."""

from __future__ import annotations

from collections.abc import Sequence

from zmlx.graph.layout import Layout, whole

#: Elements from which a reduction of everything takes two passes.
_ALL_AT_ONCE = 4096


def reduction_launches(at: Layout, axes: Sequence[int], made: int, *, cuda: bool) -> int:
    """Return the kernels of MLX's Reduce.

    Args:
        at: the layout of its input.
        axes: that are reduced.
        made: number of elements of the result.
        cuda: whether for CUDA; else for Metal.
    """
    if at.size == made:
        return 1
    copies = 0
    if cuda:
        repeated = any(s == 0 for axis, s in enumerate(at.strides) if axis not in axes)
        copies = int(repeated or not at.contiguous)
    if copies or _kind(at, axes) == "general":
        copies = 1
        at = whole(at.shape)
    everything = _kind(at, axes) == "all"
    columns = _kind(at, axes) == "columns"
    length = at.size // made
    twice = everything and at.size > _ALL_AT_ONCE
    if not cuda and columns:
        # Metal's sum down long columns of few elements.
        twice = (length >= 1024 and made < 32) or (length > 256 and made < 32 * 1024)
    return copies + 1 + int(twice)


def _kind(at: Layout, axes: Sequence[int]) -> str:
    """Return which of MLX's plans serves: "all", "rows", "columns" or "general" (copied first)."""
    if at.size == at.data_size and len(axes) == len(at.shape) and at.contiguous:
        return "all"
    steps = sorted(at.strides[axis] for axis in axes if at.shape[axis] > 1)
    forward = [step for step in steps if step > 0]
    if not forward or len(forward) < len(steps):
        return "general"
    if forward[0] == 1:
        return "rows"
    if at.rows:
        return "columns"
    inner, repeated = 1, False
    for axis in reversed(range(len(at.shape))):
        if axis == axes[-1]:
            continue
        stride, length = at.strides[axis], at.shape[axis]
        if stride == 0 and length == 1:
            continue
        if stride == 0:
            repeated = True
            break
        if stride != inner and length != 1:
            break
        inner *= length
    fits = inner > forward[0] or (inner == forward[0] and not repeated)
    return "columns" if fits else "general"
