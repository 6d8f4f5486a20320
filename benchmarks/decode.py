"""Decode speed of SmolLM2-135M, dense and as a mixture of experts, stock against zmlx.

    python benchmarks/decode.py

Stock and patched runs alternate in one process, with one copy of the weights. Writes every raw run
to benchmarks/capsules/decode-cpu.json and prints the medians. Stock takes one to four seconds for
each token with 16-bit scales on a CPU, so it decodes fewer tokens there; all takes ten minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from zmlx import backend
from zmlx.bench.capsule import GENERATION, Run, collect, write
from zmlx.bench.decode import measure, plan_of
from zmlx.bench.environment import as_under_zmlx_run
from zmlx.bench.loading import load_checkpoint
from zmlx.bench.report import show
from zmlx.demo.prepare import prepare
from zmlx.demo.smollm import DemoUnavailable

PROMPT = "The capital of France is"
DTYPES = ("float32", "bfloat16", "float16")
#: dtype -> tokens that a stock run generates
STOCK_TOKENS = {"float32": 17, "bfloat16": 5, "float16": 5}
CAPSULES = Path(__file__).parent / "capsules"


@click.command(context_settings={"show_default": True})
@click.option("--runs", type=click.IntRange(min=1), default=5, help="Runs of each kind.")
@click.option("--tokens", type=click.IntRange(min=2), default=65, help="Tokens of a patched run.")
@click.option("--shape", "shapes", multiple=True, default=("dense", "moe"))
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoints lie.")
@click.option("--capsule", type=click.Path(path_type=Path), help="Where the raw runs go.")
def main(
    runs: int,
    tokens: int,
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    folder: Path | None,
    capsule: Path | None,
) -> None:
    """Measure prefill and decode of SmolLM2, stock and zmlx in turn."""
    as_under_zmlx_run()
    made: list[Run] = []
    plans = {}
    console = Console(stderr=True)
    home = folder or Path(tempfile.gettempdir()) / "zmlx-decode-benchmark"
    for shape in shapes:
        for dtype in dtypes:
            subject = f"{shape} {dtype}"
            with console.status(subject) as status:
                try:
                    model, tokenizer = load_checkpoint(str(prepare(home, shape, dtype)))
                except DemoUnavailable as error:
                    sys.exit(str(error))
                new, report = measure(
                    model,
                    tokenizer.encode(PROMPT),
                    subject=subject,
                    stock_tokens=STOCK_TOKENS.get(dtype, tokens),
                    tokens=tokens,
                    runs=runs,
                    on_run=lambda kind, name=subject: status.update(f"{name}: {kind}"),
                )
            made += new
            plans[subject] = plan_of(report)
    stock = ", ".join(f"{STOCK_TOKENS.get(d, tokens) - 1} ({d})" for d in dtypes)
    notes = (f"prompt {PROMPT!r}; decode steps in a run: zmlx {tokens - 1}, stock {stock}",)
    title = "SmolLM2-135M-Instruct, stock mlx-lm against zmlx"
    result = collect(title, made, GENERATION, plans=plans, notes=notes)
    write(result, capsule or CAPSULES / f"decode-{backend.current()}.json")
    show(result)


if __name__ == "__main__":
    main()
