"""The kernels under the address, undefined-behaviour and thread sanitizers (`sanitized.cpp`)."""

from __future__ import annotations

import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zmlx.backend.cpu import build

#: They hold MLX types; all others are plain C++.
WITH_MLX = (
    "primitives.cpp",
    "step_primitives.cpp",
    "binding.cpp",
    "view.cpp",
    "operations.cpp",
    "arithmetic.cpp",
    "program.cpp",
    "fuse.cpp",
)


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_products_are_clean(sanitizers, tmp_path):
    compiler = shlex.split(build.find_compiler())
    flags = ["-std=c++20", "-O1", "-g1", "-w", f"-I{build.SOURCE}", f"-fsanitize={sanitizers}"]
    flags += ["-fno-sanitize-recover=all"]
    units = {build.SOURCE / name: own for name, own in build._units().items()}
    jobs = [job for job in units.items() if job[0].name not in WITH_MLX]
    jobs.append((Path(__file__).with_name("sanitized.cpp"), []))

    def compiled(job: tuple[Path, list[str]]) -> str:
        source, own = job
        target = str(tmp_path / f"{source.stem}.o")
        subprocess.run([*compiler, *flags, *own, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as executor:
        objects = list(executor.map(compiled, jobs))
    program = str(tmp_path / "sanitized")
    subprocess.run([*compiler, *flags, "-pthread", *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
