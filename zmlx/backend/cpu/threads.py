"""How many threads the native kernels use: physical cores, as far as this process may use them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

from zmlx_autopatch import variables

_SYSTEM = Path("/sys")
_PROCESS = Path("/proc/self")


def default_threads() -> int:
    """Return ZMLX_NUM_THREADS, or the physical cores within affinity and cgroup limits.

    Raises:
        zmlx_autopatch.variables.VariableError: ZMLX_NUM_THREADS is not a positive whole number.
    """
    asked = variables.count("ZMLX_NUM_THREADS")
    if asked is not None:
        return asked
    cores = physical_cores(usable_cpus())
    quota = cgroup_cpus()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def usable_cpus() -> set[int]:
    """Return the processors on which the system lets this process run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int]) -> int:
    """Count the cores behind some processors; two hyperthreads of a core count once."""
    cores = set()
    for cpu in cpus:
        topology = _SYSTEM / f"devices/system/cpu/cpu{cpu}/topology"
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            cores.add(("?", str(cpu)))
    return len(cores)


def cgroup_cpus() -> float | None:
    """Return the number of processors' worth of time that the cgroup allows; None is no limit."""
    try:
        groups = (_PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _limits(path, "", _limit_of_v2)
        elif "cpu" in controllers.split(","):
            limits += _limits(path, "cpu", _limit_of_v1)
    return min(limits, default=None)


def _limits(path: str, controller: str, read: Callable[[Path], float | None]) -> list[float]:
    """Read the limits of a group and of all groups above it."""
    root = _SYSTEM / "fs/cgroup" / controller
    here = root / path.lstrip("/")
    folders = [here, *here.parents]
    found = [read(folder) for folder in folders if folder == root or root in folder.parents]
    return [limit for limit in found if limit is not None]


def _limit_of_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _limit_of_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if quota <= 0 else quota / period
