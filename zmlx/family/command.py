"""`zmlx family`: what a model is recognised as and why, from its config.json alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table as Grid
from rich.text import Text

from zmlx.console import wide_console
from zmlx.family.detect import detect
from zmlx.family.table import Family, ModelType, table

#: Keys under which configurations count the routed experts, and those that a token uses.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
    "moe_k",
)
#: Activations that a fused gated MLP computes -> the pattern that has it.
_GATED = {"swiglu": "swiglu_mlp", "geglu": "geglu_mlp", "geglu_tanh": "geglu_mlp"}


class ModelPathError(click.ClickException):
    """The path holds no configuration of a model."""

    exit_code = 2


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
    grid = Grid(show_header=False, box=None)
    for key, value in facts.items():
        for number, line in enumerate(_lines(value)):
            grid.add_row("" if number else key.replace("_", " "), Text(line))
    wide_console().print(grid)


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{key}: {inner}" for key, inner in value.items()]
    return [str(line) for line in value] if isinstance(value, list) else [str(value)]


def read_config(model_path: Path) -> dict[str, Any]:
    """Read the config.json of a model folder, or a configuration named itself.

    Raises:
        ModelPathError: there is none, or it is not a JSON object.
    """
    file = model_path if model_path.suffix == ".json" else model_path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelPathError(
            f"{file}: {error.strerror}; give the folder of a model, the one with config.json"
        ) from error
    except ValueError as error:
        raise ModelPathError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelPathError(f"{file}: not a JSON object")
    return config


def explain(found: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a recognised model, for people and for machines."""
    known = table()
    facts: dict[str, Any] = {
        "model_type": found.model_type or "(none)",
        "family": found.name,
        "called": known.titles.get(found.name, "a model that zmlx does not know"),
        "because": list(found.because),
    }
    row = found.facts
    if row is not None:
        routed = row.router and _count(config, _EXPERTS) != 0
        facts["kind"] = row.kind
        facts["router"] = f"{row.router}: {known.routers[row.router]}" if routed else "none"
        if routed:
            facts["experts"] = _experts(row, config)
            facts["shared_experts"] = row.shared or "none"
        facts["mlp"] = f"{row.mlp}: {known.activations[row.mlp]}" if row.mlp else "none"
        if row.note:
            facts["note"] = row.note
    facts["quantization"] = quantization(config)
    facts["patterns"] = needs(found, config)
    facts["refused"] = [
        f"{pattern} on {', '.join(refusal.backends or ()) or 'every backend'}: {refusal.reason}"
        f" ({refusal.evidence})"
        for pattern, refusal in found.refusals.items()
    ]
    return facts


def needs(found: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Return pattern -> what of this model it would be about, in words."""
    row = found.facts
    if row is None:
        return {"none": "nothing is replaced in a model of an unknown type, unless by name"}
    settings = _quantization(config)
    linear = "quantized layers, of which there are none"
    if settings is not None:
        linear = f"layers quantized as {quantization(config)}"
    about = {"quantized_linear": linear, "linear": "layers that are not quantized"}
    if row.mlp in _GATED:
        about[_GATED[row.mlp]] = f"dense MLPs that compute {table().activations[row.mlp]}"
    if row.router and _count(config, _EXPERTS) != 0:
        about["moe_mlp"] = f"the experts of {row.block}; the router stays as it is"
    return about


def _experts(row: ModelType, config: Mapping[str, Any]) -> str:
    total, chosen = _count(config, _EXPERTS), _count(config, _TOP_K)
    described = f"{row.experts}: {table().activations[row.experts]}; in {row.block}"
    return described + (f"; {chosen or '?'} of {total} per token" if total else "")


def _count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of some numbers that the configuration has, None when it has none."""
    places = [config, config.get("text_config"), config.get("ffn_config")]
    for place in [place for place in places if isinstance(place, Mapping)]:
        for key in keys:
            value = place.get(key)
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return None


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    settings = config.get("quantization") or config.get("quantization_config")
    return settings if isinstance(settings, Mapping) else None


def quantization(config: Mapping[str, Any]) -> str:
    """Describe how a checkpoint's weights are quantized, single layers included."""
    settings = _quantization(config)
    if settings is None:
        return "none"
    if "bits" not in settings:
        return f"{settings.get('quant_method', 'an unknown method')}, without a number of bits"
    described = _format(settings)
    layers = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    other = Counter(_format({**settings, **layer}) for layer in layers.values())
    plain = sum(value is False for value in settings.values())
    parts = [f"{count} x {kind}" for kind, count in other.items()]
    if plain:
        parts.append(f"{plain} x not quantized")
    return described + (f"; single layers: {'; '.join(parts)}" if parts else "")


def _format(settings: Mapping[str, Any]) -> str:
    mode = settings.get("mode", "affine")
    return f"{mode}, {settings['bits']} bits, groups of {settings.get('group_size', 64)}"
