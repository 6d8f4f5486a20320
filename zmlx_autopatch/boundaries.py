"""The functions that return a finished model, and what happens to what they return.

A boundary is the outermost call that loads a model: adapters, sharding and other libraries' own
patches are done when it returns. What it calls in turn (another boundary, on the same thread) is
left alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from zmlx_autopatch import variables
from zmlx_autopatch.hook import STATE
from zmlx_autopatch.speech import level, say


def _first(result: Any) -> Any:
    """Return the model of `(model, tokenizer)` or `(model, tokenizer, config)`."""
    return result[0]


@dataclass(frozen=True)
class Boundary:
    """A function that loads a model.

    Attributes:
        module: where it is defined.
        name: its name there.
        model: takes the model out of what it returns.
    """

    module: str
    name: str
    model: Callable[[Any], Any]

    @property
    def origin(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


BOUNDARIES = (
    Boundary("mlx_lm.utils", "load", _first),
    Boundary("mlx_lm.utils", "sharded_load", _first),
)


class _Thread(threading.local):
    """Whether this thread is inside of a boundary; a server loads on its own thread."""

    inside = False


_THREAD = _Thread()


class LoaderWrapper(wrapt.FunctionWrapper):  # type: ignore[misc]
    """A wrapped loader; its class is the mark that it is wrapped."""


def wrap(module: ModuleType, *, sweep: bool) -> list[str]:
    """Wrap the loaders of a module that has been imported.

    Args:
        module: one of the modules that BOUNDARIES names.
        sweep: also rebind the global variables of other modules that already hold a loader, such
            as those that `from mlx_lm import load` made. Closures, default arguments and
            attributes of objects cannot be reached.

    Returns:
        The dotted names of the loaders that are wrapped now.
    """
    wrapped = []
    for boundary in BOUNDARIES:
        original = vars(module).get(boundary.name)
        if boundary.module != module.__name__ or original is None:
            continue
        if not isinstance(original, LoaderWrapper):
            replacement = LoaderWrapper(original, _patching(boundary))
            setattr(module, boundary.name, replacement)
            if sweep:
                _rebind(original, replacement)
        wrapped.append(boundary.origin)
    return wrapped


def unwrap(module: ModuleType) -> None:
    """Give the loaders of a module back, also to those who took the wrapped ones."""
    for boundary in BOUNDARIES:
        wrapper = vars(module).get(boundary.name)
        if boundary.module == module.__name__ and isinstance(wrapper, LoaderWrapper):
            _rebind(wrapper, wrapper.__wrapped__)


def _rebind(old: Any, new: Any) -> None:
    """Replace a function in the global variables of every module."""
    for module in list(sys.modules.values()):
        names = vars(module) if isinstance(module, ModuleType) else {}
        for name, value in list(names.items()):
            if value is old:
                setattr(module, name, new)


def _patching(boundary: Boundary) -> Callable[..., Any]:
    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if _THREAD.inside:
            return wrapped(*args, **kwargs)
        _THREAD.inside = True
        try:
            result = wrapped(*args, **kwargs)
        finally:
            _THREAD.inside = False
        _patch(boundary, result)
        return result

    return call


def _patch(boundary: Boundary, result: Any) -> None:
    """Patch a model that was just loaded; whatever goes wrong, the user gets it as it was."""
    STATE.loads += 1
    try:
        if not variables.flag("ZMLX_AUTOPATCH"):
            return
        # Only now: it imports MLX, which the loader has imported anyway.
        from zmlx.patch import patch_loaded  # noqa: PLC0415

        report = patch_loaded(boundary.model(result), origin=boundary.origin)
        STATE.patched += report.patched_count
        say(report.summary() if level() == "debug" else report.line())
    except Exception as error:
        STATE.error = str(error)
        if variables.text("ZMLX_STRICT") == "1":
            raise
        say(f"zmlx: the model stays as it was loaded: {type(error).__name__}: {error}")
