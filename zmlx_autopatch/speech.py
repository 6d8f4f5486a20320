"""Text for people, on stderr, whatever state stderr is in."""

from __future__ import annotations

import sys

from zmlx_autopatch import variables

TYPE_CHECKING = False  # `typing` takes a millisecond of every start
if TYPE_CHECKING:
    from typing import TextIO

LEVELS = ("off", "line", "debug")


def level() -> str:
    """Return ZMLX_LOG; a value that it does not take counts as "line"."""
    try:
        return variables.choice("ZMLX_LOG", LEVELS)
    except variables.VariableError:
        return "line"


def say(text: str, end: str = "\n") -> None:
    """Write a line to stderr unless ZMLX_LOG is off; never to stdout, and never fail.

    With an empty `end` it is a part of a line. With its descriptor closed stderr is None, and
    `print(file=None)` would write to stdout.
    """
    stream = sys.stderr
    if stream is None or level() == "off":
        return
    try:
        _write(stream, text + end)
    except (OSError, ValueError):  # the reader went away, or the stream was closed
        return


def _write(stream: TextIO, text: str) -> None:
    """Write and leave nothing in a buffer: what cannot be flushed at exit changes the exit code."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    stream.flush()
    if raw is None:
        stream.write(text)
        stream.flush()
        return
    left = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    while left:
        # None from a descriptor that does not block and is full: then the rest is not said.
        left = left[raw.write(left) or len(left) :]
