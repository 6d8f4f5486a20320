"""Additions whose result is normalised by the next statement, found in a forward.

    h = a + b                                        h = a + b
    out = h + self.mlp(self.norm(h))                 residual = h
                                                     x = self.norm(h)

What a and b are does not matter: they are computed as they stand there. An addition that something
lies behind before the norm is not found, nor one in whose statement the norm may not be called.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

from zmlx.patch.forward import Forward

#: In these a call may run not at all, or later.
_CONDITIONAL = (
    ast.IfExp,
    ast.BoolOp,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.NamedExpr,
    ast.Await,
)


@dataclass(frozen=True)
class NormedAddition:
    """`h = a + b` at `statement`, and `self.<norm>(h)` at `call`."""

    statement: ast.Assign
    addition: ast.BinOp
    call: ast.Call
    norm: str


@cache
def normed_additions(forward: Forward) -> list[NormedAddition]:
    """Find them all, in the order of the forward."""
    found = []
    for node in ast.walk(forward.tree):
        for name in ("body", "orelse"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                sites = (_site(forward, body, at) for at in range(len(body) - 1))
                found += [site for site in sites if site is not None]
    return sorted(found, key=lambda site: site.statement.lineno)


def _site(forward: Forward, body: list[ast.stmt], at: int) -> NormedAddition | None:
    statement = body[at]
    name = _assigned_name(statement)
    if name is None or not isinstance(statement, ast.Assign):
        return None
    addition = statement.value
    if not isinstance(addition, ast.BinOp) or not isinstance(addition.op, ast.Add):
        return None
    after = at + 1
    if _is_alias(body[after], name):
        after += 1
    if after == len(body) or not isinstance(body[after], ast.Assign | ast.Return):
        return None
    if any(isinstance(node, _CONDITIONAL) for node in ast.walk(body[after])):
        return None
    calls = [n for n in ast.walk(body[after]) if _normed(forward, n, name) is not None]
    if len(calls) != 1:
        return None
    call = calls[0]
    norm = _normed(forward, call, name)
    assert isinstance(call, ast.Call)
    return None if norm is None else NormedAddition(statement, addition, call, norm)


def _assigned_name(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _is_alias(statement: ast.stmt, name: str) -> bool:
    """Return whether a statement gives what has a name another name."""
    target = _assigned_name(statement)
    if target is None or target == name or not isinstance(statement, ast.Assign):
        return False
    return isinstance(statement.value, ast.Name) and statement.value.id == name


def _normed(forward: Forward, node: ast.AST, name: str) -> str | None:
    """Return N of `self.N(name)`, else None."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None
    argument, function = node.args[0], node.func
    if not isinstance(argument, ast.Name) or argument.id != name:
        return None
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return None
    return function.attr if function.value.id == forward.parameters[0] else None
