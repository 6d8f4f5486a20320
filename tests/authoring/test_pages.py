"""Every program on the pages for authors runs, on every backend."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    "QUICKSTART.md": ROOT / "docs" / "QUICKSTART.md",
    "COOKBOOK.md": ROOT / "docs" / "COOKBOOK.md",
    "README.md": ROOT / "README.md",
}


def programs() -> list[tuple[str, int, str]]:
    """Return page, line and text of every block of Python; of the README those about kernels."""
    found = []
    for name, path in PAGES.items():
        text = path.read_text()
        for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            if name != "README.md" or "zmlx.api" in match.group(1):
                found.append((name, text[: match.start(1)].count("\n") + 1, match.group(1)))
    return found


@pytest.mark.parametrize(("page", "line", "program"), programs(), ids=lambda v: str(v)[:20])
def test_the_program_runs(page, line, program, backend, tmp_path, capsys, monkeypatch):
    if backend == "reference" and "metal.kernel" in program:
        # A source alone has no reference; without a GPU it then runs in the emulator.
        monkeypatch.delenv("ZMLX_BACKEND")
    file = tmp_path / f"{page}_{line}.py"
    # Blank lines before, so that an error names the line of the page.
    file.write_text("\n" * (line - 1) + program)
    runpy.run_path(str(file))
    printed = capsys.readouterr().out
    if "print(error)" in program:
        text = PAGES[page].read_text()
        assert f"```text\n{printed}```" in text


def test_all_pages_have_programs():
    assert {page for page, _, _ in programs()} == set(PAGES)
