"""NVIDIA's compiler at run time: the library that MLX has loaded, called beside MLX."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zmlx_autopatch import variables

#: Its first version that writes code for every device, and takes the options given here.
_FIRST = (12, 0)


class CompileError(Exception):
    """A text does not compile; the message is what the compiler says."""


@dataclass(frozen=True)
class Compiler:
    """NVRTC.

    Attributes:
        library: its functions.
        includes: folders that are searched for headers, in this order.
    """

    library: ctypes.CDLL
    includes: tuple[Path, ...]

    @property
    def version(self) -> tuple[int, int]:
        """Its major and minor version."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def binary(
        self,
        text: str,
        kernel: str,
        *,
        file: str,
        headers: Mapping[str, str],
        options: Sequence[str],
    ) -> tuple[bytes, str]:
        """Compile a program for one architecture.

        Args:
            text: the program.
            kernel: a kernel's name in C++, with its namespaces.
            file: the program's name in messages.
            headers: texts of headers by the names by which they are included. They come before
                those in the folders.
            options: what else the compiler is told.

        Returns:
            The binary, and the kernel's name in it.

        Raises:
            CompileError: it does not compile.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            text.encode(),
            file.encode(),
            len(headers),
            _strings(headers.values()),
            _strings(headers),
        )
        try:
            self._call("nvrtcAddNameExpression", program, kernel.encode())
            given = [*options, *(f"--include-path={folder}" for folder in self.includes)]
            if self.library.nvrtcCompileProgram(program, len(given), _strings(given)):
                raise CompileError(self._bytes("ProgramLog", program).rstrip(b"\0").decode())
            lowered = ctypes.c_char_p()
            name = kernel.encode()
            self._call("nvrtcGetLoweredName", program, name, ctypes.byref(lowered))
            return self._bytes("CUBIN", program), (lowered.value or b"").decode()
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, found)
        return found.raw

    def _call(self, function: str, *arguments: object) -> None:
        failed = getattr(self.library, function)(*arguments)
        if failed:
            raise CompileError(f"{function} failed with {failed}")


def _strings(texts: object) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]  # type: ignore[attr-defined]
    return (ctypes.c_char_p * len(encoded))(*encoded)


@cache
def loaded() -> Compiler | None:
    """Return the compiler in this process, with the folders that MLX searches; None without it."""
    files = _mapped()
    mlx, nvrtc = files.get("libmlx.so"), files.get("libnvrtc.so")
    if mlx is None or nvrtc is None:
        return None
    compiler = Compiler(ctypes.CDLL(str(nvrtc)), ())
    if compiler.version < _FIRST:
        return None
    return Compiler(compiler.library, _includes(mlx.parents[1], compiler.version[0]))


def _mapped() -> dict[str, Path]:
    """Return the libraries that are loaded, by their names up to `.so`."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return {}
    paths = [Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")]
    return {f"{path.name.partition('.so')[0]}.so": path for path in paths if ".so" in path.name}


def _includes(package: Path, major: int) -> tuple[Path, ...]:
    """Return where MLX's package looks for headers."""
    toolkit = package.parent / "nvidia" / ("cu13" if major >= 13 else "cuda_runtime")
    if not (toolkit / "include").is_dir():
        chosen = variables.foreign("CUDA_HOME") or variables.foreign("CUDA_PATH")
        toolkit = Path(chosen or "/usr/local/cuda")
    own = package / "include"
    return tuple(f for f in (own, own / "cccl", toolkit / "include") if f.is_dir())
