"""Read a module's forward as the library wrote it, and replace one proven expression in it.

A block is not recognised by its name, nor by the names of its parts: nine of ten blocks with a
`gate_proj` use SiLU, and the tenth would give wrong logits. What is recognised is an expression of
the upstream forward, for instance `swiglu(self.gate_proj(x), self.up_proj(x))`, with every name in
it resolved to the object that it means. The replacement keeps the upstream forward and swaps that
expression alone, under a condition, so that the original stays where it stood:

    before   return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    after    return self.down_proj(
                 self._zmlx_glu(self.gate_proj, self.up_proj, x)
                 if self._zmlx_ready(self.gate_proj, self.up_proj)
                 else swiglu(self.gate_proj(x), self.up_proj(x)))

Routing, shared experts, all-reduces and whatever else a block does are thereby what they were.
"""

from __future__ import annotations

import ast
import copy
import linecache
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any


class ForwardRefused(Exception):
    """A forward cannot be read, or is not the one its library defined; the text says which."""


@dataclass(frozen=True, eq=False)
class Forward:
    """A function as it was defined, with the syntax tree that it was compiled from."""

    function: Any
    tree: ast.FunctionDef
    imports: list[ast.stmt]

    @property
    def parameters(self) -> list[str]:
        """The names of the positional parameters, `self` included."""
        return [argument.arg for argument in self.tree.args.posonlyargs + self.tree.args.args]

    def resolve(self, node: ast.expr) -> Any:
        """Return the object that a name or dotted name of this function means, or None."""
        if isinstance(node, ast.Name):
            return None if node.id in self.parameters else self.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            holder = self.resolve(node.value)
            return None if holder is None else getattr(holder, node.attr, None)
        return None


@dataclass(frozen=True)
class _Source:
    """A parsed source file: its functions by name and first line, and its imports."""

    functions: dict[tuple[str, int], ast.FunctionDef]
    imports: list[ast.stmt]


@cache
def _source(filename: str, text: str) -> _Source:
    tree = ast.parse(text, filename)
    functions = {
        (node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    imports = [node for node in _top_level(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return _Source(functions, [node for node in imports if not _is_future(node)])


#: id of a code object -> the code object, and its forward; all layers of a model share one
_PARSED: dict[int, tuple[CodeType, Forward]] = {}


def parse(function: Any) -> Forward:
    """Parse a function, or what `mx.compile` made of one.

    Raises:
        ForwardRefused: there is no source, or the source is not what runs.
    """
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        raise ForwardRefused(f"{function!r} is not written in Python")
    known = _PARSED.get(id(code))
    if known is not None and known[1].function is function:
        return known[1]
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        source = _source(code.co_filename, text)
    except SyntaxError as error:
        raise ForwardRefused(f"the source of {code.co_name} cannot be read: {error}") from error
    definition = source.functions.get((code.co_name, code.co_firstlineno))
    if definition is None:
        raise ForwardRefused(f"{code.co_name} has no source at {code.co_filename}")
    if _identity(_compile(definition, source.imports, code.co_filename)) != _identity(code):
        raise ForwardRefused(f"the source of {code.co_name} is not what runs")
    forward = Forward(function, definition, source.imports)
    _PARSED[id(code)] = (code, forward)
    return forward


def own_forward(cls: type) -> Forward:
    """Parse the `__call__` of a module class, provided that its library defined it.

    Raises:
        ForwardRefused: somebody replaced it, or `parse` refuses it.
    """
    owner = next((base for base in cls.__mro__ if "__call__" in vars(base)), None)
    if owner is None:
        raise ForwardRefused(f"{cls.__qualname__} has no forward")
    function = vars(owner)["__call__"]
    expected = f"{owner.__qualname__}.__call__"
    if (
        not isinstance(function, FunctionType)
        or function.__module__ != owner.__module__
        or function.__qualname__ != expected
        or function.__code__.co_name != "__call__"
        or hasattr(function, "__wrapped__")
    ):
        raise ForwardRefused(
            f"{expected} is not the one that {owner.__module__} defined: "
            f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
        )
    return parse(function)


Substitutions = Mapping[ast.AST, "ast.AST | list[ast.stmt]"]


def replaced(tree: ast.AST, substitutions: Substitutions) -> Any:
    """Return a copy of a tree in which some of its nodes are others.

    Args:
        tree: a syntax tree; it stays as it is.
        substitutions: node of `tree` -> the node that takes its place, or for a statement the
            statements that do (none removes it).
    """
    for node in substitutions:
        node._zmlx_key = id(node)  # type: ignore[attr-defined]
    try:
        duplicate = copy.deepcopy(tree)
    finally:
        for node in substitutions:
            del node._zmlx_key  # type: ignore[attr-defined]
    return _Substitute(substitutions).visit(duplicate)


def rewritten(
    forward: Forward, substitutions: Substitutions, scope: dict[str, Any] | None = None
) -> Any:
    """Compile a forward in which nodes of its tree are others (see `replaced`).

    Args:
        forward: what `own_forward` or `parse` returned.
        substitutions: what is replaced by what.
        scope: the global variables of the new function; default the original's own.

    Returns:
        A function with the original's defaults, signature and line numbers.
    """
    original = forward.function
    tree = replaced(forward.tree, substitutions)
    code = _compile(tree, forward.imports, original.__code__.co_filename)
    function = FunctionType(
        code, scope or original.__globals__, original.__name__, original.__defaults__
    )
    function.__kwdefaults__ = original.__kwdefaults__
    function.__annotations__ = dict(original.__annotations__)
    function.__qualname__ = original.__qualname__
    function.__module__ = original.__module__
    function.__doc__ = original.__doc__
    return function


def expression(text: str, **holes: ast.expr) -> ast.expr:
    """Parse an expression in which the names of `holes` stand for given nodes."""
    tree = ast.parse(text, mode="eval").body
    return _Fill(holes).visit(tree)  # type: ignore[no-any-return]


class _Fill(ast.NodeTransformer):
    def __init__(self, holes: dict[str, ast.expr]) -> None:
        self.holes = holes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.holes[node.id]) if node.id in self.holes else node


class _Substitute(ast.NodeTransformer):
    def __init__(self, substitutions: Substitutions) -> None:
        self.by_key = {id(node): new for node, new in substitutions.items()}

    def visit(self, node: ast.AST) -> Any:
        key = getattr(node, "_zmlx_key", None)
        return self.by_key[key] if key in self.by_key else super().visit(node)


def _compile(definition: ast.FunctionDef, imports: list[ast.stmt], filename: str) -> CodeType:
    """Compile one def statement, without what is evaluated where it stands.

    The imports of its file go before it: CPython calls a method of an imported name in another way.
    """
    bare = copy.deepcopy(definition)
    bare.decorator_list = []
    bare.returns = None
    arguments = bare.args
    for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs:
        argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
    module = ast.fix_missing_locations(ast.Module([*imports, bare], []))
    constants = compile(module, filename, "exec", dont_inherit=True).co_consts
    return next(constant for constant in constants if isinstance(constant, CodeType))


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the statements of a module's own scope."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _top_level(node)


def _is_future(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _identity(code: CodeType) -> tuple[Any, ...]:
    """Return what two code objects of the same function share, wherever they were compiled."""
    # Before Python 3.11, the qualified name of a nested function is a constant beside its code.
    inner = {f".<locals>.{c.co_name}" for c in code.co_consts if isinstance(c, CodeType)}
    constants = tuple(
        _identity(constant)
        if isinstance(constant, CodeType)
        else next((end for end in inner if str(constant).endswith(end)), repr(constant))
        for constant in code.co_consts
    )
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants
