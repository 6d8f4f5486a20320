"""Operations whose forward and backward passes are kernels that the author wrote out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher
from zmlx.backend.outputs import alone, together
from zmlx.backend.replay import Replay
from zmlx.backend.vmapping import inside_vmap

_THREADGROUP = 256


class SourceOperation:
    """A differentiable operation from two kernels; made by `zmlx.autograd.nary_from_expr`."""

    def __init__(self, name: str, forward: Definition, backward: Definition) -> None:
        self.name = name
        self.forward = forward
        self.backward = backward
        function = mx.custom_function(self._forward)
        function.vjp(self._vjp)
        self._replay = Replay(function, self._launch)

    def __call__(self, *arrays: mx.array) -> Any:
        """Compute the outputs, lazily; shapes and dtypes are those of the first array.

        Raises:
            TypeError: there are too many or too few arguments, or one is no array.
            ValueError: it is called inside `mx.vmap`.
        """
        names = self.forward.input_names
        if len(arrays) != len(names):
            raise TypeError(
                f"{self.name} takes {len(names)} arrays ({', '.join(names)}); got {len(arrays)}"
            )
        for array in arrays:
            if not isinstance(array, mx.array):
                raise TypeError(f"{self.name} takes mx.arrays; got a {type(array).__name__}")
        if inside_vmap():
            raise ValueError(
                f"{self.name} cannot be used inside mx.vmap: its source does not say how it is "
                "batched; call it with the whole batch instead"
            )
        return self._replay(for_kernels(has_reference=False), arrays)

    def _forward(self, *arrays: mx.array) -> Any:
        return self._launch(*[mx.stop_gradient(array) for array in arrays])

    def _launch(self, *arrays: mx.array) -> Any:
        outputs = len(self.forward.output_names)
        found = _launched(self.forward, arrays, arrays[0], [arrays[0]] * outputs)
        return alone(found)

    def _vjp(self, primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        arrays, several = together(primals), together(cotangents)
        return _launched(self.backward, [*arrays, *several], arrays[0], arrays)


def _launched(
    definition: Definition, inputs: Sequence[mx.array], first: mx.array, like: Sequence[mx.array]
) -> list[mx.array]:
    """Launch one thread for each element of an array; outputs are like the given ones."""
    if first.size == 0:
        return [mx.zeros(array.shape, array.dtype) for array in like]
    launch = launcher(definition, for_kernels(has_reference=False))
    # Metal passes 0-d arrays by reference, which cannot be indexed.
    flat = [array if array.shape else array.reshape(1) for array in inputs]
    found = launch(
        inputs=flat,
        output_shapes=[array.shape or (1,) for array in like],
        output_dtypes=[array.dtype for array in like],
        grid=(first.size, 1, 1),
        threadgroup=(_THREADGROUP, 1, 1),
        template=(("T", mx.float32), ("O", first.dtype)),
    )
    return [array.reshape(other.shape) for array, other in zip(found, like, strict=True)]
