"""Python extensions with operations for MLX, compiled here against the installed mlx.

They are compiled against the headers of the very mlx that is installed, with a nanobind of mlx's
own binary interface: values of the type `mlx.core.array` pass between two extensions only when both
carry the same tag.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from zmlx.backend.cpu.threads import usable_cpus
from zmlx_autopatch import variables

#: Longest time for one step, in seconds; a compiler or a self-test that hangs is given up.
TIME_LIMIT = 600
#: Flags of every unit.
COMMON = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DNB_DOMAIN=mlx", "-w")
#: Is told after each step of a build: how many are done, and of how many.
Progress = Callable[[int, int], None]
#: A source, and flags of its own.
Unit = tuple[Path, list[str]]

_ABI_TAG = re.compile(rb"nanobind_[a-z]+_[a-z0-9_]*_v[0-9]+")


class NativeUnavailable(RuntimeError):
    """The native library cannot be had here; `reason` says why and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"native code: {reason}")
        self.reason = reason


def find_compiler() -> str:
    """Return the command of the C++ compiler: ZMLX_CXX, or the first of c++, g++ and clang++.

    Raises:
        NativeUnavailable: there is none.
    """
    asked = variables.text("ZMLX_CXX")
    if asked:
        first, *rest = shlex.split(asked)
        path = shutil.which(first)
        if path is None:
            raise NativeUnavailable(f"ZMLX_CXX={asked}: no program {first} on PATH")
        return shlex.join([path, *rest])
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return shlex.quote(path)
    raise NativeUnavailable("no C++ compiler found; install g++ or clang++ (C++20)")


def compiler_version(compiler: str) -> str:
    """Return the first line that the compiler prints for --version.

    Raises:
        NativeUnavailable: it does not run.
    """
    try:
        done = subprocess.run(
            [*shlex.split(compiler), "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIME_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} does not run: {error}") from error
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def link_all(
    library: Path,
    compiler: str,
    units: Sequence[Unit],
    common: Sequence[str] = COMMON,
    *,
    progress: Progress = lambda done, steps: None,
) -> None:
    """Compile an extension, with nanobind.

    Args:
        library: its file; the objects are beside it for a while.
        compiler: command of the compiler.
        units: its sources, the slowest to compile first.
        common: flags of all of them.
        progress: is called after each step, by the calling thread.

    Raises:
        NativeUnavailable: a step failed; the reason holds the first error and where the log is.
    """
    include = _includes()
    binding = _nanobind_folder() / "src" / "nb_combined.cpp"
    jobs = [(binding, ["-O1", "-fno-strict-aliasing"]), *units]
    command = shlex.split(compiler)
    steps = len(jobs) + 1

    def compile_unit(job: Unit) -> str:
        source, flags = job
        target = str(library.parent / f"{source.stem}.o")
        arguments = [*common, *flags, *include, "-c", str(source), "-o", target]
        run_step([*command, *arguments], f"compiling {source.name}")
        return target

    executor = ThreadPoolExecutor(len(usable_cpus()))
    try:
        running = [executor.submit(compile_unit, job) for job in jobs]
        for done, unit in enumerate(as_completed(running), 1):
            unit.result()
            progress(done, steps)
    finally:
        executor.shutdown(cancel_futures=True)
    objects = [unit.result() for unit in running]
    # No run path: mlx.core has loaded libmlx before us, wherever it lies.
    mlx = f"-L{mlx_folder() / 'lib'}"
    link = ["-shared", "-pthread", *objects, mlx, "-lmlx", "-s", "-o", str(library)]
    run_step([*command, *link], "linking")
    for file in objects:
        Path(file).unlink()
    progress(steps, steps)


def open_extension(name: str, library: Path) -> ModuleType:
    """Load an extension.

    Raises:
        NativeUnavailable: it is none, or lacks something that it needs.
    """
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise NativeUnavailable(f"{library} does not load: {error}") from error
    return module


def file_of(module: str) -> str:
    """Return an extension's file name, which holds the version of Python and the platform."""
    return f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"


def hash_of_folder(folder: Path) -> str:
    """Return a hash of the names and contents of the files in a folder and those within."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def fingerprint_of(file: str, *facts: str) -> str:
    """Return a hash of facts, and of what every extension depends on.

    Args:
        file: the extension's name.
        facts: what this one depends on besides MLX, nanobind and the machine.
    """
    digest = hashlib.sha256()
    size = str((mlx_folder() / "lib" / "libmlx.so").stat().st_size)
    for part in (mlx_version(), size, version_of("nanobind"), platform.machine(), file, *facts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def abi_tag(library: Path) -> str:
    """Return the tag of nanobind's binary interface that a library carries; empty if none."""
    match = _ABI_TAG.search(library.read_bytes())
    return match.group().decode() if match else ""


def mlx_extension() -> Path:
    """Return the file of the extension `mlx.core`."""
    return Path(str(mx.__file__))


def mlx_include() -> Path:
    """Return the folder of the headers that the installed mlx ships."""
    return mlx_folder() / "include"


def mlx_version() -> str:
    """Return the version of the mlx that is loaded."""
    return str(vars(mx)["__version__"])


def mlx_folder() -> Path:
    """Return the folder of the installed mlx."""
    return mlx_extension().parent


def hash_of(file: Path) -> str:
    """Return a hash of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def version_of(package: str) -> str:
    """Return the version of an installed package; "none" of others."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def run_step(command: list[str], what: str, environment: dict[str, str] | None = None) -> None:
    """Run a step of a build.

    Raises:
        NativeUnavailable: it failed; the reason holds the first error and where the log is.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{what} took more than {TIME_LIMIT} s") from error
    except OSError as error:
        raise NativeUnavailable(f"{what} failed: {error}") from error
    if done.returncode == 0:
        return
    text = done.stderr + done.stdout
    handle, log = tempfile.mkstemp(prefix="zmlx-native-", suffix=".log", text=True)
    with os.fdopen(handle, "w") as file:
        file.write(f"{shlex.join(command)}\nexit code {done.returncode}\n{text}")
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    last = text.strip().splitlines()[-1:]
    reason = (errors or last or [f"exit code {done.returncode}"])[0].strip()
    raise NativeUnavailable(f"{what} failed: {reason} (log: {log})")


def _nanobind_folder() -> Path:
    spec = importlib.util.find_spec("nanobind")
    if spec is None or spec.origin is None:
        raise NativeUnavailable("nanobind is not installed; pip install 'nanobind>=3.0.1,<3.1'")
    return Path(spec.origin).parent


def _includes() -> list[str]:
    nanobind = _nanobind_folder()
    folders = [
        mlx_include(),
        nanobind / "include",
        nanobind / "ext" / "robin_map" / "include",
        Path(sysconfig.get_path("include")),
    ]
    return [f"-I{folder}" for folder in folders]
