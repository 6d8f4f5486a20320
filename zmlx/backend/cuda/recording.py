"""Launches that are always the same, recorded once and launched together as one CUDA graph.

    recording = record(plan)
    results = recording(copied, buffers)          some microseconds of the host's time

MLX builds a CUDA graph anew for every evaluation, which costs the host microseconds for each
kernel. What a `Plan` says is built once. Values between its kernels have fixed places in an arena;
what comes anew is copied into the arena, and the results out of it, by the graph itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from zmlx.backend.cuda import library
from zmlx.backend.cuda.ahead import lean
from zmlx.backend.cuda.nvrtc import Compiler
from zmlx.backend.cuda.source import OVERLAPPED, WAIT

#: What stands at the beginning of an address: as in the C++ of the same names.
BYTES, ARENA, FIXED, BUFFER = range(4)
#: Where parts of the arena begin: multiples of this many bytes.
ALIGNED = 256

_MOVER = "zmlx_move"
_MOVER_TEXT = """
#include "%(overlapped)s"

struct Moves {
  unsigned long long from[%(most)d];
  unsigned long long to[%(most)d];
  unsigned bytes[%(most)d];
};

template <typename T>
__device__ void move(unsigned long long to, unsigned long long from, unsigned bytes) {
  const unsigned threads = gridDim.x * blockDim.x;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes / sizeof(T); i += threads) {
    reinterpret_cast<T*>(to)[i] = reinterpret_cast<const T*>(from)[i];
  }
}

extern "C" __global__ void zmlx_move(const __grid_constant__ Moves moves) {
  %(wait)s
  const unsigned long long from = moves.from[blockIdx.y], to = moves.to[blockIdx.y];
  const unsigned bytes = moves.bytes[blockIdx.y];
  const unsigned long long together = from | to | bytes;
  if (together %% 16 == 0) {
    move<uint4>(to, from, bytes);
  } else if (together %% 4 == 0) {
    move<unsigned>(to, from, bytes);
  } else {
    move<unsigned char>(to, from, bytes);
  }
}
"""


@dataclass(frozen=True)
class Argument:
    """What a kernel is given.

    Attributes:
        base: `BYTES`, or where the address begins: `ARENA`, `FIXED` or `BUFFER`.
        index: of the fixed array or the buffer.
        offset: bytes from there.
        value: what is given by value.
    """

    base: int
    index: int = 0
    offset: int = 0
    value: bytes = b""


@dataclass(frozen=True)
class Kernel:
    """A launch.

    Attributes:
        binary: the compiled program, and the kernel's name in it.
        grid: blocks along x, y and z.
        block: threads of one.
        arguments: what it is given, in its order.
    """

    binary: tuple[bytes, str]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Part:
    """A value in the arena.

    Attributes:
        offset: where it begins, in bytes.
        shape: its shape.
        dtype: its dtype.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        size = self.dtype.size
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Plan:
    """Launches, one after another.

    Attributes:
        kernels: the launches.
        inputs: what is copied in before them.
        results: what is copied out after them.
        buffers: how many arrays come anew that are not copied.
        fixed: arrays that do not change, computed, in row order.
        size: of the arena, in bytes.
    """

    kernels: tuple[Kernel, ...]
    inputs: tuple[Part, ...]
    results: tuple[Part, ...]
    buffers: int
    fixed: tuple[mx.array, ...] = field(repr=False)
    size: int


class Recording:
    """A plan as a CUDA graph; see `record`.

    Attributes:
        overlapped: whether its kernels overlap.
    """

    def __init__(self, native: Any, held: Any, plan: Plan) -> None:
        self._replay = native.replay
        self._held = held
        self.overlapped: bool = held.overlapped
        self._shapes = [part.shape for part in plan.results]
        self._dtypes = [part.dtype for part in plan.results]

    def __call__(
        self, inputs: Sequence[mx.array], buffers: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        """Launch the kernels, lazily.

        Args:
            inputs: one for each of the plan's, in row order.
            buffers: as many as the plan says, in row order. Kernels may write into them, which MLX
                does not know.

        Returns:
            New arrays, one for each result of the plan.
        """
        found: Sequence[mx.array] = self._replay(
            self._held, [*inputs, *buffers], self._shapes, self._dtypes
        )
        return found


def record(plan: Plan, *, overlapped: bool = True) -> Recording:
    """Build the CUDA graph of a plan, on MLX's default device.

    Args:
        plan: the launches. Their kernels have been compiled by `zmlx.backend.cuda.ahead.Kernel`, so
            that each waits for the one before.
        overlapped: let kernels be brought to the device while the one before runs, where the device
            and its driver can do that (from compute capability 9.0 on).

    Raises:
        zmlx.backend.extension.NativeUnavailable: what it takes cannot be compiled here.
        zmlx.backend.cuda.nvrtc.CompileError: so it is with the kernel that copies.
        RuntimeError: CUDA refuses something.
        ValueError: more arrays would be copied than one kernel takes.
    """
    native = library.load()
    if max(len(plan.inputs), len(plan.results)) > native.most_moves:
        raise ValueError(f"a step copies more than {native.most_moves} arrays")
    found = lean()
    if found is None:
        raise RuntimeError("kernels cannot be compiled ahead here")
    moves = mover(found.compiler, found.options, native.most_moves)
    binaries = list(dict.fromkeys([moves, *(kernel.binary for kernel in plan.kernels)]))
    numbers = {binary: number for number, binary in enumerate(binaries)}
    # A sum, so that it lies where the device's own arrays do.
    arena = mx.zeros((max(plan.size, ALIGNED),), mx.uint8) + mx.array(0, mx.uint8)
    mx.eval(arena, plan.fixed)
    held = native.record(
        binaries,
        numbers[moves],
        [
            (
                numbers[kernel.binary],
                kernel.grid,
                kernel.block,
                [(a.base, a.index, a.offset, a.value) for a in kernel.arguments],
            )
            for kernel in plan.kernels
        ],
        [(part.offset, part.bytes) for part in plan.inputs],
        [(part.offset, part.bytes) for part in plan.results],
        plan.buffers,
        arena,
        list(plan.fixed),
        overlapped,
    )
    return Recording(native, held, plan)


def mover(compiler: Compiler, options: Sequence[str], most: int) -> tuple[bytes, str]:
    """Return the binary of the kernel that copies up to `most` arrays, and its name.

    Raises:
        zmlx.backend.cuda.nvrtc.CompileError: it does not compile.
    """
    file = f"{_MOVER}.cu"
    return compiler.binary(mover_text(most), _MOVER, file=file, headers={}, options=options)


def mover_text(most: int) -> str:
    """Return the kernel that copies up to `most` arrays."""
    return _MOVER_TEXT % {"most": most, "overlapped": OVERLAPPED, "wait": WAIT}
