"""Differentiable kernels from formulas and their gradients."""

from zmlx.authoring.autograd import binary_from_expr, nary_from_expr, unary_from_expr

__all__ = ["binary_from_expr", "nary_from_expr", "unary_from_expr"]
