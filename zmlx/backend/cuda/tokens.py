"""Metal source text as tokens, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
      (?P<space>(?:\s|\\\n|//(?:\\\n|[^\n])*|/\*.*?\*/)+)
    | (?P<directive>\#(?:\\\n|/\*.*?\*/|(?!//)[^\n])*)
    | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    | (?P<number>\.?\d(?:[eE][+-](?=\d)|[pP][+-]|[\w.'])*)
    | (?P<name>[A-Za-z_]\w*)
    | (?P<mark>::|->|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|<<|\.\.\.|[^\w\s])
    """,
    re.VERBOSE | re.DOTALL,
)

#: opening bracket -> closing one
BRACKETS = {"(": ")", "[": "]", "{": "}"}


class TranslationError(ValueError):
    """A Metal source holds something that cannot be translated; the text says what and where."""


@dataclass(frozen=True)
class Token:
    """A token of C++: `kind` is directive, string, number, name or mark.

    `space` is the white space before it: comments are gone, line ends are kept, so that messages
    of the compiler name the right line.
    """

    kind: str
    text: str
    space: str = ""
    line: int = 0


def tokenize(text: str) -> list[Token]:
    """Return the tokens of a source; the last one is an empty mark that holds the last space.

    Raises:
        TranslationError: there is a character that no token starts with, such as a lone quote.
    """
    tokens: list[Token] = []
    position, line, space = 0, 1, ""
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise TranslationError(f"line {line}: {text[position]!r} starts no token")
        kind, found = match.lastgroup or "", match.group()
        if kind == "directive" and tokens and "\n" not in space:
            kind, found = "mark", "#"  # an operator of the preprocessor, in a macro
        if kind == "space":
            space = "\n" * found.count("\n") or " "
        else:
            tokens.append(Token(kind, found, space, line))
            space = ""
        line += found.count("\n")
        position += len(found)
    tokens.append(Token("mark", "", space, line))
    return tokens


def text_of(tokens: Iterable[Token]) -> str:
    """Return the tokens as a source; words that would grow together are kept apart."""
    parts: list[str] = []
    last = ""
    for token in tokens:
        if not token.text and "\n" not in token.space:
            continue
        if not token.space and _is_word(last[-1:]) and _is_word(token.text[:1]):
            parts.append(" ")
        parts.append(token.space + token.text)
        last = token.text
    return "".join(parts)


def inserted(code: str, like: Token) -> list[Token]:
    """Return the tokens of `code`, to be put where `like` stands: its space and line are taken."""
    tokens = tokenize(code)[:-1]
    first = Token(tokens[0].kind, tokens[0].text, like.space, like.line)
    return [first, *(Token(t.kind, t.text, t.space, like.line) for t in tokens[1:])]


def closing(tokens: Sequence[Token], opening: int) -> int:
    """Return the index of the bracket that closes the one at `opening`.

    Raises:
        TranslationError: it is not closed.
    """
    depth = 0
    for index in range(opening, len(tokens)):
        if tokens[index].kind != "mark":
            continue
        if tokens[index].text in BRACKETS:
            depth += 1
        elif tokens[index].text in BRACKETS.values():
            depth -= 1
            if depth == 0:
                return index
    at = tokens[opening]
    raise TranslationError(f"line {at.line}: {at.text!r} is never closed")


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
