"""What mlx-lm's `generate` does with the logits of every token.

Before   logprobs = logits - mx.logsumexp(logits)     over the whole vocabulary: one element after
         mx.argmax(logprobs)                          the other on a CPU, on a GPU by one
         mx.async_eval(token, logprobs)               threadgroup
After    CPU: with the kernel `logsumexp`, and as one operation (`program`) with the output head
         GPU: with the kernels `logsumexp` and `argmax`, up to `MOST_ROWS` rows at a time;
         top-k and top-p without a sort (`zmlx.runtime.filtering`)

These lines stand in no module, but in the generation loops of `mlx_lm.generate` and in the samplers
of `mlx_lm.sample_utils`; so, while a model whose steps are fused is in use, the name `mx` of these
modules stands for a namespace that has our functions and whatever else mlx.core has. Other modules,
and mlx.core itself, are as they were. What the kernels do not take runs the stock operations.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zmlx.kernels.fast import LOGSUMEXP
from zmlx.kernels.program import PROGRAM
from zmlx.kernels.rows import FLOATS
from zmlx.kernels.spec import KernelSpec
from zmlx.kernels.vectors.replayed import Replayed
from zmlx.kernels.vocabulary import ARGMAX
from zmlx.runtime.filtering import FILTERS, Filter

_GENERATE = "mlx_lm.generate"
_SAMPLERS = "mlx_lm.sample_utils"

#: Elements of a row below which stock's single launch on a GPU is as fast as two.
SHORT = 16384
#: Rows above which stock's kernels, a threadgroup for each, have enough of a GPU to do.
MOST_ROWS = 32

#: id -> the models whose use keeps the namespaces in place
_USERS: dict[int, weakref.ref[nn.Module]] = {}

Function = Callable[..., Any]


class Namespace(ModuleType):
    """mlx.core with other functions in the place of some.

    Args:
        functions: name -> function.
    """

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(mx.__name__, mx.__doc__)
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def _takes(a: Any, axis: Any, stream: Any, device: mx.Device) -> bool:
    """Whether a call is over the last axis of an array, where the kernel runs."""
    if stream is not None or not isinstance(a, mx.array) or a.ndim == 0:
        return False
    return axis in (-1, a.ndim - 1) and mx.default_device() == device


def _logsumexp(kernel: Callable[[mx.array], mx.array]) -> Function:
    """Return mlx.core's logsumexp with a kernel for calls over the last axis, which stays."""
    device = mx.default_device()

    def logsumexp(
        a: Any, /, axis: Any = None, keepdims: bool = False, *, stream: Any = None
    ) -> mx.array:
        """As mlx.core.logsumexp."""
        last = axis
        if axis is None and isinstance(a, mx.array) and a.ndim and a.size == a.shape[-1]:
            last = -1
        if keepdims and _takes(a, last, stream, device):
            return kernel(a)
        return mx.logsumexp(a, axis, keepdims, stream=stream)

    return logsumexp


def _argmax(kernel: Callable[..., mx.array]) -> Function:
    """Return mlx.core's argmax with a kernel for calls over the last axis."""
    device = mx.default_device()

    def argmax(
        a: Any, /, axis: Any = None, keepdims: bool = False, *, stream: Any = None
    ) -> mx.array:
        """As mlx.core.argmax."""
        if _takes(a, axis, stream, device):
            return kernel(a, keepdims=bool(keepdims))
        return mx.argmax(a, axis, keepdims, stream=stream)

    return argmax


def _async_eval(program: Callable[[list[mx.array]], object]) -> Function:
    """Return mlx.core's async_eval; `program` makes of graphs, in place, what operations it can."""

    def async_eval(*trees: Any) -> None:
        """As mlx.core.async_eval."""
        named: Any = tree_flatten(trees)
        program([leaf for _, leaf in named if isinstance(leaf, mx.array)])
        mx.async_eval(*trees)

    return async_eval


def _few_long_rows(x: mx.array) -> bool:
    length = x.shape[-1]
    return length >= SHORT and x.size <= MOST_ROWS * length and x.dtype in FLOATS


def _stock_logsumexp(x: mx.array) -> mx.array:
    return mx.logsumexp(x, axis=-1, keepdims=True)


def _launched_logsumexp(backend: str, x: mx.array) -> mx.array:
    return LOGSUMEXP.implementation(backend)(x)


def _stock_argmax(x: mx.array, *, keepdims: bool) -> mx.array:
    return mx.argmax(x, axis=-1, keepdims=keepdims)


def _launched_argmax(backend: str, x: mx.array, *, keepdims: bool) -> mx.array:
    index = ARGMAX.implementation(backend)(x)
    return index if keepdims else index.squeeze(-1)


#: On GPUs: (backend, array) -> result, by kernels where there are few long rows.
_REPLAYED_LOGSUMEXP = Replayed(_launched_logsumexp, _stock_logsumexp, _few_long_rows)
_REPLAYED_ARGMAX = Replayed(_launched_argmax, _stock_argmax, _few_long_rows)


def _kernels(backend: str) -> tuple[KernelSpec, ...]:
    return (LOGSUMEXP, PROGRAM) if backend == "cpu" else (LOGSUMEXP, ARGMAX)


def _functions(backend: str) -> dict[str, dict[str, Function]]:
    """Return module -> name in mlx.core -> what it stands for in that module."""
    if backend == "cpu":
        return {
            _GENERATE: {
                "logsumexp": _logsumexp(LOGSUMEXP.implementation(backend)),
                "async_eval": _async_eval(PROGRAM.implementation(backend)),
            }
        }
    argmax = _argmax(partial(_REPLAYED_ARGMAX, backend))
    logsumexp = _logsumexp(partial(_REPLAYED_LOGSUMEXP, backend))
    return {_GENERATE: {"logsumexp": logsumexp, "argmax": argmax}, _SAMPLERS: {"argmax": argmax}}


def second_launches(length: int) -> tuple[str, ...]:
    """Return what of a token's choice is two launches on a GPU, not one, by the vocabulary's size.

    These are MLX's names of the operations.
    """
    return ("ArgReduce", "LogSumExp") if length >= SHORT else ()


def to_be_probed(backend: str) -> list[tuple[KernelSpec, dict[str, Any]]]:
    """Return the kernels that `use` needs, and their configurations; none if there is no use."""
    modules = [sys.modules.get(name) for name in (_GENERATE, _SAMPLERS)]
    if not any(getattr(module, "mx", None) is mx or _placed(module) for module in modules):
        return []
    return [(kernel, {"dtype": mx.bfloat16}) for kernel in _kernels(backend)]


def use(model: nn.Module, backend: str) -> None:
    """Put the functions in place for as long as a model needs them.

    A module that is not loaded, or in which somebody else has replaced `mx`, is left alone.
    """
    needed = to_be_probed(backend)
    if not needed:
        return
    for kernel, configuration in needed:
        if backend not in kernel.contract or kernel.probe(backend, **configuration):
            return
    number = id(model)
    _USERS[number] = weakref.ref(model, lambda _: _forget(number))
    for name, functions in _functions(backend).items():
        module = sys.modules.get(name)
        if module is not None and getattr(module, "mx", None) is mx:
            module.mx = Namespace(functions)  # type: ignore[attr-defined]
    samplers = sys.modules.get(_SAMPLERS)
    if samplers is not None and backend != "cpu":
        _filter(samplers, backend)


def _filter(samplers: ModuleType, backend: str) -> None:
    """Put filters in the place of the functions that are the module's own.

    A function has the globals of the module that it was written in, even if it calls itself by
    the name of another one, as wrappers do.
    """
    for name in FILTERS:
        stock = getattr(samplers, name, None)
        if stock is not None and getattr(stock, "__globals__", None) is vars(samplers):
            setattr(samplers, name, Filter(name, stock, backend, _is_to_be_filtered))


def _is_to_be_filtered(x: mx.array) -> bool:
    """Whether kernels serve an array; not where somebody still has a filter after the release."""
    return bool(_USERS) and _few_long_rows(x)


def release(model: nn.Module) -> None:
    """Take them away when no model needs them any more."""
    _forget(id(model))


def _forget(number: int) -> None:
    _USERS.pop(number, None)
    if _USERS:
        return
    for name in (_GENERATE, _SAMPLERS):
        module = sys.modules.get(name)
        if module is None:
            continue
        if _placed(module):
            module.mx = mx  # type: ignore[attr-defined]
        for filtering in FILTERS:
            found = getattr(module, filtering, None)
            if isinstance(found, Filter):
                setattr(module, filtering, found.stock)


def _placed(module: ModuleType | None) -> bool:
    return isinstance(getattr(module, "mx", None), Namespace)
