"""Control groups that give their processes a part of a processor, version 1 or 2."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
#: Microseconds after which the system gives a new share.
PERIOD = 100_000


class NoLimit(RuntimeError):
    """This system lets nobody here make such a group; the text says what it answered."""


@contextmanager
def limited(cpus: float) -> Iterator[Path]:
    """Make a group with a limit and yield the file that takes process ids; remove it afterwards.

    Args:
        cpus: processors' worth of time, such as 0.5.

    Raises:
        NoLimit: it cannot be made.
    """
    parent, version = _own_group()
    try:
        group = Path(tempfile.mkdtemp(prefix="zmlx-", dir=parent))
    except OSError as error:
        raise NoLimit(f"no control group: {error}") from error
    try:
        if version == 2:
            _let_children_have_limits(parent)
            (group / "cpu.max").write_text(f"{int(cpus * PERIOD)} {PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(int(cpus * PERIOD)))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise NoLimit(f"no control group of {cpus:g} processors: {error}") from error
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def _own_group() -> tuple[Path, int]:
    """Return this process's group of the controller "cpu", and the version of its hierarchy."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError as error:
        raise NoLimit(f"no control groups: {error}") from error
    found = {tuple(line.split(":", 2)[1].split(",")): line.split(":", 2)[2] for line in lines}
    for controllers, path in found.items():
        if "cpu" in controllers:
            return ROOT / "cpu" / path.lstrip("/"), 1
    if ("",) in found:
        return ROOT / found[("",)].lstrip("/"), 2
    raise NoLimit("no control groups with the controller cpu")


def _let_children_have_limits(parent: Path) -> None:
    if "cpu" not in (parent / "cgroup.subtree_control").read_text().split():
        (parent / "cgroup.subtree_control").write_text("+cpu")
