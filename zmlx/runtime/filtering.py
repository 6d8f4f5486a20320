"""mlx-lm's `apply_top_k` and `apply_top_p` on GPUs, without sorting the vocabulary.

Before   the whole vocabulary is sorted, summed up and compared, for every token
After    the kernels `top_k` and `top_p`

A `Filter` stands in the place of the function of that name in `mlx_lm.sample_utils`, where samplers
look it up. At its first call it is compared with that function, since what a name does may be
another thing in another version; if they differ the function is used from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from zmlx.backend.vmapping import inside_vmap
from zmlx.kernels.filters import TOP_K, TOP_P
from zmlx.kernels.spec import KernelSpec
from zmlx.kernels.vectors.replayed import Replayed
from zmlx_autopatch import speech

Library = Callable[[mx.array, Any], mx.array]


def _is_k(number: object, length: int) -> bool:
    return type(number) is int and 0 < number < length


def _is_p(number: object, length: int) -> bool:
    return isinstance(number, float) and 0.0 < number < 1.0


#: name in mlx_lm.sample_utils -> kernel, the numbers that it takes, one to compare with
FILTERS: dict[str, tuple[KernelSpec, Callable[[object, int], bool], int | float]] = {
    "apply_top_k": (TOP_K, _is_k, 40),
    "apply_top_p": (TOP_P, _is_p, 0.75),
}


def _launched(place: tuple[str, str], x: mx.array, wanted: mx.array) -> mx.array:
    backend, name = place
    return FILTERS[name][0].implementation(backend)(x, wanted)


def _reference_of(name: str) -> Callable[[mx.array, mx.array], mx.array]:
    return FILTERS[name][0].reference


#: name -> a call of its kernel, replayed; ((backend, name), array, numbers) -> array
_REPLAYED = {
    name: Replayed(_launched, _reference_of(name), lambda *_: True)  # asked before
    for name in FILTERS
}


class Filter:
    """A filter of log-probabilities: a kernel, or the library's function for what it does not take.

    Args:
        name: the function's.
        stock: the function.
        backend: where the kernel runs.
        serves: whether the kernel is to be used for an array.

    Attributes:
        stock: the same.
    """

    def __init__(
        self, name: str, stock: Library, backend: str, serves: Callable[[mx.array], bool]
    ) -> None:
        self.__name__ = name
        self.stock = stock
        self._serves = serves
        self._kernel, self._takes, self._example = FILTERS[name]
        self._place = (backend, name)
        self._device = mx.default_device()
        self._agrees: bool | None = None

    def __call__(self, logprobs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Filter (..., V) log-probabilities; arguments and result as of the library's function."""
        number = self._number(*args, **kwargs)
        if (
            isinstance(logprobs, mx.array)
            and logprobs.ndim > 0
            and self._takes(number, logprobs.shape[-1])
            and self._serves(logprobs)
            and mx.default_device() == self._device
            and not inside_vmap()
            and self._is_stocks()
        ):
            return self._by_kernel(logprobs, number)
        return self.stock(logprobs, *args, **kwargs)

    def _number(self, *args: Any, **kwargs: Any) -> Any:
        """Return the second argument, given by place or by name; None for anything else."""
        if len(args) == 1 and not kwargs:
            return args[0]
        named = self.__name__.removeprefix("apply_")
        return kwargs.get(named) if not args and len(kwargs) == 1 else None

    def _by_kernel(self, logprobs: mx.array, number: Any) -> mx.array:
        return _REPLAYED[self.__name__](self._place, logprobs, _wanted(number))

    def _is_stocks(self) -> bool:
        """Return whether the kernel is right, and does what the library's function does."""
        if self._agrees is None:
            self._agrees = self._compared()
            if not self._agrees and speech.level() == "debug":
                speech.say(
                    f"zmlx: {self.__name__} of mlx-lm is not the one that is known; it stays"
                )
        return self._agrees

    def _compared(self) -> bool:
        if self._kernel.probe(self._place[0], dtype=mx.bfloat16):
            return False
        x = 2 * mx.random.normal((2, 500), key=mx.random.key(3))
        x = x - mx.logsumexp(x, axis=-1, keepdims=True)
        wanted = mx.array([self._example, -mx.inf], mx.float32)
        ours = self._kernel.implementation(self._place[0])(x, wanted)
        return bool(mx.array_equal(ours, self.stock(x, self._example)).item())


@lru_cache(maxsize=256)
def _wanted(number: float) -> mx.array:
    """Return a kernel's second argument, computed on the device (`cuda/kernel.py` says why).

    It is part of a longer array, as MLX's CUDA backend keeps those of 8 bytes in the host's memory.
    """
    wanted = (mx.array([number, -mx.inf, 0, 0], mx.float32) + 0)[:2]
    mx.eval(wanted)
    return wanted
