"""How fast this device reads and copies memory: what a kernel can reach at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import mlx.core as mx
import numpy as np

from zmlx.backend import current
from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher
from zmlx.bench.environment import usable_cores
from zmlx.tuning.timing import finish, seconds_per_call

#: Bytes that are read, and as many written: more than caches hold.
COPIED = 2**28
_RUNS = 10
#: Bytes that are read; so many more than caches hold that what they keep does not count.
READ = 2**30
#: Threads that read, and vectors of 16 bytes that each asks for before it uses the first.
_THREADS = 2**18
_IN_FLIGHT = 8
_READER = Definition(
    name="read_all",
    input_names=("x",),
    output_names=("folded",),
    source="""
    const device uint4* vectors = (const device uint4*)x;
    uint at = thread_position_in_grid.x;
    uint4 bits = uint4(0, 0, 0, 0);
    for (uint first = at; first < VECTORS; first += THREADS * IN_FLIGHT) {
        uint4 loaded[IN_FLIGHT];
        for (int k = 0; k < IN_FLIGHT; ++k) loaded[k] = vectors[first + k * THREADS];
        for (int k = 0; k < IN_FLIGHT; ++k) {
            bits.x ^= loaded[k].x;
            bits.y ^= loaded[k].y;
            bits.z ^= loaded[k].z;
            bits.w ^= loaded[k].w;
        }
    }
    folded[at] = bits.x ^ bits.y ^ bits.z ^ bits.w;
    """,
)


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes on MLX's default device.

    It is the best of some copies of 256 MiB, measured once per process and backend: on GPUs by an
    operation of MLX that reads and writes each element, on CPUs by all usable cores at once.
    """
    return _measured(current())


def read_bandwidth() -> float:
    """Return the bytes per second that MLX's default device reads, its best.

    It is the best of some passes over 1 GiB, measured once per process and backend: on GPUs by a
    kernel that does nothing but read, on CPUs by sums on all usable cores at once.
    """
    return _measured_read(current())


@cache
def _measured_read(backend: str) -> float:
    return READ / (_cpu_read_seconds() if backend == "cpu" else _gpu_read_seconds(backend))


def _gpu_read_seconds(backend: str) -> float:
    source = mx.ones((READ // 4,), mx.uint32)
    finish([source, read_all(source, backend)])
    return min(seconds_per_call(lambda: read_all(source, backend), 8) for _ in range(_RUNS))


def read_all(x: mx.array, backend: str, threads: int = _THREADS) -> mx.array:
    """Read an array once; return the exclusive or of what each thread read.

    Args:
        x: uint32, of a multiple of 32 * `threads` elements.
        backend: where the kernel runs, as for `zmlx.backend.launch.launcher`.
        threads: how many read, a multiple of 256.

    Raises:
        ValueError: the elements do not divide.
    """
    if x.size % (4 * _IN_FLIGHT * threads):
        raise ValueError(f"{x.size} elements: give a multiple of {4 * _IN_FLIGHT * threads}")
    counts = [("VECTORS", x.size // 4), ("THREADS", threads), ("IN_FLIGHT", _IN_FLIGHT)]
    return launcher(_READER, backend)(
        inputs=[x],
        output_shapes=[(threads,)],
        output_dtypes=[mx.uint32],
        grid=(threads, 1, 1),
        threadgroup=(256, 1, 1),
        template=counts,
    )[0]


def _cpu_read_seconds() -> float:
    source = np.ones(READ // 8, np.int64)
    return _seconds_in_threads(len(source), lambda part: source[part].sum())


@cache
def _measured(backend: str) -> float:
    return 2 * COPIED / (_cpu_seconds() if backend == "cpu" else _gpu_seconds())


def _gpu_seconds() -> float:
    source = mx.zeros((COPIED // 4,), mx.float32)
    finish([source, source + 1])
    # Four copies at a time, so that waiting for them is not what is measured.
    return min(seconds_per_call(lambda: source + 1, 4) for _ in range(_RUNS))


def _cpu_seconds() -> float:
    source, target = np.zeros(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    return _seconds_in_threads(COPIED, lambda part: np.copyto(target[part], source[part]))


def _seconds_in_threads(length: int, call: Callable[[slice], object]) -> float:
    """Return the seconds of the best of some passes, each split over all usable cores."""
    threads = usable_cores()
    ends = [length * number // threads for number in range(threads + 1)]
    parts = [slice(start, end) for start, end in pairwise(ends)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_RUNS):
            started = time.perf_counter()
            list(pool.map(call, parts))
            best = min(best, time.perf_counter() - started)
    return best
