"""What the strict look says about a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """One reason why Apple's compiler would refuse a text.

    Attributes:
        part: where it stands: "source", "header", "signature" (what is written around the source),
            or the name given to a whole text.
        line: from 1.
        column: from 1.
        message: what is wrong.
        advice: what to do, or an empty string.
    """

    part: str
    line: int
    column: int
    message: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f" ({self.advice})" if self.advice else ""
        return f"{self.part}:{self.line}:{self.column}: {self.message}{advice}"
