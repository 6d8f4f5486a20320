"""From the syntax tree of an expression to the typed form, constants folded as Python would."""

from __future__ import annotations

import ast
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from zmlx.authoring.functions import FUNCTIONS
from zmlx.authoring.jit.definition import Definition
from zmlx.authoring.jit.ir import (
    Apply,
    Binary,
    Call,
    Compare,
    Constant,
    Expression,
    Function,
    Kind,
    Logic,
    Power,
    Select,
    Unary,
    Variable,
    cast,
    zero,
)
from zmlx.authoring.jit.names import UNKNOWN, as_number, meaning
from zmlx.authoring.jit.source import JitError

_BINARY: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Mod: ("%", operator.mod),
    ast.Pow: ("**", operator.pow),
    ast.BitAnd: ("&", operator.and_),
    ast.BitOr: ("|", operator.or_),
    ast.BitXor: ("^", operator.xor),
}
#: Operators that are also called as functions: `mx.remainder(a, b)`, `pow(a, b)`.
_CALLED = {shown: kind for kind, (shown, _) in _BINARY.items() if shown in ("//", "%", "**")}

_COMPARE: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}

_REFUSED: dict[type[ast.expr], str] = {
    ast.Attribute: "attributes: a kernel sees numbers; take the value into a name outside",
    ast.Subscript: "indexing: a kernel sees one element, not the array",
    ast.JoinedStr: "strings have no meaning in a kernel",
    ast.Lambda: "functions in functions: define it outside, with @jit of its own",
    ast.ListComp: "comprehensions: write a `for` loop over `range`",
    ast.SetComp: "comprehensions: write a `for` loop over `range`",
    ast.DictComp: "comprehensions: write a `for` loop over `range`",
    ast.GeneratorExp: "generators: write a `for` loop over `range`",
    ast.Yield: "a generator cannot be compiled; use `return`",
    ast.YieldFrom: "a generator cannot be compiled; use `return`",
    ast.Await: "`await` has no meaning in a kernel",
    ast.List: "lists have no meaning in a kernel",
    ast.Tuple: "a tuple can only be assigned to names or returned",
    ast.Dict: "dicts have no meaning in a kernel",
    ast.Set: "sets have no meaning in a kernel",
    ast.NamedExpr: "`:=` is not supported; assign in a statement of its own",
    ast.Starred: "`*` is not supported; name each value",
}

#: Largest whole exponent that is multiplied out; beyond it the power function is as good.
_LONGEST_POWER = 64
#: Functions that leave whole numbers as they are.
_WHOLE_ALREADY = ("floor", "ceil", "trunc", "rint")


class Expressions:
    """Lowers expressions, given the kinds of variables that are known so far.

    Attributes:
        variables: variable -> its kind; a variable that is not in it yet counts as BOOL.
    """

    def __init__(
        self,
        definition: Definition,
        every: frozenset[str],
        variables: dict[str, Kind],
        *,
        final: bool,
    ) -> None:
        self.variables = variables
        self._definition = definition
        self._every = every
        self._final = final

    def error(self, node: ast.AST, reason: str) -> JitError:
        """Return the error that points at `node`."""
        return self._definition.source.error(node, reason)

    def typed(self, definition: Definition, kinds: tuple[Kind, ...]) -> Function:
        """Return another function for arguments of these kinds."""
        raise NotImplementedError

    def _misfit(self, node: ast.AST, reason: str) -> Expression:
        """Refuse kinds that do not fit; before all are known, stand in with the narrowest."""
        if self._final:
            raise self.error(node, reason)
        return zero(Kind.BOOL)

    def value(self, node: ast.expr, *, several: bool = False) -> Expression:
        """Return an expression's typed form; `several` admits a call with several results."""
        match node:
            case ast.Constant(value=value):
                return self._number(node, value)
            case ast.Name():
                return self._name(node)
            case ast.Attribute():
                return self._number(node, self._member(node))
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(node, op, self.value(left), self.value(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._not(self.condition(operand))
            case ast.UnaryOp(op=op, operand=operand):
                return self._unary(node, op, self.value(operand))
            case ast.Compare():
                return self._compare(node)
            case ast.BoolOp(op=op, values=values):
                return self._either(isinstance(op, ast.And), [self.value(each) for each in values])
            case ast.IfExp(test=test, body=yes, orelse=no):
                return self._select(self.condition(test), self.value(yes), self.value(no))
            case ast.Call():
                return self._call(node, several=several)
        reason = _REFUSED.get(type(node), f"`{type(node).__name__}` is not supported")
        raise self.error(node, reason)

    def condition(self, node: ast.expr) -> Expression:
        """Return whether an expression is true, as BOOL."""
        if isinstance(node, ast.BoolOp):
            shown = "and" if isinstance(node.op, ast.And) else "or"
            whole = self.condition(node.values[0])
            for part in node.values[1:]:
                whole = Logic(shown, whole, self.condition(part))
            return whole
        return cast(self.value(node), Kind.BOOL)

    def bounds(self, node: ast.expr) -> tuple[Expression, Expression, Expression]:
        """Return start, stop and step of a call of `range`."""
        if not (isinstance(node, ast.Call) and self._meaning(node.func) == "range"):
            raise self.error(node, "a loop must go over `range(...)`")
        arguments = self._arguments(node)
        if not 1 <= len(arguments) <= 3:
            raise self.error(node, "`range` takes 1 to 3 arguments")
        whole = []
        for given, argument in zip(node.args, arguments, strict=True):
            if argument.kind == Kind.FLOAT:
                argument = self._misfit(given, "`range` takes whole numbers; write int(...)")
            whole.append(cast(argument, Kind.INT))
        if len(whole) == 1:
            whole.insert(0, Constant(0, Kind.INT))
        if len(whole) == 2:
            whole.append(Constant(1, Kind.INT))
        start, stop, step = whole
        if isinstance(step, Constant) and step.value == 0:
            self._misfit(node, "the step of `range` is zero")
        return start, stop, step

    # Names

    def _name(self, node: ast.Name) -> Expression:
        if node.id in self._every:
            return Variable(node.id, self.variables.get(node.id, Kind.BOOL))
        return self._number(node, self._around(node))

    def _around(self, node: ast.Name) -> Any:
        """Return what a name outside of the function stands for."""
        found = self._definition.names.lookup(node.id)
        if found is UNKNOWN:
            raise self.error(node, f"`{node.id}` is not defined when the function is decorated")
        return found

    def _member(self, node: ast.Attribute) -> Any:
        """Return what `module.name` stands for."""
        base: Any = None
        if isinstance(node.value, ast.Name) and node.value.id not in self._every:
            base = self._around(node.value)
        elif isinstance(node.value, ast.Attribute):
            base = self._member(node.value)
        if not isinstance(base, types.ModuleType):
            raise self.error(node, _REFUSED[ast.Attribute])
        shown = ast.unparse(node)
        found = self._definition.names.member(shown, base, node.attr)
        if found is UNKNOWN:
            raise self.error(node, f"`{shown}` does not exist")
        return found

    def _number(self, node: ast.expr, value: Any) -> Expression:
        number = as_number(value)
        if number is not None:
            kind = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT}[type(number)]
            return Constant(number, kind)
        shown = ast.unparse(node)
        if isinstance(value, mx.array):
            raise self.error(node, f"`{shown}` is an array; make it a parameter of the function")
        if isinstance(value, str):
            raise self.error(node, "strings have no meaning in a kernel")
        if callable(value):
            raise self.error(node, f"`{shown}` is a function; it can only be called")
        raise self.error(
            node, f"`{shown}` is a {type(value).__name__}; only numbers can be constants"
        )

    # Operators

    def _unary(self, node: ast.AST, op: ast.unaryop, operand: Expression) -> Expression:
        wide = cast(operand, max(operand.kind, Kind.INT))
        if isinstance(op, ast.UAdd):
            return wide
        if isinstance(op, ast.Invert):
            if wide.kind == Kind.FLOAT:
                return self._misfit(node, "`~` of a float; it takes whole numbers")
            if isinstance(wide, Constant):
                return Constant(~int(wide.value), Kind.INT)
            return Unary("~", wide, Kind.INT)
        if isinstance(wide, Constant):
            return Constant(-wide.value, wide.kind)
        return Unary("-", wide, wide.kind)

    def binary(
        self, node: ast.AST, op: ast.operator, left: Expression, right: Expression
    ) -> Expression:
        """Return the value of an operator of two operands."""
        if type(op) not in _BINARY:
            shown = {ast.MatMult: "@", ast.LShift: "<<", ast.RShift: ">>"}[type(op)]
            hint = "" if shown == "@" else "; multiply or floor-divide by a power of two"
            raise self.error(node, f"`{shown}` is not supported{hint}")
        shown, compute = _BINARY[type(op)]
        if isinstance(left, Constant) and isinstance(right, Constant):
            return self._folded(node, compute, left, right)
        kind = max(left.kind, right.kind, Kind.INT)
        if shown == "**":
            return self._power(node, left, right)
        if shown == "/":
            kind = Kind.FLOAT
        if shown in "&|^":
            kind = max(left.kind, right.kind)
            if kind == Kind.FLOAT:
                return self._misfit(node, f"`{shown}` of a float; for truth values write and, or")
        return Binary(shown, cast(left, kind), cast(right, kind), kind)

    def _folded(
        self, node: ast.AST, compute: Callable[..., Any], *operands: Constant
    ) -> Expression:
        """Return the constant that Python computes from constants."""
        try:
            value = compute(*(operand.value for operand in operands))
        except (ArithmeticError, ValueError, TypeError) as failure:
            return self._misfit(
                node, f"Python computes this as {type(failure).__name__}: {failure}"
            )
        number = as_number(value)
        if number is None:
            return self._misfit(node, f"this is the {type(value).__name__} {value}")
        kind = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT}[type(number)]
        return Constant(number, kind)

    def _power(self, node: ast.AST, base: Expression, exponent: Expression) -> Expression:
        kind = max(base.kind, exponent.kind, Kind.INT)
        if not isinstance(exponent, Constant):
            if kind != Kind.FLOAT:
                return self._misfit(
                    node,
                    "a whole number to the power of one that may be negative is whole or not; "
                    "write float(...) ** ...",
                )
        elif exponent.value == int(exponent.value if math.isfinite(exponent.value) else 0):
            count = int(exponent.value)
            if count < 0:
                kind = Kind.FLOAT
            base = cast(base, kind)
            if count == 0:
                return cast(Constant(1, Kind.INT), kind)
            if abs(count) <= _LONGEST_POWER:
                whole = base if abs(count) == 1 else Power(base, abs(count), kind)
                return whole if count > 0 else Binary("/", Constant(1.0, kind), whole, kind)
            if kind == Kind.INT:
                return self._misfit(node, f"a whole number to the power {count} does not fit")
        return Call("pow", (cast(base, Kind.FLOAT), cast(exponent, Kind.FLOAT)), Kind.FLOAT)

    def _not(self, operand: Expression) -> Expression:
        if isinstance(operand, Constant):
            return Constant(not operand.value, Kind.BOOL)
        return Unary("not", operand, Kind.BOOL)

    def _compare(self, node: ast.Compare) -> Expression:
        whole: Expression | None = None
        left = self.value(node.left)
        for op, part in zip(node.ops, node.comparators, strict=True):
            if type(op) not in _COMPARE:
                raise self.error(node, "`is` and `in` have no meaning in a kernel; compare with ==")
            right = self.value(part)
            shown, compute = _COMPARE[type(op)]
            if isinstance(left, Constant) and isinstance(right, Constant):
                one = self._folded(node, compute, left, right)
            else:
                kind = max(left.kind, right.kind)
                one = Compare(shown, cast(left, kind), cast(right, kind))
            whole = one if whole is None else Logic("and", whole, one)
            left = right
        assert whole is not None
        return whole

    def _either(self, both: bool, values: list[Expression]) -> Expression:
        """Return `a and b ...` or `a or b ...`: the value that decides, as Python has it."""
        if all(value.kind == Kind.BOOL for value in values):
            whole = values[0]
            for value in values[1:]:
                whole = Logic("and" if both else "or", whole, value)
            return whole
        whole = values[-1]
        for value in reversed(values[:-1]):
            true = cast(value, Kind.BOOL)
            whole = self._select(true, whole, value) if both else self._select(true, value, whole)
        return whole

    def _select(self, condition: Expression, yes: Expression, no: Expression) -> Expression:
        kind = max(yes.kind, no.kind)
        return Select(condition, cast(yes, kind), cast(no, kind), kind)

    # Calls

    def _callee(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute):
            return self._member(node)
        if not isinstance(node, ast.Name):
            raise self.error(node, "only functions with a name can be called")
        if node.id in self._every:
            raise self.error(node, f"`{node.id}` is a number here and cannot be called")
        if node.id == self._definition.name:
            raise self.error(node, f"`{node.id}` calls itself; kernels cannot recurse")
        return self._around(node)

    def _meaning(self, node: ast.expr) -> str | None:
        return meaning(self._callee(node))

    def _arguments(self, node: ast.Call) -> list[Expression]:
        if node.keywords:
            raise self.error(node, "arguments by name are not supported; pass them in order")
        return [self.value(argument) for argument in node.args]

    def _call(self, node: ast.Call, *, several: bool) -> Expression:
        callee = self._callee(node.func)
        definition = getattr(callee, "definition", None)
        if isinstance(definition, Definition):
            return self._apply(node, definition, several=several)
        name = meaning(callee)
        if name is None:
            shown = ast.unparse(node.func)
            raise self.error(
                node, f"`{shown}` is no function of kernels; decorate your own with @jit"
            )
        if name == "range":
            raise self.error(node, "`range` can only be looped over")
        arguments = self._arguments(node)
        takes = {"clip": 3, "where": 3, "bool": 1, "int": 1, "float": 1, "not": 1}.get(name, 2)
        if name in FUNCTIONS:
            takes = FUNCTIONS[name].arguments
        many = name in ("max", "min") and len(arguments) > 2
        if len(arguments) != takes and not many:
            shown = ast.unparse(node.func)
            raise self.error(node, f"`{shown}` takes {takes} argument{'s' * (takes != 1)} here")
        return self._form(node, name, arguments)

    def _form(self, node: ast.Call, name: str, arguments: list[Expression]) -> Expression:
        first, *rest = arguments
        if name in _CALLED:
            return self.binary(node, _CALLED[name](), first, rest[0])
        match name:
            case "bool":
                return cast(first, Kind.BOOL)
            case "float":
                return cast(first, Kind.FLOAT)
            case "int":
                return self._int(node, first)
            case "not":
                return self._not(cast(first, Kind.BOOL))
            case "and" | "or":
                return Logic(name, cast(first, Kind.BOOL), cast(rest[0], Kind.BOOL))
            case "where":
                return self._select(cast(first, Kind.BOOL), rest[0], rest[1])
            case "clip":
                above = self._function(node, "max", [first, rest[0]])
                return self._function(node, "min", [above, rest[1]])
        if name in ("max", "min"):
            for value in rest:
                first = self._function(node, name, [first, value])
            return first
        return self._function(node, name, arguments)

    def _int(self, node: ast.AST, value: Expression) -> Expression:
        if isinstance(value, Constant):
            return self._folded(node, int, value)
        return cast(value, Kind.INT)

    def _function(self, node: ast.AST, name: str, arguments: list[Expression]) -> Expression:
        """Return a call of a function of the table."""
        function = FUNCTIONS[name]
        widest = max(argument.kind for argument in arguments)
        whole = widest != Kind.FLOAT and (function.result == "whole" or name in _WHOLE_ALREADY)
        kind = Kind.INT if whole else Kind.FLOAT
        arguments = [cast(argument, kind) for argument in arguments]
        if whole and name in _WHOLE_ALREADY:
            return arguments[0]
        constants = [argument for argument in arguments if isinstance(argument, Constant)]
        result = Kind.BOOL if function.result == "bool" else kind
        if len(constants) == len(arguments):
            return cast(self._folded(node, function.python, *constants), result)
        return Call(name, tuple(arguments), result)

    def _apply(self, node: ast.Call, definition: Definition, *, several: bool) -> Expression:
        arguments = self._arguments(node)
        parameters = definition.parameters
        for parameter in parameters[len(arguments) :]:
            if parameter.default is None:
                raise self.error(node, f"`{definition.name}` needs `{parameter.name}`")
            arguments.append(self._number(node, parameter.default))
        if len(arguments) > len(parameters):
            raise self.error(node, f"`{definition.name}` takes {len(parameters)} arguments")
        function = self._called(node, definition, arguments)
        if function is None:
            return zero(Kind.BOOL)
        if len(function.results) > 1 and not several:
            raise self.error(
                node,
                f"`{definition.name}` returns {len(function.results)} values; assign them "
                "to names first",
            )
        kinds = (function.variables[name] for name in function.parameters)
        return Apply(function, tuple(cast(a, k) for a, k in zip(arguments, kinds, strict=True)))

    def _called(
        self, node: ast.Call, definition: Definition, arguments: list[Expression]
    ) -> Function | None:
        """Return the function for these arguments; None while kinds do not fit yet."""
        kinds = []
        for parameter, argument in zip(definition.parameters, arguments, strict=True):
            kind = argument.kind if parameter.kind is None else parameter.kind
            if argument.kind > kind:
                self._misfit(
                    node, f"`{parameter.name}` of `{definition.name}` takes {kind.name.lower()}"
                )
            kinds.append(kind)
        try:
            return self.typed(definition, tuple(kinds))
        except JitError as error:
            if self._final:
                raise self.error(node, f"cannot call `{definition.name}` here: {error}") from error
            return None
