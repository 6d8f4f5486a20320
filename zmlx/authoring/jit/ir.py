"""The typed intermediate form of a scalar function: a tree of statements and expressions.

Everything between a Python function and its kernels works on it: it is printed as Metal
(`metal.py`), evaluated with MLX operations (`evaluate.py`) and differentiated (`derive.py`).
Nodes are compared by identity. Every operand has the kind that its operation works in; where a
kind changes there is a `Cast`. Expressions have no effects and cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias


class Kind(IntEnum):
    """What a value is; a later kind holds what an earlier one does.

    `FLOAT` is a float32. `INT` is 32 bits wide, or 64 where an argument is int64 or uint32.
    """

    BOOL = 0
    INT = 1
    FLOAT = 2


@dataclass(frozen=True, eq=False)
class Constant:
    """A number that is known when the kernel is made."""

    value: float | int | bool
    kind: Kind


@dataclass(frozen=True, eq=False)
class Variable:
    """The value that a parameter or a local has now."""

    name: str
    kind: Kind


@dataclass(frozen=True, eq=False)
class Cast:
    """A value as another kind: to BOOL whether it is not zero, FLOAT to INT towards zero."""

    operand: Expression
    kind: Kind


@dataclass(frozen=True, eq=False)
class Unary:
    """`-` of INT or FLOAT, `not` of BOOL, `~` of INT."""

    operator: str
    operand: Expression
    kind: Kind


@dataclass(frozen=True, eq=False)
class Binary:
    """`+ - * // %` of INT or FLOAT, `/` of FLOAT, `& | ^` of BOOL or INT.

    `//` and `%` round down as Python's do; by a whole zero both give 0.
    """

    operator: str
    left: Expression
    right: Expression
    kind: Kind


@dataclass(frozen=True, eq=False)
class Power:
    """A value multiplied with itself, `exponent` factors of it (at least one)."""

    base: Expression
    exponent: int
    kind: Kind


@dataclass(frozen=True, eq=False)
class Compare:
    """`< <= > >= == !=` of two values of one kind."""

    operator: str
    left: Expression
    right: Expression
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, eq=False)
class Logic:
    """`and` or `or` of two BOOL."""

    operator: str
    left: Expression
    right: Expression
    kind: Kind = Kind.BOOL


@dataclass(frozen=True, eq=False)
class Select:
    """`yes if condition else no`, both of the same kind."""

    condition: Expression
    yes: Expression
    no: Expression
    kind: Kind


@dataclass(frozen=True, eq=False)
class Call:
    """A function of the table `zmlx.authoring.functions`, by its name there."""

    function: str
    arguments: tuple[Expression, ...]
    kind: Kind


@dataclass(frozen=True, eq=False)
class Apply:
    """A call of another function; its value where it has one result, else see `Unpack`."""

    function: Function
    arguments: tuple[Expression, ...]

    @property
    def kind(self) -> Kind:
        """The kind of the first result."""
        return self.function.results[0]


Expression: TypeAlias = (
    Constant | Variable | Cast | Unary | Binary | Power | Compare | Logic | Select | Call | Apply
)


@dataclass(frozen=True, eq=False)
class Assign:
    """`name = value`."""

    name: str
    value: Expression


@dataclass(frozen=True, eq=False)
class Unpack:
    """`name, name, ... = call`: as many names as the function has results."""

    names: tuple[str, ...]
    call: Apply


@dataclass(frozen=True, eq=False)
class If:
    """`if condition: ... else: ...`."""

    condition: Expression
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]


@dataclass(frozen=True, eq=False)
class For:
    """`for name in range(start, stop, step)`; the bounds are evaluated once, before it.

    A `step` of zero, which Python refuses, makes no turn.
    """

    name: str
    start: Expression
    stop: Expression
    step: Expression
    body: tuple[Statement, ...]


@dataclass(frozen=True, eq=False)
class Return:
    """Ends the function with its results."""

    values: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Break:
    """Ends the innermost loop."""


@dataclass(frozen=True, eq=False)
class Continue:
    """Ends this turn of the innermost loop."""


Statement: TypeAlias = Assign | Unpack | If | For | Return | Break | Continue


@dataclass(frozen=True, eq=False)
class Function:
    """A function whose parameters and locals have one kind each; every path returns.

    Attributes:
        name: for people; not unique.
        parameters: their names, in order.
        variables: kind of every parameter and local. Names that the compiler made hold a
            character that Python's identifiers cannot.
        body: the statements.
        results: kinds of what it returns.
    """

    name: str
    parameters: tuple[str, ...]
    variables: dict[str, Kind]
    body: tuple[Statement, ...]
    results: tuple[Kind, ...]


def cast(value: Expression, kind: Kind) -> Expression:
    """Return `value` as `kind`; constants are converted here."""
    if value.kind == kind:
        return value
    if isinstance(value, Constant):
        converted = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}[kind](value.value)
        return Constant(converted, kind)
    return Cast(value, kind)


def zero(kind: Kind) -> Constant:
    """Return the constant 0 of a kind."""
    return Constant({Kind.BOOL: False, Kind.INT: 0, Kind.FLOAT: 0.0}[kind], kind)


def operands(node: Expression) -> tuple[Expression, ...]:
    """Return the expressions that an expression is made of, in order."""
    match node:
        case Cast() | Unary():
            return (node.operand,)
        case Binary() | Compare() | Logic():
            return (node.left, node.right)
        case Power():
            return (node.base,)
        case Select():
            return (node.condition, node.yes, node.no)
        case Call() | Apply():
            return node.arguments
    return ()


def _roots(body: tuple[Statement, ...]) -> Iterator[Expression]:
    for statement in body:
        match statement:
            case Assign():
                yield statement.value
            case Unpack():
                yield statement.call
            case If():
                yield statement.condition
                yield from _roots(statement.then)
                yield from _roots(statement.otherwise)
            case For():
                yield from (statement.start, statement.stop, statement.step)
                yield from _roots(statement.body)
            case Return():
                yield from statement.values


def expressions(function: Function) -> Iterator[Expression]:
    """Yield every expression in a function's body, not in those that it calls."""
    waiting = list(_roots(function.body))
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(operands(node))


def loops(body: tuple[Statement, ...]) -> Iterator[For]:
    """Yield every loop in a body, outer ones first."""
    for statement in body:
        if isinstance(statement, If):
            yield from loops(statement.then)
            yield from loops(statement.otherwise)
        elif isinstance(statement, For):
            yield statement
            yield from loops(statement.body)


def reachable(function: Function) -> list[Function]:
    """Return a function and all that it calls, each before those that call it."""
    found: dict[Function, None] = {}

    def visit(current: Function) -> None:
        for node in expressions(current):
            if isinstance(node, Apply) and node.function not in found:
                visit(node.function)
        found[current] = None

    visit(function)
    return list(found)
