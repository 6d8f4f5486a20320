"""The native CPU kernels: found in the package or the cache, or built there; loaded once.

A library is kept under a key of everything that it depends on, and moved there whole, after it has
passed its self-test. Whatever goes wrong on the way is a `NativeUnavailable` with the reason; the
stock operations then stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from zmlx.backend.cpu import build as building
from zmlx.backend.cpu.build import NativeUnavailable
from zmlx.backend.cpu.threads import default_threads
from zmlx.backend.extension import open_extension
from zmlx_autopatch import speech, variables

__all__ = [
    "Found",
    "NativeUnavailable",
    "cache_folder",
    "clear",
    "counting",
    "find",
    "forget",
    "load",
    "open_library",
    "put_into",
]

#: A library that was built into the package.
BUNDLED = Path(__file__).parent / "lib"
#: A build that failed faster than this (in seconds) is tried again by the next process.
_WORTH_REMEMBERING = 3.0


@dataclass(frozen=True)
class Found:
    """Where the library is, or would be built.

    Attributes:
        library: its file.
        present: whether it is there, whole and for the installed mlx.
        compiler: command of the compiler; empty when there is none.
        version: what the compiler says of itself.
        bundled: why the library in the package is not the one; empty when there is none.
    """

    library: Path
    present: bool
    compiler: str = ""
    version: str = ""
    bundled: str = ""


@dataclass
class _Loaded:
    """What the first call of `load` found; later calls repeat it."""

    module: ModuleType | None = None
    refusal: NativeUnavailable | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_LOADED = _Loaded()


def load(*, announce: Callable[[str], None] | None = None) -> ModuleType:
    """Return the library, built first if need be.

    Args:
        announce: gets the lines that a build is worth; default prints them to stderr.

    Raises:
        NativeUnavailable: with the reason; asking again costs nothing and gives the same.
    """
    with _LOADED.lock:
        if _LOADED.module is None and _LOADED.refusal is None:
            try:
                threads = default_threads()
                _LOADED.module = _load(announce or speech.say)
                _LOADED.module.set_num_threads(threads)
            except NativeUnavailable as refusal:
                _LOADED.refusal = refusal
            except (OSError, variables.VariableError) as error:
                _LOADED.refusal = NativeUnavailable(str(error))
        if _LOADED.refusal is not None:
            raise _LOADED.refusal.with_traceback(None)
        assert _LOADED.module is not None
        return _LOADED.module


def find() -> Found:
    """Look for the library without building it: in the package, then in the cache.

    Raises:
        NativeUnavailable: there is none and no compiler, or this platform has none.
    """
    library = BUNDLED / building.file_name()
    if not BUNDLED.is_dir():
        return _find_in_cache("")
    misfit = building.misfit(library)
    return _find_in_cache(f"the one in the package {misfit}") if misfit else Found(library, True)


def _find_in_cache(bundled: str) -> Found:
    """Look in the cache; `bundled` says why the library in the package is not used, if it is there.

    Raises:
        NativeUnavailable: as `find`.
    """
    key = building.fingerprint()
    try:
        compiler = building.find_compiler()
    except NativeUnavailable as refusal:
        # One that was built when there still was a compiler serves as well.
        for library in sorted(cache_folder().glob(f"{key}-*/{building.file_name()}")):
            if building.fits(library):
                return Found(library, True, bundled=bundled)
        if bundled:
            raise NativeUnavailable(f"{bundled}; {refusal.reason}") from None
        raise
    version = building.compiler_version(compiler)
    suffix = hashlib.sha256(f"{compiler}\0{version}".encode()).hexdigest()[:8]
    library = cache_folder() / f"{key}-{suffix}" / building.file_name()
    return Found(library, building.fits(library), compiler, version, bundled)


def cache_folder() -> Path:
    """Return the folder that holds the built libraries."""
    root = variables.text("ZMLX_CACHE_DIR") or "~/.cache/zmlx"
    return Path(root).expanduser() / "native"


def put_into(folder: Path) -> Path:
    """Put a library and its manifest into a folder, to ship them; return the library's file.

    It is the one in the cache where that was built by the same compiler from the same sources; else
    it is compiled.

    Raises:
        NativeUnavailable: there is no compiler, or a step of the build failed.
        OSError: the folder cannot be written.
    """
    found = _find_in_cache("")
    if found.present and found.compiler:
        for file in (found.library, found.library.with_name(building.MANIFEST)):
            shutil.copy2(file, folder)
        return folder / found.library.name
    with counting() as progress:
        return building.build(folder, building.find_compiler(), progress)


def forget() -> None:
    """Have failed builds tried again."""
    for note in cache_folder().glob("*.failed"):
        note.unlink(missing_ok=True)


def clear() -> int:
    """Remove every library from the cache folder; return how many there were."""
    folder = cache_folder()
    count = len(list(folder.glob(f"*/{building.MODULE}*")))
    if folder.is_dir():
        shutil.rmtree(folder)
    return count


def _load(announce: Callable[[str], None]) -> ModuleType:
    found = find()
    if found.present and found.library.parent == BUNDLED:
        try:
            return open_library(found.library)
        except NativeUnavailable as refusal:
            found = _find_in_cache(refusal.reason)
    if found.present:
        try:
            return open_library(found.library)
        except NativeUnavailable:
            if not found.compiler:
                raise
            # It was whole, yet does not load: built for another system library, perhaps.
            shutil.rmtree(found.library.parent, ignore_errors=True)
    return _build_and_load(found, announce)


def _build_and_load(found: Found, announce: Callable[[str], None]) -> ModuleType:
    if found.bundled:
        announce(f"zmlx: native CPU kernels: {found.bundled}")
    try:
        lock = _lock(found, announce)
    except OSError as error:
        return _load_for_this_run(found, announce, error)
    with lock:
        if not building.fits(found.library):
            _build_in_place(found, announce)
    return open_library(found.library)


def _load_for_this_run(found: Found, announce: Callable[[str], None], error: OSError) -> ModuleType:
    """Build in a private folder that goes as soon as the library is loaded."""
    announce(
        f"zmlx: cannot write to {cache_folder()} ({error.strerror}): compiling the CPU kernels for "
        "this run only; ZMLX_CACHE_DIR names a folder that keeps them"
    )
    with tempfile.TemporaryDirectory(prefix="zmlx-native-") as folder, counting() as progress:
        return open_library(building.build(Path(folder), found.compiler, progress))


def _build_in_place(found: Found, announce: Callable[[str], None]) -> None:
    """Build beside the final folder and move it there whole; the caller holds the lock."""
    final = found.library.parent
    note = final.with_suffix(".failed")
    if note.is_file():
        raise NativeUnavailable(f"{note.read_text().strip()}; `zmlx native build` tries again")
    # What is left of a build that was killed, or of a library that was damaged.
    for leftover in [*final.parent.glob(f"{final.name}.*.part"), final]:
        shutil.rmtree(leftover, ignore_errors=True)
    announce(
        f"zmlx: compiling the CPU kernels, once (about {building.duration()} s), "
        f"with {found.version}"
    )
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".part", dir=final.parent))
    try:
        with counting() as progress:
            building.build(folder, found.compiler, progress)
        os.replace(folder, final)
    except NativeUnavailable as refusal:
        if time.monotonic() - started > _WORTH_REMEMBERING:
            note.write_text(refusal.reason + "\n")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(found: Found, announce: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """Open a lock that the system drops when this process ends, however it ends.

    Raises:
        OSError: the cache folder cannot be written.
    """
    folder = found.library.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".lock").open("w")

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                announce("zmlx: waiting for another process, which compiles the CPU kernels")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return held()


def open_library(library: Path) -> ModuleType:
    """Load a library; it uses one thread until told otherwise.

    Raises:
        NativeUnavailable: it is not a library, or lacks something that it needs.
    """
    return open_extension(building.MODULE, library)


@contextlib.contextmanager
def counting() -> Iterator[building.Progress]:
    """Give what shows how far a build is: in a line of a terminal, which goes when it is over."""
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def show(text: str) -> None:
        if terminal:
            speech.say(f"\r\033[K{text}", end="")

    try:
        yield lambda done, steps: show(f"zmlx: compiling the CPU kernels {done}/{steps}")
    finally:
        show("")
