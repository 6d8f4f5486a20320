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
class CudaBody:
    """A kernel's body written for CUDA by hand, in place of the translated one.

    Attributes:
        source: the body, in CUDA C++; it gets whole blocks, and no prelude.
        header: what stands before the kernel.
        architecture: the compute capability that it needs, times ten; devices of a lower one get
            the translated body.
        launch: grid and threadgroup, where threads are dealt out otherwise than for Metal.
        threads: most threads of a block, where the compiler has to know them so that there are
            registers for all; 0 where any number can run.
        early: inputs that it reads while earlier kernels may still run: weights, which no kernel
            writes. Such a body says `zmlx::wait_for_earlier();` itself, once and in all threads,
            before it touches anything else; before others that is put.
    """

    source: str
    header: str = ""
    architecture: int = 0
    launch: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    threads: int = 0
    early: tuple[str, ...] = ()


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
        updated_inputs: names of inputs into which the kernel writes in place, through a pointer
            whose `const` it casts away. MLX knows nothing of that: what is to be read after the
            launch has to depend on one of its outputs.
        partial_outputs: threads may leave elements of outputs unwritten, which nobody reads.
        cuda: a body written for CUDA by hand, in place of the translated one.

    Raises:
        TypeError: a name or a text is not a string, or names come as one.
        ValueError: a name is no C identifier, is a word of Metal's or is there twice; no outputs;
            an empty source; an updated input that is none, or may be copied before the launch.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    updated_inputs: tuple[str, ...] = ()
    partial_outputs: bool = False
    cuda: CudaBody | None = None

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
        if unknown := set(self.updated_inputs) - set(self.input_names):
            raise ValueError(
                f"kernel {self.name!r}: updated inputs {sorted(unknown)} are no inputs"
            )
        if self.updated_inputs and self.ensure_row_contiguous:
            raise ValueError(
                f"kernel {self.name!r} updates inputs, of which it may get copies; "
                "set ensure_row_contiguous=False and go by their strides"
            )


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
