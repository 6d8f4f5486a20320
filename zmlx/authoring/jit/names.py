"""What the names in a function mean: numbers, mathematical functions, other jit functions."""

from __future__ import annotations

import builtins
import math
import numbers
import types
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from zmlx.authoring.functions import FUNCTIONS

#: A name that stands for nothing.
UNKNOWN = object()

#: Functions that are no row of the table: an operator or a statement of the language.
_FORMS: dict[Any, str] = {
    builtins.abs: "abs",
    builtins.bool: "bool",
    builtins.float: "float",
    builtins.int: "int",
    builtins.max: "max",
    builtins.min: "min",
    builtins.pow: "**",
    builtins.range: "range",
    builtins.round: "rint",
    mx.clip: "clip",
    mx.floor_divide: "//",
    mx.logical_and: "and",
    mx.logical_not: "not",
    mx.logical_or: "or",
    mx.remainder: "%",
    mx.where: "where",
    np.clip: "clip",
    np.floor_divide: "//",
    np.logical_and: "and",
    np.logical_not: "not",
    np.logical_or: "or",
    np.remainder: "%",
    np.where: "where",
}

#: Names of the table that mean something else in MLX and NumPy: reductions, or dropping a NaN.
_DIFFERENT = ("max", "min", "fmax", "fmin")


@cache
def _callables() -> dict[Any, str]:
    """Return function object -> its name in the language."""
    known = dict(_FORMS)
    for name, function in FUNCTIONS.items():
        for module in (math, mx, np):
            found = getattr(module, name, None)
            if found is not None and (module is math or name not in _DIFFERENT):
                known.setdefault(found, function.name)
    return known


def meaning(value: Any) -> str | None:
    """Return what a Python function is called in the language; None when it is not in it."""
    if not callable(value):
        return None
    try:
        return _callables().get(value)
    except TypeError:  # it has no hash
        return None


def as_number(value: Any) -> float | int | bool | None:
    """Return a Python number for a Python or NumPy one; None for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float):
        return value
    return float(value) if isinstance(value, numbers.Real) else None


class Names:
    """The names that a function sees around it, each as it was when it was first asked for."""

    def __init__(self, function: types.FunctionType) -> None:
        self._cells = dict(
            zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        )
        self._globals = function.__globals__
        self._frozen: dict[str, Any] = {}

    def lookup(self, name: str) -> Any:
        """Return what a name stands for: closure, then globals, then builtins; or UNKNOWN."""
        if name not in self._frozen:
            self._frozen[name] = self._find(name)
        return self._frozen[name]

    def member(self, dotted: str, module: types.ModuleType, attribute: str) -> Any:
        """Return a module's attribute, or UNKNOWN."""
        if dotted not in self._frozen:
            self._frozen[dotted] = getattr(module, attribute, UNKNOWN)
        return self._frozen[dotted]

    def _find(self, name: str) -> Any:
        if name in self._cells:
            try:
                return self._cells[name].cell_contents
            except ValueError:  # assigned only later
                return UNKNOWN
        return self._globals.get(name, getattr(builtins, name, UNKNOWN))
