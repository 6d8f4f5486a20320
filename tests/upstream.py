"""Which mlx-lm is installed: tests hold what its newest release does, and run on an older one too.

Python 3.10 has only mlx-lm 0.31, without some of the model types and with others written otherwise.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

#: Whether the installed mlx-lm is the release whose sources the tests and the tables state.
NEWEST = tuple(map(int, version("mlx-lm").split(".")[:2])) >= (0, 32)
if not NEWEST and sys.version_info >= (3, 11):
    raise RuntimeError("tests need mlx-lm >= 0.32 where Python is 3.11 or newer: pip install -U")

#: For what only the newest release does; an older Python cannot install it.
newest_only = pytest.mark.skipif(not NEWEST, reason="mlx-lm 0.32 needs Python 3.11")


@cache
def installed_types() -> tuple[str, ...]:
    """Return the names of the installed mlx-lm's model types: modules that have a `Model`."""
    spec = find_spec("mlx_lm.models")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    return tuple(sorted(p.stem for p in folder.glob("*.py") if _has_model(p)))


def _has_model(path: Path) -> bool:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return {"Model", "ModelArgs"} <= names
