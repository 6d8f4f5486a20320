"""Capsules: what is written is read again, and what is not a capsule is refused by key."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from zmlx.bench import environment
from zmlx.bench.capsule import CapsuleError, Run, collect, read, write
from zmlx.bench.report import main, report

QUANTITIES = {"decode": ("tokens/s", True), "peak_memory": ("bytes", False)}


def capsule():
    runs = [
        Run("small", variant, n, {"decode": rate, "peak_memory": 2**20}, {"steps": [0.1, 0.2]})
        for variant, rates in (("stock", [1.0, 2.0, 90.0]), ("zmlx", [8.0, 4.0]))
        for n, rate in enumerate(rates)
    ]
    return collect("a title", runs, QUANTITIES, plans={"small": {"patched_count": 3}}, notes=("n",))


@pytest.fixture
def file(tmp_path):
    return write(capsule(), tmp_path / "deep" / "capsule.json")


def test_what_is_written_is_read(file):
    found = read(file)
    assert found.runs == capsule().runs
    assert found.quantities == QUANTITIES
    assert found.plans == {"small": {"patched_count": 3}}
    assert found.environment["hardware"]["logical_cores"] >= 1
    assert found.environment["versions"]["mlx"]


def test_medians_are_of_all_runs_and_are_not_stored(file):
    found = read(file)
    assert found.median("small", "stock", "decode") == 2.0
    assert found.median("small", "zmlx", "decode") == 6.0
    assert found.median("small", "other", "decode") is None
    assert "median" not in file.read_text()


def test_the_report_is_a_table_with_ratios(file, capsys):
    report(file)
    text = capsys.readouterr().out
    assert "2 (1 - 90)" in text
    assert "3.00x" in text  # decode: 6 over 2
    assert "1.00x" in text  # memory
    assert "a title" in text


def set_in(content, path, value):
    for key in path[:-1]:
        content = content[key]
    if value is None:
        del content[path[-1]]
    else:
        content[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["runs"], None, "capsule: 'runs' is missing"),
        (["runs"], [], "runs: empty"),
        (["runs"], {}, "capsule.runs: expected list, found dict"),
        (["extra"], 1, "unknown key 'extra'"),
        (["schema"], 2, "schema 2: this zmlx reads 1"),
        (["schema"], None, "'schema' is missing"),
        (["environment", "hardware"], None, "environment: 'hardware' is missing"),
        (["quantities", "decode"], "tokens/s", r"quantities.decode: expected \[unit"),
        (["runs", 1, "variant"], 3, r"runs\[1\].variant: expected str, found int"),
        (["runs", 1], 7, r"runs\[1\]: expected an object, found int"),
        (["runs", 0, "values"], {}, r"runs\[0\].values: empty"),
        (["runs", 0, "values", "speed"], 1.0, "'speed' is not among the quantities"),
        (["runs", 0, "values", "decode"], "1", "'1' is not a finite number"),
        (["runs", 0, "values", "decode"], True, "True is not a finite number"),
        (["runs", 0, "values", "decode"], -1.0, "-1.0 is not a finite number"),
        (["runs", 0, "values", "decode"], math.nan, "nan is not a finite number"),
        (["runs", 0, "samples", "steps"], 0.1, r"samples.steps: expected a list"),
        (["runs", 0, "samples", "steps"], [math.inf], "inf is not a finite number"),
    ],
)
def test_a_malformed_capsule_is_refused_by_key(file, path, value, complaint):
    content = json.loads(file.read_text())
    set_in(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(CapsuleError, match=complaint) as failure:
        read(file)
    assert str(file) in str(failure.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "not JSON"), ("[]", "expected an object, found list"), (b"\xff\xfe", "not JSON")],
)
def test_what_is_no_capsule_at_all(tmp_path, content, complaint):
    file = tmp_path / "capsule.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CapsuleError, match=complaint):
        read(file)
    with pytest.raises(CapsuleError, match="cannot be read"):
        read(tmp_path / "none.json")


def test_a_bad_run_is_not_written(tmp_path):
    bad = collect("t", [Run("s", "stock", 0, {"decode": math.nan})], QUANTITIES)
    with pytest.raises(CapsuleError):
        write(bad, tmp_path / "capsule.json")
    assert not (tmp_path / "capsule.json").exists()


def test_the_module_prints_and_refuses(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "small" in capsys.readouterr().out
    command = [sys.executable, "-m", "zmlx", "bench", "report", str(tmp_path / "none.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("zmlx bench report: ")


def test_the_environment_says_where_it_ran(monkeypatch):
    monkeypatch.setenv("ZMLX_NUM_THREADS", "1")
    found = environment.describe()
    hardware = found["hardware"]
    assert hardware["cpu"]
    assert hardware["memory_bytes"] > 2**28
    assert 1 <= hardware["usable_cores"] <= hardware["logical_cores"]
    assert found["variables"]["ZMLX_NUM_THREADS"] == "1"
    assert json.loads(json.dumps(found)) == found


def test_a_missing_compiler_is_not_an_error(monkeypatch):
    monkeypatch.setenv("ZMLX_CXX", "no-such-compiler")
    assert environment.compiler() == ("", "")
    assert environment.versions()["compiler"] == ""


@pytest.mark.parametrize(
    ("before", "again"),
    [(None, True), ("glibc.malloc.hugetlb=0", False), ("glibc.malloc.hugetlb=1", False)],
)
def test_a_benchmark_starts_again_once_with_large_pages(monkeypatch, before, again):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "benchmark", "--runs", "1"])
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    environment.as_under_zmlx_run()
    assert len(started) == again
    for program, arguments, variables in started:
        assert (program, arguments) == (sys.executable, sys.orig_argv)
        assert variables["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
