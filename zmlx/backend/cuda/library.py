"""The native part of recordings: compiled once, on first use, against MLX's and CUDA's headers.

It is kept in the cache folder under a key of all that it depends on.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from zmlx.backend.cpu import native
from zmlx.backend.cuda import nvrtc
from zmlx.backend.extension import (
    COMMON,
    NativeUnavailable,
    abi_tag,
    compiler_version,
    file_of,
    find_compiler,
    fingerprint_of,
    hash_of_folder,
    link_all,
    mlx_extension,
    open_extension,
)
from zmlx_autopatch import speech

MODULE = "_zmlx_replay"
SOURCE = Path(__file__).with_name("native")
#: The slowest to compile first.
_UNITS = ("binding.cpp", "recording.cpp", "blocks.cpp", "driver.cpp")
#: Headers that packages lack; where there are real ones, these come first.
_STAND_INS = SOURCE / "stand_ins"


#: Held while it is built, so that who comes meanwhile waits.
_BUILDING = threading.Lock()


def begin() -> None:
    """Have another thread build the library if need be, so that it is there when a step needs it.

    The process does not end before that thread has.
    """
    if mx.cuda.is_available():
        threading.Thread(target=wait, name="zmlx-library").start()


def is_being_built() -> bool:
    """Return whether who asks for the library now would have to wait."""
    return _BUILDING.locked()


def load() -> ModuleType:
    """Return the library, built first if need be.

    Raises:
        NativeUnavailable: with the reason.
    """
    with _BUILDING:
        found = _loaded()
    if isinstance(found, str):
        raise NativeUnavailable(found)
    return found


def wait() -> None:
    """Return when the library is there, or is known not to be had here."""
    with suppress(Exception):  # whoever needs the library is told
        load()


@cache
def _loaded() -> ModuleType | str:
    """Return the library, or why there is none: that stays so, and takes a while to find out.

    Not the exception itself, which keeps whatever its callers hold.
    """
    try:
        return _load()
    except NativeUnavailable as failure:
        return failure.reason


def _load() -> ModuleType:
    if sys.platform != "linux":
        raise NativeUnavailable("recordings are only for Linux")
    found = nvrtc.loaded()
    if found is None:
        raise NativeUnavailable("MLX has loaded no compiler of NVIDIA's")
    compiler = find_compiler()
    folder = native.cache_folder().parent / "replay" / _key(compiler, found.includes)
    library = folder / file_of(MODULE)
    if not library.is_file():
        speech.say("zmlx: compiling what launches recorded steps, once (about 15 s)")
        try:
            _build_in_place(library, compiler, found.includes)
        except OSError as error:
            raise NativeUnavailable(f"{folder} cannot be written: {error}") from error
    return open_extension(MODULE, library)


def build(folder: Path, compiler: str, includes: Sequence[Path]) -> Path:
    """Compile the library in a folder; return its file.

    Args:
        folder: an existing one.
        compiler: command of the compiler.
        includes: folders with the headers of MLX's CUDA backend and of CUDA.

    Raises:
        NativeUnavailable: it does not compile, or does not fit the installed mlx.
    """
    library = folder / file_of(MODULE)
    options = [f"-I{path}" for path in (*includes, _STAND_INS)]
    link_all(library, compiler, [(SOURCE / unit, options) for unit in _UNITS])
    ours, theirs = abi_tag(library), abi_tag(mlx_extension())
    if ours != theirs or not ours:
        library.unlink()
        raise NativeUnavailable(
            f"nanobind has the binary interface {ours or 'unknown'}, the installed mlx "
            f"{theirs or 'unknown'}"
        )
    return library


def _build_in_place(library: Path, compiler: str, includes: Sequence[Path]) -> None:
    """Build beside the final folder and move it there whole."""
    final = library.parent
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".part", dir=final.parent))
    try:
        build(folder, compiler, includes)
        os.replace(folder, final)
    except OSError:
        if not library.is_file():  # unless another process was faster
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _key(compiler: str, includes: Sequence[Path]) -> str:
    return fingerprint_of(
        file_of(MODULE),
        repr((COMMON, _UNITS, [str(path) for path in includes])),
        hash_of_folder(SOURCE),
        compiler,
        compiler_version(compiler),
    )
