"""Elementwise operations from formulas; the module itself is callable, like `api.elementwise`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from zmlx.authoring.elementwise import binary, elementwise, map, unary
from zmlx.authoring.operation import Elementwise

__all__ = ["Elementwise", "binary", "map", "unary"]


class _Callable(ModuleType):
    """A module that makes an operation when it is called: `zmlx.elementwise("x * x")`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Elementwise:
        return elementwise(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
