"""Elementwise operations from formulas: one kernel forward, one backward.

A formula is an expression of C or Metal. Functions may be written with or without `metal::`,
`metal::precise::` or `metal::fast::`; values are computed in float32 whatever the arrays hold.
Where no gradient is given it is derived.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

from zmlx.authoring.formula.formula import formula
from zmlx.authoring.msl import DEFAULT_HEADER
from zmlx.authoring.operation import Elementwise
from zmlx.authoring.pointwise import Pointwise
from zmlx.deprecation import takes_compute_dtype


@takes_compute_dtype
def elementwise(
    expr: str,
    *,
    name: str | None = None,
    grad_expr: str | None = None,
    header: str | None = None,
    use_output: bool = True,
    grad_prelude: str = "",
) -> Elementwise:
    """Make an operation on one array from a formula.

    Args:
        expr: the formula, of `x`, such as "log(1 + exp(x))".
        name: the kernel's name, a C identifier; made from the formula when it is None.
        grad_expr: the gradient for x, of the cotangent `g`, `x` and, with use_output, the output
            `y`. None derives it from the formula.
        header: Metal text before the kernel, whose functions the formulas may call;
            `msl.DEFAULT_HEADER` when it is None.
        use_output: let grad_expr use `y`. The output is then kept until the backward pass.
        grad_prelude: declarations before grad_expr, such as "float s = kk_sigmoid(x);".

    Returns:
        A function of one array of any shape. Its result has that shape; dtypes are those that
        `Elementwise` tells.

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    text = DEFAULT_HEADER if header is None else header
    called = name if name is not None else f"elementwise_{zlib.crc32(str(expr).encode()):08x}"
    if grad_expr is None:
        if grad_prelude.strip():
            raise ValueError(f"{called}: grad_prelude belongs to a grad_expr, and there is none")
        return unary(name=called, expr=expr, header=text, cache=False)
    return with_gradients(
        called,
        expr,
        ("x",),
        (grad_expr,),
        header=text,
        prelude=grad_prelude,
        output="y" if use_output else "",
    )


@takes_compute_dtype
def unary(
    *,
    name: str,
    expr: str,
    ensure_row_contiguous: bool = True,
    header: str = "",
    cache: bool = True,
) -> Elementwise:
    """Make an operation on one array, `x` in the formula; its gradient is derived.

    Args:
        name: the kernel's name, a C identifier.
        expr: the formula, of `x`.
        ensure_row_contiguous: copy an array that is not row contiguous before the launch; False
            reads it by its strides instead.
        header: Metal text before the kernel, whose functions the formula may call.
        cache: return the operation that was made from equal arguments before, if there is one.

    Raises:
        FormulaError: the formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    make = _unary if cache else _unary.__wrapped__
    return make(name, expr, ensure_row_contiguous, header)


@cache
def _unary(name: str, expr: str, contiguous: bool, header: str) -> Elementwise:
    return _derived(name, expr, ("x",), contiguous, header)


@takes_compute_dtype
def binary(
    *, name: str, expr: str, ensure_row_contiguous: bool = True, header: str = ""
) -> Elementwise:
    """Make an operation on two arrays of one shape, `a` and `b`; its gradients are derived.

    Args:
        name: the kernel's name, a C identifier.
        expr: the formula, of `a` and `b`.
        ensure_row_contiguous: as for `unary`.
        header: Metal text before the kernel, whose functions the formula may call.

    Returns:
        A function of two arrays. It does not broadcast: arrays of different shapes raise
        ValueError. Its result has the dtype that MLX gives the two arguments together.

    Raises:
        FormulaError: the formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    return _derived(name, expr, ("a", "b"), ensure_row_contiguous, header)


@takes_compute_dtype
def map(
    *,
    name: str,
    expr: str,
    input_names: Sequence[str],
    ensure_row_contiguous: bool = True,
    header: str = "",
) -> Elementwise:
    """Make an operation on any number of arrays of one shape; its gradients are derived.

    Args:
        name: the kernel's name, a C identifier.
        expr: the formula, of the names in `input_names`.
        input_names: C identifiers, in the order of the arguments.
        ensure_row_contiguous: as for `unary`.
        header: Metal text before the kernel, whose functions the formula may call.

    Raises:
        FormulaError: the formula has a mistake; the error points to it.
        TypeError: input_names is a string.
        ValueError: a name is not a C identifier or is there twice, or there are none.
    """
    if isinstance(input_names, str):
        raise TypeError(f"{name}: input_names={input_names!r} is a string; give a list of names")
    if not input_names:
        raise ValueError(f"{name}: input_names is empty; name at least one input")
    if len(set(input_names)) != len(input_names):
        raise ValueError(f"{name}: input_names={list(input_names)} holds a name twice")
    return _derived(name, expr, input_names, ensure_row_contiguous, header)


def _derived(
    name: str, expr: str, names: Sequence[str], contiguous: bool, header: str
) -> Elementwise:
    read = formula(expr, names, header=header)
    return Elementwise(Pointwise(name, names, [read], header=header, contiguous=contiguous))


def with_gradients(
    name: str,
    expr: str,
    names: Sequence[str],
    gradients: Sequence[str],
    *,
    header: str,
    prelude: str = "",
    output: str = "",
    contiguous: bool = True,
) -> Elementwise:
    """Make an operation with given gradients.

    Args:
        name: the kernel's name, a C identifier.
        expr: the formula, of `names`.
        names: the variables.
        gradients: for each variable its gradient, of `names`, the cotangent `g` and `output`.
        header: Metal text before the kernels, whose functions the formulas may call.
        prelude: declarations before the gradients.
        output: the name of the output in the gradients; empty if they do not use it.
        contiguous: copy arrays that are not row contiguous before a launch.

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    read = formula(expr, names, header=header)
    known = [*names, "g", *([output] if output else [])]
    found = [formula(text, known, header=header, prelude=prelude) for text in gradients]
    kernel = Pointwise(name, names, [read], header=header, contiguous=contiguous)
    return Elementwise(kernel, found, output=output)
