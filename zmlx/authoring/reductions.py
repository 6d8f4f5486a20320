"""Reductions of rows, and operations that reduce each row and then map it, from formulas."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from zmlx.authoring.formula.formula import Formula, formula
from zmlx.authoring.formula.tree import Name, substituted
from zmlx.authoring.msl import DEFAULT_HEADER
from zmlx.authoring.rows import Pass, RowKernel
from zmlx.authoring.rowwise import USUAL, RowOperation
from zmlx.deprecation import takes_compute_dtype


@takes_compute_dtype
def reduce(
    *,
    init: str,
    update: str,
    finalize: str = "acc",
    name: str | None = None,
    header: str | None = None,
) -> RowOperation:
    """Make a reduction over the last axis from formulas.

    Args:
        init: the value to begin with, such as "-INFINITY"; it counts once for each row.
        update: the accumulator after one more element, of `acc` and the element `v`, such as
            "max(acc, v)".
        finalize: the result, of `acc`; here and in `update` `d` is the length of the row, so that
            "acc / d" of a sum is the mean.
        name: the kernel's name, a C identifier; made from the formulas when it is None.
        header: Metal text before the kernel; `msl.DEFAULT_HEADER` when it is None.

    Returns:
        A function of one array of shape (..., d); its result has shape (...). Floating-point rows
        give their own dtype, accumulated in float32; whole numbers give int32 or the wider type of
        `acc`, or float32 if `acc` is a float. Gradients are those of the same reduction in MLX
        operations.

        Many threads share a row when `update` folds: `acc + f`, `max(acc, f)`, `acc * f`,
        `f > acc ? f : acc` and the like, with any f that does not hold `acc`. Partial results are
        then joined with the same operation. Any other update is computed from left to right by
        one thread for each row; in MLX operations it takes d steps.

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        ValueError: the name is not a C identifier.
    """
    text = DEFAULT_HEADER if header is None else header
    called = name or _name("reduce", init, update, finalize)
    kernel = RowKernel(
        name=called,
        inputs=("rows_of",),
        element="v",
        passes=(
            Pass(
                "acc",
                "total",
                formula(init, ("d",), header=text),
                formula(update, ("acc", "v", "d"), header=text),
            ),
        ),
        writes=(_finalized(finalize, text),),
        per_row=True,
        outputs=("result",),
        header=text,
    )
    return RowOperation(kernel)


def _finalized(finalize: str, header: str) -> Formula:
    """Read the last formula; the kernel calls the finished accumulator `total`."""
    read = formula(finalize, ("acc", "d"), header=header)
    if read.tree is None:
        return Formula(f"[&](float acc) {{ return {read.text}; }}(total)", None, read.opaque)
    return Formula(read.text, substituted(read.tree, {"acc": Name("total")}))


@takes_compute_dtype
def map_reduce(
    *,
    pass1: Mapping[str, str],
    pass2: Mapping[str, str],
    write: str,
    name: str | None = None,
    threadgroup: int | str = USUAL,
    header: str | None = None,
) -> RowOperation:
    """Make an operation that reduces each row twice and writes a value for each element.

    Args:
        pass1: formulas of the first reduction: "init"; "update", of `acc1` and the element `x`;
            "reduce", of two results `a` and `b`. Its result is `s1`.
        pass2: those of the second, whose accumulator is `acc2` and result `s2`; they may use `s1`.
        write: the value of an element, of `x`, `s1` and `s2`.
        name: the kernel's name, a C identifier; made from the formulas when it is None.
        threadgroup: most threads of a threadgroup, a multiple of 32 up to 1,024; a row shorter
            than that gets fewer. "auto" tunes it on the first call for each shape and remembers it
            on disk; in the emulator and on the CPU, where there is nothing to tune, it is 256.
        header: Metal text before the kernel; `msl.DEFAULT_HEADER` when it is None.

    Returns:
        A function of one array of shape (..., d), d from 0; its result has the same shape and, for
        floating-point arrays, dtype. Accumulators are float32. `d` in formulas is the row's length.
        Gradients are those of the same operation in MLX operations.

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        ValueError: a pass lacks a formula or has one too many, an update folds with another
            operation than "reduce" joins, or the name or threadgroup is none.
    """
    text = DEFAULT_HEADER if header is None else header
    formulas = [*_given("pass1", pass1), *_given("pass2", pass2), write]
    return _row_operation(
        name or _name("map_reduce", *formulas),
        formulas[:3],
        formulas[3:6],
        (write,),
        inputs=("inp",),
        outputs=("out",),
        threadgroup=threadgroup,
        header=text,
    )


@takes_compute_dtype
def rowwise_map_reduce(
    *,
    name: str,
    d: int,
    pass1_init: str,
    pass1_update: str,
    pass1_reduce_op: str,
    pass2_init: str,
    pass2_update: str,
    pass2_reduce_op: str,
    write_expr: str | Sequence[str],
    input_names: Sequence[str] = ("inp",),
    output_names: Sequence[str] = ("out",),
    threadgroup: int | str = USUAL,
    header: str = "",
) -> RowOperation:
    """Make an operation over rows of a fixed length, with several inputs and outputs.

    Args:
        name: the kernel's name, a C identifier.
        d: the length of a row; arrays with other rows are refused. `d` in formulas.
        pass1_init: the value that the first reduction begins with.
        pass1_update: its accumulator `acc1` after one more element.
        pass1_reduce_op: two of its results `a` and `b` joined, such as "a + b".
        pass2_init: as of the first one; the second may use the first one's result, `s1`.
        pass2_update: as of the first one, with the accumulator `acc2`.
        pass2_reduce_op: as of the first one; the result is `s2`.
        write_expr: the value of an element, of the inputs, `s1` and `s2`; with several outputs a
            sequence of formulas, one for each.
        input_names: names of the inputs. An element of the first one is also called `x`. Others
            have the first one's shape, or (d,) for a value per column, (..., 1) for one per row,
            or () for one number.
        output_names: names of the outputs, which have the first input's shape.
        threadgroup: as for `map_reduce`.
        header: Metal text before the kernel.

    Returns:
        A function of the inputs; it returns an array, or a tuple when there are several outputs.

    Raises:
        FormulaError: a formula has a mistake; the error points to it.
        TypeError: names are given as one string.
        ValueError: there are not as many formulas to write as outputs, an update folds with another
            operation than its reduce_op joins, or a name, d or threadgroup is none.
    """
    for what, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise TypeError(f"{name}: {what}={names!r} is a string; give a list of names")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{name}: {what}={list(names)}; name at least one, each once")
    writes = (write_expr,) if isinstance(write_expr, str) else tuple(write_expr)
    if len(writes) != len(output_names):
        raise ValueError(
            f"{name}: write_expr has {len(writes)} formulas for {len(output_names)} outputs; give "
            "a list with one for each"
        )
    return _row_operation(
        name,
        (pass1_init, pass1_update, pass1_reduce_op),
        (pass2_init, pass2_update, pass2_reduce_op),
        writes,
        inputs=tuple(input_names),
        outputs=tuple(output_names),
        threadgroup=threadgroup,
        header=header,
        length=d,
    )


def _row_operation(
    name: str,
    first: Sequence[str],
    second: Sequence[str],
    writes: Sequence[str],
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    threadgroup: int | str,
    header: str,
    length: int | None = None,
) -> RowOperation:
    elements = ("x", *(called for called in inputs if called != "x"), "d")
    kernel = RowKernel(
        name=name,
        inputs=inputs,
        element="x",
        passes=(
            _pass(name, "acc1", "s1", first, ("d",), elements, header),
            _pass(name, "acc2", "s2", second, ("d", "s1"), (*elements, "s1"), header),
        ),
        writes=tuple(formula(text, (*elements, "s1", "s2"), header=header) for text in writes),
        per_row=False,
        outputs=outputs,
        header=header,
    )
    return RowOperation(kernel, threadgroup=threadgroup, length=length)


def _pass(
    name: str,
    accumulator: str,
    result: str,
    texts: Sequence[str],
    begins: Sequence[str],
    elements: Sequence[str],
    header: str,
) -> Pass:
    init, update, joint = texts
    made = Pass(
        accumulator,
        result,
        formula(init, begins, header=header),
        formula(update, (accumulator, *elements), header=header),
        formula(joint, ("a", "b"), header=header),
    )
    folded, operator = made.fold(), made.operator()
    if folded is not None and operator is not None and folded.operator != operator:
        raise ValueError(
            f"{name}: the update {update!r} folds with {folded.operator!r} and the reduction "
            f"{joint!r} joins with {operator!r}; threads' results would be joined wrongly"
        )
    return made


def _given(what: str, formulas: Mapping[str, str]) -> list[str]:
    wanted = ("init", "update", "reduce")
    if not isinstance(formulas, Mapping) or set(formulas) != set(wanted):
        got: Any = sorted(formulas) if isinstance(formulas, Mapping) else formulas
        raise ValueError(f'{what} takes the formulas "init", "update" and "reduce"; got {got}')
    return [formulas[key] for key in wanted]


def _name(kind: str, *texts: str) -> str:
    return f"{kind}_{zlib.crc32(chr(0).join(map(str, texts)).encode()):08x}"
