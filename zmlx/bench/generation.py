"""One greedy generation, timed token by token, with what a comparison needs beside the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

#: Tokens of the prompt that go through the model at once, as in mlx-lm.
PREFILL_STEP = 2048


@dataclass(frozen=True)
class Generation:
    """What one run gave.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: the generated token ids; the first comes from the prompt's last position.
        prefill_seconds: time of the prompt until the first token is known.
        step_seconds: time of each further token; one fewer than `tokens`.
        peak_bytes: most memory that MLX held meanwhile, weights included.
        has_nan: whether any logit was NaN.
        logits: float32 (len(tokens), vocabulary), or None when they were not kept.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    prefill_seconds: float
    step_seconds: tuple[float, ...]
    peak_bytes: int
    has_nan: bool
    logits: mx.array | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after the first."""
        return len(self.step_seconds) / sum(self.step_seconds)


def generate(
    model: nn.Module,
    prompt: Sequence[int],
    count: int,
    *,
    forced: Sequence[int] | None = None,
    keep_logits: bool = False,
    prefill_step: int = PREFILL_STEP,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Run a prompt and decode `count` tokens, always the likeliest, never stopping early.

    Args:
        model: an mlx-lm model.
        prompt: token ids, at least one.
        count: tokens to generate, at least two (the first belongs to the prompt's time).
        forced: token ids to feed instead of the generated ones, so that two models see the same
            context; `count` or more.
        keep_logits: keep the logits of every generated position.
        prefill_step: tokens of the prompt that go through the model at once.
        on_token: called after the prompt with its length and after each token with 1.

    Returns:
        The run.

    Raises:
        ValueError: an empty prompt, fewer than two tokens, or too few forced ones.
    """
    if not prompt or count < 2 or (forced is not None and len(forced) < count):
        raise ValueError(
            f"prompt of {len(prompt)} tokens and {count} tokens to generate: "
            "expected at least 1 and 2, and as many forced tokens as generated ones"
        )
    cache = make_prompt_cache(model)
    tokens: list[int] = []
    seconds: list[float] = []
    kept: list[mx.array] = []
    nan = mx.array(False)
    mx.clear_cache()
    mx.reset_peak_memory()
    pending = list(prompt)
    for position in range(count):
        started = time.perf_counter()
        logits = _last_logits(model, pending, cache, prefill_step)
        choice = mx.argmax(logits)
        mx.eval(choice, logits)
        seconds.append(time.perf_counter() - started)
        nan = mx.logical_or(nan, mx.any(mx.isnan(logits)))
        if keep_logits:
            kept.append(logits.astype(mx.float32))
        mx.eval(nan, kept[-1:])
        tokens.append(cast(int, choice.item()))
        if on_token is not None:
            on_token(len(pending))
        pending = [forced[position] if forced is not None else tokens[-1]]
    return Generation(
        prompt_tokens=len(prompt),
        tokens=tuple(tokens),
        prefill_seconds=seconds[0],
        step_seconds=tuple(seconds[1:]),
        peak_bytes=mx.get_peak_memory(),
        has_nan=bool(nan.item()),
        logits=mx.stack(kept) if keep_logits else None,
    )


def _last_logits(model: nn.Module, tokens: list[int], cache: list[object], step: int) -> mx.array:
    """Return the logits (vocabulary,) after some tokens, which go through in steps."""
    for start in range(0, len(tokens), step):
        logits = model(mx.array([tokens[start : start + step]]), cache=cache)
        if start + step < len(tokens):
            mx.eval(logits[0, -1])
    last: mx.array = logits[0, -1]
    return last
