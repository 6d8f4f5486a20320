"""What a profile may say, and what it means when all of its chain is put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from zmlx.toml import Source, TomlError

CONTRACTS = ("exact", "tighter", "tolerant")

#: key of a profile -> its type
_KEYS: dict[str, type] = {
    "description": str,
    "extends": str,
    "admits": list,
    "custom_primitives": bool,
    "include": list,
    "exclude": list,
    "options": dict,
    "family": dict,
}
_FAMILY_KEYS = ("include", "exclude", "options")
_WORDS = {
    str: "a string",
    list: "a list of strings",
    bool: "true or false",
    dict: "a table",
    int: "a whole number",
}


class ProfileError(TomlError):
    """A profile, or the file that should define it, is wrong; the text names file, line and key."""


@dataclass(frozen=True)
class Definition:
    """One profile as its file has it.

    Attributes:
        name: the profile's name.
        source: the file.
        path: path of the profile's table in the file.
        table: the table itself.
    """

    name: str
    source: Source
    path: tuple[str, ...]
    table: Mapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """A resolved release policy.

    Attributes:
        name: the profile's name.
        extends: the profiles it builds on, nearest first.
        description: one sentence.
        admits: the contracts that a replacement may have.
        custom_primitives: whether optional custom MLX primitives may be used.
        include: the only patterns to use; empty means all.
        exclude: patterns not to use.
        pattern_options: pattern -> option -> value.
        families: family -> overrides with the keys include, exclude and options.
        sources: dotted key -> where its value came from; "profile" is who chose the profile.
        notes: what else was found on the way, one sentence each.
    """

    name: str
    extends: tuple[str, ...] = ()
    description: str = ""
    admits: frozenset[str] = frozenset()
    custom_primitives: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pattern_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    families: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def allows(self, pattern: str, contract: str, family: str) -> tuple[bool, str]:
        """Say whether a pattern of a contract may be used on a family, and why.

        Args:
            pattern: name of the pattern.
            contract: "exact", "tighter" or "tolerant".
            family: name of the model family.

        Returns:
            Whether it may, and a reason that names the profile and where it says so.
        """
        override = self.families.get(family, {})
        where = f"family.{family}."
        if pattern in override.get("exclude", ()):
            return False, self._because(f"excludes {pattern} for {family}", where + "exclude")
        if pattern in override.get("include", ()):
            return self._admitted(contract)
        if pattern in self.exclude:
            return False, self._because(f"excludes {pattern}", "exclude")
        if override.get("include") and pattern not in override["include"]:
            return False, self._because(
                f"does not include {pattern} for {family}", where + "include"
            )
        if self.include and pattern not in self.include:
            return False, self._because(f"does not include {pattern}", "include")
        return self._admitted(contract)

    def names(self, pattern: str, family: str) -> bool:
        """Say whether a pattern is named, as those must be that are used only when asked for."""
        return pattern in (*self.include, *self.families.get(family, {}).get("include", ()))

    def options(self, pattern: str, family: str) -> dict[str, Any]:
        """Return the options of a pattern on a family."""
        of_family = self.families.get(family, {}).get("options", {})
        return {**self.pattern_options.get(pattern, {}), **of_family.get(pattern, {})}

    def _admitted(self, contract: str) -> tuple[bool, str]:
        if contract in self.admits:
            return True, self._because(f"admits {contract} replacements", "admits")
        return False, self._because(f"does not admit {contract} replacements", "admits")

    def _because(self, what: str, key: str) -> str:
        return f"profile {self.name} {what} ({self.sources.get(key, 'builtin')})"


def check(definition: Definition) -> None:
    """Check keys, types and names of one profile.

    Raises:
        ProfileError: naming file, line and key, and what is allowed.
    """
    for key, value in definition.table.items():
        _check_key(definition, (key,), tuple(_KEYS))
        _check_type(definition, (key,), value, _KEYS[key])
    table = definition.table
    for contract in table.get("admits", ()):
        _check_name(definition, ("admits",), contract, CONTRACTS, "contract")
    _check_patterns(definition, (), table)
    for family, override in table.get("family", {}).items():
        _check_name(definition, ("family", family), family, _families(), "family")
        _check_type(definition, ("family", family), override, dict)
        for key, value in override.items():
            _check_key(definition, ("family", family, key), _FAMILY_KEYS)
            _check_type(definition, ("family", family, key), value, _KEYS[key])
        _check_patterns(definition, ("family", family), override)


# Both are imported only for a profile that names a pattern or a family: `zmlx run` reads the
# profile before every start, and most profiles name none.


def _patterns() -> dict[str, dict[str, type]]:
    known: dict[str, dict[str, type]] = import_module("zmlx.patch.names").pattern_options()
    return known


def _families() -> tuple[str, ...]:
    names: tuple[str, ...] = import_module("zmlx.family.table").family_names()
    return names


def _check_patterns(definition: Definition, at: tuple[str, ...], table: Mapping[str, Any]) -> None:
    for key in ("include", "exclude"):
        for name in table.get(key, ()):
            _check_name(definition, (*at, key), name, tuple(_patterns()), "pattern")
    for name in table.get("include", ()):
        if name in table.get("exclude", ()):
            path = (*definition.path, *at, "exclude")
            raise definition.source.error(path, f"{name!r} is also in include; keep one of them")
    for pattern, options in table.get("options", {}).items():
        path = (*at, "options", pattern)
        _check_name(definition, path, pattern, tuple(_patterns()), "pattern")
        _check_type(definition, path, options, dict)
        known = _patterns()[pattern]
        for option, value in options.items():
            _check_key(definition, (*path, option), tuple(known))
            _check_type(definition, (*path, option), value, known[option])


def _check_key(definition: Definition, path: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    if path[-1] not in allowed:
        listed = ", ".join(allowed) or "none"
        raise definition.source.error((*definition.path, *path), f"unknown key; allowed: {listed}")


def _check_name(
    definition: Definition, path: tuple[str, ...], name: str, allowed: tuple[str, ...], kind: str
) -> None:
    if name not in allowed:
        problem = f"unknown {kind} {name!r}; allowed: {', '.join(allowed)}"
        raise definition.source.error((*definition.path, *path), problem)


def _check_type(definition: Definition, path: tuple[str, ...], value: Any, kind: type) -> None:
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is list:
        fits = fits and all(isinstance(item, str) for item in value)
    if not fits:
        problem = f"expected {_WORDS[kind]}, found {value!r}"
        raise definition.source.error((*definition.path, *path), problem)
