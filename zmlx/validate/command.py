"""`zmlx validate MODEL`: exit code 0 when the contract holds, 1 when it is broken, 2 on bad use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
import mlx.nn as nn
from rich.console import Console
from rich.progress import Progress

from zmlx.bench.capsule import write
from zmlx.bench.loading import LoadError, load_checkpoint
from zmlx.console import wide_console
from zmlx.profile import ProfileError, resolve_policy
from zmlx.validate.compare import Comparison, compare, steps
from zmlx.validate.contract import judge
from zmlx.validate.report import capsule_of, show, to_json

_PROMPT = "What is the capital of France?"


@click.command(name="validate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--profile", help="Release profile; the default is the one in force here.")
@click.option("--runs", type=click.IntRange(min=1), default=3, help="Runs of each kind [3].")
@click.option("--tokens", type=click.IntRange(min=2), default=32, help="Tokens of a run [32].")
@click.option("--prompt", default=_PROMPT, help="Text; the model's chat template is applied.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option("--capsule", type=click.Path(path_type=Path), help="Write every raw run to a file.")
def validate(
    model: str,
    profile: str | None,
    runs: int,
    tokens: int,
    prompt: str,
    as_json: bool,
    capsule: Path | None,
) -> None:
    """Run MODEL stock and patched in turn and compare speed, text, logits and memory.

    MODEL is what mlx_lm.load takes. Exit code 1 says that the contract is broken.
    """
    try:
        resolve_policy(profile)
    except ProfileError as error:
        _refuse(str(error))
    try:
        network, tokenizer = load_checkpoint(model)
    except LoadError as error:
        _refuse(str(error))
    ids = encode(tokenizer, prompt)
    if not ids:
        _refuse("the prompt has no tokens")
    comparison = _compared(network, ids, tokens, runs, profile)
    if capsule is not None:
        notes = (f"prompt of {len(ids)} tokens, {tokens} generated",)
        write(capsule_of(comparison, model, notes), capsule)
    if as_json:
        print(json.dumps(to_json(comparison, model), indent=1))
    else:
        show(comparison, model, wide_console())
    sys.exit(1 if judge(comparison) else 0)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a user's message, in the model's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _compared(
    network: nn.Module, ids: list[int], tokens: int, runs: int, profile: str | None
) -> Comparison:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=steps(ids, tokens, runs))
        return compare(
            network,
            ids,
            tokens=tokens,
            runs=runs,
            profile=profile,
            progress=lambda count: bar.advance(task, count),
        )


def _refuse(text: str) -> NoReturn:
    print(f"zmlx validate: {text}", file=sys.stderr)
    sys.exit(2)
