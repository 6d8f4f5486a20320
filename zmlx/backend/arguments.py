"""What a launch is called with, checked before it reaches a compiler or a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.backend.names import check_name

#: Most threads that a threadgroup may have on any backend.
MAX_THREADS = 1024
#: Launches count threads with 32 bits.
_LIMIT = 1 << 31


def check_inputs(definition: Definition, inputs: Sequence[Any]) -> int:
    """Return how many inputs of a launch are arrays; the others are numbers.

    Raises:
        TypeError: an input is neither.
        ValueError: there are too many or too few.
    """
    _check_length(definition.name, "inputs", inputs, definition.input_names)
    arrays = 0
    for index, value in enumerate(inputs):
        if isinstance(value, mx.array):
            arrays += 1
        elif not isinstance(value, bool | int | float):
            raise TypeError(
                f"kernel {definition.name!r}: input {definition.input_names[index]!r} is a "
                f"{type(value).__name__}; give an mx.array or a number"
            )
    return arrays


def check_arguments(
    definition: Definition,
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]] | None,
) -> None:
    """Refuse outputs and templates of a launch that would fail late.

    The grid has its own check, since it is not looked at where there is nothing to compute.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or there are too many or too few of something.
    """
    name = definition.name
    _check_length(name, "output_shapes", output_shapes, definition.output_names)
    _check_length(name, "output_dtypes", output_dtypes, definition.output_names)
    for shape in output_shapes:
        _check_shape(name, shape)
    for dtype in output_dtypes:
        if not isinstance(dtype, mx.Dtype):
            raise TypeError(f"kernel {name!r}: output_dtypes holds {dtype!r}; give mx.Dtype values")
    if template:
        _check_template(definition, template)


def check_geometry(name: str, grid: Sequence[int], threadgroup: Sequence[int]) -> None:
    """Refuse a grid or threadgroup that no device takes.

    Raises:
        TypeError: not three whole numbers.
        ValueError: a number is not positive, or there are too many threads.
    """
    for what, value in (("grid", grid), ("threadgroup", threadgroup)):
        if (
            not isinstance(value, tuple | list)
            or len(value) != 3
            or not all(isinstance(count, int) for count in value)
        ):
            raise TypeError(f"kernel {name!r}: {what}={value!r}; give three ints, (x, y, z)")
        if not all(0 < count < _LIMIT for count in value):
            raise ValueError(
                f"kernel {name!r}: {what}={tuple(value)}; each number must be from 1 to 2^31 - 1"
            )
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > MAX_THREADS:
        raise ValueError(
            f"kernel {name!r}: threadgroup={tuple(threadgroup)} has {threads} threads; "
            f"at most {MAX_THREADS} are possible"
        )


def _check_length(
    name: str, what: str, values: Sequence[object] | None, names: Sequence[str]
) -> None:
    if not isinstance(values, tuple | list):
        raise TypeError(f"kernel {name!r}: {what} is {type(values).__name__}; give a list")
    if len(values) != len(names):
        raise ValueError(
            f"kernel {name!r}: {what} has {len(values)} elements; "
            f"it takes {len(names)} ({', '.join(names) or 'none'})"
        )


def _check_shape(name: str, shape: Sequence[int]) -> None:
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) for n in shape):
        raise TypeError(f"kernel {name!r}: output shape {shape!r}; give a tuple of ints")
    if any(not 0 <= n < _LIMIT for n in shape):
        raise ValueError(
            f"kernel {name!r}: output shape {tuple(shape)}; each number must be from 0 to 2^31 - 1"
        )


def _check_template(definition: Definition, template: Sequence[tuple[str, Any]]) -> None:
    name = definition.name
    if not isinstance(template, tuple | list) or not all(
        isinstance(entry, tuple | list) and len(entry) == 2 for entry in template
    ):
        raise TypeError(
            f"kernel {name!r}: template={template!r}; give a list of (name, value) pairs"
        )
    taken = {*definition.input_names, *definition.output_names}
    for parameter, value in template:
        check_name(parameter, f"kernel {name!r}, template")
        if parameter in taken:
            raise ValueError(
                f"kernel {name!r}: template parameter {parameter!r} names something else too; "
                "rename it"
            )
        taken.add(parameter)
        if not isinstance(value, mx.Dtype | int):
            raise TypeError(
                f"kernel {name!r}: template parameter {parameter!r} is {value!r}; "
                "give an mx.Dtype, an int or a bool, and numbers with a fraction as inputs"
            )
        if isinstance(value, int) and not -_LIMIT <= value < _LIMIT:
            raise ValueError(
                f"kernel {name!r}: template parameter {parameter}={value} needs more than 32 bits"
            )
