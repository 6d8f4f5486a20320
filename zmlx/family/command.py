"""`zmlx family`: what a model is recognised as and why, from its config.json alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from zmlx.family.detect import detect
from zmlx.family.table import Family, title


@click.command()
@click.argument("model_path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def family(model_path: Path, as_json: bool) -> None:
    """Explain how the model in MODEL_PATH is recognised, without loading its weights."""
    config = read_config(model_path)
    facts = explain(detect(config=config), config)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        for number, line in enumerate(value if isinstance(value, list) else [value]):
            table.add_row("" if number else key, str(line))
    Console(file=sys.stdout, soft_wrap=True).print(table)


def read_config(model_path: Path) -> dict[str, Any]:
    """Read the config.json of a model folder.

    Raises:
        click.UsageError: there is none, or it is not a JSON object.
    """
    file = model_path if model_path.suffix == ".json" else model_path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(
            f"{file}: {error.strerror}; give the folder of a model, the one with config.json"
        ) from error
    except ValueError as error:
        raise click.UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise click.UsageError(f"{file} is not a JSON object")
    return config


def explain(found: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a recognised model, for people and for machines."""
    facts: dict[str, Any] = {
        "family": found.name,
        "model type": found.model_type,
        "because": list(found.because),
    }
    if found.facts is not None:
        facts["called"] = title(found.name)
        facts["router"] = found.facts.router or "none: a dense model"
        facts["activation"] = found.facts.activation or "no gated MLP"
        if found.facts.shared:
            facts["shared experts"] = found.facts.shared
    facts["quantization"] = quantization(config)
    facts["refused"] = [
        f"{pattern} on {', '.join(refusal.backends) or 'every backend'}: {refusal.reason}"
        f" ({refusal.evidence})"
        for pattern, refusal in found.refusals.items()
    ] or ["nothing by the table; `zmlx doctor MODEL_PATH` shows the plan"]
    return facts


def quantization(config: Mapping[str, Any]) -> str:
    """Describe how a checkpoint's weights are quantized."""
    settings = config.get("quantization") or config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return "none"
    if "bits" not in settings:
        return f"by {settings.get('quant_method', 'an unknown method')}"
    mode = settings.get("mode", "affine")
    described = f"{mode}, {settings['bits']} bits, groups of {settings.get('group_size')}"
    layers = [value for value in settings.values() if isinstance(value, Mapping)]
    other = Counter(f"{row.get('bits')} bits" for row in layers)
    if other:
        described += "; single layers differ: " + ", ".join(f"{n} x {k}" for k, n in other.items())
    return described
