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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zmlx.graph.stepping import Steps
from zmlx.kernels.decode_attention_probe import DECODE_ATTENTION
from zmlx.kernels.program import PROGRAM
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.pattern import (
    STATE,
    KernelUse,
    PatchConfig,
    PatchPattern,
    Proposal,
    Refused,
    as_library,
)
from zmlx_autopatch import speech, variables

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
        parameters = inspect.signature(forward.function).parameters
        if "cache" not in parameters:
            return None
        at = list(parameters).index("cache") - 1  # without self
        count = max(map(len, layers))
        if config.backend != "cpu":
            return _recorded(config, list(parameters.values())[1:], count, _dtypes(module))
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


def _dtypes(module: nn.Module) -> list[mx.Dtype]:
    """Return the dtypes of a module's floating parameters that activations may have."""
    parameters: Any = tree_flatten(module.parameters())
    held = {array.dtype for _, array in parameters}
    return [dtype for dtype in (mx.float32, mx.float16, mx.bfloat16) if dtype in held]


def _recorded(
    config: PatchConfig,
    parameters: list[inspect.Parameter],
    count: int,
    dtypes: Sequence[mx.Dtype],
) -> Proposal | Refused:
    """Return what replays steps on a GPU."""
    kinds = inspect.Parameter
    names = tuple(p.name for p in parameters if p.kind is kinds.POSITIONAL_OR_KEYWORD)
    if not names or names[0] == "cache":
        return Refused("its forward does not take the tokens first")
    if any(p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in parameters):
        return Refused("its forward takes arguments that have no name")
    needed = tuple(
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind is not kinds.VAR_KEYWORD and p.name != "cache"
    )
    uses = tuple(
        KernelUse(DECODE_ATTENTION, {"head_dim": 64, "dtype": dtype})
        for dtype in dtypes or (mx.float32,)
    )
    return Proposal(
        (config.backend, names, needed),
        lambda base: {"__call__": _replaying(base, names, needed)},
        uses,
        f"the {count} layers of a step of one token, recorded",
    )


def _replaying(base: type, names: tuple[str, ...], needed: tuple[str, ...]) -> Callable[..., Any]:
    """Return a forward that replays steps.

    Args:
        base: the library's class.
        names: of its forward's arguments in their order: first the tokens, then others.
        needed: those of the others that have no default; None is given for them.
    """
    stock = base.__call__
    absent = dict.fromkeys(needed)

    def forward(module: nn.Module, tokens: mx.array, caches: list[Any]) -> Any:
        with as_library(module):
            return stock(module, tokens, cache=caches, **absent)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False), **kwargs)
        tokens, cache = given.pop(names[0], None), given.pop("cache", None)
        steps: Steps | None = self.__dict__.get(STATE)
        if (
            not isinstance(cache, list)
            or not isinstance(tokens, mx.array)
            or tokens.shape != (1, 1)
            or self._training
            or any(value is not None for value in given.values())
        ):
            if steps is not None:
                steps.forget()
            return stock(self, *args, **kwargs)
        if steps is None:
            steps = self.__dict__[STATE] = Steps(self, forward, _tell)
        out = steps(tokens, cache)
        return stock(self, *args, **kwargs) if out is None else out

    return __call__


def _tell(reason: str, failure: Exception | None) -> None:
    """Say why steps keep the model's own forward; a failure is raised under ZMLX_STRICT=1."""
    if failure is not None and variables.text("ZMLX_STRICT") == "1":
        raise failure
    speech.say(f"zmlx: decode steps keep the model's own forward: {reason}")


PATTERN = DecodeStep()
