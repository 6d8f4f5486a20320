"""What the hook has seen in this process, for `zmlx doctor` and for whoever wonders."""

from __future__ import annotations

import sys

from zmlx_autopatch.boundaries import BOUNDARIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from zmlx_autopatch.hook import Finder


class State:
    """What the hook has seen in this process.

    Attributes:
        finder: the installed finder, or None.
        seen: targets that were imported while it was installed.
        wrapped: dotted names of the loaders that are wrapped.
        lacking: dotted name -> why a loader of the table is not wrapped, though its module is here.
        loads: outermost calls of wrapped loaders that returned.
        patched: modules of all loaded models that were replaced.
        error: the last error that was kept from the user's program; empty when there was none.
    """

    def __init__(self) -> None:
        self.finder: Finder | None = None
        self.seen: list[str] = []
        self.wrapped: list[str] = []
        self.lacking: dict[str, str] = {}
        self.loads = 0
        self.patched = 0
        self.error = ""

    def have(self, origin: str) -> None:
        """Note that a loader is wrapped."""
        self.lacking.pop(origin, None)
        if origin not in self.wrapped:
            self.wrapped.append(origin)

    def lack(self, origin: str, reason: str) -> None:
        """Note that a loader of the table cannot be wrapped."""
        self.lacking[origin] = reason

    def as_dict(self) -> dict[str, object]:
        """Return it as data that `json` can write."""
        return {
            "installed": self.finder is not None and self.finder in sys.meta_path,
            "targets": sorted({boundary.module for boundary in BOUNDARIES}),
            "seen": list(self.seen),
            "wrapped": list(self.wrapped),
            "lacking": dict(self.lacking),
            "loads": self.loads,
            "patched": self.patched,
            "error": self.error,
        }


STATE = State()
