"""Checks on statements before kinds are known: which there are, and that every path is whole.

A kernel has no "not assigned yet" and no None: a local must be assigned on every path to its use,
and every path must return.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field

from zmlx.authoring.jit.definition import Definition
from zmlx.authoring.jit.source import Source

_REFUSED: dict[type[ast.stmt], str] = {
    ast.While: "`while` has no bound that is known before it; write `for ... in range(...)`",
    ast.With: "`with` has no meaning in a kernel",
    ast.Try: "`try`: nothing in a kernel raises; test the values instead",
    ast.Raise: "`raise`: a kernel cannot raise; return a value that says so, such as math.nan",
    ast.Assert: "`assert`: a kernel cannot raise; check the arrays before the call",
    ast.FunctionDef: "functions in functions: define it outside, with @jit of its own",
    ast.AsyncFunctionDef: "functions in functions: define it outside, with @jit of its own",
    ast.AsyncFor: "`async for` has no meaning in a kernel",
    ast.AsyncWith: "`async with` has no meaning in a kernel",
    ast.ClassDef: "a class has no meaning in a kernel",
    ast.Import: "import outside of the function",
    ast.ImportFrom: "import outside of the function",
    ast.Global: "`global`: a kernel writes nothing but its results",
    ast.Nonlocal: "`nonlocal`: a kernel writes nothing but its results",
    ast.Delete: "`del` has no meaning in a kernel",
    ast.Match: "`match` is not supported; write `if` and `elif`",
}

#: Names assigned on every path that gets here; None where no path does.
_Assigned = frozenset[str] | None


def _both(one: _Assigned, other: _Assigned) -> _Assigned:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def assigned_names(body: Iterable[ast.stmt]) -> frozenset[str]:
    """Return the names that statements assign: the locals."""
    found: set[str] = set()
    for statement in body:
        match statement:
            case ast.Assign(targets=targets):
                found |= {name for target in targets for name in _names_of(target)}
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                found |= set(_names_of(target))
            case ast.For(target=target, body=inner):
                found |= {*_names_of(target), *assigned_names(inner)}
            case ast.If(body=then, orelse=otherwise):
                found |= assigned_names(then) | assigned_names(otherwise)
    return frozenset(found)


def _names_of(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Tuple | ast.List):
        return [name for part in target.elts for name in _names_of(part)]
    return [target.id] if isinstance(target, ast.Name) else []


def check_paths(definition: Definition) -> frozenset[str]:
    """Check a function's statements and return its parameters and locals.

    Raises:
        JitError: a statement that kernels do not have, a use of a local that some path does not
            assign, or a path without `return`.
    """
    parameters = frozenset(parameter.name for parameter in definition.parameters)
    every = parameters | assigned_names(definition.body)
    source = definition.source
    end = _Paths(source, every).block(definition.body, parameters)
    if end is not None:
        last = definition.body[-1] if definition.body else source.node
        raise source.error(
            last, f"a path through {definition.name} ends without `return` after this statement"
        )
    return every


@dataclass
class _Loop:
    """What is assigned where a loop is left, and where a turn ends early."""

    breaks: list[_Assigned] = field(default_factory=list)
    continues: list[_Assigned] = field(default_factory=list)


class _Paths:
    def __init__(self, source: Source, every: frozenset[str]) -> None:
        self._source = source
        self._every = every
        self._loops: list[_Loop] = []

    def block(self, body: list[ast.stmt], assigned: _Assigned) -> _Assigned:
        for statement in body:
            # What no path reaches is checked as if everything were assigned.
            after = self._statement(statement, self._every if assigned is None else assigned)
            assigned = None if assigned is None else after
        return assigned

    def _statement(self, statement: ast.stmt, assigned: frozenset[str]) -> _Assigned:
        match statement:
            case ast.Assign(targets=targets, value=value):
                self._uses(value, assigned)
                return assigned.union(*(_names_of(target) for target in targets))
            case ast.AugAssign(target=target, value=value):
                self._uses(target, assigned)
                self._uses(value, assigned)
                return assigned
            case ast.AnnAssign(target=target, value=value):
                if value is None:
                    return assigned
                self._uses(value, assigned)
                return assigned.union(_names_of(target))
            case ast.If(test=test, body=then, orelse=otherwise):
                self._uses(test, assigned)
                return _both(self.block(then, assigned), self.block(otherwise, assigned))
            case ast.For():
                return self._for(statement, assigned)
            case ast.Return(value=value):
                if value is None:
                    raise self._source.error(statement, "`return` without a value")
                self._uses(value, assigned)
                return None
            case ast.Break():
                self._loops[-1].breaks.append(assigned)
                return None
            case ast.Continue():
                self._loops[-1].continues.append(assigned)
                return None
            case ast.Pass() | ast.Expr():
                return assigned
        reason = _REFUSED.get(type(statement), f"`{type(statement).__name__}` is not supported")
        raise self._source.error(statement, reason)

    def _for(self, statement: ast.For, assigned: frozenset[str]) -> _Assigned:
        if statement.orelse:
            raise self._source.error(statement.orelse[0], "`else` of a loop is not supported")
        self._uses(statement.iter, assigned)
        loop = _Loop()
        self._loops.append(loop)
        end = self.block(statement.body, assigned.union(_names_of(statement.target)))
        self._loops.pop()
        if not _runs(statement.iter):
            return assigned
        for early in (*loop.continues, *loop.breaks):
            end = _both(end, early)
        return end

    def _uses(self, value: ast.expr, assigned: frozenset[str]) -> None:
        for node in ast.walk(value):
            if isinstance(node, ast.Name) and node.id in self._every - assigned:
                raise self._source.error(
                    node, f"`{node.id}` is not assigned on every path to this use; assign it before"
                )


def _runs(iterable: ast.expr) -> bool:
    """Return whether a `range` of literal numbers has at least one turn."""
    if not isinstance(iterable, ast.Call):
        return False
    try:
        return len(range(*(ast.literal_eval(argument) for argument in iterable.args))) > 0
    except (ValueError, TypeError):
        return False
