"""Derivatives, by forward accumulation: every value carries its derivative by each parameter.

From a function f this makes functions of the same form, so that they are printed, evaluated and
differentiated again like any other:

    partials   (x, ...) -> f's results, then the derivative of each by each parameter
    gradients  (x, ..., g, ...) -> sum of g * derivative over the results, for each parameter

Only FLOAT results and parameters have derivatives. What is not taken by a branch does not count:
the derivative of `log(x) if x > 0 else 0` is 0 at x = 0, not NaN. Corners are the table's.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable
from functools import cache

from zmlx.authoring.functions import FUNCTIONS
from zmlx.authoring.jit.ir import (
    Apply,
    Assign,
    Binary,
    Call,
    Cast,
    Compare,
    Constant,
    Expression,
    For,
    Function,
    If,
    Kind,
    Power,
    Return,
    Select,
    Statement,
    Unary,
    Unpack,
    Variable,
    operands,
    zero,
)

#: Derivatives of one value: index of the parameter -> expression; what is not there is zero.
_Dual = dict[int, Expression]

_ZERO = zero(Kind.FLOAT)
_ONE = Constant(1.0, Kind.FLOAT)


def float_parameters(function: Function) -> list[int]:
    """Return the positions of a function's FLOAT parameters."""
    kinds = (function.variables[name] for name in function.parameters)
    return [index for index, kind in enumerate(kinds) if kind == Kind.FLOAT]


def float_results(function: Function) -> list[int]:
    """Return the positions of a function's FLOAT results."""
    return [index for index, kind in enumerate(function.results) if kind == Kind.FLOAT]


class Derivatives:
    """Makes derivatives; a function that is called twice is differentiated once."""

    def __init__(self) -> None:
        self._made: dict[Function, Function] = {}

    def partials(self, function: Function) -> Function:
        """Return f's results, then by FLOAT result and FLOAT parameter the derivatives."""
        if function not in self._made:
            self._made[function] = _Forward(function, self).function()
        return self._made[function]

    def gradients(self, function: Function) -> Function:
        """Return for every FLOAT parameter the sum of g * derivative over the FLOAT results.

        It takes f's parameters and one g for each FLOAT result.
        """
        partials = self.partials(function)
        variables = {name: function.variables[name] for name in function.parameters}
        primals = tuple(Variable(name, kind) for name, kind in variables.items())
        given = [_fresh(f"g {i}", variables) for i in float_results(function)]
        variables.update(dict.fromkeys(given, Kind.FLOAT))
        taken = [_fresh(f"value {i}", variables) for i in range(len(partials.results))]
        variables.update(zip(taken, partials.results, strict=True))
        rows, columns = len(float_results(function)), len(float_parameters(function))
        table = [
            [
                Variable(taken[len(function.results) + row * columns + c], Kind.FLOAT)
                for c in range(columns)
            ]
            for row in range(rows)
        ]
        weights = [Variable(name, Kind.FLOAT) for name in given]
        sums = [_sum(_times(weights[r], table[r][c]) for r in range(rows)) for c in range(columns)]
        body = (Unpack(tuple(taken), Apply(partials, primals)), Return(tuple(sums)))
        return Function(
            f"{function.name} gradients",
            (*function.parameters, *given),
            variables,
            body,
            (Kind.FLOAT,) * len(sums),
        )


def _fresh(name: str, taken: Container[str]) -> str:
    """Return a name that no variable has: a derivative's own derivative has all of these again."""
    while name in taken:
        name += " "
    return name


def _sum(terms: Iterable[Expression]) -> Expression:
    whole: Expression = _ZERO
    for term in terms:
        whole = _plus(whole, term)
    return whole


def _is(value: Expression, number: float) -> bool:
    return isinstance(value, Constant) and value.value == number


def _plus(left: Expression, right: Expression) -> Expression:
    if _is(left, 0):
        return right
    return left if _is(right, 0) else Binary("+", left, right, Kind.FLOAT)


def _times(left: Expression, right: Expression) -> Expression:
    if _is(left, 0) or _is(right, 0):
        return _ZERO
    if _is(left, 1):
        return right
    if _is(right, 1):
        return left
    if _is(right, -1):
        return _minus(left)
    if isinstance(left, Select) and _is(left.no, 0):
        # Not a product with 0: the other factor may be infinite.
        return Select(left.condition, _times(left.yes, right), _ZERO, Kind.FLOAT)
    return Binary("*", left, right, Kind.FLOAT)


def _minus(value: Expression) -> Expression:
    if isinstance(value, Constant):
        return _ZERO if value.value == 0 else Constant(-value.value, Kind.FLOAT)
    return Unary("-", value, Kind.FLOAT)


class _Forward:
    """Makes `partials` of one function."""

    def __init__(self, function: Function, derivatives: Derivatives) -> None:
        self._function = function
        self._derivatives = derivatives
        self._parameters = float_parameters(function)
        self._variables = dict(function.variables)
        self._active = _active(function)
        self._assigned = {
            statement.name
            for statement in _assignments(function.body)
            if isinstance(statement, Assign)
        } | {
            name
            for statement in _assignments(function.body)
            if isinstance(statement, Unpack)
            for name in statement.names
        }
        self._tangents: dict[tuple[str, int], str] = {}
        self._temporaries = 0
        self._out: list[Statement] = []

    def function(self) -> Function:
        function = self._function
        for index in self._parameters:
            name = function.parameters[index]
            if name in self._assigned:
                for other in self._active[name]:
                    seed = _ONE if other == index else _ZERO
                    self._out.append(Assign(self._tangent(name, other), seed))
        first = tuple(self._out)
        body = first + self._block(function.body)
        count = len(float_results(function)) * len(self._parameters)
        return Function(
            f"{function.name} partials",
            function.parameters,
            self._variables,
            body,
            (*function.results, *[Kind.FLOAT] * count),
        )

    def _block(self, body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        outer, self._out = self._out, []
        for statement in body:
            self._statement(statement)
        made, self._out = self._out, outer
        return tuple(made)

    def _statement(self, statement: Statement) -> None:
        match statement:
            case Assign(name=name, value=value):
                changed, dual = self._dual(value)
                # Derivatives read the old value of the name, so they are assigned first.
                self._store(name, dual)
                self._out.append(Assign(name, changed))
            case Unpack(names=names, call=call):
                values, duals = self._applied(call)
                for name, result, dual in zip(names, values, duals, strict=True):
                    self._store(name, dual)
                    self._out.append(Assign(name, result))
            case If(condition=condition, then=then, otherwise=otherwise):
                self._out.append(If(condition, self._block(then), self._block(otherwise)))
            case For(name=name, start=start, stop=stop, step=step, body=body):
                self._out.append(For(name, start, stop, step, self._block(body)))
            case Return(values=values):
                self._return(values)
            case _:
                self._out.append(statement)

    def _store(self, name: str, dual: _Dual) -> None:
        for index in self._active.get(name, ()):
            tangent, value = self._tangent(name, index), dual.get(index, _ZERO)
            if not isinstance(value, Variable) or value.name != tangent:
                self._out.append(Assign(tangent, value))

    def _return(self, values: tuple[Expression, ...]) -> None:
        results: list[Expression] = []
        derivatives: list[Expression] = []
        for value in values:
            changed, dual = self._dual(value)
            results.append(changed)
            if value.kind == Kind.FLOAT:
                derivatives += [dual.get(index, _ZERO) for index in self._parameters]
        self._out.append(Return((*results, *derivatives)))

    def _tangent(self, name: str, index: int) -> str:
        """Return the name of a variable's derivative by a parameter."""
        if (name, index) not in self._tangents:
            wanted = f"d {name} {self._function.parameters[index]}"
            self._tangents[name, index] = tangent = _fresh(wanted, self._variables)
            self._variables[tangent] = Kind.FLOAT
        return self._tangents[name, index]

    def _temporary(self, kind: Kind) -> Variable:
        self._temporaries += 1
        name = _fresh(f"part {self._temporaries}", self._variables)
        self._variables[name] = kind
        return Variable(name, kind)

    def _atom(self, value: Expression) -> Expression:
        """Return a value that can be used several times without computing it again."""
        if isinstance(value, Constant | Variable):
            return value
        kept = self._temporary(value.kind)
        self._out.append(Assign(kept.name, value))
        return kept

    def _dual(self, value: Expression) -> tuple[Expression, _Dual]:
        """Return a value and its derivatives; what they need is put before the statement."""
        if not _depends(value, self._active):
            return value, {}
        match value:
            case Variable(name=name):
                return value, self._of_variable(name)
            case Unary(operand=operand):
                inner, dual = self._dual(operand)
                return Unary("-", inner, Kind.FLOAT), {k: _minus(d) for k, d in dual.items()}
            case Binary():
                return self._of_binary(value)
            case Power(base=base, exponent=exponent):
                inner, dual = self._dual(base)
                inner = self._atom(inner)
                lower = inner if exponent == 2 else Power(inner, exponent - 1, Kind.FLOAT)
                slope = Binary("*", Constant(float(exponent), Kind.FLOAT), lower, Kind.FLOAT)
                return Power(inner, exponent, Kind.FLOAT), self._scaled(slope, dual)
            case Select():
                return self._of_select(value)
            case Call():
                return self._of_call(value)
            case Apply():
                values, duals = self._applied(value)
                return values[0], duals[0]
        raise AssertionError(f"{type(value).__name__} has no derivative")

    def _of_variable(self, name: str) -> _Dual:
        if name in self._function.parameters and name not in self._assigned:
            return {self._function.parameters.index(name): _ONE}
        return {
            index: Variable(self._tangent(name, index), Kind.FLOAT) for index in self._active[name]
        }

    def _scaled(self, slope: Expression, dual: _Dual) -> _Dual:
        if len(dual) > 1:
            slope = slope if isinstance(slope, Select) else self._atom(slope)
        return {index: _times(slope, tangent) for index, tangent in dual.items()}

    def _of_binary(self, value: Binary) -> tuple[Expression, _Dual]:
        left, by_left = self._dual(value.left)
        right, by_right = self._dual(value.right)
        shown = value.operator
        if shown in "+-":
            signed = by_right if shown == "+" else {k: _minus(d) for k, d in by_right.items()}
            return Binary(shown, left, right, Kind.FLOAT), _added(by_left, signed)
        left, right = self._atom(left), self._atom(right)
        result: Expression = Binary(shown, left, right, Kind.FLOAT)
        if shown == "*":
            return result, _added(self._scaled(right, by_left), self._scaled(left, by_right))
        if shown == "/":
            by_left = {k: Binary("/", d, right, Kind.FLOAT) for k, d in by_left.items()}
            if not by_right:
                return result, by_left
            result = self._atom(result)
            slope = _minus(Binary("/", result, right, Kind.FLOAT))
            return result, _added(by_left, self._scaled(slope, by_right))
        if not by_right:
            return result, by_left
        times = _minus(Binary("//", left, right, Kind.FLOAT))
        return result, _added(by_left, self._scaled(times, by_right))

    def _of_select(self, value: Select) -> tuple[Expression, _Dual]:
        """Only the branch that is taken is computed, with its derivatives."""
        condition = self._atom(value.condition)
        branches = []
        for branch in (value.yes, value.no):
            outer, self._out = self._out, []
            changed, dual = self._dual(branch)
            made, self._out = self._out, outer
            branches.append((made, changed, dual))
        (before_yes, yes, by_yes), (before_no, no, by_no) = branches
        indices = sorted({*by_yes, *by_no})
        pairs = [(yes, no), *((by_yes.get(k, _ZERO), by_no.get(k, _ZERO)) for k in indices)]
        if not before_yes and not before_no:
            chosen: list[Expression] = [Select(condition, a, b, Kind.FLOAT) for a, b in pairs]
        else:
            kept = [self._temporary(Kind.FLOAT) for _ in pairs]
            for side, before in enumerate((before_yes, before_no)):
                before += [
                    Assign(variable.name, pair[side])
                    for variable, pair in zip(kept, pairs, strict=True)
                ]
            self._out.append(If(condition, tuple(before_yes), tuple(before_no)))
            chosen = list(kept)
        return chosen[0], dict(zip(indices, chosen[1:], strict=True))

    def _of_call(self, value: Call) -> tuple[Expression, _Dual]:
        parts = [self._dual(argument) for argument in value.arguments]
        arguments = tuple(self._atom(argument) for argument, _ in parts)
        result = self._atom(Call(value.function, arguments, value.kind))
        named = dict(zip("ab", arguments, strict=False)) | {"y": result}
        whole: _Dual = {}
        for text, (_, dual) in zip(FUNCTIONS[value.function].partials, parts, strict=True):
            if dual:
                whole = _added(whole, self._scaled(_written(text, named), dual))
        return result, whole

    def _applied(self, call: Apply) -> tuple[list[Expression], list[_Dual]]:
        """Return the results of a call, and the derivatives of each, by the chain rule."""
        parts = [self._dual(argument) for argument in call.arguments]
        arguments = tuple(self._atom(argument) for argument, _ in parts)
        partials = self._derivatives.partials(call.function)
        taken = [self._temporary(kind) for kind in partials.results]
        self._out.append(Unpack(tuple(v.name for v in taken), Apply(partials, arguments)))
        inner = float_parameters(call.function)
        slopes = iter(taken[len(call.function.results) :])
        duals: list[_Dual] = []
        for kind in call.function.results:
            whole: _Dual = {}
            if kind == Kind.FLOAT:
                for index, slope in zip(inner, slopes, strict=False):
                    whole = _added(whole, self._scaled(slope, parts[index][1]))
            # Kept: the names that are assigned next may be those that these are made of.
            duals.append({k: self._atom(d) if not _is(d, 0) else d for k, d in whole.items()})
        return list(taken[: len(call.function.results)]), duals


def _added(one: _Dual, other: _Dual) -> _Dual:
    return {k: _plus(one.get(k, _ZERO), other.get(k, _ZERO)) for k in sorted({*one, *other})}


def _assignments(body: tuple[Statement, ...]) -> list[Assign | Unpack]:
    found: list[Assign | Unpack] = []
    for statement in body:
        match statement:
            case Assign() | Unpack():
                found.append(statement)
            case If(then=then, otherwise=otherwise):
                found += _assignments(then) + _assignments(otherwise)
            case For(body=inner):
                found += _assignments(inner)
    return found


def _depends(value: Expression, active: dict[str, set[int]]) -> set[int]:
    """Return the parameters by which a value may have a derivative."""
    if value.kind != Kind.FLOAT:
        return set()
    match value:
        case Variable(name=name):
            return active.get(name, set())
        case Constant() | Cast():  # only whole numbers and truth values are cast to FLOAT
            return set()
        case Binary(operator="//"):
            return set()
        case Call(function=function) if set(FUNCTIONS[function].partials) == {"0"}:
            return set()
        case Select(yes=yes, no=no):
            return _depends(yes, active) | _depends(no, active)
    return set().union(*(_depends(operand, active) for operand in operands(value)))


def _active(function: Function) -> dict[str, set[int]]:
    """Return variable -> the FLOAT parameters by which it may have a derivative."""
    active: dict[str, set[int]] = {
        function.parameters[index]: {index} for index in float_parameters(function)
    }
    statements = _assignments(function.body)
    changed = True
    while changed:
        changed = False
        for statement in statements:
            if isinstance(statement, Assign):
                names: tuple[str, ...] = (statement.name,)
                found = _depends(statement.value, active)
            else:
                names = statement.names
                found = set().union(*(_depends(a, active) for a in statement.call.arguments))
            for name in names:
                if function.variables[name] == Kind.FLOAT and not found <= active.get(name, set()):
                    active[name] = active.get(name, set()) | found
                    changed = True
    return active


@cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _written(text: str, named: dict[str, Expression]) -> Expression:
    """Return a derivative of the table as an expression over `a`, `b` and `y`."""
    return _expression(_parsed(text), named)


_SHOWN = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPARED = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "=="}


def _expression(node: ast.expr, named: dict[str, Expression]) -> Expression:
    match node:
        case ast.Constant(value=value):
            return Constant(float(value), Kind.FLOAT)  # type: ignore[arg-type]
        case ast.Name(id=name):
            return named[name]
        case ast.UnaryOp(operand=operand):
            return _minus(_expression(operand, named))
        case ast.BinOp(left=left, op=op, right=right):
            pair = _expression(left, named), _expression(right, named)
            return Binary(_SHOWN[type(op)], *pair, Kind.FLOAT)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            pair = _expression(left, named), _expression(right, named)
            return Compare(_COMPARED[type(op)], *pair)
        case ast.Call(func=ast.Name(id="where"), args=arguments):
            condition, yes, no = (_expression(argument, named) for argument in arguments)
            return Select(condition, yes, no, Kind.FLOAT)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            given = tuple(_expression(argument, named) for argument in arguments)
            return Call(name, given, Kind.FLOAT)
    raise AssertionError(ast.unparse(node))
