"""The layers of a decode step in one operation of MLX.

Before   h = layers(tokens, cache)              some 25 operations for every layer
After    h, cache = program(layers(...))        one, with the same operations inside

Found as the module that holds the layers and passes the cache on to them. Its forward runs as it
is, and builds its graph; before that is evaluated, what the native library can run in one go is
taken together, also the updates of the cache. Prompts, modules in training mode and calls inside
of a transformation (grad, compile, vmap) keep the graph as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.program import PROGRAM
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused

OPTIONS: dict[str, str] = {
    # tokens in one call above which the graph stays as it is: the operations are long then
    "max_tokens": "int",
}
_MAX_TOKENS = 32


def cache_arrays(holder: Any) -> Iterator[mx.array]:
    """Yield every array that a cache, or a list of caches, holds."""
    if isinstance(holder, mx.array):
        yield holder
    elif isinstance(holder, list | tuple):
        for value in holder:
            yield from cache_arrays(value)
    elif isinstance(holder, dict):
        yield from cache_arrays(list(holder.values()))
    elif hasattr(holder, "__dict__"):
        yield from cache_arrays(list(vars(holder).values()))


class DecodeStep(PatchPattern):
    """Modules that pass a list of caches on to a list of layers."""

    order = 4

    def name(self) -> str:
        """Return "decode_step"."""
        return "decode_step"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept a module with layers whose forward takes a cache."""
        layers = [
            value
            for value in module.values()
            if isinstance(value, list) and value and isinstance(value[0], nn.Module)
        ]
        if not layers or max(map(len, layers)) < 2:
            return None
        try:
            forward = own_forward(type(module))
        except ForwardRefused:
            return None
        parameters = list(inspect.signature(forward.function).parameters)
        if "cache" not in parameters:
            return None
        at = parameters.index("cache") - 1  # without self
        limit = int(config.options.get("max_tokens", _MAX_TOKENS))
        uses = tuple(KernelUse(PROGRAM, {"dtype": d}) for d in (mx.float32, mx.bfloat16))
        return Proposal(
            (config.backend, at, limit),
            lambda base: {"__call__": _forward(base, config.backend, at, limit)},
            uses,
            f"the {max(map(len, layers))} layers of a step of up to {limit} tokens",
        )


def _forward(base: type, backend: str, at: int, limit: int) -> Callable[..., Any]:
    stock = base.__call__
    program = PROGRAM.implementation(backend)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        if self._training or not isinstance(out, mx.array) or out.size > limit * out.shape[-1]:
            return out
        cache = kwargs["cache"] if "cache" in kwargs else args[at] if len(args) > at else None
        program([out, *cache_arrays(cache)])
        return out

    return __call__


PATTERN = DecodeStep()
