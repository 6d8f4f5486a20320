"""The library's C++ and a test's as one program, for any compiler and flags."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zmlx.backend.cpu import build

#: They hold MLX types; all others are plain C++.
WITH_MLX = ("together_primitives.cpp", "together_programs.cpp", "emulated.cpp")
#: source -> flags of its own
Units = dict[Path, list[str]]


def units(machine: str | None = None, *, mlx: bool) -> Units:
    """Return the library's units for a kind of machine, with or without those of MLX types."""
    own = build._units(machine) if machine else build._units()
    del own["together_bindings.cpp"]
    return {
        build.SOURCE / name: flags for name, flags in own.items() if mlx or name not in WITH_MLX
    }


def compile_units(compiler: list[str], sources: Units, folder: Path) -> list[str]:
    """Compile each unit with the compiler's flags and then its own; return the objects."""
    include = [f"-I{build.SOURCE}", f"-I{build.mlx_folder() / 'include'}"]
    command = [*compiler, "-std=c++20", "-w", "-Wno-psabi", *include]

    def compiled(job: tuple[Path, list[str]]) -> str:
        source, own = job
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*command, *own, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(compiled, sources.items()))


def link(compiler: list[str], flags: list[str], objects: list[str], program: Path) -> Path:
    """Link objects; return the program."""
    subprocess.run([*compiler, "-pthread", *objects, *flags, "-o", str(program)], check=True)
    return program


def run(command: list[str], **variables: str) -> list[str]:
    """Run the program, which must find no fault; return the lines it prints."""
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout.splitlines()
