"""`sanitized.cpp` and the library's plain C++ as one program, for any compiler and flags."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zmlx.backend.cpu import build

#: They hold MLX types; all others are plain C++.
WITH_MLX = (
    "primitives.cpp",
    "weights.cpp",
    "lookup.cpp",
    "step_primitives.cpp",
    "binding.cpp",
    "view.cpp",
    "operations.cpp",
    "arithmetic.cpp",
    "program.cpp",
    "fuse.cpp",
)


def compile_program(compiler: list[str], flags: list[str], machine: str, folder: Path) -> Path:
    """Compile each unit with the flags that it has on a kind of machine; return the program."""
    units = {build.SOURCE / name: own for name, own in build._units(machine).items()}
    jobs = [job for job in units.items() if job[0].name not in WITH_MLX]
    jobs.append((Path(__file__).with_name("sanitized.cpp"), []))
    command = [*compiler, "-std=c++20", "-w", f"-I{build.SOURCE}", *flags]

    def compiled(job: tuple[Path, list[str]]) -> str:
        source, own = job
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*command, *own, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as executor:
        objects = list(executor.map(compiled, jobs))
    program = folder / "sanitized"
    subprocess.run([*command, "-pthread", *objects, "-o", str(program)], check=True)
    return program


def run(command: list[str]) -> list[str]:
    """Run the program, which must find no fault; return the lines it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout.splitlines()
