"""Wraps the loaders of models, and patches what they return.

Imported by the first module that defines a loader; importing wrapt takes 70 ms.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from zmlx_autopatch import variables
from zmlx_autopatch.boundaries import BOUNDARIES, Boundary
from zmlx_autopatch.record import STATE
from zmlx_autopatch.speech import level, say


class NotPatched(RuntimeError):
    """A model keeps its stock forward, and ZMLX_STRICT is 1."""


class LoaderWrapper(wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]
    """A wrapped loader; its class is the mark that it is wrapped."""

    def __reduce_ex__(self, protocol: Any) -> str:
        """Pickle by name, as a function is; wrapt leaves this open."""
        name: str = self.__wrapped__.__qualname__
        return name

    def __copy__(self) -> LoaderWrapper:
        """Return itself, as the copy of a function is."""
        return self

    def __deepcopy__(self, memo: Any) -> LoaderWrapper:
        """Return itself."""
        return self


class _Thread(threading.local):
    """Whether this thread is inside of a boundary; a server loads on a thread of its own."""

    inside = False


_THREAD = _Thread()


def wrap(module: ModuleType, *, sweep: bool) -> None:
    """Wrap the loaders of a module that has been imported; `STATE` then says which.

    Args:
        module: one that the table of boundaries names.
        sweep: also rebind the global variables of other modules that hold a loader already, such
            as those that `from mlx_lm import load` made. Closures, default arguments, partials and
            attributes of objects cannot be reached.
    """
    for boundary in BOUNDARIES:
        if boundary.module != module.__name__:
            continue
        owner, attribute = _place(module, boundary)
        original = None if owner is None else vars(owner).get(attribute)
        if not callable(original):
            STATE.lack(boundary.origin, "not there")
        elif _is_deferred(original):
            STATE.lack(boundary.origin, "a generator or coroutine: its call returns no model")
        else:
            if not isinstance(original, LoaderWrapper):
                replacement = LoaderWrapper(original, _patching(boundary), enabled=_is_installed)
                setattr(owner, attribute, replacement)
                if sweep:
                    _rebind(original, replacement)
            STATE.have(boundary.origin)


def unwrap(module: ModuleType) -> None:
    """Give the loaders of a module back, also to those who took the wrapped ones."""
    for boundary in BOUNDARIES:
        if boundary.module != module.__name__:
            continue
        owner, attribute = _place(module, boundary)
        wrapper = None if owner is None else vars(owner).get(attribute)
        if isinstance(wrapper, LoaderWrapper):
            setattr(owner, attribute, wrapper.__wrapped__)
            _rebind(wrapper, wrapper.__wrapped__)


def _place(module: ModuleType, boundary: Boundary) -> tuple[Any, str]:
    """Return the module or class that holds a loader, or None, and the attribute."""
    *classes, attribute = boundary.name.split(".")
    owner: Any = module
    for name in classes:
        owner = getattr(owner, name, None)
    return owner, attribute


def _is_deferred(function: Any) -> bool:
    return (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
    )


def _is_installed() -> bool:
    """Whether the hook is installed; a wrapper that outlives it only passes calls on."""
    return STATE.finder is not None


def _rebind(old: Any, new: Any) -> None:
    """Replace a function in the global variables of every module."""
    for module in list(sys.modules.values()):
        # The namespace itself: a module may define what setting an attribute does.
        names = vars(module) if isinstance(module, ModuleType) else {}
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


def _patching(boundary: Boundary) -> Callable[..., Any]:
    # wrapt calls this without a frame of its own: tracebacks of a load that fails grow by one.
    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if _THREAD.inside:
            return wrapped(*args, **kwargs)
        _THREAD.inside = True
        try:
            result = wrapped(*args, **kwargs)
        finally:
            _THREAD.inside = False
        _patch(boundary, result, instance)
        return result

    return call


def _patch(boundary: Boundary, result: Any, instance: Any) -> None:
    """Patch a model that was just loaded; whatever goes wrong, the user gets it as it was."""
    STATE.loads += 1
    try:
        if not variables.flag("ZMLX_AUTOPATCH"):
            return
        # Only now: it imports MLX, which the loader has imported anyway.
        from zmlx.patch import patch_loaded  # noqa: PLC0415

        report = patch_loaded(boundary.model(result, instance), origin=boundary.origin)
        STATE.patched += report.patched_count
        if report.patched_count == 0 and _is_strict():
            raise NotPatched(report.line())
        say(report.summary() if level() == "debug" else report.line())
    except Exception as error:
        STATE.error = f"{type(error).__name__}: {error}"
        if _is_strict():
            raise
        say(f"zmlx: the model stays as it was loaded: {STATE.error}")


def _is_strict() -> bool:
    # Not `flag`: a value that it does not take would raise while another error is handled.
    return variables.text("ZMLX_STRICT") == "1"
