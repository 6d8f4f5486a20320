"""Reading TOML files, and finding the line on which a key stands, for errors that say where."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

#: A bare key, or a quoted one.
_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER = re.compile(rf"\s*\[\[?\s*({_DOTTED})\s*\]\]?")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=(.*)")
#: A string, a comment, or a bracket.
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*|[\[\]{}]')


class TomlError(ValueError):
    """A TOML file, or what it says, is wrong; the text names file, line and key."""


@dataclass(frozen=True)
class Source:
    """A parsed TOML file.

    Attributes:
        label: what messages call the file.
        data: its content.
        lines: path of a key -> line on which it is set, counted from 1.
        wrong: the error to raise about its content.
    """

    label: str
    data: dict[str, Any]
    lines: dict[tuple[str, ...], int]
    wrong: type[TomlError] = TomlError

    def at(self, *path: str) -> str:
        """Return "file:line" of a key, or of the nearest table above it."""
        for length in range(len(path), 0, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return f"{self.label}:{line}"
        return self.label

    def error(self, path: tuple[str, ...], problem: str) -> TomlError:
        """Return the error for a key."""
        return self.wrong(f"{self.at(*path)}: {'.'.join(path)}: {problem}")


def read(file: Path, label: str | None = None, wrong: type[TomlError] = TomlError) -> Source:
    """Parse a TOML file.

    Args:
        file: the file.
        label: what messages call it; default its path.
        wrong: the class of error to raise, for the file and for its content.

    Raises:
        TomlError: it cannot be read or is not TOML; the message has the parser's line.
    """
    label = label or str(file)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise wrong(f"{label}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise wrong(f"{label}: is not UTF-8 text: {error}") from error
    return parse(text, label, wrong)


def parse(text: str, label: str, wrong: type[TomlError] = TomlError) -> Source:
    """Parse the text of a TOML file.

    Raises:
        TomlError: it is not TOML; the message has the parser's line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise wrong(f"{label}: is not TOML: {error}") from error
    return Source(label, data, key_lines(text), wrong)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Return path of each key and table of a TOML text -> its line, counted from 1."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    depth, quote = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        rest = line
        if depth == 0 and not quote:
            header, assignment = _HEADER.match(line), _ASSIGNMENT.match(line)
            if assignment:
                path = table + _parts(assignment.group(1))
                rest = assignment.group(2)
                _note(lines, path, number)
            elif header:
                table = _parts(header.group(1))
                _note(lines, table, number)
                rest = ""
        depth, quote = _open_brackets(rest, depth, quote)
    return lines


def _note(lines: dict[tuple[str, ...], int], path: tuple[str, ...], number: int) -> None:
    """Note the line of a key, and of the tables that it brings into being."""
    for length in range(1, len(path) + 1):
        lines.setdefault(path[:length], number)


def _parts(dotted: str) -> tuple[str, ...]:
    parts = re.findall(_PART, dotted)
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in parts)


def _open_brackets(text: str, depth: int, quote: str) -> tuple[int, str]:
    """Follow a value over its lines: how deep in brackets it is, and in which long string."""
    position = 0
    while position < len(text):
        if quote:
            end = text.find(quote, position)
            if end < 0:
                return depth, quote
            position, quote = end + 3, ""
            continue
        match = _TOKEN.search(text, position)
        if match is None:
            break
        position = match.end()
        token = match.group()
        if token in ('"""', "'''"):
            quote = token
        elif token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
    return depth, quote
