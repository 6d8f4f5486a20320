"""`zmlx tune`: results on stdout, the rest on stderr."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from zmlx.cli import main
from zmlx.tuning.identity import Machine, Subject
from zmlx.tuning.store import Result, default_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path))
    return default_store()


@pytest.fixture
def filled(store):
    where = Machine("NVIDIA H200", "cuda", "0.32.4", "1.0")
    choices = ("64", "128", "1024")
    times = {"64": 0.5, "128": 0.25}
    dropped = {"1024": "RuntimeError: [too many] registers"}
    for name in ("softmax", "rows"):
        subject = Subject(where, name, "c0ffee", "(8, 1000) float32", choices)
        store.add(Result(subject, "128", times, dropped))
    return store


def run(*words):
    return CliRunner().invoke(main, ["tune", *words])


def test_list(filled):
    ran = run("list")
    assert ran.exit_code == 0
    for text in ("softmax", "rows", "(8, 1000) float32", "128", "0.25", "NVIDIA H200", "cuda"):
        assert text in ran.stdout
    assert ran.stderr == ""
    found = json.loads(run("list", "--json").stdout)
    assert [entry["subject"]["kernel"] for entry in found] == ["softmax", "rows"]
    assert found[0]["best"] == "128"


def test_list_of_nothing(store):
    ran = run("list")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert "nothing is tuned yet" in ran.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_show(filled):
    ran = run("show", "softmax")
    assert ran.exit_code == 0
    assert "best" in ran.stdout
    assert "0.5" in ran.stdout
    assert "RuntimeError: [too many] registers" in ran.stdout
    (found,) = json.loads(run("show", "softmax", "--json").stdout)
    assert found["dropped"] == {"1024": "RuntimeError: [too many] registers"}


def test_show_of_an_unknown_kernel(filled):
    ran = run("show", "nothing")
    assert ran.exit_code == 1
    assert ran.stdout == ""
    assert "no results for 'nothing'; tuned are: rows, softmax" in ran.stderr


def test_clear(filled):
    assert json.loads(run("clear", "--json").stdout) == {"removed": 2, "file": str(filled.file)}
    assert not filled.file.exists()
    assert "removed 0" in run("clear").stdout
