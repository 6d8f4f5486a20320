"""Logits of a model over a prompt, cached decoding and a ragged batch, and their errors.

`alone` is one sequence, `long` one with a longer prompt. `ragged` is what mlx-lm's batch generation
does with prompts of different lengths: the first part is padded on the right, the caches then move
the padding to the left, and everything that follows (here a second part of the prompts, then single
tokens) runs left-padded.

    stock = run(alone, model)
    patch(model)
    patched = run(alone, model)
    verdict = judge(alone, reference(model, mx.float64), stock, patched)
    assert not verdict.complaints()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache
from zoo.choices import Choice, choices, same, slip
from zoo.devices import on_cpu

Logits = npt.NDArray[np.float64]

#: The prompt (7 tokens) and the tokens that are fed one by one after it.
PROMPT = (11, 95, 3, 152, 27, 64, 118)
DECODED = (71, 8, 133, 40)

#: A prompt longer than the sliding windows, and long enough for experts to be visited in order.
LONG = tuple((17 * i * i + 5 * i + 3) % 151 for i in range(40))

#: Two prompts of different lengths, then what follows in both: two tokens at once, two singly.
RAGGED = ((11, 95, 3, 152, 27), (88, 7, 144))
FOLLOWING = ((64, 118), (30, 19))
STEPS = ((71, 5), (8, 102))


#: Errors of two roundings of the same sum differ by chance: over the 1,700 logits and more of a run
#: the root mean square varies by a few per cent, the largest one by more.
SLACK_RMS = 1.1
SLACK_WORST = 1.3

#: What counts as rounding of float32, over the standard deviation of the logits. Stock float32
#: models of the zoo are 3e-7 to 2e-6 (rms) and 1e-6 to 8e-6 (worst) from the float64 truth.
FLOOR_RMS = 1e-6
FLOOR_WORST = 5e-6


class CannotBatch(Exception):
    """The stock model's caches do not support batches of different lengths."""


@dataclass(frozen=True)
class Error:
    """Distance of logits from the truth, over the standard deviation of the truth.

    Attributes:
        rms: root of the mean square.
        worst: the largest.
    """

    rms: float
    worst: float

    def __str__(self) -> str:
        return f"{self.rms:.1e} rms, {self.worst:.1e} max"


@dataclass(frozen=True)
class Run:
    """The logits of one run and the choices that it made."""

    logits: Logits
    choices: list[Choice]


@dataclass(frozen=True)
class Verdict:
    """How far the stock and the patched model are from the truth on the same choices.

    Attributes:
        stock: error of the stock model.
        patched: error of the patched model.
        same: whether both made the same choices.
        wrong: the worst choice of the patched model that the truth would not have made, and ...
        noise: ... the largest error of a stock score, both over the spread of the scores.
    """

    stock: Error
    patched: Error
    same: bool
    wrong: float
    noise: float

    def complaints(self) -> list[str]:
        """Return what breaks the contract `tighter`."""
        found = []
        if not self.patched.rms <= SLACK_RMS * self.stock.rms + FLOOR_RMS:
            found.append(f"rms error {self.patched.rms:.2e}, stock {self.stock.rms:.2e}")
        if not self.patched.worst <= SLACK_WORST * self.stock.worst + FLOOR_WORST:
            found.append(f"worst error {self.patched.worst:.2e}, stock {self.stock.worst:.2e}")
        if not self.wrong <= 2 * self.noise + FLOOR_WORST:
            found.append(f"a choice wrong by {self.wrong:.2e}, stock scores err {self.noise:.2e}")
        return found


def run(function: Callable[[nn.Module], Logits], model: nn.Module) -> Run:
    """Run `alone`, `long` or `ragged`; without compilation, so that the choices are seen."""
    with _uncompiled(), choices() as made:
        return Run(function(model), made)


def judge(
    function: Callable[[nn.Module], Logits], truth: nn.Module, stock: Run, patched: Run
) -> Verdict:
    """Compare two runs with the truth; `truth` is the model in a higher precision."""
    on_stock = _replayed(function, truth, stock)
    agree = same(stock.choices, patched.choices)
    on_patched = on_stock if agree else _replayed(function, truth, patched)
    return Verdict(
        error(stock.logits, on_stock.logits),
        error(patched.logits, on_patched.logits),
        agree,
        slip(patched.choices, on_patched.choices)[0],
        slip(stock.choices, on_stock.choices)[1],
    )


def _replayed(function: Callable[[nn.Module], Logits], truth: nn.Module, told: Run) -> Run:
    # A GPU has no float64.
    with on_cpu(), _uncompiled(), choices(replay=told.choices) as made:
        return Run(function(truth), made)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def alone(model: nn.Module) -> Logits:
    """Return the logits of the prompt's positions and of each decoded token: (11, vocab)."""
    return _sequence(model, PROMPT, DECODED)


def long(model: nn.Module) -> Logits:
    """Return the logits of a long prompt and of two decoded tokens: (42, vocab)."""
    return _sequence(model, LONG, DECODED[:2])


def ragged(model: nn.Module) -> Logits:
    """Return the logits of all true positions of a batch of two prompts: (16, vocab).

    Raises:
        CannotBatch: a cache of the model has no batched form; said by mlx-lm before any forward.
    """
    cache = _batched_caches(model, len(RAGGED))
    lengths = [len(prompt) for prompt in RAGGED]
    longest = max(lengths)
    padded = mx.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in RAGGED])
    for c in cache:
        c.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    logits = model(padded, cache=cache)
    for c in cache:
        c.finalize()
    steps = [logits[row, :n] for row, n in enumerate(lengths)]
    for tokens in (FOLLOWING, *([[a], [b]] for a, b in STEPS)):
        mx.eval(steps)
        steps.extend(model(mx.array(tokens), cache=cache))
    return _stacked(steps)


def error(logits: Logits, truth: Logits) -> Error:
    """Return how far logits are from the truth."""
    difference = np.abs(logits - truth) / truth.std()
    return Error(float(np.sqrt((difference**2).mean())), float(difference.max()))


def _sequence(model: nn.Module, prompt: Sequence[int], decoded: Sequence[int]) -> Logits:
    cache = make_prompt_cache(model)
    steps = [model(mx.array([prompt]), cache=cache)[0]]
    for token in decoded:
        mx.eval(steps)
        steps.append(model(mx.array([[token]]), cache=cache)[0])
    return _stacked(steps)


def _batched_caches(model: nn.Module, rows: int) -> list[Any]:
    caches = [make_prompt_cache(model) for _ in range(rows)]
    merged = []
    for parts in zip(*caches, strict=True):
        merge: Callable[[Any], Any] | None = getattr(parts[0], "merge", None)
        if merge is None:
            raise CannotBatch(f"{type(parts[0]).__name__} has no merge")
        merged.append(merge(parts))
    return merged


def _stacked(steps: list[mx.array]) -> Logits:
    # NumPy has no bfloat16; float64 holds every value of every dtype.
    wide = [s if s.dtype == mx.float64 else s.astype(mx.float32) for s in steps]
    return np.concatenate([np.array(s, dtype=np.float64) for s in wide])
