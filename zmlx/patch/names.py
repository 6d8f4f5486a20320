"""The names of the patterns and of their options, known without importing MLX.

A pattern is one file in `patterns/`, named as the pattern, whose options are a literal
`OPTIONS = {"key": "int"}`. Profiles are checked against these names before any model is loaded
(`zmlx run` does so before it starts the command), so the files are read and not imported.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "patterns"
_TYPES: dict[str, type] = {"bool": bool, "int": int, "str": str}

PATTERN_NAMES: tuple[str, ...] = tuple(
    sorted(file.stem for file in _FOLDER.glob("*.py") if not file.stem.startswith("_"))
)


def _options(name: str) -> dict[str, type]:
    tree = ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == "OPTIONS" and node.value is not None:
                literal = ast.literal_eval(node.value)
                return {key: _TYPES[kind] for key, kind in literal.items()}
    return {}


@cache
def pattern_options() -> dict[str, dict[str, type]]:
    """Return pattern name -> option key -> type of its value."""
    return {name: _options(name) for name in PATTERN_NAMES}


def __getattr__(name: str) -> dict[str, dict[str, type]]:
    if name == "PATTERN_OPTIONS":
        return pattern_options()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
