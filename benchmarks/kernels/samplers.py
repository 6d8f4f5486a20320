"""Choosing a token from logits: what mlx-lm calls against what zmlx has it call, on an NVIDIA GPU.

    python benchmarks/kernels/samplers.py

Microseconds in which kernels run, by PyTorch's profiler, for rows of bfloat16 logits of published
vocabularies. Variants take turns. Writes every run to benchmarks/capsules/samplers-cuda.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx_lm import sample_utils

from zmlx.backend import current
from zmlx.bench.capsule import Quantities, Run, collect, write
from zmlx.bench.kernel_times import record, why_not
from zmlx.bench.report import show
from zmlx.kernels.fast import LOGSUMEXP
from zmlx.kernels.vocabulary import ARGMAX
from zmlx.runtime.filtering import Filter

CAPSULES = Path(__file__).parents[1] / "capsules"
QUANTITIES: Quantities = {"gpu": ("us", False), "kernels": ("a call", False)}
STOCK, OURS = "mlx-lm", "zmlx"
ROWS = ((1, 128_256), (1, 201_088), (8, 128_256), (32, 128_256))
#: Calls that the profiler watches at a time, each on other logits.
CALLS = 8

Function = Callable[[mx.array], mx.array]


def functions(backend: str) -> dict[str, dict[str, Function]]:
    """Return name -> variant -> function of log-probabilities."""

    def filtered(name: str, number: float) -> dict[str, Function]:
        stock = getattr(sample_utils, name)
        ours = Filter(name, stock, backend, lambda _: True)
        return {STOCK: lambda x: stock(x, number), OURS: lambda x: ours(x, number)}

    return {
        "argmax": {
            STOCK: lambda x: mx.argmax(x, axis=-1),
            OURS: mx.compile(ARGMAX.implementation(backend)),
        },
        "logsumexp": {
            STOCK: lambda x: mx.logsumexp(x, axis=-1, keepdims=True),
            OURS: mx.compile(LOGSUMEXP.implementation(backend)),
        },
        "top-k of 40": filtered("apply_top_k", 40),
        "top-p of 0.9": filtered("apply_top_p", 0.9),
    }


def logits_of(rows: int, vocabulary: int) -> list[mx.array]:
    """Return log-probabilities of `CALLS` steps: some tokens stand out."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(CALLS):
        values = random.normal(-2, 2.2, (rows, vocabulary))
        values[:, :: vocabulary // 64] += 8
        logits = mx.array(values.astype(np.float32))
        made.append((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.bfloat16))
    mx.eval(made)
    return made


def runs_of(
    name: str, variants: dict[str, Function], shape: tuple[int, int], runs: int
) -> list[Run]:
    """Time both variants in turn."""
    logits = logits_of(*shape)

    def call(function: Function) -> None:
        for row in logits:
            mx.eval(function(row))

    made = []
    for number in range(runs):
        for variant in (STOCK, OURS) if number % 2 == 0 else (OURS, STOCK):
            times = record(lambda variant=variant: call(variants[variant]), CALLS)  # type: ignore[misc]
            values = {"gpu": times.microseconds, "kernels": times.kernels}
            made.append(Run(f"{name}, {shape[0]} x {shape[1]:,}", variant, number, values))
    return made


@click.command(context_settings={"show_default": True})
@click.option("--runs", type=click.IntRange(min=1), default=5, help="Runs of each.")
@click.option("--capsule", type=click.Path(path_type=Path))
def main(runs: int, capsule: Path | None) -> None:
    """Time what chooses a token."""
    if reason := why_not():
        sys.exit(f"samplers.py: {reason}")
    made: list[Run] = []
    for shape in ROWS:
        for name, variants in functions(current()).items():
            made += runs_of(name, variants, shape, runs)
    result = collect("Choosing a token, mlx-lm against zmlx", made, QUANTITIES)
    show(result)
    write(result, capsule or CAPSULES / f"samplers-{current()}.json")


if __name__ == "__main__":
    main()
