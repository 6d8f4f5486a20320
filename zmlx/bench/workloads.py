"""What users do with a model, timed: decode after a prompt, a batch of sequences, a prompt.

All go through mlx-lm's own loops, `generate_step` and `BatchGenerator`, with their pipeline: the
next step is built and encoded while the device computes the last one. Where steps are timed, their
prompts were read before, once (`Prompts`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zmlx.bench.prompts import Prompts

#: Steps of a timed batch at most: it gives many tokens in each.
_BATCH_STEPS = 32


@dataclass(frozen=True)
class Outcome:
    """One run of a workload.

    Attributes:
        rate: tokens per second: generated ones, or of the prompt.
        quantity: "decode" or "prefill", what the rate is of.
        peak_bytes: most memory that MLX held in what is timed, weights included, without `Prompts`.
        samples: seconds of each step, or of the prompt.
    """

    rate: float
    quantity: str
    peak_bytes: int
    samples: dict[str, list[float]]


@dataclass(frozen=True)
class Decode:
    """Generate after one prompt, greedily; timed from the first token to the last.

    Attributes:
        prompt: token ids.
    """

    prompt: tuple[int, ...]

    @property
    def label(self) -> str:
        """How it is named in a capsule."""
        return f"context {len(self.prompt)}"

    def run(self, model: nn.Module, tokens: int, prompts: Prompts) -> Outcome:
        """Generate `tokens` tokens, two or more."""
        steps: list[float] = []
        caches = prompts.after(self.prompt)
        _fresh()
        started = 0.0
        for _ in generated(model, self.prompt[-1:], tokens, caches):
            now = time.perf_counter()
            if started:
                steps.append(now - started)
            else:
                mx.reset_peak_memory()
            started = now
        peak = mx.get_peak_memory() - prompts.bytes
        return Outcome(len(steps) / sum(steps), "decode", peak, {"step_seconds": steps})


@dataclass(frozen=True)
class Prefill:
    """Read a prompt; timed until its first token is there.

    Attributes:
        prompt: token ids.
    """

    prompt: tuple[int, ...]

    @property
    def label(self) -> str:
        """How it is named in a capsule."""
        return f"prefill {len(self.prompt)}"

    def run(self, model: nn.Module, tokens: int, prompts: Prompts) -> Outcome:
        """Read the prompt, which `prompts` has not; `tokens` does not matter."""
        del tokens
        _fresh()
        started = time.perf_counter()
        for _ in generated(model, self.prompt, 1):
            seconds = time.perf_counter() - started
        peak = mx.get_peak_memory() - prompts.bytes
        rate = len(self.prompt) / seconds
        return Outcome(rate, "prefill", peak, {"prefill_seconds": [seconds]})


@dataclass(frozen=True)
class Batch:
    """Generate after several prompts at once; timed when all of them have their first token.

    Attributes:
        prompts: token ids, each as many as the others.
    """

    prompts: tuple[tuple[int, ...], ...]

    @property
    def label(self) -> str:
        """How it is named in a capsule."""
        return f"batch {len(self.prompts)}"

    def run(self, model: nn.Module, tokens: int, prompts: Prompts) -> Outcome:
        """Generate `tokens` tokens for each prompt, two or more, at most 33."""
        wanted = min(tokens, _BATCH_STEPS + 1)
        size = len(self.prompts)
        caches = [prompts.after(prompt) for prompt in self.prompts]
        _fresh()
        batch = import_module("mlx_lm.generate").BatchGenerator(
            model, completion_batch_size=size, prefill_batch_size=size
        )
        steps: list[float] = []
        try:
            # One more than is taken: a sequence that ends is taken out of the batch, which costs.
            last = [list(prompt[-1:]) for prompt in self.prompts]
            batch.insert(last, [wanted + 1] * size, caches)
            del caches
            started = time.perf_counter()
            for number in range(wanted):
                answers = batch.next_generated()
                now = time.perf_counter()
                if len(answers) != size:
                    raise RuntimeError(f"{len(answers)} sequences of {size} gave a token")
                if number == 0:
                    mx.reset_peak_memory()
                else:
                    steps.append(now - started)
                started = now
        finally:
            mx.synchronize()
            batch.close()
        rate = size * len(steps) / sum(steps)
        peak = mx.get_peak_memory() - prompts.bytes
        return Outcome(rate, "decode", peak, {"step_seconds": steps})


Workload = Decode | Prefill | Batch


def workloads(
    vocabulary: int, contexts: Sequence[int], batches: Sequence[int], context: int, prefill: int
) -> list[Workload]:
    """Return what is measured of a model, with prompts of random tokens.

    Args:
        vocabulary: token ids are below.
        contexts: lengths of the prompts to decode after.
        batches: numbers of sequences to decode together, each after `context` tokens.
        context: see `batches`.
        prefill: length of the prompt whose reading is timed; 0 for none.
    """
    random = np.random.default_rng(0)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(random.integers(0, vocabulary, length).tolist())

    result: list[Workload] = [Decode(prompt(length)) for length in contexts]
    if prefill:
        result.append(Prefill(prompt(prefill)))
    result += [Batch(tuple(prompt(context) for _ in range(size))) for size in batches]
    return result


def generated(
    model: nn.Module, prompt: Sequence[int], tokens: int, caches: list[Any] | None = None
) -> Iterator[Any]:
    """Run mlx-lm's `generate_step`, greedily, as its `stream_generate` does.

    Args:
        model: an mlx-lm model.
        prompt: token ids.
        tokens: how many to generate.
        caches: of what is before the prompt; they are used up. None for nothing.
    """
    loop = import_module("mlx_lm.generate")
    given = mx.array(tuple(prompt))
    with loop.wired_limit(model, [loop.generation_stream]):
        yield from loop.generate_step(given, model, max_tokens=tokens, prompt_cache=caches)
    mx.synchronize(loop.generation_stream)


@dataclass(frozen=True)
class Parts:
    """Seconds of each step when nothing overlaps: one entry a step.

    Attributes:
        build: in Python, until the step's graph is there.
        encode: in MLX, until every kernel has been handed to the device; on the CPU, until every
            operation stands in its queue.
        wait: from then until the device is done.
    """

    build: list[float]
    encode: list[float]
    wait: list[float]


def parts(model: nn.Module, prompt: Sequence[int], steps: int, prompts: Prompts) -> Parts:
    """Take steps of `generate_step` apart, waiting after each for the device.

    Args:
        model: an mlx-lm model.
        prompt: token ids.
        steps: how many, one or more; the first ones after the prompt are left out.
        prompts: has the prompt, or reads it.
    """
    skipped = 3
    build: list[float] = []
    encode: list[float] = []
    wait: list[float] = []
    with _timed_async_eval() as evaluations:
        caches = prompts.after(prompt)
        tokens = generated(model, prompt[-1:], skipped + steps + 1, caches)
        for number in range(skipped + steps):
            mx.synchronize()
            evaluations.clear()
            started = time.perf_counter()
            next(tokens)
            returned = time.perf_counter()
            _synchronize()
            if number >= skipped:
                encode.append(sum(evaluations))
                build.append(max(0.0, returned - started - encode[-1]))
                wait.append(time.perf_counter() - returned)
        for _ in tokens:
            pass
    return Parts(build, encode, wait)


def _synchronize() -> None:
    mx.synchronize(import_module("mlx_lm.generate").generation_stream)


@contextmanager
def _timed_async_eval() -> Iterator[list[float]]:
    """Note the seconds of every call of `mx.async_eval`, which is where kernels are encoded."""
    seconds: list[float] = []
    stock: Any = mx.async_eval

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        stock(*arguments)
        seconds.append(time.perf_counter() - started)

    mx.async_eval = timed
    try:
        yield seconds
    finally:
        mx.async_eval = stock


def _fresh() -> None:
    """Begin a run with nothing under way and no memory kept for reuse."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
