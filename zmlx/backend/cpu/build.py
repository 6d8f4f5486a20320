"""Compile the native CPU kernels against the installed mlx, and check what came out.

The library is a Python extension whose operations are MLX primitives. It is compiled against the
headers of the very mlx that is installed, with a nanobind of mlx's own binary interface: values of
the type `mlx.core.array` pass between two extensions only when both carry the same tag.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mlx.core as mx

from zmlx.backend.cpu.threads import usable_cpus
from zmlx_autopatch import variables

MODULE = "_zmlx_cpu"
SOURCE = Path(__file__).parent / "source"
#: Beside a library: what it was built with, and its hash.
MANIFEST = "library.json"
#: Longest time for one step, in seconds; a compiler or a self-test that hangs is given up.
TIME_LIMIT = 600
#: What a build takes, in seconds of one processor, and at least, on however many.
PROCESSOR_SECONDS = 56
SHORTEST_SECONDS = 10
#: Is told after each step of a build: how many are done, and of how many.
Progress = Callable[[int, int], None]

_COMMON = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DNB_DOMAIN=mlx", "-w"]
#: of units with loops whose lengths are known only to templates; the others gain nothing
_HOT = ["-O3"]
_AVX2 = [*_HOT, "-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
#: translation unit -> flags of its own, the slowest to compile first
_X86_UNITS: dict[str, list[str]] = {
    "panels_avx512_bf16.cpp": [*_AVX512, "-mavx512vbmi", "-mavx512bf16"],
    "kernels_avx512_vnni.cpp": [*_AVX512, "-mavx512vbmi", "-mavx512vnni"],
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx2.cpp": _AVX2,
    "step_avx512.cpp": _AVX512,
    "step_avx2.cpp": _AVX2,
}
_ARM_UNITS: dict[str, list[str]] = {
    "kernels_neon_dotprod.cpp": ["-march=armv8.2-a+dotprod"],
}
_UNITS: dict[str, list[str]] = {
    "primitives.cpp": [],
    "weights.cpp": [],
    "lookup.cpp": [],
    "binding.cpp": ["-O1"],
    "kernels_portable.cpp": _HOT,
    "products.cpp": [],
    "pool.cpp": [],
    "dispatch.cpp": [],
    "step_portable.cpp": [],
    "step_primitives.cpp": [],
    "step.cpp": [],
    "view.cpp": [],
    "operations.cpp": [],
    "arithmetic.cpp": [],
    "program.cpp": [],
    "fuse.cpp": [],
    "emulator_binding.cpp": ["-O1"],
    "emulated.cpp": [],
    "emulator_checks.cpp": [],
    "emulator_launch.cpp": [],
    "emulator_memory.cpp": [],
    "emulator_fiber.cpp": [],
}
_ABI_TAG = re.compile(rb"nanobind_[a-z]+_[a-z0-9_]*_v[0-9]+")


class NativeUnavailable(RuntimeError):
    """The native library cannot be had here; `reason` says why and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"native CPU kernels: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Manifest:
    """What a library depends on, and the hash of its file.

    Attributes:
        mlx: version of mlx whose headers it was compiled against.
        interface: tag of nanobind's binary interface.
        compiler: first line of what the compiler says of itself.
        sources: hash of the sources.
        sha256: hash of the library's bytes.
    """

    mlx: str
    interface: str
    compiler: str
    sources: str
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return the manifest in a folder, or None when there is none that can be read."""
        try:
            return cls(**json.loads((folder / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError):
            return None


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


def fingerprint() -> str:
    """Return a hash of all that a library depends on, but for the compiler.

    Raises:
        NativeUnavailable: this platform has no native library.
    """
    if sys.platform != "linux":
        raise NativeUnavailable("only for Linux; here MLX uses the GPU")
    digest = hashlib.sha256()
    for part in (
        mlx_version(),
        str((_mlx_folder() / "lib" / "libmlx.so").stat().st_size),
        _version_of("nanobind"),
        platform.machine(),
        file_name(),
        repr((_COMMON, _units())),
        repr([field.name for field in fields(Manifest)]),
        sources(),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def sources() -> str:
    """Return a hash of the sources' names and contents."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def duration() -> int:
    """Return about how many seconds a build takes here."""
    return max(SHORTEST_SECONDS, PROCESSOR_SECONDS // len(usable_cpus()))


def build(folder: Path, compiler: str, progress: Progress = lambda done, steps: None) -> Path:
    """Compile and check a library in a folder; return its file.

    Args:
        folder: an existing folder; it also gets the objects, for a while, and the manifest.
        compiler: command of the compiler.
        progress: is called after each step, by the calling thread.

    Raises:
        NativeUnavailable: a step failed; the reason holds the first error and where the log is.
    """
    library = folder / file_name()
    include = _includes()
    jobs = [(SOURCE / name, flags) for name, flags in _units().items()]
    binding = _nanobind_folder() / "src" / "nb_combined.cpp"
    jobs.insert(0, (binding, ["-O1", "-fno-strict-aliasing"]))
    command = shlex.split(compiler)
    steps = len(jobs) + 2

    def compile_unit(job: tuple[Path, list[str]]) -> str:
        source, flags = job
        target = str(folder / f"{source.stem}.o")
        arguments = [*_COMMON, *flags, *include, "-c", str(source), "-o", target]
        _run([*command, *arguments], f"compiling {source.name}")
        return target

    executor = ThreadPoolExecutor(len(usable_cpus()))
    try:
        units = [executor.submit(compile_unit, job) for job in jobs]
        for done, unit in enumerate(as_completed(units), 1):
            unit.result()
            progress(done, steps)
    finally:
        executor.shutdown(cancel_futures=True)
    objects = [unit.result() for unit in units]
    mlx = _mlx_folder() / "lib"
    # No run path: mlx.core has loaded libmlx before us, wherever it lies.
    link = ["-shared", "-pthread", *objects, f"-L{mlx}", "-lmlx", "-s", "-o", str(library)]
    _run([*command, *link], "linking")
    progress(steps - 1, steps)
    for file in objects:
        Path(file).unlink()
    check(library)
    manifest = Manifest(
        mlx=mlx_version(),
        interface=abi_tag(library),
        compiler=compiler_version(compiler),
        sources=sources(),
        sha256=_hash_of(library),
    )
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    progress(steps, steps)
    return library


def check(library: Path) -> None:
    """Compare binary interfaces, then try the library in a process of its own.

    Raises:
        NativeUnavailable: it does not fit the installed mlx, or it does not compute what it should.
    """
    ours, theirs = abi_tag(library), abi_tag(mlx_extension())
    if ours != theirs or not ours:
        raise NativeUnavailable(
            f"nanobind {_version_of('nanobind')} has the binary interface {ours or 'unknown'}, "
            f"the installed mlx {theirs or 'unknown'}; install the nanobind mlx was built with"
        )
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    _run(
        [sys.executable, "-m", "zmlx.backend.cpu.selftest", str(library)],
        "the self-test",
        {**os.environ, "PYTHONPATH": path, "ZMLX_AUTOPATCH": "0"},
    )


def fits(library: Path) -> bool:
    """Return whether a library is whole, and was built for the installed mlx."""
    return misfit(library) == ""


def misfit(library: Path) -> str:
    """Return why a library cannot be used, as the end of a sentence; empty when it can."""
    manifest = Manifest.read(library.parent)
    others = sorted(path.name for path in library.parent.glob(f"{MODULE}*"))
    if not library.is_file() and others:
        return f"is for another Python or processor ({others[0]}; this one takes {library.name})"
    if manifest is None or not library.is_file():
        return "is not whole"
    if manifest.mlx != mlx_version():
        return f"was built for mlx {manifest.mlx}, and mlx {mlx_version()} is installed"
    if manifest.interface != abi_tag(mlx_extension()):
        return "was built for another build of mlx (its binary interface of nanobind is another)"
    if manifest.sources != sources():
        return "was built from other sources"
    return "" if manifest.sha256 == _hash_of(library) else "is damaged"


def abi_tag(library: Path) -> str:
    """Return the tag of nanobind's binary interface that a library carries; empty if none."""
    match = _ABI_TAG.search(library.read_bytes())
    return match.group().decode() if match else ""


def file_name() -> str:
    """Return the library's file name, which holds the version of Python and the platform."""
    return f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def mlx_extension() -> Path:
    """Return the file of the extension `mlx.core`."""
    return Path(str(mx.__file__))


def mlx_include() -> Path:
    """Return the folder of the headers that the installed mlx ships."""
    return _mlx_folder() / "include"


def mlx_version() -> str:
    """Return the version of the mlx that is loaded."""
    return str(vars(mx)["__version__"])


def _run(command: list[str], what: str, environment: dict[str, str] | None = None) -> None:
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


def _units(machine: str | None = None) -> dict[str, list[str]]:
    machine = machine or platform.machine()
    x86, arm = machine in ("x86_64", "AMD64"), machine in ("aarch64", "arm64")
    return {**(_X86_UNITS if x86 else _ARM_UNITS if arm else {}), **_UNITS}


def _hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _mlx_folder() -> Path:
    return mlx_extension().parent


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


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
