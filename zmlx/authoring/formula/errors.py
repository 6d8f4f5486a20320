"""A mistake in a formula, shown where it stands."""

from __future__ import annotations


class FormulaError(ValueError):
    """A formula that cannot be used; the text of the error points into it.

    Attributes:
        text: the formula.
        at: index of the character that the mistake is at.
        problem: what is wrong.
        advice: what to do.
    """

    def __init__(self, text: str, at: int, problem: str, advice: str = "") -> None:
        self.text = text
        self.at = min(at, len(text))
        self.problem = problem
        self.advice = advice
        super().__init__(self._pointed())

    def _pointed(self) -> str:
        before = self.text[: self.at]
        start = before.rfind("\n") + 1
        end = self.text.find("\n", self.at)
        line = self.text[start : len(self.text) if end < 0 else end].replace("\t", " ")
        column = self.at - start
        where = f"column {column + 1}"
        if "\n" in self.text:
            where = f"line {before.count(chr(10)) + 1}, {where}"
        pointed = f"{self.problem} ({where})\n  {line}\n  {' ' * column}^"
        return f"{pointed}\n{self.advice}" if self.advice else pointed


class NotDifferentiable(ValueError):
    """A gradient was asked for that a formula does not have; the text says why."""
