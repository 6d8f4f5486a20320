"""How fast this device moves memory: what a kernel that reads and writes can reach at most."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import mlx.core as mx
import numpy as np

from zmlx.backend import current
from zmlx.bench.environment import usable_cores
from zmlx.tuning.timing import finish, seconds_per_call

#: Bytes that are read, and as many written: more than caches hold.
COPIED = 2**28
_RUNS = 10


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes on MLX's default device.

    It is the best of some copies of 256 MiB, measured once per process and backend: on GPUs by an
    operation of MLX that reads and writes each element, on CPUs by all usable cores at once.
    """
    return _measured(current())


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
    threads = usable_cores()
    ends = [COPIED * number // threads for number in range(threads + 1)]
    parts = [slice(start, end) for start, end in pairwise(ends)]

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_RUNS):
            started = time.perf_counter()
            list(pool.map(copy, parts))
            best = min(best, time.perf_counter() - started)
    return best
