"""A kernel's source with its names, and what a compiled kernel is on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from zmlx.backend.names import check_names

#: Values of a kernel's template: a type, a whole number or a truth value by parameter.
Template = Sequence[tuple[str, "mx.Dtype | int | bool"]]


@dataclass(frozen=True)
class Definition:
    """A kernel as `mx.fast.metal_kernel` takes it; equal ones are compiled once.

    Attributes:
        name: a C identifier; it shows in profiles and in compilers' messages.
        input_names: C identifiers, in the order of the inputs. `NAME_shape`, `NAME_strides` and
            `NAME_ndim` exist in the source where it uses them.
        output_names: C identifiers, in the order of the outputs.
        source: the body of the kernel, in the Metal Shading Language.
        header: what stands before the kernel: functions, constants, includes.
        ensure_row_contiguous: copy inputs that are not row contiguous before the launch.
        atomic_outputs: outputs are `device atomic<T>*`.
        cuda: a body written for CUDA by hand, in place of the translated one.
        cuda_header: what stands before it.

    Raises:
        TypeError: a name or a text is not a string, or names come as one.
        ValueError: a name is no C identifier, is a word of Metal's or is there twice; no outputs;
            an empty source.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    cuda: str | None = None
    cuda_header: str = ""

    def __post_init__(self) -> None:
        """Refuse what would fail late, at the first evaluation, in a compiler's words."""
        check_names(self.name, self.input_names, self.output_names)
        for what, text in (("source", self.source), ("header", self.header)):
            if not isinstance(text, str):
                raise TypeError(
                    f"kernel {self.name!r}: {what} is a {type(text).__name__}; give a string"
                )
        if not self.source.strip():
            raise ValueError(f"kernel {self.name!r}: its source is empty; give the body of one")


class Launch(Protocol):
    """A compiled kernel: the call of `mx.fast.metal_kernel`'s result, on any backend.

    `grid` counts threads (not threadgroups), as Metal's dispatchThreads does, and need not be a
    multiple of `threadgroup`. Outputs are uninitialised where the kernel writes nothing, unless
    `init_value` is given.
    """

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
        """Return the outputs, lazily."""
