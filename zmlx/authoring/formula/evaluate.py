"""A formula as MLX operations: what its kernel computes, in the same types and order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from zmlx.authoring.formula.functions import FUNCTIONS
from zmlx.authoring.formula.inference import COMPARISONS, Types
from zmlx.authoring.formula.kinds import CASTS, TYPES, common
from zmlx.authoring.formula.tree import Binary, Call, Cast, Choice, Name, Number, Tree, Unary, names

#: Takes arrays of the variables' types and returns the formulas' values.
Program = Callable[[Sequence[mx.array]], list[mx.array]]


def _whole_divide(a: mx.array, b: mx.array) -> mx.array:
    """Divide as C does: towards zero. (MLX rounds down.)"""
    size = mx.floor_divide(mx.abs(a), mx.abs(b))
    return mx.where((a < 0) != (b < 0), -size, size)


def _whole_remainder(a: mx.array, b: mx.array) -> mx.array:
    """Return C's remainder, which has the sign of `a`. (MLX's has that of `b`.)"""
    size = mx.remainder(mx.abs(a), mx.abs(b))
    return mx.where(a < 0, -size, size)


_OPERATIONS: dict[str, Callable[..., mx.array]] = {
    "+": mx.add,
    "-": mx.subtract,
    "*": mx.multiply,
    "/": mx.divide,
    "==": mx.equal,
    "!=": mx.not_equal,
    "<": mx.less,
    "<=": mx.less_equal,
    ">": mx.greater,
    ">=": mx.greater_equal,
    "&&": mx.logical_and,
    "||": mx.logical_or,
    "&": mx.bitwise_and,
    "|": mx.bitwise_or,
    "^": mx.bitwise_xor,
    "<<": mx.left_shift,
    ">>": mx.right_shift,
}
_WHOLE: dict[str, Callable[..., mx.array]] = {"/": _whole_divide, "%": _whole_remainder}
_UNARY: dict[str, Callable[..., mx.array]] = {
    "-": mx.negative,
    "!": mx.logical_not,
    "~": mx.bitwise_invert,
}


class _Place(NamedTuple):
    """Where a value is: "variable", "constant" or "step", and its number there."""

    where: str
    number: int


def program(
    trees: Sequence[Tree],
    variables: Mapping[str, mx.Dtype],
    results: Sequence[mx.Dtype],
    types: Types,
    *,
    shaped: bool = True,
) -> Program:
    """Return a function of arrays that computes formulas.

    Equal parts are computed once.

    Args:
        trees: the formulas.
        variables: the names of the arrays in their order, with their dtypes.
        results: a dtype for each formula's value.
        types: the types of the formulas' parts.
        shaped: give a formula without variables the shape of the first array, not that of a number.

    Raises:
        FormulaError: an operator is given a type that it does not take.
    """
    builder = _Builder(variables, types, shaped)
    places = [builder.result(tree, dtype) for tree, dtype in zip(trees, results, strict=True)]
    starts = {"variable": 0, "constant": len(variables)}
    starts["step"] = len(variables) + len(builder.constants)
    steps = [
        (operation, tuple(starts[place.where] + place.number for place in arguments))
        for operation, arguments in builder.steps
    ]
    wanted = [starts[place.where] + place.number for place in places]
    constants = tuple(builder.constants)

    def run(arrays: Sequence[mx.array]) -> list[mx.array]:
        values = [*arrays, *constants]
        for operation, arguments in steps:
            values.append(operation(*[values[argument] for argument in arguments]))
        return [values[index] for index in wanted]

    return run


class _Builder:
    """Gives every distinct part of the formulas a place, once for each type it is wanted in."""

    def __init__(self, variables: Mapping[str, mx.Dtype], types: Types, shaped: bool) -> None:
        self.types = types
        self.shaped = shaped
        self.dtypes = variables
        self.variables = {name: index for index, name in enumerate(variables)}
        self.constants: list[mx.array] = []
        self.steps: list[tuple[Callable[..., mx.array], tuple[_Place, ...]]] = []
        self.places: dict[tuple[Tree, str], _Place] = {}

    def place(self, tree: Tree, kind: str) -> _Place:
        """Return where a part's value will be, converted to a type."""
        found = self.places.get((tree, kind))
        if found is None:
            own = self.types.of(tree)
            if isinstance(tree, Number):
                found = self.constant(mx.array(tree.value, TYPES[kind]))
            elif own == kind:
                found = self.compute(tree, own)
            else:
                found = self.step(_converted(TYPES[kind]), self.place(tree, own))
            self.places[tree, kind] = found
        return found

    def result(self, tree: Tree, dtype: mx.Dtype) -> _Place:
        """Return where a formula's value will be, rounded or cut to a dtype."""
        kind = self.types.of(tree)
        value = self.place(tree, kind)
        if self.shaped and not names(tree):
            value = self.step(_spread, value, _Place("variable", 0))
        return value if TYPES[kind] == dtype else self.step(_converted(dtype), value)

    def constant(self, value: mx.array) -> _Place:
        self.constants.append(value)
        return _Place("constant", len(self.constants) - 1)

    def step(self, operation: Callable[..., mx.array], *arguments: _Place) -> _Place:
        self.steps.append((operation, arguments))
        return _Place("step", len(self.steps) - 1)

    def compute(self, tree: Tree, kind: str) -> _Place:
        if isinstance(tree, Name):
            array = _Place("variable", self.variables[tree.name])
            same = self.dtypes[tree.name] == TYPES[kind]
            return array if same else self.step(_converted(TYPES[kind]), array)
        if isinstance(tree, Cast):
            return self.cast(tree, kind)
        if isinstance(tree, Unary):
            operand = "bool" if tree.operator == "!" else kind
            return self.step(_UNARY[tree.operator], self.place(tree.operand, operand))
        if isinstance(tree, Choice):
            branches = (self.place(tree.yes, kind), self.place(tree.no, kind))
            return self.step(mx.where, self.place(tree.condition, "bool"), *branches)
        if isinstance(tree, Binary):
            return self.binary(tree, kind)
        assert isinstance(tree, Call)
        function = FUNCTIONS[tree.name]
        wanted = kind if function.result == "whole" else "float"
        return self.step(function.mlx, *[self.place(node, wanted) for node in tree.arguments])

    def binary(self, tree: Binary, kind: str) -> _Place:
        operator, left, right = tree.operator, self.types.of(tree.left), self.types.of(tree.right)
        if operator in ("&&", "||"):
            wanted = "bool"
        elif operator in COMPARISONS:
            wanted = common(left, right)
        else:
            wanted = kind
        table = _OPERATIONS if wanted == "float" or operator not in _WHOLE else _WHOLE
        return self.step(
            table[operator], self.place(tree.left, wanted), self.place(tree.right, wanted)
        )

    def cast(self, tree: Cast, kind: str) -> _Place:
        target = TYPES[kind] if tree.to == "T" else CASTS[tree.to]
        value = self.place(tree.operand, self.types.of(tree.operand))
        value = self.step(_converted(target), value)
        return value if target == TYPES[kind] else self.step(_converted(TYPES[kind]), value)


def _spread(number: mx.array, array: mx.array) -> mx.array:
    return mx.broadcast_to(number, array.shape)


def _converted(dtype: mx.Dtype) -> Callable[[mx.array], mx.array]:
    return partial(mx.array.astype, dtype=dtype)
