"""Programs and operations, with MLX, under the sanitizers (`sanitized_program.cpp`).

libmlx.so is as it was installed, without instrumentation. The address sanitizer does not mind:
MLX's memory comes from the same `malloc`. UBSan's check of dynamic types (vptr) needs type
information that libmlx keeps to itself, so it is off.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zmlx.backend.cpu import build

#: The thread sanitizer sees the locks and threads of libmlx, which are calls into the system, but
#: not its atomic counters, by which it knows who is the last to hold an event, an array or a
#: primitive. What is freed then looks like a race with whoever used it before; whether memory is
#: used after that is the address sanitizer's question. No other access of ours is left out: naming
#: libmlx.so here would leave out all that runs on a stream's thread, which begins in libmlx.
SUPPRESSIONS = """
race:mlx::core::Event::wait
race:mlx::core::array::wait
race:mlx::core::array::is_available
race:^operator delete
"""

#: Units that hold MLX types.
WITH_MLX = (
    "sanitized_program.cpp",
    "primitives.cpp",
    "step_primitives.cpp",
    "view.cpp",
    "operations.cpp",
    "arithmetic.cpp",
    "program.cpp",
    "fuse.cpp",
)


def instrumented_program(folder: Path, sanitizers: str, speed: str) -> Path:
    """Compile `sanitized_program.cpp` and all units but the Python module; link with libmlx.so.

    `speed` is how to optimise what holds MLX types, the templates of which are slow to compile.
    """
    compiler = shlex.split(build.find_compiler())
    mlx = build.mlx_extension().parent
    flags = ["-std=c++20", "-g1", "-w", "-Wno-psabi", f"-I{build.SOURCE}", f"-I{mlx / 'include'}"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    units = {build.SOURCE / name: own for name, own in build._units().items()}
    del units[build.SOURCE / "binding.cpp"]
    jobs = [(Path(__file__).with_name("sanitized_program.cpp"), []), *units.items()]

    def compiled(job: tuple[Path, list[str]]) -> str:
        source, own = job
        target = str(folder / f"{source.stem}.o")
        level = speed if source.name in WITH_MLX else "-O1"
        command = [*compiler, *flags, level, *own, "-c", str(source), "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as executor:
        objects = list(executor.map(compiled, jobs))
    program = folder / "sanitized"
    libraries = ["-pthread", f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}"]
    subprocess.run([*compiler, *flags, *objects, *libraries, "-o", str(program)], check=True)
    return program


# Without optimisation a destructor first writes its own type, which is one more race as above.
@pytest.mark.parametrize(("sanitizers", "speed"), [("address,undefined", "-O0"), ("thread", "-O1")])
def test_programs_are_clean(sanitizers, speed, tmp_path):
    program = instrumented_program(tmp_path, sanitizers, speed)
    (tmp_path / "suppressions").write_text(SUPPRESSIONS)
    env = {
        **os.environ,
        "TSAN_OPTIONS": f"suppressions={tmp_path}/suppressions print_suppressions=0",
    }
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
