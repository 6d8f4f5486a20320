"""The formats of weights that the kernels read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

#: Packed values and scales (and biases), or plain values.
Weight = tuple[mx.array, ...]
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Format:
    """How weights are stored.

    Attributes:
        name: as tables show it.
        dtype: of the activations, and of the weights or scales where these are floats.
        mode: one of `mx.quantize`, or "dense".
        group_size, bits: of quantized weights; 0 for others.
    """

    name: str
    dtype: mx.Dtype
    mode: str
    group_size: int = 0
    bits: int = 0

    def options(self) -> dict[str, object]:
        """Return the format as `mx.quantize` and the kernels take it."""
        return {"mode": self.mode, "group_size": self.group_size, "bits": self.bits}

    def weight(self, dense: mx.array) -> Weight:
        """Return a matrix (N, K) in this format."""
        made = dense.astype(self.dtype)
        weight = (made,) if self.mode == "dense" else tuple(mx.quantize(made, **self.options()))
        mx.eval(weight)
        return weight


def formats() -> Iterator[Format]:
    """Yield affine widths and groups, the small floats, and weights that are not quantized."""
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            yield Format(f"{bits} bits, group {group}", mx.bfloat16, "affine", group, bits)
    for mode, group, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)):
        yield Format(mode, mx.bfloat16, mode, group, bits)
    for name, dtype in DTYPES.items():
        yield Format(f"dense {name}", dtype, "dense")


def copies(weight: Weight, size: int) -> list[Weight]:
    """Return a weight and copies of it, until all together have `size` bytes."""
    count = max(1, -(-size // nbytes(weight)))
    made = [weight, *(tuple(mx.array(part) for part in weight) for _ in range(count - 1))]
    mx.eval(made)
    return made


def nbytes(weight: Weight) -> int:
    """Return the bytes that a weight takes, scales and biases included."""
    return sum(part.nbytes for part in weight)
