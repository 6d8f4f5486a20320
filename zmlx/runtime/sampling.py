"""What mlx-lm's `generate` does with the logits of every token.

Before   logprobs = logits - mx.logsumexp(logits)             over the whole vocabulary, one element
         mx.async_eval(mx.argmax(logprobs), logprobs)         after the other: 2 ms for 128,256
After    the same with the kernel `logsumexp`, and as one operation (`program`) with the output head

These lines stand in no module, but in the generation loops of `mlx_lm.generate`; so, while a model
whose steps are fused is in use, the name `mx` of that one module stands for a namespace that has
our logsumexp and async_eval and whatever else mlx.core has. Other modules, and mlx.core itself, are
as they were. What the kernels do not take runs the stock operations.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zmlx.kernels.fast import LOGSUMEXP
from zmlx.kernels.program import PROGRAM

_GENERATE = "mlx_lm.generate"

#: id -> the models whose use keeps the namespace in place
_USERS: dict[int, weakref.ref[nn.Module]] = {}


class Namespace(ModuleType):
    """mlx.core with another logsumexp and another async_eval.

    Args:
        kernel: computes logsumexp over the last axis, which stays.
        program: makes of arrays' graphs, in place, as few operations as it can.
    """

    def __init__(
        self,
        kernel: Callable[[mx.array], mx.array],
        program: Callable[[list[mx.array]], object],
    ) -> None:
        super().__init__(mx.__name__, mx.__doc__)

        def logsumexp(a: Any, *args: Any, **kwargs: Any) -> mx.array:
            """As mlx.core.logsumexp."""
            if _takes(a, *args, **kwargs):
                return kernel(a)
            return mx.logsumexp(a, *args, **kwargs)

        def async_eval(*trees: Any) -> None:
            """As mlx.core.async_eval."""
            named: Any = tree_flatten(trees)
            program([leaf for _, leaf in named if isinstance(leaf, mx.array)])
            mx.async_eval(*trees)

        self.logsumexp = logsumexp
        self.async_eval = async_eval

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def _takes(a: Any, axis: Any = None, keepdims: bool = False, *, stream: Any = None) -> bool:
    """Whether a call is over the last axis of an array, which stays."""
    if not keepdims or stream is not None or not isinstance(a, mx.array) or a.ndim == 0:
        return False
    return axis in (-1, a.ndim - 1) or (axis is None and a.size == a.shape[-1])


def use(model: nn.Module, backend: str) -> None:
    """Put the kernel in place for as long as a model needs it."""
    module = sys.modules.get(_GENERATE)
    if module is None or (getattr(module, "mx", None) is not mx and not _placed(module)):
        return  # not the module that we know, or somebody else was here
    for kernel in (LOGSUMEXP, PROGRAM):
        if backend not in kernel.contract or kernel.probe(backend, dtype=mx.bfloat16):
            return
    number = id(model)
    _USERS[number] = weakref.ref(model, lambda _: _forget(number))
    if not _placed(module):
        module.mx = Namespace(  # type: ignore[attr-defined]
            LOGSUMEXP.implementation(backend), PROGRAM.implementation(backend)
        )


def release(model: nn.Module) -> None:
    """Take it away when no model needs it any more."""
    _forget(id(model))


def _forget(number: int) -> None:
    _USERS.pop(number, None)
    module = sys.modules.get(_GENERATE)
    if not _USERS and module is not None and _placed(module):
        module.mx = mx  # type: ignore[attr-defined]


def _placed(module: ModuleType) -> bool:
    return isinstance(getattr(module, "mx", None), Namespace)
