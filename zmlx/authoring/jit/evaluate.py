"""The reference: the typed form evaluated with MLX operations on whole arrays.

Where elements take different ways, both are computed and a mask says which elements are on one;
`return`, `break` and `continue` take elements out of the mask. A loop makes as many turns as the
element that needs most. Whole numbers that no array takes part in stay Python's, so that most
bounds of loops and conditions on counters are decided at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx

from zmlx.authoring.functions import FUNCTIONS
from zmlx.authoring.jit.ir import (
    Apply,
    Assign,
    Binary,
    Break,
    Call,
    Cast,
    Compare,
    Constant,
    Continue,
    Expression,
    For,
    Function,
    If,
    Kind,
    Logic,
    Power,
    Return,
    Select,
    Statement,
    Unary,
    Unpack,
    Variable,
)


class LengthUnknown(ValueError):
    """A loop's length depends on an array that a transformation keeps from being evaluated."""


#: A value: Python's where no array takes part (never a float), else an array.
_Value: TypeAlias = int | bool | mx.array
#: Elements on a way: None for all of them, False for none.
_Mask: TypeAlias = mx.array | bool | None

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
}


def evaluate(
    function: Function, arguments: Sequence[mx.array], integer: mx.Dtype
) -> list[mx.array]:
    """Return a function's results; they broadcast against the arguments.

    Args:
        function: what is evaluated.
        arguments: one array of any dtype for each parameter; they broadcast.
        integer: int32 or int64, the dtype of INT.

    Raises:
        LengthUnknown: see there.
    """
    kinds = [function.variables[name] for name in function.parameters]
    dtypes = {Kind.BOOL: mx.bool_, Kind.INT: integer, Kind.FLOAT: mx.float32}
    given = [a.astype(dtypes[kind]) for a, kind in zip(arguments, kinds, strict=True)]
    results = _Evaluation(integer).call(function, given, None)
    return [
        mx.array(value, dtypes[kind]) if not isinstance(value, mx.array) else value
        for value, kind in zip(results, function.results, strict=True)
    ]


def _and(mask: _Mask, other: mx.array | bool) -> _Mask:
    if isinstance(other, bool):
        return mask if other else False
    if mask is None:
        return other
    return mx.logical_and(mask, other) if isinstance(mask, mx.array) else mask


def _or(one: _Mask, other: _Mask) -> _Mask:
    if one is None or other is None:
        return None
    if isinstance(one, bool):
        return other
    return one if isinstance(other, bool) else mx.logical_or(one, other)


def _not(value: mx.array | bool) -> mx.array | bool:
    return not value if isinstance(value, bool) else mx.logical_not(value)


@dataclass
class _Loop:
    """Elements that left the innermost loop, and those that only left this turn."""

    broken: _Mask = False
    continued: _Mask = False


@dataclass
class _Frame:
    """One call of one function."""

    values: dict[str, _Value]
    results: list[_Value] | None = None
    loops: list[_Loop] = field(default_factory=list)


class _Evaluation:
    def __init__(self, integer: mx.Dtype) -> None:
        self._integer = integer
        self._half = 2**63 if integer == mx.int64 else 2**31

    def call(self, function: Function, arguments: Sequence[_Value], mask: _Mask) -> list[_Value]:
        frame = _Frame(dict(zip(function.parameters, arguments, strict=True)))
        self._block(function.body, frame, mask)
        assert frame.results is not None, f"{function.name} returned on no path"
        return frame.results

    # Statements. Each returns the mask of the elements that go on behind it.

    def _block(self, body: tuple[Statement, ...], frame: _Frame, mask: _Mask) -> _Mask:
        for statement in body:
            if mask is False:
                break
            mask = self._statement(statement, frame, mask)
        return mask

    def _statement(self, statement: Statement, frame: _Frame, mask: _Mask) -> _Mask:
        match statement:
            case Assign(name=name, value=value):
                self._store(frame, name, self._value(value, frame, mask), mask)
            case Unpack(names=names, call=call):
                for name, result in zip(names, self._apply(call, frame, mask), strict=True):
                    self._store(frame, name, result, mask)
            case If():
                return self._if(statement, frame, mask)
            case For():
                return self._for(statement, frame, mask)
            case Return(values=values):
                found = [self._value(value, frame, mask) for value in values]
                if frame.results is not None:
                    pairs = zip(found, frame.results, strict=True)
                    found = [self._merged(mask, new, old) for new, old in pairs]
                frame.results = found
                return False
            case Break():
                frame.loops[-1].broken = _or(frame.loops[-1].broken, mask)
                return False
            case Continue():
                frame.loops[-1].continued = _or(frame.loops[-1].continued, mask)
                return False
        return mask

    def _store(self, frame: _Frame, name: str, value: _Value, mask: _Mask) -> None:
        old = frame.values.get(name)
        frame.values[name] = value if old is None else self._merged(mask, value, old)

    def _merged(self, mask: _Mask, new: _Value, old: _Value) -> _Value:
        if mask is None:
            return new
        return self._where(mask, new, old)

    def _if(self, statement: If, frame: _Frame, mask: _Mask) -> _Mask:
        condition = self._value(statement.condition, frame, mask)
        if isinstance(condition, bool | int):
            return self._block(statement.then if condition else statement.otherwise, frame, mask)
        yes, no = _and(mask, condition), _and(mask, _not(condition))
        after_yes = self._block(statement.then, frame, yes)
        after_no = self._block(statement.otherwise, frame, no)
        return mask if after_yes is yes and after_no is no else _or(after_yes, after_no)

    def _for(self, statement: For, frame: _Frame, mask: _Mask) -> _Mask:
        start, stop, step = (
            self._value(bound, frame, mask)
            for bound in (statement.start, statement.stop, statement.step)
        )
        turns = self._turns(start, stop, step)
        loop = _Loop()
        frame.loops.append(loop)
        if isinstance(turns, int):
            mask = self._turn_together(statement, frame, mask, start, step, turns)
        else:
            for turn in range(self._most(turns, mask)):
                running = _and(mask, turns > turn)
                self._store(frame, statement.name, self._counted(start, step, turn), running)
                end = self._block(statement.body, frame, running)
                if end is not running:
                    # Those whose turns were over stay in; those that returned or broke do not.
                    over = _and(mask, turns <= turn)
                    mask = _or(_or(end, loop.continued), over)
                    loop.continued = False
        frame.loops.pop()
        return _or(mask, loop.broken)

    def _turn_together(
        self, statement: For, frame: _Frame, mask: _Mask, start: _Value, step: _Value, turns: int
    ) -> _Mask:
        """Make the same turns for all elements; while they last the counter is one for all.

        Bounds of inner loops that depend on it are then known. Elements that break keep theirs.
        """
        name, loop, entered = statement.name, frame.loops[-1], mask
        before, left = frame.values.get(name), None
        for turn in range(turns):
            broken = loop.broken
            frame.values[name] = self._counted(start, step, turn)
            end = self._block(statement.body, frame, mask)
            if loop.broken is not broken:
                own = frame.values[name]
                left = own if left is None else self._merged(broken, left, own)
            if end is not mask:
                mask = _or(end, loop.continued)
                loop.continued = False
            if mask is False:
                break
        if turns and left is not None and loop.broken is not None:
            frame.values[name] = self._merged(loop.broken, left, frame.values[name])
        if turns and before is not None:
            frame.values[name] = self._merged(entered, frame.values[name], before)
        return mask

    def _counted(self, start: _Value, step: _Value, turn: int) -> _Value:
        return self._arithmetic("+", start, self._arithmetic("*", step, turn))

    def _turns(self, start: _Value, stop: _Value, step: _Value) -> int | mx.array:
        """Return how many turns a loop makes; 0 where the step is zero."""
        if not any(isinstance(bound, mx.array) for bound in (start, stop, step)):
            return len(range(int(start), int(stop), int(step))) if step else 0
        start, stop, step = (mx.array(bound, mx.int64) for bound in (start, stop, step))
        size = mx.maximum(mx.abs(step), 1)
        length = mx.where(step > 0, stop - start, mx.where(step < 0, start - stop, 0))
        return mx.maximum((length + size - 1) // size, 0)

    def _most(self, turns: mx.array, mask: _Mask) -> int:
        """Return the turns of the element that needs most; this evaluates."""
        if isinstance(mask, mx.array):
            turns = mx.where(mask, turns, 0)
        try:
            return int(turns.max().item()) if turns.size else 0  # type: ignore[arg-type]
        except ValueError as error:
            raise LengthUnknown(
                "the length of a loop depends on an array, which mx.compile and mx.vmap keep from "
                "being evaluated"
            ) from error

    # Expressions

    def _value(self, node: Expression, frame: _Frame, mask: _Mask) -> _Value:
        match node:
            case Constant(value=value, kind=kind):
                return mx.array(value, mx.float32) if kind == Kind.FLOAT else value  # type: ignore[return-value]
            case Variable(name=name):
                return frame.values[name]
            case Cast(operand=operand, kind=kind):
                return self._cast(self._value(operand, frame, mask), operand.kind, kind)
            case Unary(operator=shown, operand=operand):
                return self._unary(shown, self._value(operand, frame, mask))
            case Binary(operator=shown, left=left, right=right):
                pair = self._value(left, frame, mask), self._value(right, frame, mask)
                if shown in ("//", "%"):
                    whole = node.kind == Kind.INT
                    divided = self._divided_whole if whole else self._divided_float
                    return divided(shown, *pair)  # type: ignore[arg-type]
                return self._arithmetic(shown, *pair)
            case Power(base=base, exponent=exponent):
                return self._power(self._value(base, frame, mask), exponent)
            case Compare(operator=shown, left=left, right=right):
                return _COMPARE[shown](  # type: ignore[no-any-return]
                    self._value(left, frame, mask), self._value(right, frame, mask)
                )
            case Logic():
                return self._logic(node, frame, mask)
            case Select(condition=condition, yes=yes, no=no):
                chosen = self._value(condition, frame, mask)
                if not isinstance(chosen, mx.array):
                    return self._value(yes if chosen else no, frame, mask)
                return self._where(
                    chosen,
                    self._value(yes, frame, self._narrowed(mask, chosen, yes)),
                    self._value(no, frame, self._narrowed(mask, _not(chosen), no)),
                )
            case Call(function=name, arguments=arguments, kind=kind):
                given = [self._array(self._value(argument, frame, mask)) for argument in arguments]
                return FUNCTIONS[name].mlx(*given)
            case Apply():
                return self._apply(node, frame, mask)[0]

    def _apply(self, call: Apply, frame: _Frame, mask: _Mask) -> list[_Value]:
        arguments = [self._value(argument, frame, mask) for argument in call.arguments]
        return self.call(call.function, arguments, mask)

    def _narrowed(self, mask: _Mask, chosen: mx.array | bool, branch: Expression) -> _Mask:
        """Return the mask of a branch; it matters to loops in functions that it calls."""
        return mask if isinstance(branch, Constant | Variable) else _and(mask, chosen)

    def _logic(self, node: Logic, frame: _Frame, mask: _Mask) -> _Value:
        left = self._value(node.left, frame, mask)
        decisive = node.operator == "or"
        if not isinstance(left, mx.array):
            return left if bool(left) is decisive else self._value(node.right, frame, mask)
        asked = _not(left) if decisive else left
        right = self._array(self._value(node.right, frame, self._narrowed(mask, asked, node.right)))
        return mx.logical_or(left, right) if decisive else mx.logical_and(left, right)

    def _array(self, value: _Value) -> mx.array:
        if isinstance(value, mx.array):
            return value
        return mx.array(value, mx.bool_ if isinstance(value, bool) else self._integer)

    def _where(self, mask: mx.array | bool, yes: _Value, no: _Value) -> _Value:
        return mx.where(mask, self._array(yes), self._array(no))

    def _wrapped(self, value: int) -> int:
        return (value + self._half) % (2 * self._half) - self._half

    def _cast(self, value: _Value, before: Kind, kind: Kind) -> _Value:
        if kind == Kind.BOOL:
            return bool(value) if not isinstance(value, mx.array) else value != 0
        if kind == Kind.FLOAT:
            if isinstance(value, mx.array):
                return value.astype(mx.float32)
            return mx.array(float(value), mx.float32)
        if not isinstance(value, mx.array):
            return int(value)
        if before == Kind.BOOL:
            return value.astype(self._integer)
        # Towards zero; what does not fit becomes the nearest that does, NaN becomes 0.
        inside = mx.logical_and(value >= -float(self._half), value < float(self._half))
        number = mx.where(inside, value, 0.0).astype(self._integer)
        number = mx.where(value >= float(self._half), self._array(self._half - 1), number)
        return mx.where(value < -float(self._half), self._array(-self._half), number)

    def _unary(self, shown: str, value: _Value) -> _Value:
        if not isinstance(value, mx.array):
            if shown == "not":
                return not value
            return self._wrapped(-value) if shown == "-" else ~value
        if shown == "not":
            return mx.logical_not(value)
        return -value if shown == "-" else mx.bitwise_invert(value)

    def _arithmetic(self, shown: str, left: _Value, right: _Value) -> _Value:
        if shown in "&|^" and (isinstance(left, mx.array) or isinstance(right, mx.array)):
            left, right = self._array(left), self._array(right)
        value = _ARITHMETIC[shown](left, right)
        if isinstance(value, mx.array | bool):
            return value
        return self._wrapped(value)

    def _power(self, base: _Value, exponent: int) -> _Value:
        """Multiply in the order of the kernel's: square, and multiply where a bit is set."""
        whole: _Value | None = None
        while exponent:
            if exponent & 1:
                whole = base if whole is None else self._arithmetic("*", whole, base)
            exponent >>= 1
            if exponent:
                base = self._arithmetic("*", base, base)
        assert whole is not None
        return whole

    def _divided_whole(self, shown: str, left: _Value, right: _Value) -> _Value:
        if not isinstance(left, mx.array) and not isinstance(right, mx.array):
            if right == 0:
                return 0
            return self._wrapped(left // right if shown == "//" else left % right)
        left, right = self._array(left), self._array(right)
        # Processors trap on division by 0, and on that of the smallest number by -1.
        apart = mx.logical_and(right != 0, right != -1)
        divisor = mx.where(apart, right, self._array(1))
        if shown == "%":
            return mx.where(apart, mx.remainder(left, divisor), self._array(0))
        by_one = mx.where(right == -1, -left, self._array(0))
        return mx.where(apart, mx.floor_divide(left, divisor), by_one)

    def _divided_float(self, shown: str, left: mx.array, right: mx.array) -> mx.array:
        rest = mx.remainder(left, right)
        if shown == "%":
            return rest
        quotient = mx.round((left - rest) / right)
        # What is left of a finite number by an infinite one is 0, or -1 across zero.
        across = mx.where(left * right < 0, mx.array(-1.0), mx.array(0.0))
        return mx.where(mx.logical_and(mx.isinf(right), mx.isfinite(left)), across, quotient)
