"""Compile the native CPU kernels against the installed mlx, and check what came out.

The library is a Python extension whose operations are MLX primitives. It is compiled against the
headers of the very mlx that is installed, with a nanobind of mlx's own binary interface: values of
the type `mlx.core.array` pass between two extensions only when both carry the same tag.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from zmlx.backend.cpu.threads import usable_cpus
from zmlx.backend.extension import (
    COMMON,
    NativeUnavailable,
    Progress,
    abi_tag,
    compiler_version,
    find_compiler,
    fingerprint_of,
    hash_of,
    hash_of_folder,
    link_all,
    mlx_extension,
    mlx_folder,
    mlx_include,
    mlx_version,
    run_step,
    version_of,
)

__all__ = [
    "COMMON",
    "MANIFEST",
    "MODULE",
    "SOURCE",
    "Manifest",
    "NativeUnavailable",
    "Progress",
    "abi_tag",
    "build",
    "check",
    "compiler_version",
    "duration",
    "file_name",
    "find_compiler",
    "fingerprint",
    "fits",
    "hash_of",
    "misfit",
    "mlx_extension",
    "mlx_folder",
    "mlx_include",
    "mlx_version",
    "sources",
]

MODULE = "_zmlx_cpu"
SOURCE = Path(__file__).parent / "source"
#: Beside a library: what it was built with, and its hash.
MANIFEST = "library.json"
#: What a build takes, in seconds of one processor, and at least, on however many.
PROCESSOR_SECONDS = 44
SHORTEST_SECONDS = 10

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
    "together_primitives.cpp": [],
    "together_programs.cpp": [],
    "together_bindings.cpp": ["-O1"],
    "emulated.cpp": [],
    "kernels_portable.cpp": _HOT,
    "products.cpp": [],
    "pool.cpp": [],
    "dispatch.cpp": [],
    "step_portable.cpp": [],
    "step.cpp": [],
    "emulator_checks.cpp": [],
    "emulator_launch.cpp": [],
    "emulator_memory.cpp": [],
    "emulator_fiber.cpp": [],
}


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


def fingerprint() -> str:
    """Return a hash of all that a library depends on, but for the compiler.

    Raises:
        NativeUnavailable: this platform has no native library.
    """
    if sys.platform != "linux":
        raise NativeUnavailable("only for Linux; here MLX uses the GPU")
    manifest = repr([field.name for field in fields(Manifest)])
    return fingerprint_of(file_name(), repr((COMMON, _units())), manifest, sources())


def sources() -> str:
    """Return a hash of the sources' names and contents."""
    return hash_of_folder(SOURCE)


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
    jobs = [(SOURCE / name, flags) for name, flags in _units().items()]
    link_all(
        library, compiler, jobs, COMMON, progress=lambda done, steps: progress(done, steps + 1)
    )
    check(library)
    manifest = Manifest(
        mlx=mlx_version(),
        interface=abi_tag(library),
        compiler=compiler_version(compiler),
        sources=sources(),
        sha256=hash_of(library),
    )
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    steps = len(jobs) + 3
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
            f"nanobind {version_of('nanobind')} has the binary interface {ours or 'unknown'}, "
            f"the installed mlx {theirs or 'unknown'}; install the nanobind mlx was built with"
        )
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    run_step(
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
    return "" if manifest.sha256 == hash_of(library) else "is damaged"


def file_name() -> str:
    """Return the library's file name, which holds the version of Python and the platform."""
    return f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _units(machine: str | None = None) -> dict[str, list[str]]:
    machine = machine or platform.machine()
    x86, arm = machine in ("x86_64", "AMD64"), machine in ("aarch64", "arm64")
    return {**(_X86_UNITS if x86 else _ARM_UNITS if arm else {}), **_UNITS}
