"""The native recordings run, on a driver that stands for CUDA's and executes graphs on the host."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from cuda_headers import cannot_compile, cuda_include

from zmlx.backend.cuda import library
from zmlx.backend.extension import find_compiler, mlx_folder, mlx_include

HERE = Path(__file__).with_name("driver")


@pytest.mark.skipif(
    cannot_compile() or mx.cuda.is_available(),
    reason="no nvidia-cuda-runtime (in the extra dev), no compiler, or a driver of CUDA's",
)
def test_launches_buffers_streams_and_failures(tmp_path):
    """Twice: with a driver of today, and with one that knows no edges with data."""
    folders = (mlx_include(), cuda_include(), library.SOURCE / "stand_ins", library.SOURCE, HERE)
    command = [
        *shlex.split(find_compiler()),
        *("-std=c++20", "-O1", "-fPIC"),
        *(f"-I{folder}" for folder in folders),
    ]
    # By this name it is found as CUDA's is.
    name, program = "libcuda.so.1", tmp_path / "program"
    shared = ["-shared", f"-Wl,-soname,{name}", str(HERE / "fake_driver.cpp")]
    for kind, defined in {"new": [], "old": ["-DOLD_DRIVER"]}.items():
        (tmp_path / kind).mkdir()
        subprocess.run([*command, *shared, *defined, "-o", tmp_path / kind / name], check=True)
    sources = [library.SOURCE / f"{name}.cpp" for name in ("recording", "blocks", "driver")]
    linked = [f"-L{mlx_folder() / 'lib'}", "-lmlx", str(tmp_path / "new" / name), "-ldl"]
    paths = f"-Wl,-rpath,{mlx_folder() / 'lib'}"
    own = [str(HERE / "recording_program.cpp"), *map(str, sources)]
    subprocess.run([*command, *own, *linked, paths, "-o", str(program)], check=True)
    for kind in ("new", "old"):
        found = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / kind)}
        done = subprocess.run(
            [program, kind], env=found, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "ok\n"), kind + done.stdout + done.stderr
