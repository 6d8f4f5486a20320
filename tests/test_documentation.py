"""The documentation says what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from zoo.disk import make_checkpoint

from zmlx.patch.names import PATTERN_NAMES
from zmlx_autopatch import variables

ROOT = Path(__file__).parents[1]


def test_every_variable_is_documented():
    text = (ROOT / "docs" / "VARIABLES.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == list(variables.TABLE)
    for values, default, meaning in variables.TABLE.values():
        assert meaning.replace("|", "\\|") in text
        assert values in text
        assert default in text


def test_every_pattern_is_documented():
    text = (ROOT / "docs" / "PATCHING.md").read_text()
    assert all(f"`{name}`" in text for name in PATTERN_NAMES)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def blocks(page: Path) -> list[str]:
    """Return the Python programs of a page: blocks that import something."""
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [code for code in found if "import " in code]


@pytest.mark.parametrize("name", ["README.md", "docs/PATCHING.md"])
def test_python_on_the_page_runs(name, tmp_path):
    model = make_checkpoint(
        tmp_path / "model", model_type="llama", quantize={"bits": 4, "group_size": 32}
    )
    # What is about kernels alone runs in tests/authoring, on every backend.
    programs = [code for code in blocks(ROOT / name) if "patch" in code]
    assert programs
    for program in programs:
        setup = f"import mlx_lm\npath = {str(model)!r}\nmodel, _ = mlx_lm.load(path)\n"
        done = subprocess.run(
            [sys.executable, "-c", setup + program],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "modules of llama" in done.stdout


@pytest.mark.parametrize("command", ["family MODEL", "profile show", "doctor MODEL"])
def test_commands_of_the_readme_run(command, tmp_path):
    assert f"zmlx {command.replace('MODEL', 'PATH')}" in (ROOT / "README.md").read_text()
    model = make_checkpoint(tmp_path / "model", model_type="qwen3_moe")
    arguments = [str(model) if word == "MODEL" else word for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-m", "zmlx", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
