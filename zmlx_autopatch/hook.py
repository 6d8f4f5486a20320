"""A finder that waits for named modules to be imported, and then has their loaders wrapped.

wrapt has post-import hooks too, but importing wrapt takes 70 ms, and one interpreter in many loads
a model: this finder needs `sys` alone, and wrapt is imported by the first target. It differs in
two more ways. It asks the other finders directly: `importlib.util.find_spec` takes import locks,
and inside of a finder two threads can then wait for each other for ever. And what goes wrong after
a target was imported does not fail that import.
"""

from __future__ import annotations

import sys

from zmlx_autopatch import variables
from zmlx_autopatch.boundaries import BOUNDARIES
from zmlx_autopatch.record import STATE
from zmlx_autopatch.speech import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

#: Modules that define a loader.
TARGETS = frozenset(boundary.module for boundary in BOUNDARIES)


class Finder:
    """Finds the targets through the other finders, and has their loader tell when they are done."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec that the import system would have found, or None for any other name."""
        if name not in TARGETS:
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, Finder) or not hasattr(finder, "find_spec"):
                continue
            spec: Any = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader)
                return spec
        return None


class Loader:
    """The loader of a target: itself in everything, but for a call after the module has run."""

    def __init__(self, loader: Any) -> None:
        self._zmlx_loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_zmlx_loader":  # a copy that has not been filled yet
            raise AttributeError(name)
        return getattr(self._zmlx_loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module under its own loader, and then wrap what it defines."""
        loader = self._zmlx_loader
        if module.__spec__ is not None:
            module.__spec__.loader = loader
        module.__loader__ = loader
        loader.exec_module(module)
        try:
            _wrap(module, sweep=False)
        except Exception as error:  # noqa: BLE001 - the import that it hangs on goes on
            STATE.error = f"{type(error).__name__}: {error}"
            say(f"zmlx: models stay as they are loaded: {STATE.error}")


def install() -> bool:
    """Install the finder, and wrap the loaders that are here already."""
    if not variables.flag("ZMLX_AUTOPATCH"):
        return False
    if STATE.finder is None:
        STATE.finder = Finder()
    if STATE.finder not in sys.meta_path:
        sys.meta_path.insert(0, STATE.finder)
    for module in _targets_here():
        _wrap(module, sweep=True)
    return True


def uninstall() -> None:
    """Remove the finder and unwrap the loaders."""
    if STATE.finder in sys.meta_path:
        sys.meta_path.remove(STATE.finder)
    STATE.finder = None
    if STATE.wrapped:
        from zmlx_autopatch import wrapping  # noqa: PLC0415 - imports wrapt

        for module in _targets_here():
            wrapping.unwrap(module)
    STATE.wrapped.clear()


def _targets_here() -> list[ModuleType]:
    return [sys.modules[name] for name in TARGETS if sys.modules.get(name) is not None]


def _wrap(module: ModuleType, *, sweep: bool) -> None:
    from zmlx_autopatch import wrapping  # noqa: PLC0415 - imports wrapt

    if module.__name__ not in STATE.seen:
        STATE.seen.append(module.__name__)
    wrapping.wrap(module, sweep=sweep)
