"""The way of a model: a stage imports later stages only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: From the first stage to the last.
STAGES = (
    "zmlx_autopatch.launch",
    "zmlx_autopatch",
    "zmlx.runtime",
    "zmlx.profile",
    "zmlx.family",
    "zmlx.patch",
    "zmlx.graph",
    "zmlx.kernels",
    "zmlx.authoring",
    "zmlx.tuning",
    "zmlx.backend",
)
#: Facts that any stage may read; they import no stage.
LEAVES = (
    "zmlx.version",
    "zmlx.toml",
    "zmlx.console",
    "zmlx.deprecation",
    "zmlx_autopatch.variables",
    "zmlx_autopatch.speech",
)


def stage_of(module: str) -> int | None:
    for number, stage in enumerate(STAGES):
        if module == stage or module.startswith(stage + "."):
            return number
    return None


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("zmlx", "zmlx_autopatch"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), file))
    return found


def imports(file: Path) -> set[str]:
    """Return what a file imports of ours when it runs; not what only type checkers read."""
    tree = ast.parse(file.read_text())
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("zmlx", "zmlx_autopatch")}


@pytest.mark.parametrize(("name", "file"), modules(), ids=lambda value: str(value))
def test_a_stage_imports_later_stages_only(name, file):
    own = stage_of(name)
    if own is None or name in LEAVES:
        if name in LEAVES:
            allowed = LEAVES
            assert all(i.startswith(allowed) for i in imports(file)), imports(file)
        return
    for imported in imports(file):
        if imported.startswith(LEAVES):
            continue
        stage = stage_of(imported)
        assert stage is not None, f"{name} imports {imported}, which is no stage"
        assert stage >= own, f"{name} imports {imported}, which is an earlier stage"
    assert file.read_text().startswith('"""'), f"{name} has no docstring"
