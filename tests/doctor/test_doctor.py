"""`zmlx doctor`: what it finds here, and what it says of broken things."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from zoo.disk import make_checkpoint

from zmlx.doctor import examine as examining
from zmlx.doctor import hook
from zmlx.doctor.command import doctor
from zmlx.doctor.examine import examine
from zmlx.doctor.findings import findings

ALIVE = {"alive": True, "reason": "", "state": {"installed": True}}


@pytest.fixture
def quick(monkeypatch):
    """Leave out the child process; the tests of the hook itself have it."""
    monkeypatch.setattr(hook, "look", lambda: ALIVE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("tiny"), "llama", quantize={"bits": 4, "group_size": 32}
    )


def shell(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "zmlx", "doctor", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.fixture
def importable(monkeypatch):
    """Let a child in another folder find the checkout, as an installed zmlx would be found."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def test_this_machine_is_healthy_and_the_hook_alive(importable):
    ran = shell("--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["hook"]["alive"]
    assert "mlx_lm.utils.load" in facts["hook"]["state"]["wrapped"]
    assert facts["profile"]["name"] == "stable"
    assert facts["backend"]["name"] in ("cpu", "metal", "cuda")
    assert facts["versions"]["mlx"]
    assert facts["python"]["open_files"] != 0
    assert {row["name"] for row in facts["variables"]} >= {"ZMLX_AUTOPATCH", "ZMLX_PROFILE"}


def test_a_broken_profile_file_is_an_error_that_names_it(tmp_path, importable):
    (tmp_path / "zmlx.toml").write_text('profile = "mine"\n[profiles.mine]\nadmits = 3\n')
    ran = shell(cwd=tmp_path)
    assert ran.returncode == 1
    assert "zmlx.toml" in ran.stdout
    assert "error: the release profile cannot be used" in ran.stdout


def test_no_compiler_is_an_error_with_advice(tmp_path, importable):
    ran = shell(ZMLX_CXX="no-such-compiler", ZMLX_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 1
    assert "no-such-compiler" in ran.stdout
    assert "install a C++20 compiler" in ran.stdout


def test_a_dead_hook_is_an_error(monkeypatch, importable):
    # Isolated mode keeps PYTHONPATH, and so the start-up file, from the child.
    monkeypatch.setattr(hook, "_PROBE", "print('zmlx-hook {\"installed\": false}')")
    found = hook.look()
    assert not found["alive"]
    assert "did not run in the child" in found["reason"]
    monkeypatch.setattr(hook, "_PROBE", "import sys; sys.exit('boom')")
    assert hook.look()["reason"] == "the child ended with exit code 1: boom"


def test_autopatch_off_is_a_warning_only(importable):
    ran = shell(ZMLX_AUTOPATCH="0")
    assert ran.returncode == 0, ran.stdout
    assert "warning: ZMLX_AUTOPATCH=0" in ran.stdout


def test_a_bad_variable_is_an_error(quick, monkeypatch):
    monkeypatch.setenv("ZMLX_LOG", "loud")
    result = CliRunner().invoke(doctor, [])
    assert result.exit_code == 1
    assert "ZMLX_LOG='loud': expected one of off, line, debug" in result.stdout


def test_the_plan_of_a_model(quick, tiny):
    result = CliRunner().invoke(doctor, [str(tiny), "--json"])
    assert result.exit_code == 0, result.output
    model = json.loads(result.stdout)["model"]
    assert model["report"]["family"] == "llama"
    assert model["report"]["patched_count"] > 0
    assert model["quantized"]
    text = CliRunner().invoke(doctor, [str(tiny)]).stdout
    assert "why is my model not faster" in text
    assert "run fused on" in text


def test_the_plan_reads_no_weights(quick, tiny, monkeypatch):
    asked = []

    def load(model, *, lazy):
        asked.append(lazy)
        return original(model, lazy=lazy)

    original = examining.load_checkpoint
    monkeypatch.setattr(examining, "load_checkpoint", load)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    facts = examine(str(tiny))
    assert asked == [True]
    # Probing runs on tiny arrays; the model itself stays on disk.
    assert mx.get_active_memory() - before < facts["model"]["bytes"] / 2


def test_a_model_without_quantization_is_told_so(quick, tmp_path):
    folder = make_checkpoint(tmp_path / "plain", "llama", dtype=mx.bfloat16)
    result = CliRunner().invoke(doctor, [str(folder)])
    assert result.exit_code == 0
    assert "the model is not quantized" in result.stdout
    assert "mlx_lm.convert" in result.stdout


def test_a_missing_model_is_code_2(quick, tmp_path):
    result = CliRunner().invoke(doctor, [str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "no config.json there" in result.stderr
    assert result.stdout == ""


@pytest.fixture
def facts(quick):
    return examine()


def severities(facts, word):
    return [f.severity for f in findings(facts) if word in f.what]


@pytest.mark.parametrize(
    ("part", "change", "word", "severity"),
    [
        ("backend", {"error": "libcuda is missing"}, "libcuda", "error"),
        ("backend", {"idle_gpu": "H200, 580.1"}, "although there is a GPU", "warning"),
        ("backend", {"name": "metal"}, "no metal kernels yet", "note"),
        ("versions", {"mlx-lm": ""}, "mlx-lm is not installed", "error"),
        ("python", {"open_files": 64}, "only 64 files", "warning"),
        ("python", {"flags": ["isolated"]}, "-I", "warning"),
        ("native", {"state": "not built"}, "not built yet", "note"),
        ("native", {"state": "unavailable", "reason": "ABI"}, "ABI", "error"),
        ("hook", {"alive": False, "reason": "stood aside"}, "stood aside", "error"),
        ("profile", {"error": "line 3"}, "line 3", "error"),
        ("profile", {"notes": ["two files"]}, "two files", "note"),
    ],
)
def test_each_rule(facts, part, change, word, severity):
    assert severities(facts, word) == []
    facts[part] = {**facts[part], **change}
    assert severities(facts, word) == [severity]


def test_fewer_threads_than_cores_is_a_warning(facts):
    facts["hardware"] |= {"physical_cores": 8, "usable_cores": 8}
    facts["native"] |= {"threads": 2}
    assert severities(facts, "2 of 8 cores") == ["warning"]


def test_a_model_larger_than_memory_is_a_warning(facts, tiny):
    facts["model"] = examining.plan(str(tiny))
    assert severities(facts, "will swap") == []
    facts["model"]["available_bytes"] = 1000
    assert severities(facts, "will swap") == ["warning"]


def test_errors_come_first(facts):
    facts["native"] = {"state": "not built", "threads": None}
    facts["hook"] = {"alive": False, "reason": "x", "state": {}}
    order = [f.severity for f in findings(facts)]
    assert order[0] == "error"
    assert order[-1] == "note"
