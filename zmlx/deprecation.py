"""Keywords that earlier versions took and that mean nothing now."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_compute_dtype(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a public function take `compute_dtype` and `compute_dtype_key`, and ignore them.

    Kernels compute in float32 whatever their arrays hold, so there is nothing to choose. A call
    that passes one of the two, other than None, gets a DeprecationWarning.
    """

    @wraps(function)
    def wrapper(
        *args: Any, compute_dtype: Any = None, compute_dtype_key: Any = None, **kwargs: Any
    ) -> _R:
        if compute_dtype is not None or compute_dtype_key is not None:
            name = "compute_dtype_key" if compute_dtype is None else "compute_dtype"
            warnings.warn(
                f"{function.__name__}: {name} is ignored, kernels compute in float32; leave it out",
                DeprecationWarning,
                stacklevel=2,
            )
        return function(*args, **kwargs)

    return cast(Callable[_P, _R], wrapper)
