"""A residual and the norm of it in one pass, on GPUs, where it is asked for.

Before   h = x + r                                          an addition
         out = h + self.mlp(self.norm(h))                   and a norm
After    h, normed = self._zmlx_add_norm(self.norm, x, r)
         out = h + self.mlp(normed)

Found in a layer's own forward: an addition whose result the very next statement gives to a module
that is an RMSNorm, which is one whose forward is `mx.fast.rms_norm(x, weight, eps)` for any
expressions of a weight and of eps. What is added, scaled or normalised before is computed as it
stands there. Other norms, layers that normalise something else, calls with many rows, and modules
in training mode keep the two statements.
"""

from __future__ import annotations

import ast
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.residual_norm import ADD_RMSNORM
from zmlx.patch.additions import NormedAddition, normed_additions
from zmlx.patch.calls import are_floats
from zmlx.patch.forward import (
    Forward,
    ForwardRefused,
    expression,
    own_forward,
    rewritten,
)
from zmlx.patch.pattern import (
    KernelUse,
    PatchConfig,
    PatchPattern,
    Proposal,
    Refused,
    library_class,
)

OPTIONS: dict[str, str] = {}

#: Rows above which the two operations, which share the reading of a row less, are as fast.
_MOST_ROWS = 32
_USES = tuple(
    KernelUse(ADD_RMSNORM, {"dtype": dtype, "length": 255}) for dtype in (mx.float32, mx.bfloat16)
)


def rms_arguments(cls: type) -> Any:
    """Return a function (module, x) -> (weight, eps) of a class that is an RMSNorm.

    Raises:
        ForwardRefused: its forward is not `return mx.fast.rms_norm(x, weight, eps)`.
    """
    forward = own_forward(cls)
    call = _norm_call(forward)
    if call is None:
        raise ForwardRefused(f"{cls.__qualname__} is not an RMSNorm by mx.fast.rms_norm alone")
    return rewritten(forward, {call: ast.Tuple(call.args[1:], ast.Load())})


def _norm_call(forward: Forward) -> ast.Call | None:
    last = forward.tree.body[-1]
    only = [s for s in forward.tree.body if not _is_docstring(s)] == [last]
    call = last.value if isinstance(last, ast.Return) else None
    if not only or not isinstance(call, ast.Call) or len(forward.parameters) != 2:
        return None
    if forward.resolve(call.func) is not mx.fast.rms_norm or len(call.args) != 3 or call.keywords:
        return None
    x = call.args[0]
    return call if isinstance(x, ast.Name) and x.id == forward.parameters[1] else None


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


class ResidualNorm(PatchPattern):
    """Layers in which a sum is normalised by the next statement."""

    order = 3
    opt_in = (
        "a launch of ours costs the host about what MLX's two do; no measurement asks for it yet"
    )

    def name(self) -> str:
        """Return "residual_norm"."""
        return "residual_norm"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept a forward with such statements over RMSNorms."""
        try:
            forward = own_forward(type(module))
        except ForwardRefused:
            return None
        sites = [s for s in normed_additions(forward) if _is_norm(module.get(s.norm))]
        if not sites:
            return None
        arguments: dict[type, Any] = {}
        try:
            for site in sites:
                cls = library_class(module[site.norm])
                arguments[cls] = rms_arguments(cls)
        except ForwardRefused as refused:
            return Refused(str(refused))
        names = tuple(site.norm for site in sites)

        def members(base: type) -> dict[str, Any]:
            return {
                "__call__": _rewritten(own_forward(base), names),
                "_zmlx_add_norm": _add_norm(arguments),
            }

        key = (config.backend, names, tuple(arguments))
        note = f"the sum before {' and '.join(names)} together with it"
        return Proposal(key, members, _USES, note)


def _is_norm(child: Any) -> bool:
    """Return whether a child may be a norm: it holds a weight along one axis, or nothing."""
    if not isinstance(child, nn.Module):
        return False
    return all(isinstance(value, mx.array) and value.ndim == 1 for value in child.values())


def _rewritten(forward: Forward, names: tuple[str, ...]) -> Any:
    own = forward.parameters[0]
    substitutions: dict[ast.AST, ast.AST | list[ast.stmt]] = {}
    for number, site in enumerate(_sites(forward, names)):
        both = expression(
            f"{own}._zmlx_add_norm({own}.{site.norm}, a, b)",
            a=site.addition.left,
            b=site.addition.right,
        )
        normed = f"_zmlx_normed_{number}"
        targets = [site.statement.targets[0], ast.Name(normed, ast.Store())]
        pair: ast.expr = ast.Tuple(targets, ast.Store())
        substitutions[site.statement] = [ast.Assign([pair], both)]
        substitutions[site.call] = ast.Name(normed, ast.Load())
    return rewritten(forward, substitutions)


def _sites(forward: Forward, names: tuple[str, ...]) -> list[NormedAddition]:
    return [site for site in normed_additions(forward) if site.norm in names]


def _add_norm(arguments: dict[type, Any]) -> Any:
    def _zmlx_add_norm(self: Any, norm: Any, a: Any, b: Any) -> tuple[mx.array, mx.array]:
        of = arguments.get(library_class(norm))
        if (
            of is None
            or self._training
            or not are_floats(a, b)
            or a.shape != b.shape
            or not 0 < a.size <= _MOST_ROWS * a.shape[-1]
        ):
            h = a + b
            return h, norm(h)
        weight, eps = of(norm, a)
        if not are_floats(weight):
            h = a + b
            return h, norm(h)
        return ADD_RMSNORM(a, b, weight, eps=eps)  # type: ignore[no-any-return]

    return _zmlx_add_norm


PATTERN = ResidualNorm()
