"""Compile several kernels at once: NVIDIA's compiler takes up to half a second for each.

with side_by_side():
    lazily = [launch(...) for launch in launches]  # evaluates nothing
mx.eval(lazily)  # all of them are compiled
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from zmlx.backend.cpu.threads import usable_cpus

Job = Callable[[], None]


class _Jobs(threading.local):
    pool: ThreadPoolExecutor | None = None
    under_way: list[Future[None]] | None = None


#: What this thread has other threads do; a block within another one belongs to it.
_JOBS = _Jobs()


@contextmanager
def side_by_side() -> Iterator[None]:
    """Have kernels that launches in this thread need compiled by others, until all are at the end.

    A kernel that is evaluated before that MLX compiles itself.
    """
    if _JOBS.under_way is not None:
        yield
        return
    jobs = _JOBS.under_way = []
    try:
        yield
    finally:
        _JOBS.under_way = None
        pool, _JOBS.pool = _JOBS.pool, None
        if pool is not None:
            pool.shutdown()  # when everything is done
    for job in jobs:
        job.result()


def run(job: Job) -> None:
    """Run a job, in another thread where there is more to do beside it."""
    if _JOBS.under_way is None:
        job()
        return
    if _JOBS.pool is None:
        _JOBS.pool = ThreadPoolExecutor(len(usable_cpus()), "zmlx-compiler")
    _JOBS.under_way.append(_JOBS.pool.submit(job))
