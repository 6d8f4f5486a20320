"""What kernels share that give each row, the last axis of an array, to one threadgroup."""

from __future__ import annotations

import mlx.core as mx

#: Threads of a simdgroup on every backend.
SIMD = 32

#: dtypes that kernels take; they compute in float32.
FLOATS = (mx.float32, mx.float16, mx.bfloat16)

#: Sum and maximum over a threadgroup of whole simdgroups, in each of its threads.
REDUCTIONS = """
// `partial` has a place for each simdgroup; the second barrier lets the next reduction use it.
inline float row_sum(
    float value, threadgroup float* partial, uint lane, uint group, uint groups) {
  value = simd_sum(value);
  if (lane == 0) {
    partial[group] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  value = simd_sum(lane < groups ? partial[lane] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return value;
}

inline float row_max(
    float value, threadgroup float* partial, uint lane, uint group, uint groups) {
  value = simd_max(value);
  if (lane == 0) {
    partial[group] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  value = simd_max(lane < groups ? partial[lane] : -INFINITY);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return value;
}
"""

#: First lines of a source: where this thread stands in its row.
POSITION = """
threadgroup float partial[32];
uint row = threadgroup_position_in_grid.x;
uint thread_in_row = thread_position_in_threadgroup.x;
uint threads = threads_per_threadgroup.x;
uint lane = thread_index_in_simdgroup;
uint group = simdgroup_index_in_threadgroup;
uint groups = simdgroups_per_threadgroup;
"""


def wide(array: mx.array) -> mx.array:
    """Return an array in the dtype that references sum in: float32, or float64 if it is that."""
    return array if array.dtype == mx.float64 else array.astype(mx.float32)


def check_floats(**arrays: mx.array) -> None:
    """Refuse arrays that kernels do not compute with.

    Raises:
        TypeError: one is not float32, float16 or bfloat16.
    """
    for name, array in arrays.items():
        if array.dtype not in FLOATS:
            raise TypeError(
                f"{name} is {array.dtype}; it takes float32, float16 and bfloat16, "
                f"so cast it, as in {name}.astype(mx.float32)"
            )


def check_rows(**arrays: mx.array) -> int:
    """Return the length of the rows of floats.

    Raises:
        TypeError: an array is not float32, float16 or bfloat16.
        ValueError: an array has no axis.
    """
    check_floats(**arrays)
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"{name} has no axes; it takes rows, shape (..., D)")
    return next(iter(arrays.values())).shape[-1]


def check_same_shape(**arrays: mx.array) -> None:
    """Refuse arrays of different shapes.

    Raises:
        ValueError: they have.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {listed}; they must be the same")


def check_vectors(length: int, **arrays: mx.array) -> None:
    """Refuse weights that are not one float for each element of a row.

    Raises:
        TypeError: an array is not float32, float16 or bfloat16.
        ValueError: its shape is not (length,).
    """
    check_floats(**arrays)
    for name, array in arrays.items():
        if array.shape != (length,):
            raise ValueError(f"{name} has shape {array.shape}; rows of {length} need ({length},)")


def row_threads(length: int, threadgroup: int) -> int:
    """Return how many threads share a row: those asked for, or fewer if rows are short.

    Raises:
        TypeError: `threadgroup` is no whole number.
        ValueError: it is not a multiple of 32 from 32 to 1,024.
    """
    if isinstance(threadgroup, bool) or not isinstance(threadgroup, int):
        raise TypeError(f"threadgroup={threadgroup!r}; give an int")
    if threadgroup % SIMD or not SIMD <= threadgroup <= 1024:
        raise ValueError(f"threadgroup={threadgroup}; give a multiple of 32 from 32 to 1024")
    return min(threadgroup, SIMD * max(1, -(-length // SIMD)))


def count_rows(array: mx.array) -> int:
    """Return how many rows an array has along all axes but the last."""
    rows = 1
    for length in array.shape[:-1]:
        rows *= length
    return rows
