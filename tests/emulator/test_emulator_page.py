"""Every block of docs/EMULATOR.md runs, and gives the text that stands below it."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import mlx.core as mx
import pytest

from zmlx.backend.emulator import faults

PAGE = Path(__file__).parents[2] / "docs" / "EMULATOR.md"
BLOCKS = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL)


def outcome(block, names):
    """Return what a block prints, or the message of what its last expression raises."""
    *before, last = ast.parse(block).body
    exec(compile(ast.Module(before, []), "block", "exec"), names)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            value = eval(compile(ast.Expression(last.value), "block", "eval"), names)
            mx.eval(value if isinstance(value, mx.array) else [])
    except (faults.Fault, faults.CompileError) as error:
        return str(error)
    return out.getvalue().strip()


def test_every_block_has_its_text():
    assert len(BLOCKS) == PAGE.read_text().count("```python") >= 8


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_gives_its_text(number):
    names = {"mx": mx}
    first = outcome(BLOCKS[0][0], names)
    block, expected = BLOCKS[number]
    assert (outcome(block, names) if number else first) == expected
