"""How the kernels of a thread are launched: as MLX does it, or noted, by address, in clusters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zmlx.backend.cuda.addresses import Addresses
from zmlx.backend.cuda.ahead import Kernel

#: Stands for a kernel's `run`.
Through = Callable[[Kernel], Callable[..., Any]]


@dataclass(frozen=True)
class InForce:
    """How kernels are launched.

    Attributes:
        addresses: arrays that are given by address.
        through: gives what is called in place of a kernel's `run`, with the same arguments.
        clusters: launches may be of clusters of blocks: not those that MLX runs.
    """

    addresses: Addresses | None = None
    through: Through | None = None
    clusters: bool = False

    def run_of(self, kernel: Kernel) -> Callable[..., Any]:
        """Return what launches a kernel."""
        return kernel.run if self.through is None else self.through(kernel)


class _OfThread(threading.local):
    in_force: InForce | None = None


_OF_THREAD = _OfThread()


def current() -> InForce | None:
    """Return how launches of this thread are done; None for as ever."""
    return _OF_THREAD.in_force


def takes_clusters() -> bool:
    """Return whether launches of this thread may be of clusters."""
    how = current()
    return how is not None and how.clusters


@contextmanager
def in_force(how: InForce) -> Iterator[None]:
    """Have kernels of this thread launched in a way until the block ends."""
    before = _OF_THREAD.in_force
    _OF_THREAD.in_force = how
    try:
        yield
    finally:
        _OF_THREAD.in_force = before
