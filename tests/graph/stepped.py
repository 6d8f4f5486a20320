"""Models whose steps are replayed as on a GPU, beside the same models as they are.

Without a GPU the products run as MLX's operations and the attention in the emulator; what is
traced, rewritten and replayed is what a GPU replays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import build
from zoo.configs import config_of
from zoo.devices import on_cpu

from zmlx.graph.lending import is_lent
from zmlx.graph.program import DecodeProgram
from zmlx.graph.stepping import Steps
from zmlx.patch.pattern import STATE, PatchConfig, Proposal, swap
from zmlx.patch.patterns.decode_step import PATTERN

PROMPT = mx.array([[11, 95, 3, 152, 27, 64, 118]])


def recorded(model: nn.Module) -> nn.Module:
    """Give a model the pattern's class for CUDA; return the model."""
    for path, module in list(model.named_modules()):
        if module is model:
            continue
        verdict = PATTERN.examine(module, path, model, PatchConfig(backend="cuda"))
        if isinstance(verdict, Proposal):
            swap(module, verdict, PATTERN.name())
    return model


def two(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return a tiny model whose steps are replayed, and the same one as it is.

    Args:
        name: its type.
        options: of `zoo.build.build`; a `config` is added to the type's own.
    """
    config = {**config_of(name), **options.pop("config", {})}
    model = build(name, config=config, **options)
    return recorded(copy.deepcopy(model)), model


def steps_of(model: nn.Module) -> Steps:
    """Return the steps of the one module that replays them."""
    [steps] = (vars(m)[STATE] for _, m in model.named_modules() if STATE in vars(m))
    assert isinstance(steps, Steps)
    return steps


def programs(model: nn.Module) -> list[DecodeProgram]:
    """Return the programs that a model's steps run."""
    held = [vars(m)[STATE] for _, m in model.named_modules() if STATE in vars(m)]
    return [p for steps in held for p in steps._programs.values() if p is not None]


def filled(
    model: nn.Module,
    prompt: mx.array = PROMPT,
    cache: list[Any] | None = None,
    *,
    on: Callable[[], AbstractContextManager[None]] = on_cpu,
) -> list[Any]:
    """Return a model's caches after a prompt; where there have been steps, on `nullcontext`."""
    cache = make_prompt_cache(model) if cache is None else cache
    mx.eval(model.parameters())
    with on():
        mx.eval(model(prompt, cache=cache))
    return cache


def step(model: nn.Module, cache: list[Any], token: int) -> mx.array:
    """Return the logits of one step, not computed yet."""
    logits: mx.array = model(mx.array([[token]]), cache=cache)
    return logits


def stepped(model: nn.Module, cache: list[Any], tokens: list[int]) -> np.ndarray[Any, Any]:
    """Return the logits of steps with given tokens, (steps, vocabulary)."""
    rows = []
    for token in tokens:
        rows.append(step(model, cache, token)[0, -1].astype(mx.float32))
        mx.eval(rows[-1])
    return np.stack([np.array(row) for row in rows])


def deviation(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Return the root mean square of a difference, relative to the truth's."""
    return float(np.sqrt(np.square(found - truth).mean() / np.square(truth).mean()))


def lent(cache: list[Any]) -> list[bool]:
    """Return for each cache whether a program has its buffers."""
    return [is_lent(c) for c in cache]
