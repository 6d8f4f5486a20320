"""Which type each part of a formula has, by C's rules, for given types of the variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zmlx.authoring.formula.errors import FormulaError
from zmlx.authoring.formula.functions import FUNCTIONS
from zmlx.authoring.formula.kinds import CASTS, common, inside, promoted
from zmlx.authoring.formula.tree import (
    Binary,
    Call,
    Cast,
    Choice,
    Name,
    Number,
    Tree,
    Unary,
    operands,
)

COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">="})
LOGIC = frozenset({"&&", "||"})
_WHOLE_ONLY = frozenset({"%", "&", "|", "^", "<<", ">>"})


@dataclass
class Types:
    """Types of a formula's parts.

    Attributes:
        text: the formula, for errors.
        variables: the types of its variables.
        t: the type that "T" stands for.
    """

    text: str
    variables: Mapping[str, str]
    t: str = "float"
    _known: dict[Tree, str] = field(default_factory=dict)

    def of(self, tree: Tree) -> str:
        """Return a part's type.

        Raises:
            FormulaError: an operator is given a type that it does not take.
        """
        kind = self._known.get(tree)
        if kind is None:
            kind = self._known[tree] = self._of(tree)
        return kind

    def _of(self, tree: Tree) -> str:
        if isinstance(tree, Number):
            return tree.kind
        if isinstance(tree, Name):
            return self.variables[tree.name]
        if isinstance(tree, Cast):
            self.of(tree.operand)
            return self.t if tree.to == "T" else inside(CASTS[tree.to]) or "float"
        below = [self.of(node) for node in operands(tree)]
        if isinstance(tree, Unary):
            return self._unary(tree, below[0])
        if isinstance(tree, Binary):
            return self._binary(tree, below)
        if isinstance(tree, Choice):
            return below[1] if below[1] == below[2] else common(*below[1:])
        return self._call(tree, below)

    def _unary(self, tree: Unary, below: str) -> str:
        if tree.operator == "!":
            return "bool"
        if tree.operator == "~" and below == "float":
            raise FormulaError(
                self.text, tree.at, "'~' takes whole numbers", "convert: ~int(x), or use '-' or '!'"
            )
        return promoted(below)

    def _binary(self, tree: Binary, below: list[str]) -> str:
        if tree.operator in COMPARISONS or tree.operator in LOGIC:
            return "bool"
        if tree.operator in _WHOLE_ONLY and "float" in below:
            advice = "use fmod(a, b)" if tree.operator == "%" else "convert: int(x)"
            raise FormulaError(self.text, tree.at, f"{tree.operator!r} takes whole numbers", advice)
        if tree.operator in ("<<", ">>"):
            return promoted(below[0])
        return common(*below)

    def _call(self, tree: Call, below: list[str]) -> str:
        result = FUNCTIONS[tree.name].result
        return common(*below) if result == "whole" else result
