"""Compiles programs that begin with a header of these tests, which is compiled once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

COMPILER = shutil.which("g++")


def compile_with(header: Path, options: Sequence[str], text: str, target: Path) -> None:
    """Compile a text after a header, to a program or, where the options say so, a library."""
    folder = _precompiled(header, tuple(options))
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    _run(
        [*options, "-include", str(folder / header.name), "-x", "c++", "-", "-o", str(part)],
        text,
    )
    os.replace(part, target)


@cache
def _precompiled(header: Path, options: tuple[str, ...]) -> Path:
    """Return a folder with a header and what the compiler made of it, the same for all processes.

    The compiler looks by itself whether that fits it, and else reads the header.
    """
    digest = hashlib.sha256(repr((header.read_text(), options, COMPILER)).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"zmlx-headers-{os.getuid()}" / digest
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / f"{header.name}.gch"
        if not made.is_file():
            shutil.copy(header, folder)
            part = made.with_suffix(".part")
            _run([*options, "-x", "c++-header", str(folder / header.name), "-o", str(part)])
            os.replace(part, made)
    return folder


def _run(arguments: list[str], text: str | None = None) -> None:
    done = subprocess.run(
        [COMPILER or "g++", *arguments], input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
