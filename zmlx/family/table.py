"""The table of families and model types (families.toml), as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from zmlx.patch.names import PATTERN_NAMES
from zmlx.toml import Source, read

KINDS = ("dense", "moe", "ssm", "hybrid", "hybrid_moe")
BACKENDS = ("cpu", "metal", "cuda")

_FILE = Path(__file__).with_name("families.toml")


@dataclass(frozen=True)
class Refusal:
    """A pattern that a family does not take.

    Attributes:
        reason: why.
        evidence: the file, class or measurement that shows it.
        backends: where it holds; None means everywhere.
    """

    reason: str
    evidence: str
    backends: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ModelType:
    """One model type of mlx-lm; the attributes are described at the top of families.toml.

    Attributes:
        name: file of mlx_lm/models without its ending.
        family: name of its family.
        kind: dense, moe, ssm, hybrid or hybrid_moe.
        mlp: activation of its dense MLPs; empty where there are none.
        router: how a token finds its experts; empty where there are none.
        experts: activation of the routed experts.
        block: "file.Class" of the routed block.
        shared: what every token uses beside the routed experts.
        text: the types that the language model of a multimodal type may have.
        classes: file whose Model class the type uses, when it has none of its own.
        note: what else a replacement must not overlook.
    """

    name: str
    family: str
    kind: str
    mlp: str = ""
    router: str = ""
    experts: str = ""
    block: str = ""
    shared: str = ""
    text: tuple[str, ...] = ()
    classes: str = ""
    note: str = ""

    @property
    def activation(self) -> str:
        """Return the activation of most of its work: of the experts, else of the dense MLPs."""
        return self.experts or self.mlp

    @property
    def home(self) -> str:
        """Return the file of mlx_lm/models that defines its Model class."""
        return self.classes or self.name


@dataclass(frozen=True)
class Family:
    """What a model was recognised as.

    Attributes:
        name: the family, or "unknown".
        model_type: mlx-lm's name of the architecture, or what the model calls itself.
        because: the evidence, one line each.
        refusals: pattern -> why the family does not take it.
        facts: the row of the model type, of a multimodal model the row of its language model; None
            when the model was known by its blocks alone or not at all.
    """

    name: str
    model_type: str
    because: tuple[str, ...] = ()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    facts: ModelType | None = None


@dataclass(frozen=True)
class Table:
    """A checked table of families.

    Attributes:
        types: name -> row.
        aliases: name in a checkpoint -> file of mlx_lm/models.
        architectures: (model type, architecture) -> file of mlx_lm/models.
        titles: family -> what it is called in full.
        holds: family and what its modules hold, in the order in which they are tried.
        refusals: family -> (pattern, types or None for all, refusal).
        routers, activations: name -> formula in words.
    """

    types: Mapping[str, ModelType]
    aliases: Mapping[str, str]
    architectures: Mapping[tuple[str, str], str]
    titles: Mapping[str, str]
    holds: tuple[tuple[str, tuple[frozenset[str], ...]], ...]
    refusals: Mapping[str, tuple[tuple[str, tuple[str, ...] | None, Refusal], ...]]
    routers: Mapping[str, str]
    activations: Mapping[str, str]

    def refused(self, family: str, model_type: str) -> dict[str, Refusal]:
        """Return pattern -> refusal for one type of a family ("" when the type is not known)."""
        return {
            pattern: refusal
            for pattern, types, refusal in self.refusals.get(family, ())
            if types is None or model_type in types
        }


@cache
def table() -> Table:
    """Return the table that comes with zmlx."""
    return parse(read(_FILE, "families.toml"))


def model_types() -> Mapping[str, ModelType]:
    """Return name -> row of every model type."""
    return table().types


def family_names() -> tuple[str, ...]:
    """Return the names of all families."""
    return tuple(table().titles)


def parse(source: Source) -> Table:
    """Check a parsed families.toml and return it as data.

    Raises:
        zmlx.toml.TomlError: naming file, line and key, and what is allowed.
    """
    data = source.data
    families = data.get("families", {})
    routers, activations = data.get("router", {}), data.get("activation", {})
    types = {name: _row(source, name, row) for name, row in data.get("types", {}).items()}
    for name, row in types.items():
        _one_of(source, ("types", name, "family"), row.family, families)
        _one_of(source, ("types", name, "kind"), row.kind, KINDS)
        _one_of(source, ("types", name, "router"), row.router, ("", *routers))
        for key in ("mlp", "experts"):
            _one_of(source, ("types", name, key), getattr(row, key), ("", *activations))
        for key, names in (("text", row.text), ("classes", (row.home,))):
            for other in names:
                _one_of(source, ("types", name, key), other, types)
    for alias, name in data.get("aliases", {}).items():
        _one_of(source, ("aliases", alias), name, types)
    return Table(
        types=types,
        aliases=data.get("aliases", {}),
        architectures={
            (row["model_type"], row["architecture"]): row["file"]
            for row in data.get("architectures", ())
        },
        titles={name: family["title"] for name, family in families.items()},
        holds=tuple(
            (name, tuple(frozenset(names) for names in held["modules"]))
            for name, family in families.items()
            for held in family.get("holds", ())
        ),
        refusals={name: _refusals(source, name, family) for name, family in families.items()},
        routers=routers,
        activations=activations,
    )


def _row(source: Source, name: str, row: Mapping[str, Any]) -> ModelType:
    known = [item.name for item in fields(ModelType) if item.name != "name"]
    for key in row:
        _one_of(source, ("types", name, key), key, known, "key")
    for key in ("family", "kind"):
        if key not in row:
            raise source.error(("types", name), f"the key {key} is missing")
    return ModelType(name, **{**row, "text": tuple(row.get("text", ()))})


def _refusals(
    source: Source, family: str, row: Mapping[str, Any]
) -> tuple[tuple[str, tuple[str, ...] | None, Refusal], ...]:
    found = []
    for refusal in row.get("refuse", ()):
        at = ("families", family, "refuse")
        for key in ("pattern", "reason", "evidence"):
            if not refusal.get(key):
                raise source.error(at, f"the key {key} is missing: a refusal says what and why")
        _one_of(source, at, refusal["pattern"], PATTERN_NAMES, "pattern")
        backends, types = refusal.get("backends"), refusal.get("types")
        for backend in backends or ():
            _one_of(source, at, backend, BACKENDS, "backend")
        for name in types or ():
            _one_of(source, at, name, source.data["types"], "model type")
        where = None if backends is None else tuple(backends)
        said = Refusal(refusal["reason"], refusal["evidence"], where)
        found.append((refusal["pattern"], None if types is None else tuple(types), said))
    return tuple(found)


def _one_of(
    source: Source, path: tuple[str, ...], value: str, allowed: Any, what: str = "name"
) -> None:
    if value not in allowed:
        listed = ", ".join(name for name in allowed if name)
        raise source.error(path, f"unknown {what} {value!r}; allowed: {listed}")
