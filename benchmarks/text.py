"""Real text on SmolLM2-135M: what zmlx writes against what stock mlx-lm in float32 would write.

    python benchmarks/text.py

For each checkpoint and prompt, zmlx writes 512 tokens, always the likeliest one. Stock mlx-lm, with
the same weights and its scales in float32, then reads the whole in one pass and says at each
position what it would have chosen (`zmlx.bench.text` says why that is as good as letting it write).
A small model soon repeats itself, so both also choose along 512 tokens of given prose. Every
difference is explained by its numbers. On a CPU stock reads eight tokens a second, so that all
takes 40 minutes. On a CUDA device `--piece 1` has stock read with its kernels for one token; those
for several MLX compiles first, a minute for each dtype. Writes tokens and differences to
benchmarks/capsules/text-cpu.json, or text-cuda.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from zmlx import backend
from zmlx.bench.capsule import Quantities, Run, collect, write
from zmlx.bench.decode import plan_of
from zmlx.bench.loading import load_checkpoint
from zmlx.bench.report import show
from zmlx.bench.text import PIECE, Difference, Reading, read, widen
from zmlx.demo.prepare import prepare
from zmlx.demo.smollm import DemoUnavailable
from zmlx.patch import patch, unpatch

PROMPTS = Path(__file__).parent / "prompts"
PROSE = Path(__file__).parent / "prose"
#: Tokens of prose that come before the first choice.
BEGINNING = 16
CAPSULES = Path(__file__).parent / "capsules"
DTYPES = ("float32", "bfloat16", "float16")
QUANTITIES: Quantities = {
    "tokens": ("written", True),
    "identical": ("tokens", True),
    "identical_from_the_start": ("tokens", True),
    "distinct": ("tokens", True),
    "logits_error": ("rms", False),
    "largest_gap": ("logits", False),
}


def run_of(subject: str, variant: str, reading: Reading) -> Run:
    """Return a reading as a run of a capsule; its samples say what is at each difference."""
    differences = reading.differences
    first = differences[0].position if differences else len(reading.tokens)
    samples: dict[str, list[float]] = {
        "tokens": list(reading.tokens),
        "stock_tokens": list(reading.stock),
        "errors": list(reading.errors),
    }
    for name in ("position", "ours", "stock", "gap", "spacing", "error", "step_error"):
        samples[f"difference_{name}"] = [getattr(entry, name) for entry in differences]
    stock_errors = [e.stock_step_error for e in differences if e.stock_step_error is not None]
    samples["difference_stock_step_error"] = stock_errors
    return Run(
        subject=subject,
        variant=variant,
        repeat=0,
        values={
            "tokens": len(reading.tokens),
            "identical": len(reading.tokens) - len(differences),
            "identical_from_the_start": first,
            "distinct": len(set(reading.tokens)),
            "logits_error": statistics.median(reading.errors),
            "largest_gap": max((entry.gap for entry in differences), default=0.0),
        },
        samples=samples,
    )


def line_of(entry: Difference, tokenizer: Any) -> str:
    """Return a difference in one line."""
    ours, stock = (repr(tokenizer.decode([token])) for token in (entry.ours, entry.stock))
    text = f"token {entry.position}: {ours} for {stock}, {entry.gap:.2g} apart in float32 = "
    text += f"{entry.gap / entry.spacing:.2g} spacings; logits off by {entry.error:.2g}"
    if entry.stock_step_error is not None:
        text += f", in one step by {entry.step_error:.2g} (stock {entry.stock_step_error:.2g})"
    return text


@click.command(context_settings={"show_default": True})
@click.option("--tokens", type=click.IntRange(min=2), default=512, help="Tokens to write.")
@click.option("--shape", "shapes", multiple=True, default=("dense", "moe"))
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES)
@click.option("--prompt", "names", multiple=True, help="Names of prompts; default: all.")
@click.option("--piece", type=click.IntRange(min=1), default=PIECE, help="Tokens read at once.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoints lie.")
@click.option("--capsule", type=click.Path(path_type=Path), help="Where tokens and numbers go.")
def main(
    tokens: int,
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    names: tuple[str, ...],
    piece: int,
    folder: Path | None,
    capsule: Path | None,
) -> None:
    """Compare what zmlx writes with what stock mlx-lm in float32 would write."""
    made: list[Run] = []
    notes = ["all differences; errors are root mean squares over the vocabulary:"]
    plans = {}
    console = Console(stderr=True)
    home = folder or Path(tempfile.gettempdir()) / "zmlx-text-benchmark"
    files = [*sorted(PROMPTS.glob("*.txt")), *sorted(PROSE.glob("*.txt"))]
    files = [file for file in files if not names or file.stem in names]
    for subject, shape, dtype in ((f"{s} {d}", s, d) for s in shapes for d in dtypes):
        with console.status(subject) as status:
            try:
                path = str(prepare(home, shape, dtype))
            except DemoUnavailable as error:
                sys.exit(str(error))
            model, tokenizer = load_checkpoint(path)
            wide = widen(load_checkpoint(path)[0])
            plans[subject] = plan_of(vars(patch(model))["_zmlx_patch_result"])
            unpatch(model)
            for file in files:
                seen = [0]

                def progress(count: int, seen: list[int] = seen, name: str = file.stem) -> None:
                    seen[0] += count
                    status.update(f"{subject}, {name}: {seen[0]} tokens written or read")  # noqa: B023

                prompt, given = tokenizer.encode(file.read_text().strip()), None
                if file.parent == PROSE:
                    prompt, given = prompt[:BEGINNING], prompt[BEGINNING:]
                reading = read(
                    model, wide, prompt, tokens, given=given, piece=piece, on_token=progress
                )
                made.append(run_of(subject, file.stem, reading))
                lines = [line_of(entry, tokenizer) for entry in reading.differences]
                notes += [f"{subject}, {file.stem}, {line}" for line in lines]
                console.print(f"{subject}, {file.stem}: {len(lines)} differences", *lines, sep="\n")
    title = "SmolLM2-135M-Instruct: zmlx's greedy text, read by stock mlx-lm in float32"
    result = collect(title, made, QUANTITIES, plans=plans, notes=tuple(notes))
    write(result, capsule or CAPSULES / f"text-{backend.current()}.json")
    show(result)


if __name__ == "__main__":
    main()
