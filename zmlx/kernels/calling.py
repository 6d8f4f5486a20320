"""From a call with arrays to a launch: the backend, the geometry, the gradient, the batch axes.

Whatever does not depend on the arrays' contents is worked out once: the function with its gradient
for each set of options, the geometry for each set of shapes and dtypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.arguments import check_geometry
from zmlx.backend.cpu import native
from zmlx.backend.definition import Launch
from zmlx.backend.outputs import alone
from zmlx.backend.replay import Replay
from zmlx.backend.vmapping import inside_vmap

if TYPE_CHECKING:
    from zmlx.kernels.spec import KernelSpec

#: In place of a backend: the function that `mx.vmap` traces.
_TRACED = "vmap"
#: Geometries that a kernel remembers for one set of options; more shapes than that start over.
_REMEMBERED = 4096

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class Geometry:
    """How a launch is laid out: what follows from shapes, dtypes and options.

    Attributes:
        grid: threads along x, y and z. One without threads launches nothing; outputs are zeros.
        threadgroup: threads of a threadgroup along x, y and z.
        output_shapes: a shape for each output.
        output_dtypes: a dtype for each output.
        template: values of the source's template.
        init_value: what outputs hold where the kernel writes nothing.
    """

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, mx.Dtype | int | bool], ...] = ()
    init_value: float | None = None

    @cached_property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in self.grid or all(0 in shape for shape in self.output_shapes)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What a `Launch` is called with, besides the inputs."""
        return {
            "output_shapes": self.output_shapes,
            "output_dtypes": self.output_dtypes,
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "template": self.template or None,
            "init_value": self.init_value,
        }


class Bound:
    """A kernel with its options; called with arrays."""

    def __init__(self, spec: KernelSpec, options: Mapping[str, Any]) -> None:
        self.spec = spec
        known = inspect.signature(spec.reference).parameters
        named = {p.name: p.default for p in known.values() if p.kind == p.KEYWORD_ONLY}
        defaults = {key: v for key, v in named.items() if v is not inspect.Parameter.empty}
        self.options = {**defaults, **options}
        self.reference_options = {key: v for key, v in self.options.items() if key in named}
        names = spec.definition.input_names if spec.definition else ()
        # Inputs of the source that are no arguments of the reference by position are numbers.
        self._scalars = [self.options[name] for name in names if name in named]
        self._geometries: dict[Any, Geometry] = {}
        self._functions: dict[str, Callable[..., Any]] = {}

    def __call__(self, *arrays: mx.array) -> Any:
        """Run the kernel where kernels run now, ready to be differentiated and batched.

        Forward gradients (`mx.jvp`) exist where the reference runs; MLX has none for launches.
        """
        backend = for_kernels(has_reference=True)
        if backend == "reference":
            self.geometry(arrays)  # refuses what a kernel would, with the same words
            if not native_serves(self.spec):
                return self.reference(*arrays)
            backend = "cpu"
        if inside_vmap():
            backend = _TRACED
        function = self._functions.get(backend)
        if function is None:
            function = self._functions[backend] = self._differentiable(backend)
        return function(*arrays)

    def reference(self, *arrays: mx.array) -> Any:
        """Compute the same with MLX's operations."""
        return self.spec.reference(*arrays, **self.reference_options)

    def geometry(self, arrays: Sequence[mx.array]) -> Geometry | None:
        """Return the geometry for these arrays; None when the kernel has none.

        Raises:
            TypeError: an argument is no array, or has a dtype that the kernel does not take.
            ValueError: the shapes do not fit.
        """
        if self.spec.geometry is None:
            return None
        for array in arrays:
            if not isinstance(array, mx.array):
                raise TypeError(
                    f"{self.spec.name}: got a {type(array).__name__} where it takes an mx.array"
                )
        form = tuple([(array.shape, array.dtype) for array in arrays])
        found = self._geometries.get(form)
        if found is None:
            found = self._laid_out(self.spec.geometry, arrays)
            if len(self._geometries) >= _REMEMBERED:
                self._geometries.clear()
            self._geometries[form] = found
        return found

    def _laid_out(self, geometry: Callable[..., Geometry], arrays: Sequence[mx.array]) -> Geometry:
        name = self.spec.name
        try:
            found = geometry(*arrays, **self.options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if not found.empty:
            check_geometry(name, found.grid, found.threadgroup)
        return found

    def launched(self, launch: Launch, arrays: Arrays) -> Any:
        """Run one launch of the kernel's source."""
        geometry = self.geometry(arrays)
        assert geometry is not None
        if geometry.empty:
            shapes = zip(geometry.output_shapes, geometry.output_dtypes, strict=True)
            outputs = [mx.zeros(shape, dtype) for shape, dtype in shapes]
        else:
            outputs = launch(inputs=[*arrays, *self._scalars], **geometry.arguments)
        if self.spec.finish is not None:
            return self.spec.finish(outputs, arrays)
        return alone(outputs)

    def arguments(self, arrays: Arrays) -> dict[str, Any]:
        """Return what a `Launch` is called with for these arrays."""
        geometry = self.geometry(arrays)
        assert geometry is not None
        return {"inputs": [*arrays, *self._scalars], **geometry.arguments}

    def _differentiable(self, backend: str) -> Callable[..., Any]:
        """Make the function of one backend, with its transformations; once, not at each call."""
        if backend == _TRACED:
            function = mx.custom_function(self._traced)
            function.vmap(self._vmap)
        elif backend == "cpu":
            kernel = self.spec.implementation(backend)
            function = mx.custom_function(lambda *a: kernel(*a, **self.reference_options))
        else:
            return self._replayed(backend)
        function.vjp(self._vjp)
        return function

    def _replayed(self, backend: str) -> Callable[..., Any]:
        launch = self.spec.launch(backend)

        def launched(*arrays: mx.array) -> Any:
            return self.launched(launch, arrays)

        function = mx.custom_function(launched)
        function.vjp(self._vjp)
        replay = Replay(function, launched)
        return lambda *arrays: replay(backend, arrays)

    def _traced(self, *arrays: mx.array) -> Any:
        """Stand for the kernel while `mx.vmap` traces, which asks every operation how to batch."""
        self.geometry(arrays)
        return self.reference(*arrays)

    def _vjp(self, primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        # MLX gives a lone argument without a tuple around it.
        arrays: Arrays = (primals,) if isinstance(primals, mx.array) else tuple(primals)
        spec = self.spec
        if spec.gradient is None:
            return self._reference_vjp(arrays, cotangents)
        gradients = spec.gradient(arrays, cotangents, outputs, **self.options)
        gradients = several(gradients)
        shapes = [g.shape if isinstance(g, mx.array) else None for g in gradients]
        if shapes != [array.shape for array in arrays]:
            raise ValueError(
                f"the gradient of kernel {spec.name} has shapes {shapes} for arguments of shapes "
                f"{[array.shape for array in arrays]}; each argument needs one of its own shape"
            )
        return gradients

    def _reference_vjp(self, arrays: Arrays, cotangents: Any) -> list[mx.array]:
        if self.spec.no_gradient:
            raise ValueError(f"kernel {self.spec.name} has no gradient: {self.spec.no_gradient}")
        return gradients_of(self.reference, arrays, cotangents)

    def _vmap(self, arrays: Any, axes: Any) -> tuple[Any, Any]:
        if isinstance(arrays, mx.array):
            arrays, axes = (arrays,), (axes,)
        rows = self.spec.batched
        if rows and not any(axis is not None and not row for axis, row in zip(axes, rows)):  # noqa: B905
            result = self(*_with_leading_axis(arrays, axes, rows))
        else:
            result = mx.vmap(self.reference, in_axes=tuple(axes))(*arrays)
        return result, 0 if isinstance(result, mx.array) else tuple(0 for _ in result)


def _with_leading_axis(arrays: Arrays, axes: Sequence[int | None], rows: Sequence[bool]) -> Arrays:
    """Move the axis of a batch to the front, and repeat for the batch what has none but should."""
    batch = next(
        array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    moved = []
    for array, axis, row in zip(arrays, axes, rows, strict=True):
        if axis is not None:
            array = mx.moveaxis(array, axis, 0)
        elif row:
            array = mx.broadcast_to(array, (batch, *array.shape))
        moved.append(array)
    return tuple(moved)


def gradients_of(
    function: Callable[..., Any], arrays: Sequence[mx.array], cotangents: Any
) -> list[mx.array]:
    """Differentiate a function of arrays by MLX; integers cannot move, and have zeros."""
    floats = [i for i, a in enumerate(arrays) if mx.issubdtype(a.dtype, mx.floating)]

    def of_floats(*some: mx.array) -> list[mx.array]:
        values = list(arrays)
        for i, array in zip(floats, some, strict=True):
            values[i] = array
        return several(function(*values))

    _, found = mx.vjp(of_floats, [arrays[i] for i in floats], several(cotangents))
    gradients = [mx.zeros_like(array) for array in arrays]
    for i, gradient in zip(floats, found, strict=True):
        gradients[i] = gradient
    return gradients


def several(result: Any) -> list[mx.array]:
    """Return a kernel's outputs as a list, be it one or more."""
    return list(result) if isinstance(result, list | tuple) else [result]


@cache
def native_serves(spec: KernelSpec) -> bool:
    """Return whether the CPU library has the kernel and is built; a call does not wait for it."""
    if spec.native is None:
        return False
    try:
        return native.find().present and hasattr(native.load(), spec.native)
    except native.NativeUnavailable:
        return False


#: what a call depends on besides its arrays -> its replay, of kernels that are called without specs
_REPLAYS: dict[Hashable, Replay] = {}


def replay_of(key: Hashable, make: Callable[[], Replay]) -> Replay:
    """Return the replay that is remembered under a key, made if there is none."""
    found = _REPLAYS.get(key)
    if found is None:
        found = _REPLAYS.setdefault(key, make())
    return found


#: (kernel's name, options) -> the kernel with these options
_BOUND: dict[tuple[Any, ...], Bound] = {}


def bound(spec: KernelSpec, options: Mapping[str, Any]) -> Bound:
    """Return a kernel with its options; equal ones share one."""
    key = (spec.name, *options.items())
    found = _BOUND.get(key)
    if found is None or found.spec is not spec:
        found = _BOUND[key] = Bound(spec, options)
    return found


def forget() -> None:
    """Drop what calls have built so far; later calls build it anew."""
    _BOUND.clear()
    _REPLAYS.clear()
    native_serves.cache_clear()
