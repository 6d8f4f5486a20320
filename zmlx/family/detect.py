"""Recognise a model: by its configuration, by the file that defines its modules, by what they hold.

Nothing is guessed. Where a loaded model calls itself one thing and its code is another, the code
counts. A model whose type is unknown still belongs to a family when the modules that do its work
are defined by a file of mlx-lm that is known, or hold what only one family holds; else it is
"unknown", and nothing is replaced in it unless that is asked for by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from zmlx.family.table import Family, ModelType, Table, table

#: Packages whose files of models have mlx-lm's names.
_PACKAGES = ("mlx_lm.models.", "mlx_vlm.models.")
#: Keys of a configuration that hold the configuration of the language model.
_NESTED = ("text_config", "llm_config", "language_config")
#: How the names of Hugging Face architectures end.
_ARCHITECTURE = re.compile(r"(For(CausalLM|ConditionalGeneration)|LMHeadModel|Model)$")


def detect(
    *, model: Any = None, config: Mapping[str, Any] | None = None, known: Table | None = None
) -> Family:
    """Say what family a model is of.

    Args:
        model: a loaded model, or None.
        config: the content of its config.json, or None to use what the model holds.
        known: the table of families; default is the one that comes with zmlx.

    Returns:
        The family with the evidence. `name` is "unknown" when there is none.
    """
    known = known or table()
    notes: list[str] = []
    declared = _by_config(config, known, notes) or _by_own_name(model, known, notes)
    found = _by_code(model, declared, known, notes) or declared
    if found is not None:
        refused = known.refused(found.family, found.name)
        facts = _language_model(found, model, config, known, notes)
        return Family(found.family, found.name, tuple(notes), refused, facts)
    named = str((config or {}).get("model_type") or getattr(model, "model_type", "") or "")
    by_blocks = _by_blocks(model, known, notes)
    if by_blocks is not None:
        return Family(by_blocks, named, tuple(notes), known.refused(by_blocks, named))
    return Family("unknown", named, tuple(notes))


def _lookup(name: Any, known: Table) -> tuple[ModelType, str] | None:
    """Find a model type by the name that a configuration gives it, with a remark."""
    if not isinstance(name, str):
        return None
    for candidate in (name, name.lower(), name.replace("-", "_")):
        if candidate in known.types:
            return known.types[candidate], ""
        target = known.aliases.get(candidate)
        if target is not None:
            return known.types[target], f" (mlx-lm loads it as {target})"
    return None


def _by_config(
    config: Mapping[str, Any] | None, known: Table, notes: list[str]
) -> ModelType | None:
    if config is None:
        return None
    name, architectures = config.get("model_type"), _architectures(config)
    for architecture in architectures:
        target = known.architectures.get((str(name), architecture))
        if target is not None:
            notes.append(f"config.json: model_type is {name!r}, its architecture {architecture!r}")
            return known.types[target]
    found = _lookup(name, known)
    if found is not None:
        notes.append(f"config.json: model_type is {name!r}{found[1]}")
        return found[0]
    notes.append(f"config.json: model_type {name!r} is in no row of the table")
    return _by_nested(config, known, notes) or _by_architecture(architectures, known, notes)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures") or []
    return [names] if isinstance(names, str) else [name for name in names if isinstance(name, str)]


def _by_nested(config: Mapping[str, Any], known: Table, notes: list[str]) -> ModelType | None:
    """Use the configuration of the language model of a multimodal one."""
    for key in _NESTED:
        nested = config.get(key)
        found = _lookup(nested.get("model_type"), known) if isinstance(nested, Mapping) else None
        if found is not None:
            notes.append(f"config.json: {key}.model_type is {found[0].name!r}{found[1]}")
            return found[0]
    return None


def _by_architecture(names: Iterable[str], known: Table, notes: list[str]) -> ModelType | None:
    """Use the name of the architecture, such as Qwen3MoeForCausalLM."""
    spelled = {re.sub(r"[_-]", "", name).lower(): name for name in (*known.types, *known.aliases)}
    for name in names:
        found = _lookup(spelled.get(_ARCHITECTURE.sub("", name).lower()), known)
        if found is not None:
            notes.append(f"config.json: the architecture is {name!r}{found[1]}")
            return found[0]
    return None


def _by_own_name(model: Any, known: Table, notes: list[str]) -> ModelType | None:
    """Use the name that a loaded model carries."""
    name = getattr(model, "model_type", None)
    found = _lookup(name, known)
    if found is None:
        return None
    notes.append(f"the model's model_type is {name!r}{found[1]}")
    return found[0]


def _by_code(
    model: Any, declared: ModelType | None, known: Table, notes: list[str]
) -> ModelType | None:
    """Use the file that defines the model's class, else the one that defines most of its modules.

    None where that says no more than what the model was declared to be.
    """
    if model is None:
        return None
    home = _home(type(model), known)
    if home is not None:
        said = f"its class {type(model).__name__} comes from {_PACKAGES[0]}{home}"
    else:
        modules = [module for _, module in _modules(model)]
        homes = Counter(h for h in (_home(type(m), known) for m in modules) if h is not None)
        if not homes:
            notes.append("none of its modules is defined by a model file of mlx-lm")
            return None
        home, count = homes.most_common(1)[0]
        said = f"{count} of its {len(modules)} modules come from {_PACKAGES[0]}{home}"
    if declared is not None and home in (declared.home, *declared.text):
        notes.append(said)
        return None
    notes.append(said + (", and the code counts" if declared is not None else ""))
    return known.types[home]


def _home(cls: type, known: Table) -> str | None:
    """Return the model type whose file defines a class, or one that it derives from."""
    for base in cls.__mro__:
        for package in _PACKAGES:
            if base.__module__.startswith(package):
                name = base.__module__.removeprefix(package).partition(".")[0]
                if name in known.types:
                    return name
    return None


def _modules(model: Any) -> list[tuple[str, Any]]:
    named = getattr(model, "named_modules", None)
    return list(named()) if callable(named) else []


def _language_model(
    found: ModelType,
    model: Any,
    config: Mapping[str, Any] | None,
    known: Table,
    notes: list[str],
) -> ModelType:
    """Return the row that describes the layers: of a multimodal type its language model's."""
    if not found.text:
        return found
    home = _home(type(getattr(model, "language_model", None)), known)
    if home in found.text:
        notes.append(f"its language model comes from {_PACKAGES[0]}{home}")
        return known.types[home]
    inner = _by_nested(config, known, notes) if config is not None else None
    return inner if inner is not None and inner.name in found.text else found


def _by_blocks(model: Any, known: Table, notes: list[str]) -> str | None:
    """Use what the modules hold, whatever their classes are called."""
    held = [(path, frozenset(m)) for path, m in _modules(model) if isinstance(m, Mapping)]
    for family, wanted in known.holds:
        places = [next((p for p, names in held if want <= names), None) for want in wanted]
        if all(place is not None for place in places):
            notes.extend(
                f"{place or 'the model'} holds {', '.join(sorted(want))}"
                for place, want in zip(places, wanted, strict=True)
            )
            return family
    return None
