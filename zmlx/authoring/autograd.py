"""Differentiable kernels whose gradients the author gives: the backward pass is a kernel too."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zmlx.authoring.elementwise import with_gradients
from zmlx.authoring.formula.errors import FormulaError
from zmlx.authoring.formula.tokens import tokens
from zmlx.authoring.operation import Elementwise
from zmlx.authoring.sources import SourceOperation
from zmlx.backend.definition import Definition
from zmlx.deprecation import takes_compute_dtype


@takes_compute_dtype
def unary_from_expr(
    *,
    name: str,
    fwd_expr: str,
    vjp_expr: str,
    ensure_row_contiguous: bool = True,
    use_output: bool = True,
    header: str = "",
    vjp_prelude: str = "",
) -> Elementwise:
    """Make an operation on one array from a formula and its gradient.

    Args:
        name: the kernel's name, a C identifier.
        fwd_expr: the formula, of `x`.
        vjp_expr: the gradient for x, of the cotangent `g`, `x` and, with use_output, the output
            `y`, such as "g * y" for exp(x).
        ensure_row_contiguous: copy arrays that are not row contiguous before a launch; False
            reads them by their strides instead.
        use_output: let vjp_expr use `y`. The output is then kept until the backward pass.
        header: Metal text before the kernels, whose functions the formulas may call.
        vjp_prelude: declarations before vjp_expr, such as "float s = kk_sigmoid(x);".

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    return with_gradients(
        name,
        fwd_expr,
        ("x",),
        (vjp_expr,),
        header=header,
        prelude=vjp_prelude,
        output="y" if use_output else "",
        contiguous=ensure_row_contiguous,
    )


@takes_compute_dtype
def binary_from_expr(
    *,
    name: str,
    fwd_expr: str,
    vjp_lhs_expr: str,
    vjp_rhs_expr: str,
    ensure_row_contiguous: bool = True,
    header: str = "",
    vjp_prelude: str = "",
) -> Elementwise:
    """Make an operation on two arrays of one shape from a formula and its two gradients.

    Args:
        name: the kernel's name, a C identifier.
        fwd_expr: the formula, of `a` and `b`.
        vjp_lhs_expr: the gradient for a, of the cotangent `g`, `a` and `b`.
        vjp_rhs_expr: the gradient for b, of the same.
        ensure_row_contiguous: as for `unary_from_expr`.
        header: Metal text before the kernels, whose functions the formulas may call.
        vjp_prelude: declarations before the gradients.

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    return with_gradients(
        name,
        fwd_expr,
        ("a", "b"),
        (vjp_lhs_expr, vjp_rhs_expr),
        header=header,
        prelude=vjp_prelude,
        contiguous=ensure_row_contiguous,
    )


@takes_compute_dtype
def nary_from_expr(
    *,
    name: str,
    fwd_source: str,
    bwd_source: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    ensure_row_contiguous: bool = True,
    header: str = "",
) -> SourceOperation:
    """Make a differentiable operation from two bodies of Metal kernels.

    Each is launched with one thread for each element of the first input, in a grid along x, so
    `thread_position_in_grid.x` is the element. The forward body reads the arrays of `input_names`
    and writes all of those of `output_names`. The backward body reads the same inputs and the
    cotangent, `cotan` (with several outputs `cotan_NAME` for each), and writes `dNAME` for each
    input. The type `T` is float, to compute in, and `O` that of the first input, to write; Metal
    does not convert float to bfloat16 by itself, so write `out[i] = O(value);`.

    The bodies are statements, so there is no reference: on the CPU the emulator runs them.

    Args:
        name: the kernels' name, a C identifier.
        fwd_source: the forward body.
        bwd_source: the backward body.
        input_names: names of the input arrays. The arrays have any shapes; `NAME_shape` is there.
        output_names: names of the output arrays, of the first input's shape and dtype.
        ensure_row_contiguous: copy inputs that are not row contiguous before a launch.
        header: Metal text before the kernels.

    Returns:
        A function of the inputs; it returns an array, or a tuple when there are several outputs.

    Raises:
        FormulaError: a body has a bracket without its partner.
        TypeError: names are given as one string.
        ValueError: a name is no C identifier, or a body does not write what it must.
    """
    for what, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise TypeError(f"{name}: {what}={names!r} is a string; give a list of names")
        if not names:
            raise ValueError(f"{name}: {what} is empty; name at least one")
    one = len(output_names) == 1
    cotangents = ["cotan"] if one else [f"cotan_{output}" for output in output_names]
    gradients = [f"d{input_name}" for input_name in input_names]
    _check_body(f"{name}: fwd_source", fwd_source, output_names)
    _check_body(f"{name}: bwd_source", bwd_source, gradients)
    forward = Definition(
        f"{name}_fwd",
        tuple(input_names),
        tuple(output_names),
        fwd_source,
        header,
        ensure_row_contiguous,
    )
    backward = Definition(
        f"{name}_bwd",
        (*input_names, *cotangents),
        tuple(gradients),
        bwd_source,
        header,
        ensure_row_contiguous,
    )
    return SourceOperation(name, forward, backward)


def _check_body(what: str, source: str, outputs: Sequence[str]) -> None:
    """Refuse a body whose brackets do not match or that never writes an output."""
    if not isinstance(source, str):
        raise TypeError(f"{what} is a {type(source).__name__}; give Metal statements as a string")
    # Preprocessor lines and texts in quotes are none of the words of formulas.
    plain = re.sub(r'^\s*#.*$|"[^"\n]*"', " ", source, flags=re.MULTILINE)
    try:
        tokens(plain)
    except FormulaError as error:
        raise FormulaError(plain, error.at, f"{what}: {error.problem}", error.advice) from None
    for output in outputs:
        if not re.search(rf"\b{re.escape(output)}\b", plain):
            raise ValueError(
                f"{what} never writes {output!r}: every element of every output must be written, "
                f"as in {output}[elem] = ..."
            )
