"""The expressions of upstream forwards that patterns replace, recognised by what they mean.

Two are known:

    act(self.A(x)) * self.B(x)                 a gated product (SwiGLU, GeGLU), also through a
                                               function that returns just that of its two arguments
    y = self.E(x, i)                           a weighted combination of expert outputs, with an
    z = (y * w[..., None]).sum(axis=-2)        optional .astype(...) after it; also as mx.sum, with
                                               mx.expand_dims(w, -1), with the product apart, or as
                                               a function that returns just that
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from zmlx.patch.forward import Forward, ForwardRefused, parse

#: activation functions of mlx.nn -> the name that kernels give them
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_approx": "gelu_tanh"}


@dataclass(frozen=True)
class GatedProduct:
    """`act(self.<gate>(x)) * self.<up>(x)` at `node`, where `x` is a plain name."""

    node: ast.expr
    gate: str
    up: str
    x: ast.expr
    activation: str


@dataclass(frozen=True)
class Combination:
    """Expert outputs weighted and summed by adjacent statements.

    Attributes:
        call: the statement `y = self.<experts>(x, indices)`.
        product: the statement `v = y * weights[..., None]`, where it stands apart.
        combine: the statement that holds `node`.
        node: the expression `(y * weights[..., None]).sum(axis=-2)`, with its cast when the cast
            is to the dtype of `y` itself.
        experts: attribute of the module that holds the experts.
        x, indices, weights: the operands.
        keeps_dtype: whether the sum is cast to the dtype of the expert outputs.
    """

    call: ast.Assign
    product: ast.Assign | None
    combine: ast.stmt
    node: ast.expr
    experts: str
    x: ast.expr
    indices: ast.expr
    weights: ast.expr
    keeps_dtype: bool


def activation_name(function: Any) -> str | None:
    """Return "silu", "gelu" or "gelu_tanh" for mlx.nn's function of that meaning, else None."""
    library = sys.modules.get("mlx.nn.layers.activations")
    for name, meaning in _ACTIVATIONS.items():
        known = getattr(library, name, None)
        if known is not None and function is known:
            return meaning if known.__module__ == "mlx.nn.layers.activations" else None
    return None


def gated_function(function: Any) -> tuple[str, int] | None:
    """Recognise a function of two arguments that returns `act(one) * other`.

    Returns:
        The activation's name and the position of the gate among the arguments, or None.
    """
    try:
        forward = parse(function)
    except ForwardRefused:
        return None
    body = _without_docstring(forward.tree.body)
    if len(body) != 1 or not isinstance(body[0], ast.Return) or len(forward.parameters) != 2:
        return None
    split = _activated_product(forward, body[0].value)
    if split is None:
        return None
    activation, gate, up = split
    names = [node.id if isinstance(node, ast.Name) else None for node in (gate, up)]
    if sorted(map(str, names)) != sorted(forward.parameters):
        return None
    return activation, forward.parameters.index(str(names[0]))


@cache
def gated_products(forward: Forward) -> list[GatedProduct]:
    """Find the gated products of two projections of the same input."""
    found = []
    for node in ast.walk(forward.tree):
        split = _gated_operands(forward, node) if isinstance(node, ast.expr) else None
        if split is None:
            continue
        activation, gate, up = split
        gate_call, up_call = _projection(forward, gate), _projection(forward, up)
        if gate_call and up_call and ast.dump(gate_call[1]) == ast.dump(up_call[1]):
            found.append(
                GatedProduct(node, gate_call[0], up_call[0], gate_call[1], activation)  # type: ignore[arg-type]
            )
    return found


@cache
def combinations(forward: Forward) -> list[Combination]:
    """Find the weighted sums over the experts of a token."""
    found = []
    for node in ast.walk(forward.tree):
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            if isinstance(body, list):
                for at in range(len(body) - 1):
                    one = _combination(forward, body[at : at + 3])
                    found += [one] if one else []
    return found


def _combination(forward: Forward, statements: list[ast.stmt]) -> Combination | None:
    first, second = statements[:2]
    value = _assigned(first)
    if not isinstance(value, ast.Call) or len(value.args) != 2 or value.keywords:
        return None
    assert isinstance(first, ast.Assign)
    experts, outputs = _own_attribute(forward, value.func), _target(first)
    if experts is None or not isinstance(second, ast.Assign | ast.Return):
        return None
    call = (first, experts, value.args[0], value.args[1])
    return _at_once(forward, call, outputs, second) or _apart(forward, call, outputs, statements)


#: the statement that calls the experts, their attribute, x and indices
_Call = tuple[ast.Assign, str, ast.expr, ast.expr]


def _at_once(
    forward: Forward, call: _Call, outputs: str, statement: ast.stmt
) -> Combination | None:
    """Find `(outputs * weights[..., None]).sum(axis=-2)` in a statement."""
    for node in ast.walk(statement):
        helped = _helper(forward, node, outputs)
        summed = None if helped else _summed(forward, node)
        weights = helped or (None if summed is None else _weights(forward, summed, outputs))
        if weights is None:
            continue
        assert isinstance(node, ast.expr)
        cast = _cast_of(statement, node)
        keeps_dtype = cast is not None and ast.dump(cast.args[0]) == _dtype_of(outputs)
        whole: ast.expr = cast if keeps_dtype and cast is not None else node
        if _reads(forward.tree, outputs, after=call[0]) != _reads(whole, outputs):
            return None  # the outputs of the single experts are used elsewhere too
        first, experts, x, indices = call
        keeps_dtype = keeps_dtype or helped is not None
        return Combination(first, None, statement, whole, experts, x, indices, weights, keeps_dtype)
    return None


def _apart(
    forward: Forward, call: _Call, outputs: str, statements: list[ast.stmt]
) -> Combination | None:
    """Find `v = outputs * weights[..., None]` and then the sum of v."""
    first, experts, x, indices = call
    product, third = statements[1], statements[2] if len(statements) > 2 else None
    value = _assigned(product)
    weights = None if value is None else _weights(forward, value, outputs)
    if weights is None or value is None or not isinstance(third, ast.Assign | ast.Return):
        return None
    assert isinstance(product, ast.Assign)
    name = _target(product)
    for node in ast.walk(third):
        summed = _summed(forward, node)
        if not isinstance(summed, ast.Name) or summed.id != name:
            continue
        assert isinstance(node, ast.expr)
        once = _reads(forward.tree, outputs, after=first) == _reads(value, outputs)
        if not once or _reads(forward.tree, name, after=product) != 1:
            return None
        return Combination(first, product, third, node, experts, x, indices, weights, False)
    return None


def _assigned(statement: ast.stmt) -> ast.expr | None:
    """Return e of `name = e`, else None."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    return statement.value if isinstance(statement.targets[0], ast.Name) else None


def _target(statement: ast.Assign) -> str:
    target = statement.targets[0]
    assert isinstance(target, ast.Name)
    return target.id


def _summed(forward: Forward, node: ast.AST) -> ast.expr | None:
    """Return e of `e.sum(axis=-2)` or `mx.sum(e, axis=-2)`, else None."""
    if not isinstance(node, ast.Call):
        return None
    if node.args and forward.resolve(node.func) is mx.sum:
        rest = ast.Call(node.func, node.args[1:], node.keywords)
        return node.args[0] if _is_axis(rest, -2) else None
    if isinstance(node.func, ast.Attribute) and node.func.attr == "sum" and _is_axis(node, -2):
        return node.func.value
    return None


def _weights(forward: Forward, product: ast.expr, outputs: str) -> ast.expr | None:
    """Return w of `outputs * w[..., None]`, either order, or None."""
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    for value, weight in (
        (product.left, product.right),
        (product.right, product.left),
    ):
        if isinstance(value, ast.Name) and value.id == outputs:
            return _expanded(forward, weight)
    return None


def _expanded(forward: Forward, node: ast.expr) -> ast.expr | None:
    """Return e of `e[..., None]` or `mx.expand_dims(e, -1)`, or None.

    With a cast behind it, e is `e.astype(t)`. A name that is assigned such an expression, and
    nothing else, is w of `w.squeeze(-1)`.
    """
    if isinstance(node, ast.Subscript):
        return node.value if ast.unparse(node.slice) == "(..., None)" else None
    if isinstance(node, ast.Name):
        stores = [s for s in ast.walk(forward.tree) if isinstance(s, ast.Assign | ast.AugAssign)]
        values = [s.value for s in stores if node.id in _names_stored(s)]
        if len(values) != 1 or node.id in forward.parameters:
            return None
        if _expanded_here(forward, values[0]) is None:
            return None
        squeeze = ast.Attribute(node, "squeeze", ast.Load())
        return ast.Call(squeeze, [ast.Constant(-1)], [])
    return _expanded_here(forward, node)


def _expanded_here(forward: Forward, node: ast.expr) -> ast.expr | None:
    if not isinstance(node, ast.Call):
        return None
    if forward.resolve(node.func) is mx.expand_dims and node.args:
        rest = ast.Call(node.func, node.args[1:], node.keywords)
        return node.args[0] if _is_axis(rest, -1) else None
    if isinstance(node.func, ast.Attribute) and node.func.attr == "astype":
        inner = node.func.value
        expanded = None if isinstance(inner, ast.Name) else _expanded(forward, inner)
        if expanded is not None:
            function = ast.Attribute(expanded, "astype", ast.Load())
            return ast.Call(function, node.args, node.keywords)
    return None


def _names_stored(statement: ast.Assign | ast.AugAssign) -> set[str]:
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _helper(forward: Forward, node: ast.AST, outputs: str) -> ast.expr | None:
    """Return w of `f(outputs, w)`, where f(y, w) is a weighted sum cast to the dtype of y."""
    if not isinstance(node, ast.Call) or len(node.args) != 2 or node.keywords:
        return None
    value, weights = node.args
    if not isinstance(value, ast.Name) or value.id != outputs:
        return None
    try:
        helper = parse(forward.resolve(node.func))
    except ForwardRefused:
        return None
    body = _without_docstring(helper.tree.body)
    if len(body) != 1 or not isinstance(body[0], ast.Return) or len(helper.parameters) != 2:
        return None
    y, w = helper.parameters
    for inner in ast.walk(body[0]):
        summed = _summed(helper, inner)
        found = None if summed is None else _weights(helper, summed, y)
        cast = None if found is None else _cast_of(body[0], inner)
        if cast is not None and cast is body[0].value and ast.dump(cast.args[0]) == _dtype_of(y):
            return weights if isinstance(found, ast.Name) and found.id == w else None
    return None


def _is_axis(call: ast.Call, axis: int) -> bool:
    keywords = [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in call.keywords]
    arguments = [ast.unparse(argument) for argument in call.args]
    return (arguments, keywords) in (([], [f"axis={axis}"]), ([str(axis)], []))


def _cast_of(statement: ast.stmt, node: ast.AST) -> ast.Call | None:
    """Return the call `<node>.astype(...)` in a statement, or None."""
    for call in ast.walk(statement):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "astype"
            and call.func.value is node
            and len(call.args) == 1
        ):
            return call
    return None


def _dtype_of(name: str) -> str:
    return ast.dump(ast.parse(f"{name}.dtype", mode="eval").body)


def _reads(tree: ast.AST, name: str, after: ast.stmt | None = None) -> int:
    """Count the reads of a name, from the statement `after` on up to its next assignment."""
    start = (0, 0) if after is None else (after.end_lineno or 0, after.end_col_offset or 0)
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name)
        and node.id == name
        and (node.lineno, node.col_offset) >= start
    ]
    stores = [(node.lineno, node.col_offset) for node in nodes if isinstance(node.ctx, ast.Store)]
    # The statement that assigns the name again reads it first.
    next_store = min(stores, default=None)
    if after is None or next_store is None:
        return sum(isinstance(node.ctx, ast.Load) for node in nodes)
    end = _end_of_statement(tree, next_store)
    return sum(
        isinstance(node.ctx, ast.Load) and (node.lineno, node.col_offset) <= end for node in nodes
    )


def _end_of_statement(tree: ast.AST, position: tuple[int, int]) -> tuple[int, int]:
    ends = [
        (statement.end_lineno or 0, statement.end_col_offset or 0)
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign)
        and (statement.lineno, statement.col_offset) <= position
        and position <= (statement.end_lineno or 0, statement.end_col_offset or 0)
    ]
    return min(ends, default=position)


def _gated_operands(forward: Forward, node: ast.expr) -> tuple[str, ast.expr, ast.expr] | None:
    """Split `f(a, b)` or `act(a) * b` into activation, gate and up."""
    if isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
        meaning = gated_function(forward.resolve(node.func))
        if meaning is not None:
            activation, gate = meaning
            return activation, node.args[gate], node.args[1 - gate]
    return _activated_product(forward, node)


def _activated_product(
    forward: Forward, node: ast.AST | None
) -> tuple[str, ast.expr, ast.expr] | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for gate, up in ((node.left, node.right), (node.right, node.left)):
            if isinstance(gate, ast.Call) and len(gate.args) == 1 and not gate.keywords:
                activation = activation_name(forward.resolve(gate.func))
                if activation is not None:
                    return activation, gate.args[0], up
    return None


def _projection(forward: Forward, node: ast.expr) -> tuple[str, ast.Name] | None:
    """Split `self.A(x)` into A and x, where x is a plain name."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        attribute = _own_attribute(forward, node.func)
        argument = node.args[0]
        if attribute is not None and isinstance(argument, ast.Name):
            return attribute, argument
    return None


def _own_attribute(forward: Forward, node: ast.expr) -> str | None:
    """Return A for `self.A`, else None."""
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == forward.parameters[0]
    ):
        return node.attr
    return None


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return body[1:]
    return body
