"""Tokens of Metal text with their places: enough of the language to see declarations."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

_PATTERN = re.compile(
    r"""(?P<space>(?:\s|\\\n|//[^\n]*|/\*.*?\*/)+)
      | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<sign>\[\[|\]\]|::|->|<<=|<<|\+\+|--|&&|\|\||[-+*/%&|^=!<]=|\.\.\.|\#\#|.)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Place:
    """Where something stands: the part ("source", "header", ...), line and column, from 1."""

    part: str
    line: int
    column: int


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        text: as written.
        kind: "name", "number", "text" or "sign".
        start: offset in the whole text.
        directive: it stands on a line of the preprocessor.
    """

    text: str
    kind: str
    start: int
    directive: bool = False

    @property
    def end(self) -> int:
        """Offset behind the token."""
        return self.start + len(self.text)


def tokens(text: str) -> list[Token]:
    """Split text into tokens; comments and white space are left out."""
    found: list[Token] = []
    directive = False
    fresh = True  # nothing but white space stands on this line so far
    for match in _PATTERN.finditer(text):
        kind, word = str(match.lastgroup), match[0]
        if kind == "space":
            if _ends_line(word):
                directive, fresh = False, True
            continue
        directive = directive or (fresh and word == "#")
        fresh = False
        found.append(Token(word, kind, match.start(), directive))
    return _attributes_closed(found)


def _ends_line(space: str) -> bool:
    bare = re.sub(r"/\*.*?\*/", " ", space.replace("\\\n", " "), flags=re.DOTALL)
    return "\n" in bare


def _attributes_closed(found: Sequence[Token]) -> list[Token]:
    """Split `]]` where it closes two subscripts and no attribute, and `[[` likewise."""
    result: list[Token] = []
    attributes = depth = 0
    for token in found:
        if token.text == "[[":
            attributes += 1
        elif token.text == "[":
            depth += 1
        elif token.text == "]":
            depth -= 1
        elif token.text == "]]":
            if attributes and not depth:
                attributes -= 1
            else:
                half = (token.kind, token.start, token.directive)
                result.append(Token("]", *half))
                result.append(Token("]", half[0], half[1] + 1, half[2]))
                # Two subscripts, or the last of a subscript and the first of an attribute's end.
                depth = max(0, depth - 2)
                continue
        result.append(token)
    return result


def closing(found: Sequence[Token], start: int) -> int:
    """Return the index of the bracket that closes the one at `start`; the last index if none."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">", "[[": "]]"}
    opened, closed = found[start].text, pairs[found[start].text]
    depth = 0
    index = start
    while index < len(found):
        word = found[index].text
        depth += (word == opened) - (word == closed)
        if depth == 0:
            return index
        if opened == "<" and word == "(":
            index = closing(found, index)  # a `>` in there compares
        elif opened == "<" and word in (";", "{", "}"):
            break
        index += 1
    return len(found) - 1


class Parts:
    """A text made of named parts, each on lines of its own.

    Attributes:
        text: the whole.
        names: of the parts, in order.
    """

    def __init__(self, parts: Sequence[tuple[str, str]]) -> None:
        self.text = ""
        self.names: list[str] = []
        self._starts: list[int] = []
        for name, text in parts:
            self.names.append(name)
            self._starts.append(len(self.text))
            self.text += text if text.endswith("\n") else text + "\n"

    def place(self, offset: int) -> Place:
        """Return the place of an offset in the whole text."""
        part = bisect.bisect_right(self._starts, offset) - 1
        before = self.text[self._starts[part] : offset]
        column = len(before) - (before.rfind("\n") + 1) + 1
        return Place(self.names[part], before.count("\n") + 1, column)

    def marked(self, edited: Sequence[tuple[int, str]]) -> str:
        """Return the text with edits put in and a line marker before each part.

        Args:
            edited: offset and inserted text, in the order of offsets.
        """
        pieces: list[str] = []
        edits = list(edited)
        for part, (name, start) in enumerate(zip(self.names, self._starts, strict=True)):
            end = self._starts[part + 1] if part + 1 < len(self._starts) else len(self.text)
            pieces.append(f'# 1 "{name}"\n')
            position = start
            while edits and edits[0][0] < end:
                offset, inserted = edits.pop(0)
                pieces += [self.text[position:offset], inserted]
                position = offset
            pieces.append(self.text[position:end])
        return "".join(pieces)
