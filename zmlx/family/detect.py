"""Recognise a model: by its configuration, by the file that defines its modules, by what they hold.

Nothing is guessed. A model whose type is unknown still belongs to a family when the modules that do
its work are defined by a file of mlx-lm that is known; else it is "unknown", and nothing is
replaced in it unless that is asked for by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from zmlx.family.table import Family, ModelType, aliases, model_types, refusals

#: Packages whose files of models have mlx-lm's names.
_PACKAGES = ("mlx_lm.models.", "mlx_vlm.models.")
#: Keys of a configuration that hold the configuration of the language model.
_NESTED = ("text_config", "llm_config", "language_config")


def detect(*, model: Any = None, config: Mapping[str, Any] | None = None) -> Family:
    """Say what family a model is of.

    Args:
        model: a loaded model, or None.
        config: the content of its config.json, or None to use what the model holds.

    Returns:
        The family with the evidence. `name` is "unknown" when there is none.
    """
    notes: list[str] = []
    for kind in _by_config(config, notes) or _by_type_name(model, notes) or ():
        return _family(kind, notes)
    for kind in _by_modules(model, notes):
        return _family(kind, notes)
    named = str((config or {}).get("model_type") or getattr(model, "model_type", "") or "")
    return Family("unknown", named, tuple(notes))


def _family(kind: ModelType, notes: Iterable[str]) -> Family:
    return Family(kind.family, kind.name, tuple(notes), refusals(kind.family), kind)


def _lookup(name: Any) -> tuple[ModelType, str] | None:
    """Find a model type by the name that a configuration gives it, with a remark."""
    if not isinstance(name, str):
        return None
    known = model_types()
    for candidate in (name, name.lower(), name.replace("-", "_")):
        if candidate in known:
            return known[candidate], ""
        target = aliases().get(candidate)
        if target is not None:
            return known[target], f" (mlx-lm loads it as {target})"
    return None


def _by_config(config: Mapping[str, Any] | None, notes: list[str]) -> list[ModelType]:
    if config is None:
        return []
    name = config.get("model_type")
    found = _lookup(name)
    if found is not None:
        notes.append(f"config.json: model_type is {name!r}{found[1]}")
        return [found[0]]
    notes.append(f"config.json: model_type {name!r} is in no row of the table")
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            inner = _lookup(nested.get("model_type"))
            if inner is not None:
                notes.append(f"config.json: {key}.model_type is {nested['model_type']!r}{inner[1]}")
                return [inner[0]]
    return []


def _by_type_name(model: Any, notes: list[str]) -> list[ModelType]:
    """Use the name that the model itself carries, when its code agrees with it."""
    name = getattr(model, "model_type", None) if model is not None else None
    found = _lookup(name)
    home = _home(type(model)) if model is not None else None
    if found is not None and home in (None, found[0].name):
        notes.append(f"the model's model_type is {name!r}{found[1]}")
        return [found[0]]
    if home is not None:
        notes.append(f"the model's class is defined in {type(model).__module__}")
        return [model_types()[home]]
    return []


def _by_modules(model: Any, notes: list[str]) -> list[ModelType]:
    """Use the file that defines most of the model's modules."""
    if model is None or not hasattr(model, "modules"):
        return []
    homes = Counter(home for home in map(_home, map(type, model.modules())) if home is not None)
    if not homes:
        notes.append("none of its modules is defined by a model file of mlx-lm")
        return []
    home, count = homes.most_common(1)[0]
    notes.append(f"{count} of its modules are defined in {_PACKAGES[0]}{home}")
    return [model_types()[home]]


def _home(cls: type) -> str | None:
    """Return the model type whose file defines a class, or one that it derives from."""
    for base in cls.__mro__:
        for package in _PACKAGES:
            if base.__module__.startswith(package):
                name = base.__module__.removeprefix(package).partition(".")[0]
                if name in model_types():
                    return name
    return None
