"""The demo's command: an answer with and without zmlx, then a table of both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from zmlx.bench.capsule import GENERATION, Capsule, Run, collect, write
from zmlx.bench.decode import measure, plan_of
from zmlx.bench.loading import LoadError, load_checkpoint
from zmlx.bench.report import show
from zmlx.demo.answer import Answer, CommandFailed, ask
from zmlx.demo.prepare import SHAPES, prepare
from zmlx.demo.smollm import DTYPES, DemoUnavailable
from zmlx_autopatch import variables

#: What is measured: shape, dtype, tokens of a stock run, runs. Stock sums 16-bit products one by
#: one on the CPU, a second or more for each token, so few tokens must do there.
MEASURED = (
    ("dense", "float32", 9, 3),
    ("moe", "float32", 9, 3),
    ("dense", "bfloat16", 4, 1),
    ("moe", "bfloat16", 4, 1),
)
_PATCHED_TOKENS = 33
_PROMPT = "The capital of France is"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint folder of yours.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the demo's models lie.")
@click.option("--capsule", type=click.Path(path_type=Path), help="Write every raw run to a file.")
@click.pass_context
def demo(
    context: click.Context, model: Path | None, folder: Path | None, capsule: Path | None
) -> None:
    """Answer a question with and without zmlx, then measure both."""
    if context.invoked_subcommand is not None:
        return
    try:
        if model is not None:
            _check_model(model)
            same = _answers(model, None)
            measured = _capsule([(model.name, model, 9, 3)])
        else:
            home = folder or _default_folder()
            same = _answers(prepare(home), "Paris")
            measured = _capsule(
                [
                    (f"{shape} {dtype}", prepare(home, shape, dtype), n, runs)
                    for shape, dtype, n, runs in MEASURED
                ]
            )
    except (DemoUnavailable, CommandFailed, LoadError) as error:
        print(f"zmlx demo: {error}", file=sys.stderr)
        sys.exit(1)
    show(measured)
    if capsule is not None:
        write(measured, capsule)
    sys.exit(0 if same else 1)


@demo.command("prepare")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="[float32]")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="dense", help="[dense]")
def prepare_command(folder: Path, dtype: str, shape: str) -> None:
    """Write SmolLM2-135M-Instruct as an MLX checkpoint into FOLDER and print where."""
    try:
        print(prepare(folder, shape, dtype))
    except DemoUnavailable as error:
        print(f"zmlx demo: {error}", file=sys.stderr)
        sys.exit(1)


def _answers(model: Path, expected: str | None) -> bool:
    """Print both answers; return whether they are the same and hold what is expected."""
    ours = ask(model, patched=True)
    _print_answer(ours)
    stock = ask(model, patched=False)
    _print_answer(stock)
    if ours.text != stock.text:
        print("zmlx demo: the two texts differ", file=sys.stderr)
        return False
    if expected is not None and expected not in ours.text:
        print(f"zmlx demo: the answer does not name {expected}", file=sys.stderr)
        return False
    print("The texts are the same.\n")
    return True


def _print_answer(answer: Answer) -> None:
    print(f"$ {answer.command}")
    for line in answer.messages:
        print(line)
    print(f"{answer.text}\n", flush=True)


def _capsule(subjects: list[tuple[str, Path, int, int]]) -> Capsule:
    """Measure some checkpoints, stock and patched in turn."""
    runs: list[Run] = []
    plans: dict[str, dict[str, Any]] = {}
    console = Console(stderr=True)
    for subject, folder, stock_tokens, repeats in subjects:
        with console.status(f"measuring {subject}"):
            model, tokenizer = load_checkpoint(str(folder))
            made, report = measure(
                model,
                tokenizer.encode(_PROMPT),
                subject=subject,
                stock_tokens=stock_tokens,
                tokens=_PATCHED_TOKENS,
                runs=repeats,
            )
        runs += made
        plans[subject] = plan_of(report)
    steps = ", ".join(f"{n - 1} for {subject}" for subject, _, n, _ in subjects)
    notes = (
        f"prompt: {_PROMPT!r}; decode steps in a run: zmlx {_PATCHED_TOKENS - 1}; stock {steps}",
    )
    return collect("stock mlx-lm against zmlx", runs, GENERATION, plans=plans, notes=notes)


def _check_model(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise DemoUnavailable(
            f"{model}: no config.json there; give the folder of an MLX checkpoint"
        )


def _default_folder() -> Path:
    return Path(variables.text("ZMLX_CACHE_DIR") or "~/.cache/zmlx").expanduser() / "demo"
