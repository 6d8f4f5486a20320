"""The launch of a translated kernel; what is unusual about a call is kept off the common path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from zmlx.backend.arguments import MAX_THREADS
from zmlx.backend.cuda.addresses import Addresses, Forms
from zmlx.backend.cuda.ahead import Kernel
from zmlx.backend.cuda.included import shortened
from zmlx.backend.cuda.launching import current
from zmlx.backend.cuda.source import Translation, Variant
from zmlx.backend.definition import Definition, Launch, Template

_Size = tuple[int, int, int]


def launch_of(definition: Definition) -> Launch:
    """Return a kernel in Metal's language as a function, on CUDA.

    It is a closure, and one that does little: it runs at every call of the kernel.

    Raises:
        TranslationError: the source holds something that CUDA has not.
    """
    variants = _Variants(definition)
    common = variants.get(Variant())
    known = variants.kernels  # a variant is equal to a plain tuple of what it holds
    watched, count = variants.watched, len(definition.input_names)

    def launch(
        *,
        inputs: Sequence[mx.array | float | int | bool],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: _Size,
        threadgroup: _Size,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: mx.Stream | mx.Device | None = None,
    ) -> list[mx.array]:
        gx, gy, gz = grid
        tx, ty, tz = threadgroup
        some = gx > 0 < gy and gz > 0
        if not (some and tx > 0 < ty and 0 < tx * ty * tz <= MAX_THREADS and len(inputs) == count):
            variants.check(inputs, grid, threadgroup)
        scalars: tuple[int, ...] = ()
        for index in watched:
            if not getattr(inputs[index], "ndim", 0):
                scalars = (*scalars, index)
        constants: tuple[tuple[str, int], ...] = ()
        if template is not None:
            for name, value in template:
                if type(value) is int and value < 0:
                    constants = (*constants, (name, value))
        if (gx % tx and gx > tx) or (gy % ty and gy > ty) or (gz % tz and gz > tz) or not some:
            # Threads of the blocks lie outside of the grid. Of an axis that is shorter than the
            # threadgroup MLX makes one block that fits.
            inputs = [*inputs, _size((gx, gy, gz))]
            if not some:
                grid = (gx or 1, gy or 1, gz or 1)
            key = (True, scalars, constants)
        elif scalars or constants:
            key = (False, scalars, constants)
        else:
            key = None
        kernel = common if key is None else known.get(key) or variants.get(Variant(*key))
        if constants and template is not None:
            template = [item for item in template if item not in constants]
        how = current()
        if how is not None and how.addresses is not None:
            form = key or (False, (), ())
            kernel, inputs = variants.by_address(how.addresses, form, inputs, kernel)
        if output_dtypes != kernel.output_dtypes or template != kernel.template:
            kernel.notice(inputs, output_dtypes, template)
        run = kernel.run if how is None else how.run_of(kernel)
        return run(  # type: ignore[no-any-return]
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

    return launch


class _Variants:
    """The texts of a kernel, each made when a call first needs it.

    There is one for grids that are multiples of the threadgroup, one for others, and one for each
    set of inputs without dimensions and for each set of negative numbers in the template.
    """

    def __init__(self, definition: Definition) -> None:
        self._translation = Translation(definition)
        self.kernels: dict[tuple[Any, ...], Kernel] = {}
        self.watched = self._translation.watched
        self._forms = Forms(self._made, self._translation.asks_about)

    def get(self, variant: Variant) -> Kernel:
        """Return the kernel of a variant."""
        kernel = self.kernels.get(variant)
        if kernel is None:
            kernel = self.kernels[variant] = self._made(variant)
        return kernel

    def _made(self, variant: Variant, told: str = "", names: Sequence[str] = ()) -> Kernel:
        """Return a kernel; with `told` before its body, and inputs `names`, if they are given."""
        definition = self._translation.definition
        whole = self._translation.source(variant)
        source = shortened(whole, definition.name)
        return Kernel(
            definition.name,
            names or source.input_names,
            definition.output_names,
            source,
            ensure_row_contiguous=definition.ensure_row_contiguous,
            whole=whole,
            told=told,
        )

    def by_address(
        self, held: Addresses, key: tuple[Any, ...], inputs: Sequence[Any], kernel: Kernel
    ) -> tuple[Kernel, Sequence[Any]]:
        """Return a kernel that takes inputs by address, and its inputs."""
        variant = Variant(*key)
        names = self._translation.source(variant).input_names
        return self._forms.choose(held, variant, names, inputs, kernel)

    def check(self, inputs: Sequence[Any], grid: _Size, threadgroup: _Size) -> None:
        """See whether a call can be launched; a grid may be empty.

        Raises:
            ValueError: the grid or threadgroup cannot be, or there are too few or many inputs.
        """
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


def variant_of(
    translation: Translation,
    inputs: Sequence[Any],
    grid: _Size,
    threadgroup: _Size,
    template: Template | None,
) -> Variant:
    """Return which text a call needs."""
    scalars = tuple([i for i in translation.watched if not getattr(inputs[i], "ndim", 0)])
    # MLX writes the template's numbers into the kernel's name, where a minus cannot stand.
    negative = tuple([(n, v) for n, v in template or () if type(v) is int and v < 0])
    cut = any(not g or (g > t and g % t) for g, t in zip(grid, threadgroup, strict=True))
    return Variant(cut, scalars, negative)


@lru_cache(maxsize=256)
def _size(grid: _Size) -> mx.array:
    """Return a grid's size as an input; the same few sizes come again and again.

    It is computed on the device: an array that the host made lies in memory that both share, and
    each launch that reads it takes one and a half microseconds longer.
    """
    size = mx.array(grid, dtype=mx.int32) + 0
    mx.async_eval(size)
    return size
