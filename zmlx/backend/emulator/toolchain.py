"""From the text of a kernel to a library on disk; compiled once for all processes.

The prelude (the shim of Metal's standard library and MLX's utils.h) is compiled once to a
precompiled header, which a kernel's own compilation loads. Every file is made under another name
and then renamed, so that processes and threads that do the same at the same time do no harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zmlx.backend.cpu import build, native
from zmlx.backend.emulator.faults import CompileError
from zmlx_autopatch import variables

HERE = Path(__file__).parent
#: Longest time for one compilation, in seconds.
TIME_LIMIT = 300

#: Most bytes of a function's local variables; the emulator's stacks hold twice as many.
_MOST_LOCAL = 128 << 10

_COMMON = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-g1")
#: Code lies in the order of its text: lanes that part meet again at the first place that they have
#: in common, which the emulator finds by addresses.
_IN_ORDER = ("-fno-thread-jumps", "-fno-tree-ch", "-fno-reorder-blocks", "-fno-crossjumping")
#: Rounding is IEEE's after each operation; literals are float as in Metal; each access to memory
#: comes to the emulator (-fsanitize=thread), as do an index outside a constant bound and an address
#: that is no multiple of its type's alignment.
_KERNEL = (
    *_COMMON,
    "-O1",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-omit-frame-pointer",
    "-fsanitize=thread,bounds,alignment",
    "-fno-strict-aliasing",
    "-Wno-attributes",
    f"-Werror=frame-larger-than={_MOST_LOCAL}",
    "-fsingle-precision-constant",
    "--param=tsan-instrument-func-entry-exit=0",
    *_IN_ORDER,
)
_ERROR = re.compile(r"^(?P<place>[^\n]*?\([a-z]+\):\d+):(?P<rest>\d+: (?:fatal )?error: .*)$", re.M)


@dataclass(frozen=True)
class Toolchain:
    """What kernels are compiled with: the compiler, and the folder of what it made.

    Attributes:
        compiler: its command, in words.
        flags: for kernels.
        folder: holds the precompiled prelude, the object of the hooks, and kernels.
    """

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    folder: Path

    @property
    def prelude(self) -> Path:
        """The header that every kernel begins with; what was compiled of it lies beside it."""
        return self.folder / "prelude.h"


def compiled(text: str) -> Path:
    """Compile a kernel's text and return its library, from disk where it is there.

    Raises:
        CompileError: the compiler does not accept it.
        zmlx.backend.cpu.build.NativeUnavailable: there is no compiler, or the prelude fails.
    """
    tools = toolchain()
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    library = tools.folder / name[:2] / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(library) as target:
            _compile_kernel(tools, text, target)
    return library


@cache
def _toolchain(root: str, asked: str) -> Toolchain:
    compiler, version = _find_gcc()
    sources = (*sorted(HERE.glob("include/**/*")), HERE / "hooks.cpp", _interface())
    flags = (
        *_KERNEL,
        *_half_flags(),
        f"-I{HERE / 'include'}",
        f"-I{_interface().parent}",
        f"-I{build.mlx_include()}",
    )
    digest = hashlib.sha256()
    for part in (compiler, version, build.mlx_version(), platform.machine(), repr(flags)):
        digest.update(part.encode() + b"\0")
    for file in sources:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = Path(root) / digest.hexdigest()[:16]
    tools = Toolchain(tuple(shlex.split(compiler)), flags, folder)
    _prepare(tools)
    return tools


def toolchain() -> Toolchain:
    """Return the compiler with its prelude, compiled first if need be.

    Raises:
        zmlx.backend.cpu.build.NativeUnavailable: there is no compiler, or the prelude fails.
    """
    root = native.cache_folder().parent / "emulator"
    return _toolchain(str(root), variables.text("ZMLX_CXX"))


def _find_gcc() -> tuple[str, str]:
    """Return the command and version of g++; clang++ has no literals that are float.

    Raises:
        zmlx.backend.cpu.build.NativeUnavailable: there is none.
    """
    compiler = build.find_compiler()
    version = build.compiler_version(compiler)
    if "clang" in version:
        other = shutil.which("g++")
        compiler = shlex.quote(other) if other else ""
        version = build.compiler_version(compiler) if other else "clang"
    if "clang" in version:
        raise build.NativeUnavailable(
            "the emulator of Metal kernels needs g++ 12 or newer, and here is only clang++; "
            "install it, or name it in ZMLX_CXX"
        )
    return compiler, version


def _prepare(tools: Toolchain) -> None:
    """Compile the prelude and the hooks, one process at a time."""
    if (tools.folder / "ready").exists():
        return
    tools.folder.mkdir(parents=True, exist_ok=True)
    with (tools.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (tools.folder / "ready").exists():
            return
        tools.prelude.write_text("#include <zmlx/prelude.h>\n")
        command = [*tools.compiler, *tools.flags, "-x", "c++-header", str(tools.prelude)]
        _run([*command, "-o", f"{tools.prelude}.gch"])
        command = [*tools.compiler, *_COMMON, "-O2", f"-I{_interface().parent}"]
        _run([*command, "-c", str(HERE / "hooks.cpp"), "-o", str(tools.folder / "hooks.o")])
        (tools.folder / "ready").touch()


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT, errors="replace"
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise build.NativeUnavailable(
            f"the emulator's prelude does not compile: {(lines or [done.stderr])[0]}"
        )


def _compile_kernel(tools: Toolchain, text: str, target: Path) -> None:
    command = [
        *tools.compiler,
        *tools.flags,
        "-pipe",
        *("-include", str(tools.prelude)),
        *("-x", "c++", "-"),
        *("-x", "none", str(tools.folder / "hooks.o")),
        *("-shared", "-nostdlib", "-o", str(target), "-lm", "-lgcc"),
    ]
    done = subprocess.run(
        command,
        input=text,
        env={**os.environ, "LC_ALL": "C"},  # its messages are looked through
        capture_output=True,
        text=True,
        check=False,
        timeout=TIME_LIMIT,
        errors="replace",
    )
    if done.returncode != 0:
        raise CompileError(_first_errors(done.stderr))


def _first_errors(output: str) -> str:
    """Return what the compiler says of the author's text, first errors first."""
    found = [f"{match['place']}:{match['rest']}" for match in _ERROR.finditer(output)]
    if not found:
        found = [line for line in output.splitlines() if "error" in line] or [output]
    return "the kernel does not compile: " + "\n".join(found[:3])


@contextlib.contextmanager
def _temporary(final: Path) -> Iterator[Path]:
    """Give a name beside a file, which becomes the file when all went well."""
    handle, name = tempfile.mkstemp(prefix=f".{final.stem}.", dir=final.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, final)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _interface() -> Path:
    return build.SOURCE / "emulator_interface.h"


def _half_flags() -> tuple[str, ...]:
    """Return what makes half round after each operation, fast where the processor can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        features = Path("/proc/cpuinfo").read_text().partition("flags")[2].split("\n")[0].split()
    except OSError:
        features = []
    return ("-fexcess-precision=16", *(("-mf16c",) if "f16c" in features else ()))
