"""The table of families and model types (families.toml), as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from zmlx.profile.source import read

_FILE = Path(__file__).with_name("families.toml")


@dataclass(frozen=True)
class Refusal:
    """A pattern that a family does not take.

    Attributes:
        reason: why.
        evidence: the file, class or measurement that shows it.
        backends: where it holds; empty means everywhere.
    """

    reason: str
    evidence: str
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelType:
    """One model type of mlx-lm.

    Attributes:
        name: file of mlx_lm/models without its ending.
        family: name of its family.
        router: how experts are chosen and weighted; empty for a dense model.
        activation: of the gated product in its MLPs or experts; empty where there is none.
        shared: attribute of experts that every token uses; empty where there are none.
    """

    name: str
    family: str
    router: str = ""
    activation: str = ""
    shared: str = ""


@dataclass(frozen=True)
class Family:
    """What a model was recognised as.

    Attributes:
        name: the family, or "unknown".
        model_type: mlx-lm's name of the architecture, or what the model calls itself.
        because: the evidence, one line each.
        refusals: pattern -> why the family does not take it.
        facts: the row of the model type, when it is known.
    """

    name: str
    model_type: str
    because: tuple[str, ...] = ()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    facts: ModelType | None = None


@cache
def _table() -> dict[str, Any]:
    return read(_FILE, "families.toml").data


@cache
def model_types() -> dict[str, ModelType]:
    """Return name -> row of every model type."""
    return {name: ModelType(name, **row) for name, row in _table()["types"].items()}


def aliases() -> dict[str, str]:
    """Return the names that mlx-lm maps to a file of another name."""
    return dict(_table()["aliases"])


def family_names() -> tuple[str, ...]:
    """Return the names of all families."""
    return tuple(_table()["families"])


def title(family: str) -> str:
    """Return what a family is called in full."""
    return str(_table()["families"][family]["title"])


def refusals(family: str) -> dict[str, Refusal]:
    """Return pattern -> refusal of a family."""
    rows = _table()["families"].get(family, {}).get("refuse", [])
    return {
        row["pattern"]: Refusal(row["reason"], row["evidence"], tuple(row.get("backends", ())))
        for row in rows
    }
