"""The layers of a decode step together: one operation on CPUs, a few kernels a layer on GPUs.

Before   h = layers(tokens, cache)              some 25 operations for every layer
After    h, cache = program(layers(...))        CPU: one, with the same operations inside
         h = program(tokens, cache)             GPU: recorded, with 5 to 8 kernels for every layer

Found as the module that holds the layers and passes the cache on to them. On a CPU its forward runs
as it is, and builds its graph; before that is evaluated, what the native library can run in one go
is taken together, also the updates of the cache. On a GPU the forward is traced once, for one
token of one sequence, its graph is rewritten with fused kernels (zmlx.graph), and replayed without
the forward. Prompts, batches, modules in training mode and caches that the program does not know
keep the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.graph.stepping import Steps
from zmlx.kernels.decode_attention_probe import DECODE_ATTENTION
from zmlx.kernels.program import PROGRAM
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused, as_library
from zmlx_autopatch import speech

OPTIONS: dict[str, str] = {
    # tokens in one call above which the graph stays as it is: the operations are long then
    "max_tokens": "int",
}
_MAX_TOKENS = 32
#: Where a replaced module keeps its programs.
_STEPS = "_zmlx_steps"


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
        count = max(map(len, layers))
        if config.backend != "cpu":
            return _recorded(config, at, count)
        limit = int(config.options.get("max_tokens", _MAX_TOKENS))
        uses = tuple(KernelUse(PROGRAM, {"dtype": d}) for d in (mx.float32, mx.bfloat16))
        return Proposal(
            (config.backend, at, limit),
            lambda base: {"__call__": _forward(base, config.backend, at, limit)},
            uses,
            f"the {count} layers of a step of up to {limit} tokens",
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


def _recorded(config: PatchConfig, at: int, count: int) -> Proposal | Refused:
    """Return what replays steps on a GPU."""
    if at < 1:
        return Refused("its forward takes the cache before the tokens")
    uses = tuple(
        KernelUse(DECODE_ATTENTION, {"head_dim": 64, "dtype": dtype})
        for dtype in (mx.float32, mx.bfloat16)
    )
    return Proposal(
        (config.backend, at),
        lambda base: {"__call__": _replaying(base, at)},
        uses,
        f"the {count} layers of a step of one token, recorded",
    )


def _replaying(base: type, at: int) -> Callable[..., Any]:
    stock = base.__call__

    def forward(module: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
        with as_library(module):
            return stock(module, tokens, cache=caches)  # type: ignore[no-any-return]

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs["cache"] if "cache" in kwargs else args[at] if len(args) > at else None
        tokens = args[0] if args else None
        steps = self.__dict__.get(_STEPS)
        if (
            not isinstance(cache, list)
            or not isinstance(tokens, mx.array)
            or tokens.shape != (1, 1)
            or self._training
            or any(value is not None for value in args[1:at] + args[at + 1 :])
            or any(value is not None for name, value in kwargs.items() if name != "cache")
        ):
            if steps is not None:
                steps.forget()
            return stock(self, *args, **kwargs)
        if steps is None:
            steps = Steps(self, forward, lambda reason: speech.say(f"zmlx: {reason}"))
            self.__dict__[_STEPS] = steps
        out = steps(tokens, cache)
        return stock(self, *args, **kwargs) if out is None else out

    return __call__


PATTERN = DecodeStep()
