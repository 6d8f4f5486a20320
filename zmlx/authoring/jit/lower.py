"""From a function's syntax tree and the kinds of its arguments to the typed form."""

from __future__ import annotations

import ast

from zmlx.authoring.jit.definition import Definition
from zmlx.authoring.jit.expressions import Expressions
from zmlx.authoring.jit.flow import check_paths
from zmlx.authoring.jit.ir import (
    Apply,
    Assign,
    Break,
    Constant,
    Continue,
    Expression,
    For,
    Function,
    If,
    Kind,
    Return,
    Statement,
    Unpack,
    Variable,
    cast,
)


def lower(definition: Definition, kinds: tuple[Kind, ...]) -> Function:
    """Return the typed form of a function for arguments of these kinds.

    A local has the widest kind of all that is assigned to it. Kinds are found by going over the
    body until none changes; only then are kinds that do not fit refused.

    Raises:
        JitError: something in it cannot be compiled.
    """
    if kinds not in definition.typed:
        every = check_paths(definition)
        variables = dict(
            zip((parameter.name for parameter in definition.parameters), kinds, strict=True)
        )
        results: list[Kind] = []
        settled = False
        while not settled:
            attempt = _Pass(definition, every, variables, results, final=False)
            attempt.block(definition.body)
            settled = attempt.variables == variables and attempt.results == results
            variables, results = attempt.variables, attempt.results
        last = _Pass(definition, every, variables, results, final=True)
        body = last.block(definition.body)
        definition.typed[kinds] = Function(
            definition.name,
            tuple(parameter.name for parameter in definition.parameters),
            last.variables,
            body,
            tuple(last.results),
        )
    return definition.typed[kinds]


class _Pass(Expressions):
    """One pass over the statements; kinds of variables and results only widen."""

    def __init__(
        self,
        definition: Definition,
        every: frozenset[str],
        variables: dict[str, Kind],
        results: list[Kind],
        *,
        final: bool,
    ) -> None:
        super().__init__(definition, every, dict(variables), final=final)
        self.results = list(results)
        self._temporaries = 0
        self._out: list[Statement] = []

    def typed(self, definition: Definition, kinds: tuple[Kind, ...]) -> Function:
        """Return another function for arguments of these kinds."""
        return lower(definition, kinds)

    def block(self, body: list[ast.stmt]) -> tuple[Statement, ...]:
        """Return the statements of a body; what stands behind a `return` is checked and dropped."""
        outer, self._out = self._out, []
        end = None
        for statement in body:
            self._statement(statement)
            if end is None and self._out and isinstance(self._out[-1], Return | Break | Continue):
                end = len(self._out)
        lowered, self._out = self._out[:end], outer
        return tuple(lowered)

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                self._assign(targets, value)
            case ast.AugAssign(target=target, op=operator, value=value):
                name = self._target(target)
                current = Variable(name, self.variables.get(name, Kind.BOOL))
                self._store(name, self.binary(statement, operator, current, self.value(value)))
            case ast.AnnAssign(target=target, value=value):
                name = self._target(target)
                if value is not None:
                    self._store(name, self.value(value))
            case ast.If(test=test, body=then, orelse=otherwise):
                condition = self.condition(test)
                self._out.append(If(condition, self.block(then), self.block(otherwise)))
            case ast.For():
                self._for(statement)
            case ast.Return(value=value) if value is not None:
                self._return(statement, self._values(value))
            case ast.Break():
                self._out.append(Break())
            case ast.Continue():
                self._out.append(Continue())
            case ast.Expr(value=value):
                if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                    self.value(value)
                    raise self.error(statement, "a statement that changes nothing")

    def _assign(self, targets: list[ast.expr], value: ast.expr) -> None:
        values = self._values(value)
        if len(targets) == 1 and not isinstance(targets[0], ast.Tuple | ast.List):
            if len(values) != 1:
                raise self.error(targets[0], f"{_counted(len(values))} for one name")
            self._store(self._target(targets[0]), values[0])
            return
        # All values are there before the first name changes: a, b = b, a.
        kept = [self._keep(each) for each in values]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
            if len(parts) != len(kept):
                if not self._final:  # a call whose kinds do not fit yet stands in with one value
                    continue
                raise self.error(target, f"{_counted(len(kept))} for {len(parts)} names")
            for part, each in zip(parts, kept, strict=True):
                self._store(self._target(part), each)

    def _values(self, value: ast.expr) -> list[Expression]:
        """Return the values of an expression that may be a tuple or a call with several."""
        if isinstance(value, ast.Tuple):
            return [self.value(part) for part in value.elts]
        lowered = self.value(value, several=True)
        if not isinstance(lowered, Apply) or len(lowered.function.results) == 1:
            return [lowered]
        kept = [self._temporary(kind) for kind in lowered.function.results]
        self._out.append(Unpack(tuple(variable.name for variable in kept), lowered))
        return list(kept)

    def _for(self, statement: ast.For) -> None:
        if not isinstance(statement.target, ast.Name):
            raise self.error(statement.target, "the target of a loop must be one name")
        start, stop, step = self.bounds(statement.iter)
        name = statement.target.id
        self._widen(name, Kind.INT)
        if self.variables[name] == Kind.INT:
            self._out.append(For(name, start, stop, step, self.block(statement.body)))
            return
        # The name is assigned floats elsewhere; the loop counts with a variable of its own.
        counter = self._temporary(Kind.INT)
        outer, self._out = self._out, []
        self._store(name, counter)
        first, self._out = self._out, outer
        body = (*first, *self.block(statement.body))
        self._out.append(For(counter.name, start, stop, step, body))

    def _return(self, statement: ast.stmt, values: list[Expression]) -> None:
        if not values:
            raise self.error(statement, "`return` of an empty tuple")
        if not self.results:
            self.results = [value.kind for value in values]
        if len(self.results) != len(values):
            raise self.error(
                statement,
                f"returns {_counted(len(values))} where another path returns {len(self.results)}",
            )
        self.results = [max(a, b.kind) for a, b in zip(self.results, values, strict=True)]
        self._out.append(
            Return(tuple(cast(v, kind) for v, kind in zip(values, self.results, strict=True)))
        )

    def _target(self, target: ast.expr) -> str:
        if isinstance(target, ast.Name):
            return target.id
        if isinstance(target, ast.Subscript):
            raise self.error(target, "indexing: a kernel sees one element, not the array")
        raise self.error(target, "only plain names can be assigned")

    def _widen(self, name: str, kind: Kind) -> None:
        self.variables[name] = max(self.variables.get(name, kind), kind)

    def _store(self, name: str, value: Expression) -> None:
        self._widen(name, value.kind)
        self._out.append(Assign(name, cast(value, self.variables[name])))

    def _keep(self, value: Expression) -> Expression:
        """Return a value that stays as it is while names are assigned."""
        ours = isinstance(value, Variable) and value.name not in self._every
        if ours or isinstance(value, Constant):
            return value
        kept = self._temporary(value.kind)
        self._out.append(Assign(kept.name, value))
        return kept

    def _temporary(self, kind: Kind) -> Variable:
        self._temporaries += 1
        name = f"value {self._temporaries}"
        self._widen(name, kind)
        return Variable(name, self.variables[name])


def _counted(values: int) -> str:
    return "1 value" if values == 1 else f"{values} values"
