"""The kernels on arm64: compiled for it here, and run on an emulated processor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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
    folder = tmp_path_factory.mktemp("arm64")
    sources = harness.units("aarch64", mlx=False)
    sources[Path(__file__).with_name("sanitized.cpp")] = []
    objects = harness.compile_units([COMPILER, *build.COMMON], sources, folder)
    return harness.link([COMPILER], ["-static"], objects, folder / "program")


def test_a_processor_with_dot_products(program):
    ran = harness.run([EMULATOR, "-cpu", "max", str(program)])
    assert ran == ["best: neon_dotprod", "neon_dotprod", "portable"]


def test_a_processor_without_dot_products(program):
    ran = harness.run([EMULATOR, "-cpu", "cortex-a72", str(program)])
    assert ran == ["best: portable", "portable"]


def test_units_with_mlx_types_compile(tmp_path):
    every, plain = (harness.units("aarch64", mlx=mlx) for mlx in (True, False))
    sources = {unit: flags for unit, flags in every.items() if unit not in plain}
    assert {unit.name for unit in sources} == set(harness.WITH_MLX)
    harness.compile_units([COMPILER, "-fsyntax-only"], sources, tmp_path)
