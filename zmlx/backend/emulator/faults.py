"""What the emulator reports: mistakes of a kernel that a GPU would let pass, or not compile."""

from __future__ import annotations

import re
import shutil
import subprocess

#: a line of a kernel's own text, as the assembled source names it
_PLACE = re.compile(r"[^/\n]+ \((?:body|header|signature)\):\d+")


class CompileError(ValueError):
    """The kernel's source is not accepted; the text names the line of the body or header."""


class LimitError(ValueError):
    """A launch asks for more than a device has: threads or threadgroup memory."""


class Fault(RuntimeError):
    """A kernel did something when it ran that it must not do.

    Attributes:
        kernel: the kernel's name.
        thread: the thread to blame; empty when it is no single one.
        place: file and line of the source, such as "softplus (body):3"; empty when unknown.
    """

    def __init__(self, text: str, kernel: str = "", thread: str = "", place: str = "") -> None:
        where = f", {place}" if place else ""
        who = f" [{thread}]" if thread else ""
        super().__init__(f"kernel '{kernel}'{where}: {text}{who}")
        self.kernel = kernel
        self.thread = thread
        self.place = place


class OutOfBounds(Fault):
    """A read or write outside of every array."""


class ReadOnly(Fault):
    """A write to an input."""


class Uninitialized(Fault):
    """A read of threadgroup memory or of an output that nothing was written to."""


class Race(Fault):
    """Two threads use the same memory with no barrier between, and one of them changes it."""


class Divergence(Fault):
    """A barrier that not all threads reach."""


class Unwritten(Fault):
    """Elements of an output that no thread wrote."""


class Misaligned(Fault):
    """A vector read or written at an address that is no multiple of its alignment."""


#: in the order of `Kind` in emulator_memory.h
KINDS: tuple[type[Fault], ...] = (
    OutOfBounds,
    ReadOnly,
    Uninitialized,
    Race,
    Divergence,
    Unwritten,
    Misaligned,
)


def made(
    kind: int, text: str, kernel: str, thread: str, library: str, offset: int, place: str
) -> Fault:
    """Return the exception for what the native library found.

    Args:
        kind: index into `KINDS`.
        text: what happened.
        kernel: the kernel's name.
        thread: the thread, described.
        library: file of the compiled kernel.
        offset: where in that file the kernel was; 0 when that is unknown.
        place: file and line, where they are known already.
    """
    if not place and offset:
        place = _line_of(library, offset)
    return KINDS[kind](text, kernel, thread, place)


def _line_of(library: str, offset: int) -> str:
    """Return file and line of an address in a compiled kernel; empty when no tool here can tell."""
    program = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if program is None:
        return ""
    # A return address lies after its call. Inlined functions come first, the kernel's body last:
    # the first place that is the author's is the one to name.
    command = [program, "-i", "-e", library, hex(offset - 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _PLACE.search(done.stdout)
    return found[0] if found else ""
