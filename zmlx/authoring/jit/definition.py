"""A function as it was decorated: its source, its parameters and the names around it."""

from __future__ import annotations

import ast
import types
from dataclasses import dataclass, field

from zmlx.authoring.jit.ir import Function, Kind
from zmlx.authoring.jit.names import Names, as_number
from zmlx.authoring.jit.source import JitError, Source, source_of

#: Annotations that say what a parameter is; others are for people.
_ANNOTATED = {"bool": Kind.BOOL, "int": Kind.INT, "float": Kind.FLOAT}


@dataclass(frozen=True)
class Parameter:
    """A parameter; `kind` is None where no annotation fixes it."""

    name: str
    kind: Kind | None
    default: float | int | bool | None


@dataclass(frozen=True, eq=False)
class Definition:
    """A scalar function before the kinds of its arguments are known.

    Attributes:
        name: the function's name, or "lambda".
        source: where it stands.
        names: what the names around it mean.
        parameters: in order.
        body: its statements; a lambda's is a `return`.
        typed: kinds of the parameters -> the function, filled by `lower`.
    """

    name: str
    source: Source
    names: Names
    parameters: tuple[Parameter, ...]
    body: list[ast.stmt]
    typed: dict[tuple[Kind, ...], Function] = field(default_factory=dict)


def define(function: types.FunctionType) -> Definition:
    """Read a function's source and its parameters.

    Raises:
        JitError: there is no source, or a parameter is not a plain one.
    """
    source = source_of(function)
    node = source.node
    if isinstance(node, ast.Lambda):
        statement = ast.copy_location(ast.Return(node.body), node.body)
        return Definition(
            "lambda", source, Names(function), _parameters(function, source), [statement]
        )
    return Definition(
        node.name, source, Names(function), _parameters(function, source), _undocumented(node.body)
    )


def _undocumented(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    documented = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return body[1:] if documented else body


def _parameters(function: types.FunctionType, source: Source) -> tuple[Parameter, ...]:
    arguments = source.node.args
    for extra, shown in ((arguments.vararg, "*"), (arguments.kwarg, "**")):
        if extra is not None:
            raise source.error(
                extra, f"`{shown}{extra.arg}`: a kernel has a fixed number of inputs"
            )
    if arguments.kwonlyargs:
        raise source.error(arguments.kwonlyargs[0], "keyword-only parameters are not supported")
    named = [*arguments.posonlyargs, *arguments.args]
    if not named:
        raise source.error(source.node, "a function without parameters is a constant")
    defaults = function.__defaults__ or ()
    without = len(named) - len(defaults)
    found = []
    for index, argument in enumerate(named):
        default = None
        if index >= without:
            default = as_number(defaults[index - without])
            if default is None:
                raise source.error(argument, f"the default of `{argument.arg}` is not a number")
        found.append(Parameter(argument.arg, _annotated(argument), default))
    return tuple(found)


def _annotated(argument: ast.arg) -> Kind | None:
    match argument.annotation:
        case ast.Name(id=name) | ast.Constant(value=name):
            return _ANNOTATED.get(name) if isinstance(name, str) else None
    return None


__all__ = ["Definition", "JitError", "Parameter", "define"]
