"""Long texts of kernels are included from files, short ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmlx.backend.cuda import CudaSource
from zmlx.backend.cuda.files import LONG, in_files

LONG_TEXT = "int zero = 0;\n" * (LONG // 10)


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path))


def included(text):
    word, path = text.split(maxsplit=1)
    assert word == "#include"
    return Path(path.strip().strip('"')).read_text()


def test_long_texts_go_to_files_named_by_what_they_hold():
    source = CudaSource(LONG_TEXT, "y[0] = 1;", ("x",))
    found = in_files(source)
    assert included(found.header) == LONG_TEXT + "\n"
    assert (found.body, found.input_names) == ("y[0] = 1;", ("x",))
    assert in_files(source) == found
    other = in_files(CudaSource(LONG_TEXT + "//", "y[0] = 1;", ("x",)))
    assert other.header != found.header
    body = in_files(CudaSource("", LONG_TEXT, ()))
    assert included(body.body) == LONG_TEXT + "\n"


def test_a_body_in_which_mlx_looks_for_names_stays():
    text = LONG_TEXT + "int n = x_shape[0];"
    assert in_files(CudaSource("", text, ("x",))).body == text


def test_where_nothing_can_be_written_texts_stay(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path / "file"))
    source = CudaSource(LONG_TEXT, LONG_TEXT, ())
    assert in_files(source) == source
