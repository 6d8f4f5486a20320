"""Which associative operation an update of an accumulator folds with, if it is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from zmlx.authoring.formula.tree import Binary, Call, Choice, Name, Number, Tree, Unary, names

_LOWEST = {"float": -math.inf, "int": -(1 << 31), "uint": 0, "int64_t": -(1 << 63), "uint64_t": 0}
_HIGHEST = {
    "float": math.inf,
    "int": (1 << 31) - 1,
    "uint": (1 << 32) - 1,
    "int64_t": (1 << 63) - 1,
    "uint64_t": (1 << 64) - 1,
}


@dataclass(frozen=True)
class Fold:
    """An update `acc = acc + term`, with one of the operators below in place of the sum.

    Attributes:
        operator: "+", "*", "max", "min", "&&", "||", "&", "|" or "^".
        term: what is folded in; it does not hold the accumulator.
    """

    operator: str
    term: Tree


#: operator -> the fold of an array's last axis, which stays, with MLX; None where MLX has none
ALONG_ROWS: dict[str, Callable[[mx.array], mx.array] | None] = {
    "+": lambda a: mx.sum(a, axis=-1, keepdims=True),
    "*": lambda a: mx.prod(a, axis=-1, keepdims=True),
    "max": lambda a: mx.max(a, axis=-1, keepdims=True),
    "min": lambda a: mx.min(a, axis=-1, keepdims=True),
    "&&": lambda a: mx.all(a, axis=-1, keepdims=True),
    "||": lambda a: mx.any(a, axis=-1, keepdims=True),
    "&": None,
    "|": None,
    "^": None,
}


def identity(operator: str, kind: str) -> Number:
    """Return the value that an operator leaves others as they are with, in a type."""
    if operator == "max":
        return Number(_LOWEST[kind], kind)
    if operator == "min":
        return Number(_HIGHEST[kind], kind)
    if operator == "&":
        return Number(-1 if kind.startswith("int") else _HIGHEST[kind], kind)
    value = {"*": 1, "&&": 1}.get(operator, 0)
    return Number(float(value) if kind == "float" else value, kind)


def merged(operator: str, a: Tree, b: Tree) -> Tree:
    """Return the formula that joins two partial results."""
    return Call(operator, (a, b)) if operator in ("max", "min") else Binary(operator, a, b)


def fold(update: Tree, accumulator: str) -> Fold | None:
    """Recognise the fold that an update is; None where threads' results cannot be joined.

    Recognised are `acc + f`, `acc - f`, `acc * f`, `max(acc, f)`, `min(acc, f)`, the
    logical and bit operators, `fma(a, b, acc)`, `f > acc ? f : acc` and its kin, in any order and
    nested, as long as f does not hold the accumulator.
    """
    operator = _operator(update, accumulator)
    if operator is None:
        return None
    term = _term(update, accumulator, operator)
    return None if term is None else Fold(operator, term)


def _operator(tree: Tree, accumulator: str) -> str | None:
    if isinstance(tree, Binary):
        operator = "+" if tree.operator == "-" else tree.operator
        return operator if operator in ALONG_ROWS else None
    if isinstance(tree, Call):
        return {"max": "max", "min": "min", "fma": "+"}.get(tree.name)
    if isinstance(tree, Choice):
        return _extreme(tree, accumulator)
    return None


def _holds(tree: Tree, accumulator: str) -> bool:
    return accumulator in names(tree)


def _term(tree: Tree, accumulator: str, operator: str) -> Tree | None:
    """Return what the tree joins to the accumulator with an operator; None if it is no fold."""
    if isinstance(tree, Choice):
        return _chosen(tree, accumulator)
    if _operator(tree, accumulator) != operator:
        return None
    if isinstance(tree, Call) and tree.name == "fma":
        a, b, c = tree.arguments
        if _holds(a, accumulator) or _holds(b, accumulator):
            return None
        return _joined("+", c, Binary("*", a, b), accumulator)
    if isinstance(tree, Call):
        left, right = tree.arguments
    elif isinstance(tree, Binary):
        left, right = tree.left, tree.right
    else:
        return None
    if not _holds(right, accumulator):
        return _joined(
            tree.operator if isinstance(tree, Binary) else operator, left, right, accumulator
        )
    if _holds(left, accumulator) or (isinstance(tree, Binary) and tree.operator == "-"):
        return None
    return _joined(operator, right, left, accumulator)


def _joined(operator: str, inner: Tree, other: Tree, accumulator: str) -> Tree | None:
    """Return what `inner operator other` joins to the accumulator, which is inside `inner`."""
    if inner == Name(accumulator):
        return Unary("-", other) if operator == "-" else other
    part = _term(inner, accumulator, "+" if operator == "-" else operator)
    if part is None:
        return None
    return Binary("-", part, other) if operator == "-" else merged(operator, part, other)


def _extreme(tree: Choice, accumulator: str) -> str | None:
    """Return which of max and min a choice between the accumulator and a value is."""
    condition = tree.condition
    if not (isinstance(condition, Binary) and condition.operator in ("<", "<=", ">", ">=")):
        return None
    pair = (condition.left, condition.right)
    if Name(accumulator) not in pair:
        return None
    larger = condition.operator in (">", ">=")
    if (tree.yes, tree.no) == pair:
        return "max" if larger else "min"
    if (tree.no, tree.yes) == pair:
        return "min" if larger else "max"
    return None


def _chosen(tree: Choice, accumulator: str) -> Tree | None:
    assert isinstance(tree.condition, Binary)
    other = tree.yes if tree.no == Name(accumulator) else tree.no
    return None if _holds(other, accumulator) else other
