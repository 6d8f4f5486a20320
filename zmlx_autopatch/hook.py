"""A finder that waits for named modules to be imported, and then wraps their loaders of models.

wrapt has post-import hooks too, but importing wrapt takes 70 ms, and one interpreter in a thousand
loads a model: this finder needs `sys` alone, and wrapt is imported by the first target. It differs
in one more way: it asks the other finders directly, since `importlib.util.find_spec` takes import
locks, and inside of a finder two threads can then wait for each other for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from zmlx_autopatch import variables
from zmlx_autopatch.speech import say

#: Modules with a loader in zmlx_autopatch.boundaries; a test holds the two together.
TARGETS = ("mlx_lm.utils",)


class State:
    """What the hook has seen in this process."""

    def __init__(self) -> None:
        self.finder: Finder | None = None
        self.seen: list[str] = []
        self.wrapped: list[str] = []
        self.loads = 0
        self.patched = 0
        self.error = ""

    def as_dict(self) -> dict[str, object]:
        """Return it as data."""
        return {
            "installed": self.finder is not None and self.finder in sys.meta_path,
            "targets": list(TARGETS),
            "seen": list(self.seen),
            "wrapped": list(self.wrapped),
            "loads": self.loads,
            "patched": self.patched,
            "error": self.error,
        }


STATE = State()


class Finder:
    """Finds the targets through the other finders, and has their loader tell when they are done."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec that the import system would have found, or None for any other name."""
        if name not in TARGETS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
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
        return getattr(self._zmlx_loader, name)

    def create_module(self, spec: Any) -> ModuleType | None:
        """Create the module as its own loader does."""
        module: ModuleType | None = self._zmlx_loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module under its own loader, and then wrap what it defines."""
        loader = self._zmlx_loader
        if module.__spec__ is not None:
            module.__spec__.loader = loader
        module.__loader__ = loader
        loader.exec_module(module)
        _guarded(lambda: _wrap(module, sweep=False))


def install() -> bool:
    """Install the finder, and wrap the targets that are imported already."""
    if not variables.flag("ZMLX_AUTOPATCH"):
        return False
    if STATE.finder is None or STATE.finder not in sys.meta_path:
        STATE.finder = Finder()
        sys.meta_path.insert(0, STATE.finder)  # type: ignore[arg-type]
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is not None:
            _wrap(module, sweep=True)
    return True


def uninstall() -> None:
    """Remove the finder and unwrap the loaders."""
    if STATE.finder in sys.meta_path:
        sys.meta_path.remove(STATE.finder)  # type: ignore[arg-type]
    STATE.finder = None
    loaded = [sys.modules[name] for name in TARGETS if name in sys.modules]
    if loaded and "zmlx_autopatch.boundaries" in sys.modules:
        from zmlx_autopatch import boundaries  # noqa: PLC0415 - imports wrapt

        for module in loaded:
            boundaries.unwrap(module)
    STATE.wrapped.clear()


def bootstrap() -> None:
    """Install the hook; when that fails, say so and spare the children of this process."""
    try:
        install()
    except Exception as error:  # noqa: BLE001 - the interpreter must start
        STATE.error = str(error)
        say(f"zmlx: models stay as they are loaded: {error}")
        os.environ["ZMLX_AUTOPATCH"] = "0"


def _wrap(module: ModuleType, *, sweep: bool) -> None:
    from zmlx_autopatch import boundaries  # noqa: PLC0415 - imports wrapt

    STATE.seen.append(module.__name__)
    for name in boundaries.wrap(module, sweep=sweep):
        if name not in STATE.wrapped:
            STATE.wrapped.append(name)


def _guarded(action: Callable[[], None]) -> None:
    """Run what must not fail the import that it hangs on."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the import must not fail
        STATE.error = str(error)
        say(f"zmlx: models stay as they are loaded: {error}")
