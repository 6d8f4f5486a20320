"""Derivatives of formulas, as formulas.

Corners have the derivative that MLX gives them: that of |a| at 0 is 0, that of max(a, b) at a = b
goes to b. A derivative does not look into the branch of a `? :` that is not taken, so that it is
finite where the value is.
"""

from __future__ import annotations

from functools import cache

from zmlx.authoring.formula.algebra import (
    ONE,
    ZERO,
    choice,
    difference,
    negative,
    product,
    quotient,
    total,
)
from zmlx.authoring.formula.errors import NotDifferentiable
from zmlx.authoring.formula.functions import FUNCTIONS
from zmlx.authoring.formula.inference import COMPARISONS, LOGIC
from zmlx.authoring.formula.kinds import CASTS, FLOATS
from zmlx.authoring.formula.parser import parse_partial
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
    rebuilt,
)

_PARAMETERS = ("a", "b", "c")


def derivative(tree: Tree, name: str) -> Tree:
    """Return the derivative of a formula by one of its variables.

    Raises:
        NotDifferentiable: the variable goes into an operator or a function without a derivative.
    """
    return _Derivation(name).of(tree)


class _Derivation:
    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[Tree, Tree] = {}

    def of(self, tree: Tree) -> Tree:
        found = self.known.get(tree)
        if found is None:
            found = self.known[tree] = self._of(tree)
        return found

    def _of(self, tree: Tree) -> Tree:
        if isinstance(tree, Number):
            return ZERO
        if isinstance(tree, Name):
            return ONE if tree.name == self.name else ZERO
        if isinstance(tree, Unary):
            return negative(self.of(tree.operand)) if tree.operator == "-" else self.whole(tree)
        if isinstance(tree, Binary):
            return self.binary(tree)
        if isinstance(tree, Choice):
            return choice(tree.condition, self.of(tree.yes), self.of(tree.no))
        if isinstance(tree, Cast):
            keeps = tree.to == "T" or CASTS[tree.to] in FLOATS
            return self.of(tree.operand) if keeps else ZERO
        return self.call(tree)

    def binary(self, tree: Binary) -> Tree:
        a, b, operator = tree.left, tree.right, tree.operator
        if operator == "+":
            return total(self.of(a), self.of(b))
        if operator == "-":
            return difference(self.of(a), self.of(b))
        if operator == "*":
            return total(product(self.of(a), b), product(a, self.of(b)))
        if operator == "/":
            # By way of the quotient itself: the square of b would overflow long before b does.
            outer = quotient(self.of(a), b)
            inner = self.of(b)
            if inner == ZERO:
                return outer
            return difference(outer, product(tree, quotient(inner, b)))
        if operator in COMPARISONS or operator in LOGIC:
            return ZERO
        return self.whole(tree)

    def whole(self, tree: Unary | Binary) -> Tree:
        """Return the derivative of an operator of whole numbers."""
        if tree.operator == "!" or all(self.of(node) == ZERO for node in operands(tree)):
            return ZERO
        raise NotDifferentiable(f"{tree.operator!r} has no derivative by {self.name!r}")

    def call(self, tree: Call) -> Tree:
        inner = [self.of(argument) for argument in tree.arguments]
        function = FUNCTIONS[tree.name]
        if function.result == "bool" or all(part == ZERO for part in inner):
            return ZERO
        if not function.partials:
            raise NotDifferentiable(f"the function {tree.name!r} has no derivative here")
        values = dict(zip(_PARAMETERS, tree.arguments, strict=False)) | {"y": tree}
        result: Tree = ZERO
        for text, part in zip(function.partials, inner, strict=True):
            if part != ZERO:
                result = total(result, product(_filled(_partial(text), values), part))
        return result


@cache
def _partial(text: str) -> Tree:
    """Return a derivative of the table of functions as a tree over a, b, c and y."""
    return parse_partial(text)


def _filled(tree: Tree, values: dict[str, Tree]) -> Tree:
    """Return the tree with its variables replaced, simplified on the way up."""
    if isinstance(tree, Name):
        return values[tree.name]
    below = tuple(_filled(node, values) for node in operands(tree))
    return simplified(rebuilt(tree, below)) if below else tree


def simplified(tree: Tree) -> Tree:
    """Return a node simplified by the rules of sums and products; what is below stays."""
    if isinstance(tree, Unary) and tree.operator == "-":
        return negative(tree.operand)
    if isinstance(tree, Binary):
        rule = {"+": total, "-": difference, "*": product, "/": quotient}.get(tree.operator)
        return rule(tree.left, tree.right) if rule else tree
    if isinstance(tree, Choice):
        return choice(tree.condition, tree.yes, tree.no)
    if isinstance(tree, Call) and tree.name in ("pow", "powr"):
        return _power(tree)
    return tree


def _power(tree: Call) -> Tree:
    base, exponent = tree.arguments
    if isinstance(exponent, Number):
        if exponent.value == 0:
            return ONE
        if exponent.value == 1:
            return base
        if exponent.value == 2:
            return Binary("*", base, base)
    return tree
