"""Text for people, on stderr, whatever state stderr is in."""

from __future__ import annotations

import sys

from zmlx_autopatch import variables

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
        stream.write(text + end)
        stream.flush()
    except (OSError, ValueError):  # the reader went away, or the stream was closed
        return
