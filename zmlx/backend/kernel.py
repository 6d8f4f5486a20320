"""Kernels that users write in the Metal Shading Language, called as `mx.fast.metal_kernel`'s."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.arguments import check_arguments, check_geometry, check_inputs
from zmlx.backend.definition import Definition, Launch, Template
from zmlx.backend.launch import launcher
from zmlx.deprecation import takes_compute_dtype

#: Shapes and geometries that a kernel remembers as checked; more than that start over.
_REMEMBERED = 4096


@dataclass(frozen=True)
class MetalKernelSpec:
    """What a kernel is made of.

    Attributes:
        name: a C identifier; it shows in profiles and in compilers' messages.
        input_names: C identifiers, in the order of the inputs.
        output_names: C identifiers, in the order of the outputs.
        source: the body of the kernel, in the Metal Shading Language.
        header: what stands before the kernel.
        requested_ensure_row_contiguous: what the caller asked for.
        ensure_row_contiguous: what is done, which here is always what was asked for.
        atomic_outputs: outputs are `device atomic<T>*`.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    requested_ensure_row_contiguous: bool = True
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def definition(self) -> Definition:
        """Return what backends compile.

        Raises:
            TypeError: a name or a text is not a string.
            ValueError: a name that no compiler takes, a name twice, no outputs, no source.
        """
        return Definition(
            name=self.name,
            input_names=self.input_names,
            output_names=self.output_names,
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.ensure_row_contiguous,
            atomic_outputs=self.atomic_outputs,
        )


@dataclass
class KernelStats:
    """What is known of a kernel's launches so far.

    A launch is lazy, so counting it says nothing of its time; only `MetalKernel.timed` measures.
    MLX does not tell the layout of an array before it is evaluated. What a launch cannot know it
    counts as unknown; `MetalKernel.examine` evaluates and looks.

    Attributes:
        compile_time_ms: milliseconds that making the kernel took on the host, over all backends.
            Metal and CUDA compile at the first evaluation, which is not in it.
        run_count: launches.
        total_run_time_ms: milliseconds from call to evaluated outputs, over the runs of `timed`.
        contiguity_launches: launches with an input array.
        contiguity_checks: input arrays of those launches and of `examine`.
        contiguity_unknown_inputs: those whose layout was not known: all but `examine`'s.
        non_row_contiguous_inputs: those that `examine` found not to be row contiguous.
        launches_with_non_row_contiguous: calls of `examine` that found one.
        copy_risk_launches: launches that may have copied an input, because the kernel ensures
            row contiguous ones and a layout was unknown.
        copy_risk_inputs: the input arrays of which that is true.
    """

    compile_time_ms: float = 0.0
    run_count: int = 0
    total_run_time_ms: float = 0.0
    contiguity_launches: int = 0
    contiguity_checks: int = 0
    contiguity_unknown_inputs: int = 0
    non_row_contiguous_inputs: int = 0
    launches_with_non_row_contiguous: int = 0
    copy_risk_launches: int = 0
    copy_risk_inputs: int = 0


class MetalKernel:
    """A kernel that is called as the result of `mx.fast.metal_kernel`, on the backend in force.

    On a GPU that is Metal or CUDA. On the CPU it is the emulator, which executes the source.

    Args:
        spec: what the kernel is made of.

    Attributes:
        spec: the same.
        stats: counts of its launches.

    Raises:
        TypeError: a name or a text of the spec is not a string.
        ValueError: names that no compiler takes, no outputs, an empty source.
    """

    def __init__(self, spec: MetalKernelSpec) -> None:
        self.spec = spec
        self.stats = KernelStats()
        self._definition = spec.definition()
        self._launches: dict[str, Launch] = {}
        self._checked: dict[Any, bool] = {}

    def __repr__(self) -> str:
        """Name the kernel and its arrays."""
        arrays = f"{', '.join(self.spec.input_names)} -> {', '.join(self.spec.output_names)}"
        return f"MetalKernel({self.spec.name}: {arrays})"

    def __call__(
        self,
        *arrays: mx.array | float | int | bool,
        inputs: Sequence[mx.array | float | int | bool] | None = None,
        template: Template | None = None,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None = None,
        verbose: bool = False,
        stream: mx.Stream | mx.Device | None = None,
    ) -> list[mx.array]:
        """Launch the kernel, lazily.

        Args:
            *arrays: the inputs, where they are not given as `inputs`.
            inputs: arrays or numbers in the order of the input names. A number becomes an array
                without axes, which a source reads by its bare name.
            template: (name, value) pairs; a value is a dtype, an int of 32 bits or a bool.
            grid: threads along x, y and z, from 1; not necessarily multiples of `threadgroup`.
            threadgroup: threads of a threadgroup along x, y and z, at most 1,024 together.
            output_shapes: a shape for each output. If all are empty nothing is launched.
            output_dtypes: a dtype for each output.
            init_value: what outputs hold where the kernel writes nothing; undefined by default.
            verbose: print the text that is compiled.
            stream: where it runs, by default on MLX's default device.

        Returns:
            The outputs.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a number out of range, or too many or too few inputs, shapes or dtypes.
            zmlx_autopatch.variables.VariableError: ZMLX_BACKEND chooses what is not here.
        """
        if inputs is None:
            inputs = arrays
        elif arrays:
            raise TypeError(f"kernel {self.spec.name!r}: give inputs by position or by name")
        arrays_given = check_inputs(self._definition, inputs)
        if self._is_empty(output_shapes, output_dtypes, grid, threadgroup, template):
            return [
                mx.zeros(shape, dtype, stream=stream)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
        launch = self._launch(for_kernels(has_reference=False, stream=stream))
        self._count(arrays_given)
        return launch(
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

    def timed(self, *arrays: mx.array | float | int | bool, **launch: Any) -> list[mx.array]:
        """Launch, wait for the outputs, and add the time to `stats.total_run_time_ms`.

        Inputs are evaluated first; the rest is as in a call. Not for traced arrays.
        """
        mx.eval(*arrays, *(launch.get("inputs") or ()))
        started = time.perf_counter()
        outputs = self(*arrays, **launch)
        mx.eval(outputs)
        self.stats.total_run_time_ms += (time.perf_counter() - started) * 1e3
        return outputs

    def examine(self, *arrays: mx.array) -> list[bool]:
        """Evaluate inputs, count how they lie in memory, and return which are row contiguous.

        Each input that is not is copied by each launch if the kernel ensures row contiguous ones.
        """
        mx.eval(arrays)
        found = [_row_contiguous(array) for array in arrays]
        self.stats.contiguity_checks += len(found)
        self.stats.non_row_contiguous_inputs += found.count(False)
        self.stats.launches_with_non_row_contiguous += not all(found)
        return found

    def _is_empty(
        self,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None,
    ) -> bool:
        """Check what a launch is called with, once for equal ones; return if nothing is computed.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a number is out of range, or there are too many or too few of something.
        """
        try:
            key: Any = (
                tuple(output_shapes),
                tuple(output_dtypes),
                grid,
                threadgroup,
                tuple(template or ()),
            )
            found = self._checked.get(key)
        except TypeError:  # something is a list, or not what it should be
            key, found = None, None
        if found is None:
            check_arguments(self._definition, output_shapes, output_dtypes, template)
            found = all(0 in shape for shape in output_shapes)
            if not found:
                check_geometry(self.spec.name, grid, threadgroup)
            if len(self._checked) >= _REMEMBERED:
                self._checked.clear()
            if key is not None:
                self._checked[key] = found
        return found

    def _launch(self, backend: str) -> Launch:
        launch = self._launches.get(backend)
        if launch is None:
            started = time.perf_counter()
            launch = self._launches[backend] = launcher(self._definition, backend)
            self.stats.compile_time_ms += (time.perf_counter() - started) * 1e3
        return launch

    def _count(self, arrays: int) -> None:
        stats = self.stats
        stats.run_count += 1
        if arrays:
            stats.contiguity_launches += 1
            stats.contiguity_checks += arrays
            stats.contiguity_unknown_inputs += arrays
            if self.spec.ensure_row_contiguous:
                stats.copy_risk_launches += 1
                stats.copy_risk_inputs += arrays


def _row_contiguous(array: mx.array) -> bool:
    view = memoryview(cast(Any, array))
    step = view.itemsize
    for length, stride in zip(
        reversed(view.shape or ()), reversed(view.strides or ()), strict=True
    ):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


#: spec -> its kernel, for those made with `cache=True`
_KERNELS: dict[MetalKernelSpec, MetalKernel] = {}
_LOCK = threading.Lock()


@takes_compute_dtype
def kernel(
    *,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    cache: bool = True,
) -> MetalKernel:
    """Make a kernel from a source in the Metal Shading Language; it runs on every backend.

    Args:
        name: a C identifier.
        input_names: C identifiers, in the order of the inputs. `NAME_shape`, `NAME_strides` and
            `NAME_ndim` exist in the source where it uses them.
        output_names: C identifiers, in the order of the outputs.
        source: the body of the kernel.
        header: what stands before it: functions, constants.
        ensure_row_contiguous: copy inputs that are not row contiguous before a launch; without
            it the source has to go by `NAME_strides`.
        atomic_outputs: outputs are `device atomic<T>*`.
        cache: return the kernel that an equal call has made, if there is one.

    Returns:
        The kernel; it is compiled when it is first launched.

    Raises:
        TypeError: a name or a text is not a string, or names come as one string.
        ValueError: a name is no C identifier, is a word of Metal's or is there twice; no outputs;
            an empty source.
    """
    for what, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise TypeError(f"kernel {name!r}: {what}={names!r} is a string; give a list of them")
    spec = MetalKernelSpec(
        name=name,
        input_names=tuple(input_names),
        output_names=tuple(output_names),
        source=source,
        header=header,
        requested_ensure_row_contiguous=ensure_row_contiguous,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
    )
    if not cache:
        return MetalKernel(spec)
    with _LOCK:
        if spec not in _KERNELS:
            _KERNELS[spec] = MetalKernel(spec)
        return _KERNELS[spec]


def forget_kernels() -> None:
    """Drop the kernels that were made with `cache=True`."""
    with _LOCK:
        _KERNELS.clear()
