"""Formulas: one expression of C, read, checked, computed with MLX, derived and printed as Metal."""

from zmlx.authoring.formula.errors import FormulaError, NotDifferentiable

__all__ = ["FormulaError", "NotDifferentiable"]
