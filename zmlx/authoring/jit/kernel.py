"""A typed function on arrays: launched as a kernel or evaluated, with its derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx

from zmlx.authoring.jit.derive import Derivatives, float_parameters, float_results
from zmlx.authoring.jit.evaluate import LengthUnknown, evaluate
from zmlx.authoring.jit.ir import Constant, Function, Kind, expressions, reachable
from zmlx.authoring.jit.metal import LARGE_ROW, Port, Text, write
from zmlx.backend import for_kernels
from zmlx.backend.definition import Definition, Launch
from zmlx.backend.launch import launcher
from zmlx.backend.outputs import together
from zmlx.backend.replay import Replay
from zmlx.backend.vmapping import inside_vmap
from zmlx_autopatch import variables

#: Threads of a threadgroup: a multiple of every simdgroup, and small enough for any register use.
_THREADGROUP = (256, 1, 1)
#: Buffers that a Metal kernel takes; shapes of large arrays take some more.
_MOST_BUFFERS = 28
#: Dtypes of arguments that make whole numbers 64 bits wide.
_WIDE = (mx.int64, mx.uint32)


def integer_of(ports: Sequence[Port]) -> mx.Dtype:
    """Return the dtype that whole numbers have in a kernel with these inputs."""
    return mx.int64 if any(port.dtype in _WIDE for port in ports) else mx.int32


class Kernel:
    """One function for inputs and outputs of fixed dtypes.

    Made once for each combination; a call prepares nothing.
    """

    def __init__(
        self, function: Function, inputs: tuple[Port, ...], outputs: tuple[mx.Dtype, ...]
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.outputs = outputs
        self.integer = integer_of(inputs)
        self._check()
        self._full = next((i for i, port in enumerate(inputs) if not port.scalar), 0)
        self._dtypes = list(outputs)
        self._definitions: dict[bool, Definition] = {}
        self._launches: dict[tuple[str, bool], Launch] = {}

    def _check(self) -> None:
        limit = 2**63 if self.integer == mx.int64 else 2**31
        for node in (node for each in reachable(self.function) for node in expressions(each)):
            if not isinstance(node, Constant) or node.kind != Kind.INT:
                continue
            if not -limit <= node.value < limit:
                raise OverflowError(
                    f"{self.function.name}: the whole number {node.value} does not fit in "
                    f"{self.integer}; write it as a float, or pass an int64 argument"
                )

    def text(self, *, large: bool = False) -> Text:
        """Return the kernel in Metal."""
        return write(self.function, self.inputs, self.outputs, integer=self.integer, large=large)

    def definition(self, *, large: bool) -> Definition:
        """Return what is compiled: for arrays of less than 2**31 elements, or for any."""
        if large not in self._definitions:
            buffers = len(self.inputs) + len(self.outputs)
            if buffers > _MOST_BUFFERS:
                raise ValueError(
                    f"{self.function.name} takes {buffers} arrays; a kernel takes {_MOST_BUFFERS}"
                )
            text = self.text(large=large)
            name = "".join(c if c.isascii() and c.isalnum() else "_" for c in self.function.name)
            self._definitions[large] = Definition(
                name=f"jit_{name}",
                input_names=tuple(f"in{index}" for index in range(len(self.inputs))),
                output_names=tuple(f"out{index}" for index in range(len(self.outputs))),
                source=text.body,
                header=text.header,
            )
        return self._definitions[large]

    def __call__(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Return the results for arrays that match the inputs: equal shapes but for scalars."""
        full = arrays[self._full]
        if full.size == 0:
            return [mx.zeros(full.shape, dtype) for dtype in self.outputs]
        if inside_vmap():
            return self._traced(arrays, full.shape)
        backend = for_kernels(has_reference=True)
        if backend != "reference":
            return self._launch(backend, arrays, full)
        try:
            return self._evaluate(arrays, full.shape)
        except LengthUnknown:
            # The emulator's kernel is an operation like any other; it looks at values later.
            if variables.text("ZMLX_BACKEND") == "reference":
                raise
            return self._launch("emulator", arrays, full)

    def _traced(self, arrays: Sequence[mx.array], shape: tuple[int, ...]) -> list[mx.array]:
        """Stand for the kernel while `mx.vmap` traces, which asks every operation how to batch.

        For what is mapped the rule `Differentiable._vmap` then takes its place.
        """
        try:
            return self._evaluate(arrays, shape)
        except LengthUnknown:
            if not all(_is_float(dtype) for dtype in self.outputs):
                raise
            # Only seen where mx.compile traces a call inside mx.vmap of what is not mapped.
            return [mx.full(shape, math.nan, dtype) for dtype in self.outputs]

    def _launch(self, backend: str, arrays: Sequence[mx.array], full: mx.array) -> list[mx.array]:
        count = full.size
        large = count >= 2**31
        launch = self._launches.get((backend, large))
        if launch is None:
            launch = launcher(self.definition(large=large), backend)
            self._launches[backend, large] = launch
        return launch(
            inputs=arrays,
            output_shapes=[full.shape] * len(self._dtypes),
            output_dtypes=self._dtypes,
            grid=(LARGE_ROW, math.ceil(count / LARGE_ROW), 1) if large else (count, 1, 1),
            threadgroup=_THREADGROUP,
        )

    def _evaluate(self, arrays: Sequence[mx.array], shape: tuple[int, ...]) -> list[mx.array]:
        values = evaluate(self.function, arrays, self.integer)
        return [
            mx.broadcast_to(value.astype(dtype), shape)
            for value, dtype in zip(values, self.outputs, strict=True)
        ]


class Differentiable:
    """A kernel that MLX's transformations know: vjp, by a kernel of its own, and vmap.

    Attributes:
        kernel: the kernel.
        call: takes as many arrays as it has inputs; returns an array, or a list of several.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._others: dict[tuple[bool, ...], Differentiable] = {}
        # MLX passes results on as they are nested: one alone is an array.
        plain = self._one if len(kernel.outputs) == 1 else self._several
        self.call = mx.custom_function(plain)
        self.call.vjp(self._vjp)
        self.call.vmap(self._vmap)
        self._replay = Replay(self.call, plain)

    def replayed(self, *arrays: mx.array) -> Any:
        """Return what `call` does; launches of forms that came before are not built anew."""
        return self._replay.in_force(arrays, has_reference=True)

    def _one(self, *arrays: mx.array) -> mx.array:
        return self.kernel(arrays)[0]

    def _several(self, *arrays: mx.array) -> list[mx.array]:
        return self.kernel(arrays)

    @cached_property
    def gradients(self) -> Differentiable | None:
        """The kernel of the gradients; None where there is nothing to differentiate.

        Its results are one for each FLOAT parameter; of a scalar, float32 terms to be added up.
        """
        kernel = self.kernel
        wanted = float_parameters(kernel.function)
        given = float_results(kernel.function)
        if not wanted or not given:
            return None
        alone = all(port.scalar for port in kernel.inputs)
        outputs = tuple(
            mx.float32 if not _is_float(port.dtype) or port.scalar else port.dtype
            for port in (kernel.inputs[index] for index in wanted)
        )
        inputs = (*kernel.inputs, *(Port(kernel.outputs[index], alone) for index in given))
        return Differentiable(Kernel(Derivatives().gradients(kernel.function), inputs, outputs))

    def _vjp(self, primals: Any, cotangents: Any, outputs: Any) -> Any:
        primals, cotangents = together(primals), together(cotangents)
        function = self.kernel.function
        results = [mx.zeros_like(primal) for primal in primals]
        if self.gradients is not None:
            given = [cotangents[index] for index in float_results(function)]
            found = together(self.gradients.call(*primals, *given))
            for index, gradient in zip(float_parameters(function), found, strict=True):
                dtype = self.kernel.inputs[index].dtype
                if _is_float(dtype):
                    total = gradient.sum() if self.kernel.inputs[index].scalar else gradient
                    results[index] = total.astype(dtype)
        return results[0] if len(results) == 1 else tuple(results)

    def _vmap(self, inputs: Any, axes: Any) -> Any:
        """Put the axis first; a scalar that has one becomes an array like the others."""
        inputs, axes = together(inputs), together(axes)
        ports = self.kernel.inputs
        moved = [
            array if axis is None else mx.moveaxis(array, axis, 0)
            for array, axis in zip(inputs, axes, strict=True)
        ]
        batch = next(a.shape[0] for a, axis in zip(moved, axes, strict=True) if axis is not None)
        shapes = (
            array.shape if axis is None else array.shape[1:]
            for array, axis, port in zip(moved, axes, ports, strict=True)
            if not port.scalar
        )
        shape = (batch, *next(shapes, ()))
        scalars = []
        for index, (array, axis, port) in enumerate(zip(moved, axes, ports, strict=True)):
            scalars.append(port.scalar and axis is None)
            if scalars[-1] or array.shape == shape:
                continue
            ones = (1,) * (len(shape) - 1)
            if axis is None:
                array = array[None]
            elif port.scalar:
                array = array.reshape(batch, *ones)
            moved[index] = mx.broadcast_to(array, shape)
        result = self.with_scalars(tuple(scalars)).call(*moved)
        return result, (0 if len(self.kernel.outputs) == 1 else [0] * len(self.kernel.outputs))

    def with_scalars(self, scalars: tuple[bool, ...]) -> Differentiable:
        """Return the same kernel with other inputs being scalars."""
        ports = self.kernel.inputs
        if scalars == tuple(port.scalar for port in ports):
            return self
        if scalars not in self._others:
            inputs = tuple(Port(port.dtype, s) for port, s in zip(ports, scalars, strict=True))
            kernel = Kernel(self.kernel.function, inputs, self.kernel.outputs)
            self._others[scalars] = Differentiable(kernel)
        return self._others[scalars]


def _is_float(dtype: mx.Dtype) -> bool:
    return bool(mx.issubdtype(dtype, mx.floating))
