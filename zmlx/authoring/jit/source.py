"""A Python function's own source, and errors that point into it."""

from __future__ import annotations

import ast
import linecache
import types
from dataclasses import dataclass
from functools import lru_cache


class JitError(TypeError):
    """A function, or a call of it, that `zmlx.jit` cannot compile.

    Attributes:
        filename: file of the function.
        lineno: line in it, from 1.
        text: that line, without its indentation.
        reason: what was wrong and what to do.
    """

    def __init__(
        self, filename: str, lineno: int, text: str, reason: str, marker: str = ""
    ) -> None:
        self.filename = filename
        self.lineno = lineno
        self.text = text
        self.reason = reason
        lines = [f"{filename}:{lineno}: zmlx.jit: {reason}", f"    {text}"]
        if marker:
            lines.append(f"    {marker}")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Source:
    """Where a function stands and what it says.

    Attributes:
        filename: its file.
        lines: all lines of the file.
        node: the function's definition, or its lambda.
    """

    filename: str
    lines: list[str]
    node: ast.FunctionDef | ast.Lambda

    def error(self, node: ast.AST, reason: str) -> JitError:
        """Return the error that points at `node`."""
        lineno = getattr(node, "lineno", self.node.lineno)
        line = self.lines[lineno - 1].rstrip("\n")
        text = line.strip()
        return JitError(self.filename, lineno, text, reason, _marker(node, lineno, line))


def _marker(node: ast.AST, lineno: int, line: str) -> str:
    """Return spaces and carets that underline the part of `node` on its first line."""
    column = getattr(node, "col_offset", None)
    if column is None:
        return ""
    # The tree counts bytes; people see characters.
    encoded = line.encode()
    start = len(encoded[:column].decode(errors="replace"))
    end = len(line)
    if getattr(node, "end_lineno", None) == lineno:
        end = len(encoded[: node.end_col_offset].decode(errors="replace"))  # type: ignore[attr-defined]
    indent = len(line) - len(line.lstrip())
    return " " * (start - indent) + "^" * max(end - start, 1)


_NO_SOURCE = "no source: a function made from a string cannot be compiled; write it in a file"


def source_of(function: types.FunctionType) -> Source:
    """Find a function's definition in its file.

    Raises:
        JitError: there is no source, or it is no longer that of the function.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise JitError(code.co_filename, code.co_firstlineno, function.__name__, _NO_SOURCE)
    found = _definitions("".join(lines)).get(code.co_firstlineno, [])
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    nodes = [node for node in found if _matches(node, function.__name__, parameters)]
    if len(nodes) == 1 and isinstance(nodes[0], ast.FunctionDef | ast.Lambda):
        return Source(code.co_filename, lines, nodes[0])
    lineno = min(code.co_firstlineno, len(lines))
    # The text of `python -c` may be known, under the name that every string has.
    if not nodes and code.co_filename.startswith("<"):
        reason = _NO_SOURCE
    elif not nodes:
        reason = f"the source of {function.__name__} is not on this line; has the file changed?"
    elif len(nodes) > 1:
        reason = "several functions alike start on this line; write each with `def`"
    else:
        reason = "async functions cannot be compiled; write it with `def`"
    raise JitError(code.co_filename, lineno, lines[lineno - 1].strip(), reason)


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@lru_cache(maxsize=16)
def _definitions(text: str) -> dict[int, list[_Definition]]:
    """Return first line -> the functions that start on it; decorators belong to a function."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return {}
    found: dict[int, list[_Definition]] = {}
    for node in ast.walk(tree):
        if isinstance(node, _Definition):
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            found.setdefault(first, []).append(node)
    return found


def _matches(node: _Definition, name: str, parameters: tuple[str, ...]) -> bool:
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return tuple(named) == parameters and getattr(node, "name", "<lambda>") == name
