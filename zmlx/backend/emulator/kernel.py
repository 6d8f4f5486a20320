"""A kernel on the emulator: compiled when it is first launched with its dtypes, then remembered."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend.cpu import native
from zmlx.backend.definition import Definition, Launch, Template
from zmlx.backend.emulator import assembly, faults, toolchain
from zmlx.backend.emulator.assembly import Signature

MOST_THREADS = 1024
MOST_THREADGROUP_BYTES = 32 << 10


class EmulatedKernel:
    """A definition that runs on the CPU; called as the result of `mx.fast.metal_kernel`."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self._compiled: dict[Signature, tuple[Any, assembly.Assembled]] = {}
        self._lock = threading.Lock()

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
        """Return the outputs, lazily; what the kernel does wrong is raised when they are evaluated.

        Raises:
            ValueError: numbers of inputs or outputs differ from the definition's, or the grid or
                threadgroup is not three numbers of the right size.
            zmlx.backend.emulator.faults.CompileError: the source is not accepted.
            zmlx.backend.emulator.faults.LimitError: more than 1,024 threads a threadgroup, or more
                than 32 KB of threadgroup memory.
        """
        definition = self.definition
        _same_count(definition, "inputs", inputs, definition.input_names)
        _same_count(definition, "output_shapes", output_shapes, definition.output_names)
        _same_count(definition, "output_dtypes", output_dtypes, definition.output_names)
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        group = group_size(definition.name, grid, threadgroup)
        signature = Signature.of(arrays, output_dtypes, template)
        made, text = self._made(signature)
        if verbose:
            print(f"Generated source code for `{definition.name}`:\n```\n{text.metal}\n```")
        result: list[mx.array] = native.load().emulate(
            made,
            arrays,
            [list(shape) for shape in output_shapes],
            list(output_dtypes),
            grid=tuple(grid),
            threadgroup=group,
            init_value=init_value,
            may_leave_unwritten=definition.partial_outputs,
            stream=_stream(stream),
        )
        return result

    def _made(self, signature: Signature) -> tuple[Any, assembly.Assembled]:
        found = self._compiled.get(signature)
        if found is None:
            with self._lock:
                found = self._compiled.get(signature)
                if found is None:
                    found = self._compiled[signature] = self._compile(signature)
        return found

    def _compile(self, signature: Signature) -> tuple[Any, assembly.Assembled]:
        definition = self.definition
        text = assembly.assembled(definition, signature)
        kernel = loaded(
            definition.name, text.text, text.parameters, definition.ensure_row_contiguous
        )
        return kernel, text


def compiled(definition: Definition) -> Launch:
    """Return a definition as something to launch; its source is compiled when dtypes are known.

    Raises:
        ValueError: it has no output.
    """
    if not definition.output_names:
        raise ValueError(f"kernel '{definition.name}' needs at least one output")
    return EmulatedKernel(definition)


def loaded(
    name: str, text: str, parameters: Sequence[tuple[int, int, str]], ensure_row_contiguous: bool
) -> Any:
    """Compile a kernel's text and load it.

    Args:
        name: for messages.
        text: as `assembly` writes it.
        parameters: for each parameter what it is given, the input's or output's index, its name.
        ensure_row_contiguous: copy inputs that are not.

    Raises:
        zmlx.backend.emulator.faults.CompileError: the source is not accepted.
        zmlx.backend.emulator.faults.LimitError: it takes more than 32 KB of threadgroup memory.
    """
    try:
        file = toolchain.compiled(text)
    except faults.CompileError as error:
        raise faults.CompileError(f"kernel '{name}': {error}") from None
    library = native.load()
    library.set_fault_exception(faults.made)
    kernel = library.load_kernel(str(file), name, list(parameters), ensure_row_contiguous)
    taken = library.threadgroup_bytes(kernel)
    if taken > MOST_THREADGROUP_BYTES:
        raise faults.LimitError(
            f"kernel '{name}' takes {taken:,} bytes of threadgroup memory; "
            f"a device has {MOST_THREADGROUP_BYTES:,}"
        )
    return kernel


def group_size(name: str, grid: Sequence[int], threadgroup: Sequence[int]) -> tuple[int, int, int]:
    """Return the threadgroup that a device would run: no larger than the grid.

    Raises:
        ValueError: they are not three numbers each, or a number is negative or a side has no
            threads.
        zmlx.backend.emulator.faults.LimitError: a threadgroup has more than 1,024 threads.
    """
    for what, size, least in (("grid", grid, 0), ("threadgroup", threadgroup, 1)):
        if len(size) != 3 or any(not isinstance(n, int) or n < least for n in size):
            raise ValueError(
                f"kernel '{name}': {what} {tuple(size)}: expected three numbers of at least {least}"
            )
        if any(n >= 1 << 32 for n in size):
            raise ValueError(f"kernel '{name}': {what} {tuple(size)}: too many threads")
    threads = math.prod(threadgroup)
    if threads > MOST_THREADS:
        raise faults.LimitError(
            f"kernel '{name}': a threadgroup of {tuple(threadgroup)} has {threads:,} threads; "
            f"a device runs {MOST_THREADS:,} at most"
        )
    x, y, z = (min(*pair) for pair in zip(threadgroup, grid, strict=True))
    return x, y, z


def _stream(stream: mx.Stream | mx.Device | None) -> mx.Stream | None:
    """Return the CPU's stream that is asked for; others do not matter: this runs on the CPU."""
    if isinstance(stream, mx.Device):
        return mx.default_stream(stream)
    return stream


def _same_count(
    definition: Definition, what: str, given: Sequence[Any], names: Sequence[str]
) -> None:
    if len(given) != len(names):
        raise ValueError(
            f"kernel '{definition.name}': {len(given)} {what} given, it has {len(names)} "
            f"({', '.join(names)})"
        )
