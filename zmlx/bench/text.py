"""Is a patched model's text the one that stock mlx-lm gives in float32?

The patched model writes a greedy continuation in its own dtype. Stock mlx-lm, with the same weights
in float32 (scales, biases and norms cast, which is exact), then reads prompt and continuation once
and says at every position which token it would have chosen. Up to the first difference this is what
stock would have written itself; after it, what stock would write next. Small models soon repeat
themselves, so both can also be led through a given text, where they choose but are not followed.

Where they differ, numbers say whether it is a tie: the distance between the two tokens in stock's
float32 logits, and how far a step of either model in the 16-bit dtype is from float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from zmlx.bench.generation import generate
from zmlx.patch import patch, unpatch

#: Tokens that go through a model at once.
PIECE = 64


@dataclass(frozen=True)
class Difference:
    """One position where the patched model chose another token than stock in float32.

    Errors are root mean squares over the vocabulary, against stock's float32 logits there.

    Attributes:
        position: number of the generated token, from 0.
        ours, stock: the two tokens.
        gap: stock's float32 logit of its own token minus that of ours; 0 is a tie.
        spacing: distance of neighbouring numbers of the patched model's dtype at that logit.
        error: of the patched model's logits, after all steps before.
        step_error: of one patched step on float32's keys and values, rounded to the dtype.
        stock_step_error: the same of a stock step; None when the dtype is float32.
    """

    position: int
    ours: int
    stock: int
    gap: float
    spacing: float
    error: float
    step_error: float
    stock_step_error: float | None


@dataclass(frozen=True)
class Reading:
    """What the patched model chose at every position, and what stock in float32 did.

    Attributes:
        tokens: the patched model's choices: what it wrote, unless a text was given.
        stock: stock's choices after the same tokens.
        differences: where the two differ.
        errors: at every position, root mean square of the patched logits' distance from stock's.
    """

    tokens: tuple[int, ...]
    stock: tuple[int, ...]
    differences: tuple[Difference, ...]
    errors: tuple[float, ...]


def read(
    model: nn.Module,
    wide: nn.Module,
    prompt: Sequence[int],
    count: int,
    *,
    given: Sequence[int] | None = None,
    piece: int = PIECE,
    on_token: Callable[[int], None] | None = None,
) -> Reading:
    """Write a continuation with the patched model and read it with stock in float32.

    Args:
        model: a loaded model with plain key-value caches; it is unpatched afterwards.
        wide: the same checkpoint loaded once more and widened by `widen`.
        prompt: token ids, at least two.
        count: tokens to write, at least two.
        given: a text that follows the prompt instead of what the model writes; `count` or more.
        piece: tokens of the prompt, and of what stock reads, that are read at once.
        on_token: called with the number of tokens that went through either model.

    Returns:
        The reading.
    """
    try:
        written = generate(
            patch(model),
            prompt,
            count,
            forced=given,
            keep_logits=True,
            prefill_step=piece,
            on_token=on_token,
        )
        assert written.logits is not None
        followed = written.tokens if given is None else given
        context = [*prompt, *followed[: count - 1]]
        truth, cache = _stock_logits(unpatch(wide), context, count, piece, on_token)
        choices = _tokens(mx.argmax(truth, axis=-1))
        errors = mx.sqrt(mx.mean(mx.square(written.logits - truth), axis=-1))
        found = []
        for position, (ours, stock) in enumerate(zip(written.tokens, choices, strict=True)):
            if ours == stock:
                continue
            end = len(prompt) + position
            logits = truth[position]
            step, stock_step = _step_errors(model, cache, context[:end], logits)
            found.append(
                Difference(
                    position=position,
                    ours=ours,
                    stock=stock,
                    gap=_number(logits[stock] - logits[ours]),
                    spacing=_spacing(_number(mx.abs(logits[stock])), _dtype(model)),
                    error=_number(errors[position]),
                    step_error=step,
                    stock_step_error=stock_step,
                )
            )
    finally:
        unpatch(model)
    each = cast(list[float], errors.tolist())
    return Reading(written.tokens, choices, tuple(found), tuple(each))


def widen(model: nn.Module) -> nn.Module:
    """Cast a model's floating parameters to float32, which loses nothing; quantized ones stay."""
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def _stock_logits(
    model: nn.Module,
    context: Sequence[int],
    count: int,
    piece: int,
    on_token: Callable[[int], None] | None,
) -> tuple[mx.array, list[Any]]:
    """Return the logits (count, vocabulary) of the last positions, and the cache."""
    cache = make_prompt_cache(model)
    kept = []
    for start in range(0, len(context), piece):
        tokens = context[start : start + piece]
        logits = model(mx.array([tokens]), cache=cache)[0]
        skipped = max(0, len(context) - count - start)
        kept.append(logits[skipped:].astype(mx.float32))
        mx.eval(kept[-1], [layer.state for layer in cache])
        if on_token is not None:
            on_token(len(tokens))
    return mx.concatenate(kept), cache


def _step_errors(
    model: nn.Module, cache: list[Any], context: Sequence[int], truth: mx.array
) -> tuple[float, float | None]:
    """Return the errors of one patched and one stock step after the same keys and values."""
    dtype = _dtype(model)

    def error(chosen: nn.Module) -> float:
        own = make_prompt_cache(chosen)
        for layer, filled in zip(own, cache, strict=True):
            kept = (part[..., : len(context) - 1, :] for part in (filled.keys, filled.values))
            layer.update_and_fetch(*(part.astype(dtype) for part in kept))
        logits = chosen(mx.array([context[-1:]]), cache=own)[0, -1].astype(mx.float32)
        return _number(mx.sqrt(mx.mean(mx.square(logits - truth))))

    ours = error(patch(model))
    return ours, None if dtype == mx.float32 else error(unpatch(model))


def _dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype of the floating parameters, and so of the activations."""
    parameters: Any = tree_flatten(model.parameters())
    dtypes: list[mx.Dtype] = [array.dtype for _, array in parameters]
    return next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))


def _spacing(value: float, dtype: mx.Dtype) -> float:
    """Return the distance from a positive number to the next one of a dtype."""
    _, exponent = math.frexp(value)
    digits = {mx.float32: 24, mx.float16: 11, mx.bfloat16: 8}[dtype]
    return float(2.0 ** (exponent - digits))


def _number(value: mx.array) -> float:
    return cast(float, value.item())


def _tokens(array: mx.array) -> tuple[int, ...]:
    return tuple(cast(list[int], array.tolist()))
