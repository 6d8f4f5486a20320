"""clang: found, given MLX's own prelude once, and run on a text."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from zmlx.backend.strict import outline, rewrite, tokens
from zmlx_autopatch import variables

INCLUDE = Path(__file__).parent / "include"
#: What clang must be at least: the first with C++ for OpenCL 2021.
OLDEST = 14
#: Names under which clang is installed, the newest first.
NAMES = ("clang", *(f"clang-{version}" for version in range(23, OLDEST - 1, -1)))
#: Longest time for one run, in seconds.
TIME_LIMIT = 120
_EXTENSIONS = (
    "-all,+cl_khr_fp16,+__opencl_c_generic_address_space,-__opencl_c_program_scope_global_variables"
)
_FLAGS = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc", "-target", "spir64"),
    *("-Xclang", f"-cl-ext={_EXTENSIONS}", "-Xclang", "-disable-llvm-passes"),
    *("-fno-caret-diagnostics", "-fno-color-diagnostics", "-ferror-limit=20"),
    *("-Wno-everything", "-Wunknown-attributes", "-Werror=c++11-narrowing"),
    *("-I", str(INCLUDE)),
]
#: Files of Metal's that a text may include; all that they declare is in `metal_stdlib`.
_INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"(mlx/[^"]+)"|<(metal_\w+|simd/simd\.h)>)')


class ClangUnavailable(RuntimeError):
    """There is no clang here that can look at Metal text; the text says what to do."""


@dataclass(frozen=True)
class Run:
    """What a run of clang gave: its messages, and the compiled text (empty after an error)."""

    messages: str
    module: str


def find() -> str:
    """Return the command of clang: ZMLX_CLANG, or the first on PATH that is recent enough.

    Raises:
        ClangUnavailable: there is none.
    """
    asked = variables.text("ZMLX_CLANG")
    names = [shlex.split(asked)[0]] if asked else NAMES
    for name in names:
        path = shutil.which(name)
        if path and _version(path) >= OLDEST:
            return path
    wanted = f"ZMLX_CLANG={asked}: no clang {OLDEST} or later" if asked else "no clang"
    raise ClangUnavailable(f"{wanted} on PATH; install clang {OLDEST} or later (package clang)")


@cache
def _version(path: str) -> int:
    told = _banner(path)
    match = re.search(r"clang version (\d+)", told)
    return int(match[1]) if match else 0


@cache
def _banner(path: str) -> str:
    return subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=True, timeout=TIME_LIMIT
    ).stdout


def run(text: str) -> Run:
    """Compile a text after MLX's prelude; its optimiser does not run.

    Raises:
        ClangUnavailable: there is no clang, or it cannot compile MLX's prelude.
    """
    clang = find()
    command = [clang, *_FLAGS, "-include-pch", str(_prelude(clang)), "-gline-tables-only"]
    done = _clang([*command, "-S", "-emit-llvm", "-o", "-", "-"], text)
    return Run(done.stderr, done.stdout if done.returncode == 0 else "")


def _clang(command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        input=text,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=TIME_LIMIT,
    )


@cache
def _prelude(clang: str) -> Path:
    """Return the precompiled prelude: Metal's library as declared here, and MLX's `utils.h`.

    It is built once for each clang, MLX and version of these files, and kept in the cache folder.
    """
    text = "#include <metal_stdlib>\n" + rewritten(flattened("mlx/backend/metal/kernels/utils.h"))
    digest = hashlib.sha256(f"{_FLAGS}{_banner(clang)}{text}".encode())
    for file in sorted(INCLUDE.iterdir()):
        digest.update(file.read_bytes())
    folder = Path(variables.text("ZMLX_CACHE_DIR") or "~/.cache/zmlx").expanduser() / "strict"
    # The time is in it, since clang refuses a prelude that is older than a file of it.
    kept = folder / f"{digest.hexdigest()[:32]}-{_newest():x}.pch"
    if kept.exists():
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    handle, building = tempfile.mkstemp(dir=folder, suffix=".building")
    os.close(handle)
    done = _clang([clang, *_FLAGS, "-S", "-Xclang", "-emit-pch", "-o", building, "-"], text)
    if done.returncode:
        Path(building).unlink(missing_ok=True)  # clang may have removed it
        raise ClangUnavailable(f"{clang} does not take MLX's prelude:\n{done.stderr[-4000:]}")
    os.replace(building, kept)  # another process may have done the same: the files are equal
    return kept


def _newest() -> int:
    return max(file.stat().st_mtime_ns for file in INCLUDE.iterdir())


def rewritten(text: str) -> str:
    """Return text that is known to be right as clang takes it."""
    found = tokens.tokens(text)
    seen = outline.outline([token for token in found if not token.directive])
    return tokens.Parts([("prelude", text)]).marked(rewrite.edits(found, seen))


def flattened(path: str) -> str:
    """Return a Metal file of the installed MLX with the files of MLX that it includes, each once.

    Args:
        path: from MLX's include folder, such as "mlx/backend/metal/kernels/softmax.h".

    Raises:
        FileNotFoundError: the installed MLX has no such file.
    """
    return _flattened(Path(mx.__file__).parent / "include", path, set())


def _flattened(root: Path, path: str, seen: set[str]) -> str:
    seen.add(path)
    lines = []
    for line in (root / path).read_text().splitlines():
        match = _INCLUDED.match(line)
        if match and match[1]:
            lines += [] if match[1] in seen else [_flattened(root, match[1], seen)]
        elif not match and line.strip() != "#pragma once":
            lines.append(line)
    return "\n".join(lines) + "\n"
