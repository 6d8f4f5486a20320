"""Which kernels this process has compiled, and a table of kernels for those who keep one."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from zmlx.backend import kernel, launch
from zmlx.kernels import calling


def list_kernels() -> list[str]:
    """Return the names of the kernels that this process has compiled so far, sorted.

    The kernels that there are, compiled or not, are those of `zmlx kernels list`.
    """
    return sorted({definition.name for definition, _ in launch.compiled_kernels()})


def cache_size() -> int:
    """Return how many kernels are compiled; one on two backends counts twice."""
    return len(launch.compiled_kernels())


def clear_cache() -> None:
    """Forget the compiled kernels of this process; later calls compile anew.

    A kernel that somebody holds keeps working, with what it has compiled. Nothing on disk changes.
    """
    launch.forget()
    kernel.forget_kernels()
    calling.forget()


@dataclass
class KernelEntry:
    """A row of a `KernelRegistry`.

    Attributes:
        name: the kernel's name.
        ir_node: whatever it was made from.
        pattern: the kind of operation it replaces.
        has_vjp: whether it has a gradient.
        run_count: how often it was used, as `touch` counts.
        last_used: when it was last used, in seconds of `time.time`; 0 if never.
        tags: words to find it by.
    """

    name: str
    ir_node: Any = None
    pattern: str | None = None
    has_vjp: bool = False
    run_count: int = 0
    last_used: float = 0.0
    tags: set[str] = field(default_factory=set)

    def touch(self) -> None:
        """Count a use, now."""
        self.run_count += 1
        self.last_used = time.time()


class KernelRegistry:
    """Kernels by name. Threads may share one."""

    def __init__(self) -> None:
        self._entries: dict[str, KernelEntry] = {}
        self._lock = threading.Lock()

    def register(self, entry: KernelEntry) -> None:
        """Add an entry; one of the same name is replaced.

        Raises:
            TypeError: it is no `KernelEntry`.
        """
        if not isinstance(entry, KernelEntry):
            raise TypeError(f"got a {type(entry).__name__}; give a KernelEntry")
        with self._lock:
            self._entries[entry.name] = entry

    def get(self, name: str) -> KernelEntry | None:
        """Return the entry of a name, None if there is none."""
        return self._entries.get(name)

    def list_kernels(self, *, tag: str | None = None) -> list[str]:
        """Return the names, sorted; only those with a tag if one is given."""
        return sorted(e.name for e in self._all() if tag is None or tag in e.tags)

    def by_pattern(self, kind: str) -> list[KernelEntry]:
        """Return the entries of a kind of operation, by name."""
        return [entry for entry in self._all() if entry.pattern == kind]

    def with_vjp(self) -> list[KernelEntry]:
        """Return the entries that have a gradient, by name."""
        return [entry for entry in self._all() if entry.has_vjp]

    def hottest(self, n: int = 10) -> list[KernelEntry]:
        """Return the `n` entries with the most uses, the most used first.

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n={n}; give how many entries, 0 or more")
        return sorted(self._all(), key=lambda entry: -entry.run_count)[:n]

    def size(self) -> int:
        """Return how many entries there are."""
        return len(self._entries)

    def clear(self) -> None:
        """Remove every entry."""
        with self._lock:
            self._entries.clear()

    def summary(self) -> dict[str, Any]:
        """Return counts: `total`, `with_vjp`, `runs`, and `patterns`, entries by pattern."""
        entries = self._all()
        patterns: dict[str, int] = {}
        for entry in entries:
            if entry.pattern is not None:
                patterns[entry.pattern] = patterns.get(entry.pattern, 0) + 1
        return {
            "total": len(entries),
            "with_vjp": sum(entry.has_vjp for entry in entries),
            "runs": sum(entry.run_count for entry in entries),
            "patterns": patterns,
        }

    def _all(self) -> list[KernelEntry]:
        with self._lock:
            return sorted(self._entries.values(), key=lambda entry: entry.name)
