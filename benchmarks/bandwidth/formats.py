"""The formats of weights, and a product of one row of activations with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx

#: Arrays of one weight: values, or packed values with their scales (and biases).
Weight = tuple[mx.array, ...]
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class Unavailable(RuntimeError):
    """The library has no product for a format; the text says what it answered."""


@dataclass(frozen=True)
class Format:
    """How weights are stored.

    Attributes:
        name: as tables show it.
        dtype: of the activations, and of the weights or scales where these are floating.
        options: what `mx.quantize` takes; empty for weights that are not quantized.
    """

    name: str
    dtype: mx.Dtype
    options: dict[str, Any]

    def weight(self, dense: mx.array) -> Weight:
        """Return a matrix (N, K) in this format."""
        made = dense.astype(self.dtype)
        weight = tuple(mx.quantize(made, **self.options)) if self.options else (made,)
        mx.eval(weight)
        return weight

    def product(self, library: ModuleType) -> Callable[[mx.array, Weight], mx.array]:
        """Return x, weight -> x @ weight.T of the library.

        Raises:
            Unavailable: the library has none.
        """

        def dense(x: mx.array, weight: Weight) -> mx.array:
            return library.matmul(x, *weight)

        def quantized(x: mx.array, weight: Weight) -> mx.array:
            biases = weight[2:] or (None,)
            return library.quantized_matmul(x, *weight[:2], *biases, **self.options)

        found = quantized if self.options else dense
        trial = mx.zeros((64, 128), self.dtype)
        try:
            mx.eval(found(trial[:1], self.weight(trial)))
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise Unavailable(f"{self.name}: {reason}") from error
        return found


def formats() -> Iterator[Format]:
    """Yield what MLX can store: affine widths and groups, the block floats, and dense."""
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            options = {"group_size": group, "bits": bits}
            yield Format(f"{bits} bits, group {group}", mx.bfloat16, options)
    for mode, group, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)):
        yield Format(mode, mx.bfloat16, {"group_size": group, "bits": bits, "mode": mode})
    for name, dtype in DTYPES.items():
        yield Format(f"dense {name}", dtype, {})


def copies(weight: Weight, size: int) -> list[Weight]:
    """Return a weight and copies of it, until all together have `size` bytes."""
    count = max(1, -(-size // nbytes(weight)))
    made = [weight, *(tuple(mx.array(part) for part in weight) for _ in range(count - 1))]
    mx.eval(made)
    return made


def nbytes(weight: Weight) -> int:
    """Return the bytes that a weight takes, scales and biases included."""
    return sum(part.nbytes for part in weight)
