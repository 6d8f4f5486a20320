"""The switch between stacks keeps what a call keeps: on x86-64, on arm64, and elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from zmlx.backend.cpu import build

ARM = "aarch64-linux-gnu-g++"


@pytest.mark.parametrize("kind", ["here", "ucontext", "arm64"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_flows_take_turns(kind, level, tmp_path):
    compiler, start = [build.find_compiler()], []
    if kind == "arm64":
        if not (shutil.which(ARM) and shutil.which("qemu-aarch64")) and "CI" not in os.environ:
            pytest.skip(f"{ARM} or qemu-aarch64 is not installed; .ci/run installs them")
        compiler, start = [ARM, "-static"], ["qemu-aarch64"]
    program = tmp_path / "fibers"
    flags = ["-DZMLX_UCONTEXT"] if kind == "ucontext" else []
    sources = [Path(__file__).with_name("fibers.cpp"), build.SOURCE / "emulator_fiber.cpp"]
    command = [*compiler, "-std=c++20", level, *flags, f"-I{build.SOURCE}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([*start, str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
