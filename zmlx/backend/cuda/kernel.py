"""The launch of a translated kernel; what is unusual about a call is kept off the common path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

from zmlx.backend.cuda.source import Translation, Variant
from zmlx.backend.definition import Definition, Template

#: Threads that a threadgroup may have, on Metal and on CUDA.
MAX_THREADS = 1024


class CudaKernel:
    """A kernel in Metal's language as a function, on CUDA; see `zmlx.backend.definition.Launch`.

    The text is made when a variant is first needed: one for grids that are multiples of the
    threadgroup, one for others, and one for each set of inputs without dimensions. A call only
    finds out which.
    """

    __slots__ = ("_common", "_translation", "_variants", "_watched")

    def __init__(self, definition: Definition) -> None:
        self._translation = Translation(definition)
        self._watched = self._translation.watched
        self._variants: dict[Variant, Callable[..., list[mx.array]]] = {}
        self._common = self._variant(Variant())

    def __call__(
        self,
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
        """Return the outputs, lazily.

        Raises:
            ValueError: the grid or threadgroup is not one that can be launched, or the number of
                inputs or outputs is not the definition's.
        """
        kernel = self._common
        gx, gy, gz = grid
        tx, ty, tz = threadgroup
        usual = 0 < tx * ty * tz <= MAX_THREADS and not (gx % tx or gy % ty or gz % tz)
        if usual and gx and gy and gz:
            for index in self._watched:
                if not getattr(inputs[index], "ndim", 0):
                    usual = False
            for _, value in template or ():
                if type(value) is int and value < 0:
                    usual = False
        else:
            usual = False
        if not usual:
            kernel, inputs, grid, template = self._unusual(inputs, grid, threadgroup, template)
        return kernel(
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
            init_value=init_value,
            verbose=verbose,
            stream=stream,
        )

    def _unusual(
        self,
        inputs: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None,
    ) -> tuple[Callable[..., list[mx.array]], Sequence[Any], tuple[int, int, int], Template | None]:
        """Return the kernel of a call, and its inputs, grid and template."""
        self._check(inputs, grid, threadgroup)
        variant = variant_of(self._translation, inputs, grid, threadgroup, template)
        rest = [item for item in template or () if item not in variant.constants]
        if variant.cut:
            inputs = [*inputs, _size(tuple(grid))]
            grid = (max(grid[0], 1), max(grid[1], 1), max(grid[2], 1))
        return self._variant(variant), inputs, grid, rest or None

    def _check(
        self,
        inputs: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> None:
        definition = self._translation.definition
        if len(inputs) != len(definition.input_names):
            raise ValueError(
                f"kernel {definition.name!r} takes {len(definition.input_names)} inputs "
                f"({', '.join(definition.input_names)}), not {len(inputs)}"
            )
        if min(grid) < 0:
            raise ValueError(f"kernel {definition.name!r}: grid {tuple(grid)} has a negative size")
        threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
        if min(threadgroup) < 1 or threads > MAX_THREADS:
            raise ValueError(
                f"kernel {definition.name!r}: a threadgroup of {tuple(threadgroup)} has {threads} "
                f"threads; 1 to {MAX_THREADS} can run together"
            )

    def _variant(self, variant: Variant) -> Callable[..., list[mx.array]]:
        if variant not in self._variants:
            source = self._translation.source(variant)
            definition = self._translation.definition
            made = mx.fast.cuda_kernel(
                name=definition.name,
                input_names=list(source.input_names),
                output_names=list(definition.output_names),
                source=source.body,
                header=source.header,
                ensure_row_contiguous=definition.ensure_row_contiguous,
            )
            self._variants[variant] = cast(Callable[..., list[mx.array]], made)
        return self._variants[variant]


def variant_of(
    translation: Translation,
    inputs: Sequence[Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Template | None,
) -> Variant:
    """Return which text a call needs."""
    scalars = tuple(i for i in translation.watched if not getattr(inputs[i], "ndim", 0))
    # MLX writes the template's numbers into the kernel's name, where a minus cannot stand.
    negative = tuple((n, v) for n, v in template or () if type(v) is int and v < 0)
    cut = any(g == 0 or (g > t and g % t) for g, t in zip(grid, threadgroup, strict=True))
    return Variant(cut, scalars, negative)


@lru_cache(maxsize=256)
def _size(grid: tuple[int, ...]) -> mx.array:
    """Return a grid's size as an input; the same few sizes come again and again."""
    return mx.array(grid, dtype=mx.int32)
