"""A formula as Metal text, with every conversion written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from zmlx.authoring.formula.functions import FUNCTIONS, needed
from zmlx.authoring.formula.inference import COMPARISONS, Types
from zmlx.authoring.formula.kinds import CASTS, TYPES, common
from zmlx.authoring.formula.parser import LEVELS
from zmlx.authoring.formula.tree import (
    Binary,
    Call,
    Cast,
    Choice,
    Name,
    Number,
    Tree,
    Unary,
    nodes,
    operands,
)

_BINDING = {sign: level + 2 for level, signs in enumerate(LEVELS) for sign in signs}
_CHOICE, _UNARY, _TIGHT = 1, len(LEVELS) + 2, len(LEVELS) + 3
_HARD = frozenset({"<<", ">>", "&", "|", "^", "&&", "||"})


def prelude(trees: Sequence[Tree]) -> str:
    """Return the Metal functions that must stand before a kernel with these formulas."""
    called = (node.name for tree in trees for node in nodes(tree) if isinstance(node, Call))
    return needed(sorted(set(called)))


def printed(
    trees: Sequence[Tree], types: Types, temporary: str = "t"
) -> tuple[list[str], list[str]]:
    """Return formulas as Metal text.

    Calls that stand in the formulas more than once are computed once, before them.

    Args:
        trees: the formulas.
        types: the types of their parts.
        temporary: what the names of values computed before begin with.

    Returns:
        statements that must come first, and an expression for each formula.
    """
    printer = _Printer(types, temporary, _repeated(trees))
    expressions = [printer.text(tree) for tree in trees]
    return printer.statements, expressions


def _repeated(trees: Sequence[Tree]) -> set[Tree]:
    """Return what contains a call and is wanted by more than one node."""
    wanted: dict[Tree, int] = dict.fromkeys(trees, 1)
    stack = list(wanted)
    calls: dict[Tree, bool] = {}

    def holds_call(tree: Tree) -> bool:
        if tree not in calls:
            calls[tree] = isinstance(tree, Call) or any(map(holds_call, operands(tree)))
        return calls[tree]

    while stack:
        for node in operands(stack.pop()):
            if node not in wanted:
                stack.append(node)
            wanted[node] = wanted.get(node, 0) + 1
    return {tree for tree, count in wanted.items() if count > 1 and holds_call(tree)}


class _Printer:
    def __init__(self, types: Types, temporary: str, repeated: set[Tree]) -> None:
        self.types = types
        self.temporary = temporary
        self.repeated = repeated
        self.named: dict[Tree, str] = {}
        self.statements: list[str] = []

    def text(self, tree: Tree, binding: int = 0) -> str:
        """Return the text of a part; in parentheses where it binds looser than asked."""
        if tree in self.repeated:
            return self.name(tree)
        text, own = self.bare(tree)
        return f"({text})" if own < binding else text

    def name(self, tree: Tree) -> str:
        name = self.named.get(tree)
        if name is None:
            text, _ = self.bare(tree)
            name = self.named[tree] = f"{self.temporary}{len(self.named)}"
            self.statements.append(f"const {self.types.of(tree)} {name} = {text};")
        return name

    def bare(self, tree: Tree) -> tuple[str, int]:
        if isinstance(tree, Number):
            return number(tree)
        if isinstance(tree, Name):
            return tree.name, _TIGHT
        if isinstance(tree, Unary):
            inner = self.text(tree.operand, _UNARY)
            space = " " if inner.startswith("-") and tree.operator == "-" else ""
            return f"{tree.operator}{space}{inner}", _UNARY
        if isinstance(tree, Binary):
            return self.binary(tree)
        if isinstance(tree, Choice):
            kind = self.types.of(tree)
            yes, no = (self.converted(branch, kind, _CHOICE + 1) for branch in (tree.yes, tree.no))
            return f"{self.text(tree.condition, _CHOICE + 1)} ? {yes} : {no}", _CHOICE
        if isinstance(tree, Cast):
            return self.cast(tree), _TIGHT
        return self.call(tree), _TIGHT

    def binary(self, tree: Binary) -> tuple[str, int]:
        own = _BINDING[tree.operator]
        # Compilers warn about && inside || and the like: there parentheses are always written.
        left = right = own
        if tree.operator in _HARD:
            left = _UNARY if not self.same(tree.left, tree.operator) else own
            right = _UNARY
        elif tree.operator in COMPARISONS:
            left = right = _BINDING["<<"]
        kind = self.types.of(tree)
        if tree.operator in COMPARISONS:
            kind = common(self.types.of(tree.left), self.types.of(tree.right))
        if tree.operator in ("&&", "||", "<<", ">>"):
            texts = self.text(tree.left, left), self.text(tree.right, max(right, own + 1))
        else:
            texts = (
                self.widened(tree.left, kind, left),
                self.widened(tree.right, kind, max(right, own + 1)),
            )
        return f"{texts[0]} {tree.operator} {texts[1]}", own

    def same(self, tree: Tree, operator: str) -> bool:
        return isinstance(tree, Binary) and tree.operator == operator

    def widened(self, tree: Tree, kind: str, binding: int) -> str:
        """Return an operand of arithmetic; literals take the type that C gives the operation."""
        if isinstance(tree, Number) and kind == "float":
            text, own = number(Number(float(tree.value)))
            return f"({text})" if own < binding else text
        return self.text(tree, binding)

    def converted(self, tree: Tree, kind: str, binding: int = 0) -> str:
        """Return the text of a part in a type."""
        if self.types.of(tree) == kind:
            return self.text(tree, binding)
        if isinstance(tree, Number):
            value = float(tree.value) if kind == "float" else int(tree.value)
            return number(Number(value, kind))[0]
        return f"static_cast<{kind}>({self.text(tree)})"

    def cast(self, tree: Cast) -> str:
        kind = self.types.of(tree)
        text = f"static_cast<{tree.to}>({self.text(tree.operand)})"
        # What 8 and 16 bits hold is computed with in 32, as the types of formulas say.
        stays = tree.to != "T" and CASTS[tree.to] == TYPES[kind]
        return text if stays else f"static_cast<{kind}>({text})"

    def call(self, tree: Call) -> str:
        function = FUNCTIONS[tree.name]
        kind = self.types.of(tree) if function.result == "whole" else "float"
        arguments = ", ".join(self.converted(argument, kind) for argument in tree.arguments)
        name = function.metal
        if tree.fast and name.startswith("metal::"):
            name = "metal::fast::" + name.rpartition("::")[2]
        return f"{name}({arguments})"


def number(tree: Number) -> tuple[str, int]:
    """Return a literal's text and how tight it binds."""
    value, kind = tree.value, tree.kind
    binding = _UNARY if value < 0 else _TIGHT
    if kind == "bool":
        return ("true" if value else "false"), _TIGHT
    if kind != "float":
        suffix = {"int": "", "uint": "u", "int64_t": "l", "uint64_t": "ul"}[kind]
        return f"{value}{suffix}", binding
    value = float(value)
    if math.isnan(value):
        return "NAN", _TIGHT
    if math.isinf(value):
        return ("INFINITY" if value > 0 else "-INFINITY"), binding
    return f"{shortest(value)}f", _UNARY if text_is_negative(value) else _TIGHT


def text_is_negative(value: float) -> bool:
    """Say whether a number's text begins with a minus; that of -0.0 does."""
    return math.copysign(1.0, value) < 0


def shortest(value: float) -> str:
    """Return the shortest decimal text that is the same number in float32, with a dot in it."""
    single = float(np.float32(value))
    text = repr(single)
    for digits in range(1, 10):
        text = repr(float(f"{single:.{digits}g}"))
        if float(np.float32(float(text))) == single:
            break
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{mark}{exponent}"
