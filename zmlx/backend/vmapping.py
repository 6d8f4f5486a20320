"""Whether a call happens inside `mx.vmap`.

MLX asks every operation of a traced function how it is batched, also those whose result a custom
function then replaces, and its custom kernels have no answer: `mx.vmap` of a function that launches
one raises, whatever the custom function's own rule is. So inside `mx.vmap` operations with such a
rule trace MLX operations instead, and launch their kernel from the rule. MLX has no call that tells
whether `mx.vmap` is tracing; `install` wraps it, once, so that it leaves a mark while it does, and
changes nothing else. That is done when the first operation with a source is made, so where only
models are patched `mx.vmap` stays MLX's own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx


class _Depth(threading.local):
    value = 0


_DEPTH = _Depth()


def inside_vmap() -> bool:
    """Return whether this thread is in a function that `mx.vmap` is tracing."""
    return _DEPTH.value > 0


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def traced(*args: Any, **kwargs: Any) -> Any:
        _DEPTH.value += 1
        try:
            return function(*args, **kwargs)
        finally:
            _DEPTH.value -= 1

    return traced


def marking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return `mx.vmap` as one that leaves a mark while it traces; as it is, if it does already."""
    if getattr(stock, "__zmlx__", False):
        return stock

    @functools.wraps(stock)
    def vmap(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return stock(_marked(fun), *args, **kwargs)

    vmap.__zmlx__ = True  # type: ignore[attr-defined]
    return vmap


def install() -> None:
    """Let `mx.vmap` leave a mark while it traces; the second call does nothing."""
    mx.vmap = marking(mx.vmap)
