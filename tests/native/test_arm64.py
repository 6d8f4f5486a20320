"""The kernels on arm64: compiled for it here, and run on an emulated processor."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest

from zmlx.backend.cpu import build

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
#: program -> package of Debian and Ubuntu
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}


@pytest.fixture(scope="module", autouse=True)
def _tools():
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        # In CI nobody reads what was skipped.
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"needs the packages {' and '.join(missing)}")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    flags = ["-O3", "-static"]
    return harness.compile_program([COMPILER], flags, "aarch64", tmp_path_factory.mktemp("arm64"))


def test_a_processor_with_dot_products(program):
    ran = harness.run([EMULATOR, "-cpu", "max", str(program)])
    assert ran == ["best: neon_dotprod", "neon_dotprod", "portable"]


def test_a_processor_without_dot_products(program):
    ran = harness.run([EMULATOR, "-cpu", "cortex-a72", str(program)])
    assert ran == ["best: portable", "portable"]


def test_units_with_mlx_types_compile():
    include = [f"-I{build.SOURCE}", f"-I{build._mlx_folder() / 'include'}"]
    command = [COMPILER, "-std=c++20", "-w", "-Wno-psabi", "-fsyntax-only", *include]
    # The binding also needs the headers of an arm64 Python.
    units = [build.SOURCE / name for name in harness.WITH_MLX if name != "binding.cpp"]
    with ThreadPoolExecutor(2) as executor:
        runs = executor.map(lambda unit: subprocess.run([*command, str(unit)], check=False), units)
    assert [run.returncode for run in runs] == [0] * len(units)
