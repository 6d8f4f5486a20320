"""A backend that runs nothing: each launch of a kernel is looked at, and gives zeros.

In the place of another backend it holds a strict look over every kernel that some code launches,
with the very dtypes, shapes and templates of the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from zmlx.backend.definition import Definition, Launch, Template
from zmlx.backend.signature import CONSTANT_BELOW
from zmlx.backend.strict.check import check
from zmlx.backend.strict.diagnosis import Diagnosis


class Refused(RuntimeError):
    """Apple's compiler would refuse a kernel; `diagnoses` says why."""

    def __init__(self, name: str, diagnoses: Sequence[Diagnosis]) -> None:
        listed = "\n  ".join(str(diagnosis) for diagnosis in diagnoses)
        super().__init__(f"Metal would refuse kernel {name!r}:\n  {listed}")
        self.diagnoses = tuple(diagnoses)


def compiled(definition: Definition) -> Launch:
    """Return a launch that looks at the kernel's text, and raises `Refused` if there is a fault."""

    def launch(
        *,
        inputs: Sequence[mx.array | float | int | bool],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: mx.Stream | mx.Device | None = None,
    ) -> list[mx.array]:
        arrays = [array if isinstance(array, mx.array) else mx.array(array) for array in inputs]
        found = _looked(
            definition,
            tuple(array.dtype for array in arrays),
            tuple(_kind(array) for array in arrays),
            tuple(output_dtypes),
            tuple(template or ()),
        )
        if found:
            raise Refused(definition.name, found)
        return [
            mx.zeros(tuple(shape), dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]

    return launch


def _kind(array: mx.array) -> tuple[int, ...]:
    """Return a shape that is passed as the array's is: all that a text depends on."""
    if array.ndim == 0:
        return ()
    return (min(array.size, CONSTANT_BELOW),)


@cache
def _looked(
    definition: Definition,
    input_dtypes: tuple[mx.Dtype, ...],
    input_shapes: tuple[tuple[int, ...], ...],
    output_dtypes: tuple[mx.Dtype, ...],
    template: tuple[tuple[str, mx.Dtype | int | bool], ...],
) -> tuple[Diagnosis, ...]:
    return tuple(
        check(
            definition,
            input_dtypes=input_dtypes,
            output_dtypes=output_dtypes,
            template=template,
            input_shapes=input_shapes,
        )
    )
