"""Long texts of kernels are put into files, without changing what is compiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zmlx.backend.cuda import translated
from zmlx.backend.cuda.included import LONG, shortened
from zmlx.backend.cuda.source import PRELUDE
from zmlx.backend.definition import Definition

HEADER = "inline float twice(float x) { return x + x; }\n"
BODY = "uint i = thread_position_in_grid.x;\nout[i] = twice(x[i * x_strides[0]]);\n"
FILLING = "constexpr float thing = 1.0f;\n" * (LONG // 30 + 1)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path))
    return tmp_path


def source(*, long_header=False, long_body=False):
    return translated(
        Definition(
            name="doubled",
            input_names=("x",),
            output_names=("out",),
            header=HEADER + FILLING * long_header,
            source=BODY + FILLING * long_body,
        )
    )


def expanded(text: str) -> str:
    """Put the files in, but the prelude."""

    def content(match: re.Match[str]) -> str:
        file = Path(match[1])
        return match[0] if file == PRELUDE else file.read_text().rstrip("\n")

    return re.sub(r'#include "([^"]+)"', content, text)


@pytest.mark.parametrize(("header", "body"), [(True, False), (False, True), (True, True)])
def test_long_texts_are_in_files(header, body, cache):
    long = source(long_header=header, long_body=body)
    short = shortened(long, "doubled")
    assert len(short.header) + len(short.body) < 900
    assert len(list(cache.glob("cuda/doubled-*.cuh"))) == header + body
    assert expanded(short.header).strip() == long.header.strip()
    assert expanded(short.body).replace("// x_strides\n", "").strip() == long.body.strip()
    assert "x_strides" in short.body  # MLX passes what it finds the name of
    assert "x_shape" not in short.body


def test_a_short_text_stays():
    assert shortened(source(), "doubled") == source()


def test_other_texts_have_other_files():
    one = source(long_body=True)
    other = type(one)(one.header, one.body.replace("twice", "thrice"), one.input_names)
    assert shortened(one, "doubled") == shortened(one, "doubled")
    assert shortened(one, "doubled").body != shortened(other, "doubled").body


def test_where_nothing_can_be_written_the_text_stays(monkeypatch, tmp_path):
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(file))
    long = source(long_body=True)
    assert shortened(long, "doubled") == long
