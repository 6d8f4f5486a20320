"""The native library of CPU kernels: found, or compiled on first use, checked and loaded.

It is a Python extension whose operations are MLX primitives, so it must be compiled against the
headers of the very mlx that is installed, with a nanobind of mlx's own binary interface. The result
is kept in the cache folder under a key of everything that it depends on. Whatever goes wrong on the
way is a `NativeUnavailable` with the reason; the stock operations then stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from zmlx.backend.cpu.threads import default_threads
from zmlx_autopatch import variables

MODULE = "_zmlx_cpu"
SOURCE = Path(__file__).parent / "source"
#: A library that was built into the wheel.
BUNDLED = Path(__file__).parent / "lib"

_COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNB_DOMAIN=mlx", "-w"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
#: translation unit -> flags of its own; those with instruction sets only where they exist
_UNITS: dict[str, list[str]] = {
    "primitives.cpp": [],
    "binding.cpp": [],
    "products.cpp": [],
    "pool.cpp": [],
    "dispatch.cpp": [],
    "kernels_portable.cpp": [],
}
_X86_UNITS: dict[str, list[str]] = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx512_bf16.cpp": [*_AVX512, "-mavx512vbmi", "-mavx512bf16"],
}
_ABI_TAG = re.compile(rb"nanobind_[a-z]+_[a-z0-9_]*_v[0-9]+")


class NativeUnavailable(RuntimeError):
    """The native library cannot be had here; the text says why and what to do."""


@dataclass(frozen=True)
class Build:
    """What a library would be built with, and where it belongs.

    Attributes:
        compiler: path of the C++ compiler.
        version: first line of what the compiler says of itself.
        key: hash of all that the library depends on.
        library: where the built library is kept.
    """

    compiler: str
    version: str
    key: str
    library: Path


@dataclass
class _Loaded:
    """What the first call of `load` found; later calls repeat it."""

    module: ModuleType | None = None
    refusal: NativeUnavailable | None = None


_LOADED = _Loaded()


def load(*, announce: Callable[[str], None] | None = None) -> ModuleType:
    """Return the library, built first if need be.

    Args:
        announce: gets one line before a build starts; default prints it to stderr.

    Raises:
        NativeUnavailable: with the reason; asking again costs nothing and gives the same.
    """
    if _LOADED.module is None and _LOADED.refusal is None:
        try:
            module = _import(_found_or_built(announce or _print))
            module.set_num_threads(default_threads())
            _LOADED.module = module
        except NativeUnavailable as refusal:
            _LOADED.refusal = refusal
        except (OSError, ImportError, variables.VariableError) as error:
            _LOADED.refusal = NativeUnavailable(f"native CPU kernels: {error}")
    if _LOADED.refusal is not None:
        raise _LOADED.refusal
    assert _LOADED.module is not None
    return _LOADED.module


def describe() -> Build:
    """Return what a build here would use, without building.

    Raises:
        NativeUnavailable: there is no compiler, or this platform has no native library.
    """
    if sys.platform != "linux":
        raise NativeUnavailable("native CPU kernels are for Linux; here MLX uses the GPU")
    compiler = find_compiler()
    version = _first_line([compiler, "--version"])
    digest = hashlib.sha256()
    for part in (
        version,
        _version_of("mlx"),
        _version_of("nanobind"),
        platform.machine(),
        str(sysconfig.get_config_var("SOABI")),
        repr((_COMMON, _units())),
    ):
        digest.update(part.encode() + b"\0")
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    key = digest.hexdigest()[:16]
    return Build(compiler, version, key, cache_folder() / key / _file_name())


def cache_folder() -> Path:
    """Return the folder that holds the built libraries."""
    root = variables.text("ZMLX_CACHE_DIR") or "~/.cache/zmlx"
    return Path(root).expanduser() / "native"


def find_compiler() -> str:
    """Return the path of the C++ compiler: ZMLX_CXX, or the first of c++, g++ and clang++.

    Raises:
        NativeUnavailable: there is none.
    """
    asked = variables.text("ZMLX_CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    wanted = f"ZMLX_CXX={asked} is not on PATH" if asked else "no C++ compiler found"
    raise NativeUnavailable(f"native CPU kernels: {wanted}; install g++ or clang++ (C++20)")


def abi_tag(library: Path) -> str:
    """Return the tag of nanobind's binary interface that a library carries; empty if none."""
    match = _ABI_TAG.search(library.read_bytes())
    return match.group().decode() if match else ""


def clear() -> int:
    """Remove every library from the cache folder; return how many there were."""
    folder = cache_folder()
    count = len(list(folder.glob(f"*/{MODULE}*"))) if folder.is_dir() else 0
    shutil.rmtree(folder, ignore_errors=True)
    return count


def build(into: Path, spec: Build) -> Path:
    """Compile and check the library in a folder; return its file.

    Raises:
        NativeUnavailable: a step failed; the reason holds the compiler's first error.
    """
    library = into / _file_name()
    include = _includes()
    jobs = [(SOURCE / name, flags) for name, flags in _units().items()]
    jobs.append((_nanobind_source(), ["-fno-strict-aliasing"]))

    def compile_unit(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        target = into / f"{source.stem}.o"
        command = [spec.compiler, *_COMMON, *flags, *include, "-c", str(source), "-o", str(target)]
        _run(command, into, f"compiling {source.name}")
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        objects = [str(unit) for unit in executor.map(compile_unit, jobs)]
    mlx = _mlx_folder() / "lib"
    link = [spec.compiler, "-shared", "-pthread", *objects, f"-L{mlx}", "-lmlx", "-o", str(library)]
    _run(link, into, "linking")
    for unit in objects:
        Path(unit).unlink()
    check(library)
    return library


def check(library: Path) -> None:
    """Compare binary interfaces, then try the library in a process of its own.

    Raises:
        NativeUnavailable: it does not fit the installed mlx, or it does not compute what it should.
    """
    ours, theirs = abi_tag(library), abi_tag(Path(str(mx.__file__)))
    if ours != theirs:
        raise NativeUnavailable(
            f"native CPU kernels: nanobind {_version_of('nanobind')} has the binary interface "
            f"{ours or 'unknown'}, the installed mlx {theirs or 'unknown'}; "
            "install the nanobind that mlx was built with"
        )
    command = [sys.executable, "-m", "zmlx.backend.cpu.selftest", str(library)]
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "ZMLX_AUTOPATCH": "0"}
    _run(command, library.parent, "the self-test", environment)


def _found_or_built(announce: Callable[[str], None]) -> Path:
    bundled = BUNDLED / _file_name()
    if bundled.is_file() and abi_tag(bundled) == abi_tag(Path(str(mx.__file__))):
        return bundled
    spec = describe()
    if spec.library.is_file():
        return spec.library
    try:
        spec.library.parent.parent.mkdir(parents=True, exist_ok=True)
        with _locked(spec.library.parent.with_suffix(".lock")):
            if not spec.library.is_file():
                _build_in_place(spec, announce)
        return spec.library
    except OSError as error:
        announce(f"zmlx: cannot write {cache_folder()} ({error.strerror}): building for this run")
        folder = tempfile.mkdtemp(prefix="zmlx-native-")
        return build(Path(folder), spec)


def _build_in_place(spec: Build, announce: Callable[[str], None]) -> None:
    """Build beside the final folder and move it there whole."""
    announce(f"zmlx: compiling the CPU kernels, once, with {spec.version} (about 15 s)")
    folder = Path(tempfile.mkdtemp(prefix=f"{spec.key}-", dir=spec.library.parent.parent))
    try:
        build(folder, spec)
        os.replace(folder, spec.library.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system drops when this process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, library)
    if spec is None or spec.loader is None:
        raise NativeUnavailable(f"native CPU kernels: {library} is not an extension module")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise NativeUnavailable(
            f"native CPU kernels: {library} does not load ({error}); "
            "run `zmlx native clear` to have it built again"
        ) from error
    return module


def _run(
    command: list[str], folder: Path, what: str, environment: dict[str, str] | None = None
) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode == 0:
        return
    log = Path(tempfile.gettempdir()) / f"zmlx-native-{os.getpid()}.log"
    log.write_text(" ".join(command) + "\n" + done.stdout + done.stderr)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    last = done.stderr.strip().splitlines()[-1:]
    reason = (errors or last or [f"exit code {done.returncode}"])[0].strip()
    raise NativeUnavailable(f"native CPU kernels: {what} failed: {reason} (log: {log})")


def _units() -> dict[str, list[str]]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    return {**_UNITS, **(_X86_UNITS if x86 else {})}


def _file_name() -> str:
    return f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _mlx_folder() -> Path:
    return Path(str(mx.__file__)).parent


def _nanobind_folder() -> Path:
    spec = importlib.util.find_spec("nanobind")
    if spec is None or spec.origin is None:
        raise NativeUnavailable("native CPU kernels: nanobind is not installed")
    return Path(spec.origin).parent


def _nanobind_source() -> Path:
    return _nanobind_folder() / "src" / "nb_combined.cpp"


def _includes() -> list[str]:
    nanobind = _nanobind_folder()
    folders = [
        _mlx_folder() / "include",
        nanobind / "include",
        nanobind / "ext" / "robin_map" / "include",
        Path(sysconfig.get_path("include")),
    ]
    return [f"-I{folder}" for folder in folders]


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeUnavailable(
            f"native CPU kernels: {command[0]} does not run: {error}"
        ) from error
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def _print(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)
