"""From a formula's text to its words."""

from __future__ import annotations

import re
from typing import NamedTuple

from zmlx.authoring.formula.errors import FormulaError


class Token(NamedTuple):
    """A word of a formula: kind is "number", "name", "sign" or "end"."""

    kind: str
    text: str
    at: int


_WORD = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<number>0[xX][0-9a-fA-F]+[uUlL]*
      | (?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?[fFhHuUlL]*)
  | (?P<name>[A-Za-z_]\w*(?:\s*::\s*[A-Za-z_]\w*)*)
  | (?P<sign><<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||\+\+|--|->|[-+*/%&|^]=|[-+*/%<>=!~&|^?:(),.;{}\[\]])
    """,
    re.VERBOSE | re.DOTALL,
)
_CLOSES = {")": "(", "]": "[", "}": "{"}


def tokens(text: str) -> list[Token]:
    """Return the words of a formula, and an end.

    Raises:
        FormulaError: a character that is none of the language's; a bracket without its partner;
            no words at all.
    """
    found: list[Token] = []
    at = 0
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None:
            raise FormulaError(
                text, at, f"unexpected character {text[at]!r}", "a formula is a C expression"
            )
        kind = match.lastgroup or ""
        if kind != "space":
            found.append(Token(kind, re.sub(r"\s", "", match.group()), at))
        at = match.end()
    if not found:
        raise FormulaError(text, 0, "the formula is empty", 'give an expression such as "x * x"')
    _check_brackets(text, found)
    found.append(Token("end", "", len(text.rstrip())))
    return found


def _check_brackets(text: str, found: list[Token]) -> None:
    opened: list[Token] = []
    for token in found:
        if token.text in ("(", "[", "{"):
            opened.append(token)
        elif token.text in _CLOSES:
            if not opened or opened[-1].text != _CLOSES[token.text]:
                raise FormulaError(
                    text,
                    token.at,
                    f"{token.text!r} closes nothing",
                    f"remove it, or open a {_CLOSES[token.text]!r} before it",
                )
            opened.pop()
    if opened:
        last = opened[-1]
        raise FormulaError(text, last.at, f"{last.text!r} is never closed", "close it")
