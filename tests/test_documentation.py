"""The documentation says what is there."""

from __future__ import annotations

import re
from pathlib import Path

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
