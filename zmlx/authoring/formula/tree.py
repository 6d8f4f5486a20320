"""What a formula is once it is read: a tree of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Union

#: Node of a formula. Equal trees compute the same; where they stand in a text does not count.
Tree = Union["Number", "Name", "Unary", "Binary", "Choice", "Call", "Cast"]


@dataclass(frozen=True)
class Number:
    """A literal or constant; `kind` is one of `zmlx.authoring.formula.kinds.TYPES`."""

    value: float | int | bool
    kind: str = "float"
    at: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Name:
    """A variable of the formula."""

    name: str
    at: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Unary:
    """`-a`, `!a` or `~a`."""

    operator: str
    operand: Tree
    at: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Binary:
    """`left operator right`."""

    operator: str
    left: Tree
    right: Tree
    at: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Choice:
    """`condition ? yes : no`."""

    condition: Tree
    yes: Tree
    no: Tree
    at: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Call:
    """A function of `FUNCTIONS` with its arguments; `fast` where Metal's fast one is asked for."""

    name: str
    arguments: tuple[Tree, ...]
    fast: bool = False
    at: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Cast:
    """A conversion; `to` is a type of `zmlx.authoring.formula.kinds.CASTS`, or "T"."""

    to: str
    operand: Tree
    at: int = field(default=0, compare=False, repr=False)


def operands(tree: Tree) -> tuple[Tree, ...]:
    """Return the nodes right below a node, from left to right."""
    if isinstance(tree, Unary | Cast):
        return (tree.operand,)
    if isinstance(tree, Binary):
        return (tree.left, tree.right)
    if isinstance(tree, Choice):
        return (tree.condition, tree.yes, tree.no)
    return tree.arguments if isinstance(tree, Call) else ()


def rebuilt(tree: Tree, below: tuple[Tree, ...]) -> Tree:
    """Return the same node above other operands."""
    if isinstance(tree, Unary | Cast):
        return replace(tree, operand=below[0])
    if isinstance(tree, Binary):
        return replace(tree, left=below[0], right=below[1])
    if isinstance(tree, Choice):
        return replace(tree, condition=below[0], yes=below[1], no=below[2])
    return replace(tree, arguments=below) if isinstance(tree, Call) else tree


def substituted(tree: Tree, values: Mapping[str, Tree]) -> Tree:
    """Return the tree with variables replaced by trees."""
    if isinstance(tree, Name):
        return values.get(tree.name, tree)
    below = operands(tree)
    return rebuilt(tree, tuple(substituted(node, values) for node in below)) if below else tree


def nodes(tree: Tree) -> Iterator[Tree]:
    """Yield the tree and all below it, from the top."""
    stack: list[Tree] = [tree]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(operands(node)))


def names(tree: Tree) -> frozenset[str]:
    """Return the variables that the tree holds."""
    return frozenset(node.name for node in nodes(tree) if isinstance(node, Name))
