"""Where tables are printed: stdout, as wide as it has to be."""

from __future__ import annotations

from rich.console import Console

#: Columns of text in a file or pipe, where nothing should be cut.
_FILE_WIDTH = 240


def wide_console() -> Console:
    """Return a console on stdout: as wide as the terminal, or wide enough in a file or pipe."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=_FILE_WIDTH)
