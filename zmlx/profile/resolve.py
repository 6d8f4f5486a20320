"""Which profile is in force, and what it says in the end.

The name comes from the argument, then ZMLX_PROFILE, then the nearest project file (`zmlx.toml`, or
`[tool.zmlx]` of pyproject.toml) from the current folder upward to the home folder, then the user
file (`$XDG_CONFIG_HOME/zmlx/zmlx.toml`), then it is "stable". Both files may also define profiles;
one that extends nothing extends "stable".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from zmlx.profile.schema import Definition, Policy, ProfileError, check
from zmlx.toml import Source, read
from zmlx_autopatch import variables

_BUILTIN = Path(__file__).parent / "builtin"
BUILTIN_NAMES = ("stable", "fast", "edge")
DEFAULT = "stable"

#: variable -> option of the pattern moe_mlp that it sets for the family qwen
ALIASES = {
    "ZMLX_QWEN_FUSED_SWIGLU": "fused_swiglu",
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS": "router_argpartition_logits",
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS_TOPK": "router_argpartition_logits_topk",
}


def resolve_policy(name: str | None = None, *, start: Path | None = None) -> Policy:
    """Return the release policy in force.

    Args:
        name: a profile's name; None finds it as described above.
        start: folder from which project files are looked for; default the current one.

    Raises:
        ProfileError: a file is wrong, there is no profile of that name, or one of the aliases is
            neither 0 nor 1.
    """
    files = _files(start)
    name, origin = _name(name, files)
    definitions = _definitions(files)
    chain = _chain(name, origin, definitions)
    return _policy(name, origin, chain, _notes(files))


def available_profiles(*, start: Path | None = None) -> dict[str, str]:
    """Return name -> where it is defined, of every profile that can be chosen."""
    return {
        name: definition.source.at(*definition.path)
        for name, definition in _definitions(_files(start)).items()
    }


#: A file, and the path of our table in it.
_File = tuple[Source, tuple[str, ...]]


def _files(start: Path | None) -> list[_File]:
    """Return the project file and the user file, where they exist."""
    return [file for file in (_project_file(start), _user_file()) if file is not None]


def _project_file(start: Path | None) -> _File | None:
    try:
        here = (start or Path.cwd()).resolve()
    except OSError:  # the current folder was deleted
        return None
    home = Path(os.path.expanduser("~"))
    for folder in (here, *here.parents):
        if os.path.isfile(folder / "zmlx.toml"):
            return read(folder / "zmlx.toml", wrong=ProfileError), ()
        project = _pyproject(folder)
        if project is not None:
            return project, ("tool", "zmlx")
        if folder == home:
            return None
    return None


def _pyproject(folder: Path) -> Source | None:
    """Return the folder's pyproject.toml when it has a table for zmlx."""
    file = folder / "pyproject.toml"
    # One that does not even mention us may be broken, and is not our business.
    if not os.path.isfile(file) or b"zmlx" not in file.read_bytes():
        return None
    source = read(file, wrong=ProfileError)
    tool = source.data.get("tool")
    return source if isinstance(tool, dict) and "zmlx" in tool else None


def _user_file() -> _File | None:
    file = Path(variables.config_folder()) / "zmlx.toml"
    return (read(file, wrong=ProfileError), ()) if os.path.isfile(file) else None


def _notes(files: list[_File]) -> tuple[str, ...]:
    """Say which file is passed over."""
    for source, path in files:
        folder = Path(source.label).parent
        if not path and folder != Path(variables.config_folder()) and _pyproject(folder):
            return (f"{source.label} wins over [tool.zmlx] of the pyproject.toml beside it",)
    return ()


def _table(source: Source, path: tuple[str, ...]) -> Mapping[str, Any]:
    """Return our table of a file, its top-level keys checked."""
    table: Any = source.data
    for part in path:
        table = table[part]
    if not isinstance(table, dict):
        raise source.error(path, "expected a table")
    for key, value in table.items():
        if key not in ("profile", "profiles"):
            raise source.error((*path, key), "unknown key; allowed: profile, profiles")
        wanted = str if key == "profile" else dict
        if not isinstance(value, wanted):
            kind = "a profile's name" if key == "profile" else "tables [profiles.NAME]"
            raise source.error((*path, key), f"expected {kind}, found {value!r}")
    return table


def _name(name: str | None, files: list[_File]) -> tuple[str, str]:
    """Return the profile's name and who chose it."""
    if name:
        return name, "the caller"
    asked = variables.text("ZMLX_PROFILE")
    if asked:
        return asked, "ZMLX_PROFILE"
    for source, path in files:
        chosen = _table(source, path).get("profile")
        if chosen:
            return str(chosen), source.at(*path, "profile")
    return DEFAULT, "the default"


@cache
def _builtin(name: str) -> Definition:
    source = read(_BUILTIN / f"{name}.toml", f"builtin {name}.toml", ProfileError)
    # A test checks these files: their patterns' names would cost every start an import.
    return Definition(name, source, (), source.data)


def _definitions(files: list[_File]) -> dict[str, Definition]:
    """Return every profile by name; the project's go before the user's."""
    found = {name: _builtin(name) for name in BUILTIN_NAMES}
    for source, path in reversed(files):
        for name, table in _table(source, path).get("profiles", {}).items():
            at = (*path, "profiles", name)
            if name in BUILTIN_NAMES:
                raise source.error(at, f"{name} is builtin; give yours another name and extend it")
            if not isinstance(table, dict):
                raise source.error(at, "expected a table")
            definition = Definition(name, source, at, table)
            check(definition)
            found[name] = definition
    return found


def _chain(name: str, origin: str, known: Mapping[str, Definition]) -> list[Definition]:
    """Return a profile and those it extends, nearest first."""
    if name not in known:
        raise ProfileError(
            f"profile {name!r} (asked for by {origin}) does not exist; known: {', '.join(known)}"
        )
    chain = [known[name]]
    while (parent := _parent(chain[-1])) is not None:
        last = chain[-1]
        at = (*last.path, "extends")
        if parent not in known:
            raise last.source.error(at, f"unknown profile {parent!r}; known: {', '.join(known)}")
        if parent in [definition.name for definition in chain]:
            circle = " -> ".join([*(d.name for d in chain), parent])
            raise last.source.error(at, f"profiles extend each other in a circle: {circle}")
        chain.append(known[parent])
    return chain


def _parent(definition: Definition) -> str | None:
    default = None if definition.name in BUILTIN_NAMES else DEFAULT
    parent: str | None = definition.table.get("extends", default)
    return parent


def _policy(name: str, origin: str, chain: list[Definition], notes: tuple[str, ...]) -> Policy:
    """Merge a chain: the nearest value wins; options and families merge key by key."""
    values: dict[str, Any] = {}
    sources = {"profile": origin}
    for definition in reversed(chain):
        for path, value in _leaves(definition.table):
            _put(values, path, value)
            sources[".".join(path)] = definition.source.at(*definition.path, *path)
    for variable, option in ALIASES.items():
        if variables.text(variable):
            path = ("family", "qwen", "options", "moe_mlp", option)
            _put(values, path, _flag(variable))
            sources[".".join(path)] = variable
    return Policy(
        name=name,
        extends=tuple(definition.name for definition in chain[1:]),
        description=values.get("description", ""),
        admits=frozenset(values.get("admits", ())),
        custom_primitives=values.get("custom_primitives", False),
        include=tuple(values.get("include", ())),
        exclude=tuple(values.get("exclude", ())),
        pattern_options=values.get("options", {}),
        families=values.get("family", {}),
        sources=sources,
        notes=notes,
    )


def _flag(variable: str) -> bool:
    try:
        return variables.flag(variable)
    except variables.VariableError as error:
        raise ProfileError(str(error)) from error


def _leaves(
    table: Mapping[str, Any], at: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += _leaves(value, (*at, key))
        elif key != "extends":
            found.append(((*at, key), value))
    return found


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value
