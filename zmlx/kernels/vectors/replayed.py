"""Calls of the functions of this package, recorded for each form and replayed.

Choosing a tiling and writing the text of a kernel takes a hundred microseconds of Python, and what
comes out depends on shapes, dtypes and options alone. So a call whose form came before is replayed
from its graph (`zmlx.backend.replay`). Gradients are those of stock's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.backend.replay import Replay
from zmlx.backend.vmapping import inside_vmap
from zmlx.kernels.calling import gradients_of, replay_of


class Replayed:
    """A function of arrays, of which some may be missing, and of options.

    Args:
        fused: takes what says where it runs, then the arrays, and by name the options.
        stock: the same without the first argument, in MLX's operations; calls that are not served,
            gradients and `mx.vmap` go there.
        serves: says of the arrays whether the kernels take them; asked first, at every call.
    """

    def __init__(
        self,
        fused: Callable[..., mx.array],
        stock: Callable[..., mx.array],
        serves: Callable[..., bool],
    ) -> None:
        self._fused, self._stock, self._serves = fused, stock, serves

    def __call__(self, where: Hashable, *given: mx.array | None, **options: Any) -> mx.array:
        """Call the function.

        Args:
            where: what compiles kernels, or anything else that the function depends on.
            given: the arrays, None for those that are missing.
            options: hashable.
        """
        if not self._serves(*given) or inside_vmap():
            return self._stock(*given, **options)
        present = tuple([array is not None for array in given])
        key = (self, where, present, *options.items())
        replay = replay_of(key, partial(self._made, where, present, options))
        return replay(None, [a for a in given if a is not None])  # type: ignore[no-any-return]

    def _made(self, where: Hashable, present: tuple[bool, ...], options: dict[str, Any]) -> Replay:
        def whole(arrays: tuple[mx.array, ...]) -> list[mx.array | None]:
            left = iter(arrays)
            return [next(left) if there else None for there in present]

        def launched(*arrays: mx.array) -> mx.array:
            return self._fused(where, *whole(arrays), **options)

        def stock(*arrays: mx.array) -> mx.array:
            return self._stock(*whole(arrays), **options)

        def gradients(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
            # MLX gives a lone argument without a tuple around it.
            arrays = (primals,) if isinstance(primals, mx.array) else tuple(primals)
            return gradients_of(stock, arrays, cotangents)

        function = mx.custom_function(launched)
        function.vjp(gradients)
        return Replay(function, launched)
