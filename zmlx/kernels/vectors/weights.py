"""A weight as MLX stores it, and what can be said of it without reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from zmlx.kernels.rows import FLOATS

#: Modes of `mx.quantize` without biases -> group size, bits.
SMALL_FLOATS = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
_AFFINE_GROUPS = (32, 64, 128)
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix (N, K) for products x @ W.T, or one for each of E experts.

    Attributes:
        w: (N, K * bits / 32) uint32, or (N, K) float32, float16 or bfloat16 in mode dense; with a
            leading axis E for experts.
        scales: (N, K / group_size), floats in mode affine, uint8 in mxfp4, nvfp4 and mxfp8.
        biases: like `scales`, in mode affine alone.
        bias: (N,) floats that are added to the product, or None.
        mode: "affine", "mxfp4", "nvfp4", "mxfp8" or "dense".
        group_size: weights under one scale; 0 in mode dense.
        bits: of a weight; 0 in mode dense.
    """

    w: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None
    mode: str = "affine"
    group_size: int = 64
    bits: int = 4

    @property
    def rows(self) -> int:
        """N, the length of a product."""
        return self.w.shape[-2]

    @property
    def columns(self) -> int:
        """K, the length of what it is multiplied with."""
        return self.w.shape[-1] * 32 // self.bits if self.bits else self.w.shape[-1]

    @property
    def packing(self) -> tuple[str, int, int]:
        """Mode, group size and bits."""
        return self.mode, self.group_size, self.bits

    @property
    def deciding(self) -> tuple[mx.array, ...]:
        """The arrays that decide on a product's dtype, besides x."""
        first = {"affine": self.scales, "dense": self.w}.get(self.mode)
        return tuple(a for a in (first, self.bias) if a is not None)

    def arrays(self) -> dict[str, mx.array]:
        """Return what is there of w, scales, biases and bias, by name."""
        named = {"w": self.w, "scales": self.scales, "biases": self.biases, "bias": self.bias}
        return {name: array for name, array in named.items() if array is not None}


def result_dtype(x: mx.array, *weights: Weight) -> mx.Dtype:
    """Return the dtype that a stock product of x with the weights has."""
    return mx.result_type(x, *(a for weight in weights for a in weight.deciding))


def check_weight(name: str, weight: Weight, columns: int, *, experts: bool) -> None:
    """Refuse a weight whose arrays are not as its packing says, or do not fit K columns.

    Raises:
        TypeError: a dtype that the mode has not.
        ValueError: a packing that MLX has not, parts that are missing, or shapes that do not fit.
    """
    _check_packing(name, weight)
    axes = "(E, N, K)" if experts else "(N, K)"
    if weight.w.ndim != len(axes.split(",")):
        raise ValueError(f"{name}.w has shape {weight.w.shape}; it takes {axes}, packed")
    if weight.columns != columns:
        raise ValueError(
            f"{name} has {weight.columns} columns, x has {columns}; they must be the same"
        )
    if weight.bits and columns % 32:
        raise ValueError(f"{name} has {columns} columns; packed weights have a multiple of 32")
    grouped = (*weight.w.shape[:-1], columns // (weight.group_size or 1))
    for part in ("scales", "biases"):
        array = getattr(weight, part)
        if array is not None and array.shape != grouped:
            raise ValueError(f"{name}.{part} has shape {array.shape}; it takes {grouped}")
    bias = weight.bias
    if bias is not None and (bias.shape != weight.w.shape[:-1] or bias.dtype not in FLOATS):
        raise ValueError(
            f"{name}.bias is {bias.dtype} {bias.shape}; it takes floats {weight.w.shape[:-1]}"
        )


def _check_packing(name: str, weight: Weight) -> None:
    mode, group_size, bits = weight.packing
    if mode == "affine":
        known = group_size in _AFFINE_GROUPS and bits in _AFFINE_BITS
    elif mode == "dense":
        known = not group_size and not bits
    else:
        known = SMALL_FLOATS.get(mode) == (group_size, bits)
    if not known:
        raise ValueError(f"{name}: MLX has no mode {mode} in groups of {group_size}, {bits} bits")
    wanted = {"affine": {"scales", "biases"}, "dense": set()}.get(mode, {"scales"})
    given = set(weight.arrays()) - {"w", "bias"}
    if given != wanted:
        raise ValueError(
            f"{name}: mode {mode} has {' and '.join(sorted(wanted)) or 'no scales'},"
            f" given {' and '.join(sorted(given)) or 'none'}"
        )
    kinds = FLOATS if mode == "dense" else (mx.uint32,)
    if weight.w.dtype not in kinds:
        raise TypeError(f"{name}.w is {weight.w.dtype}; mode {mode} takes {_listed(kinds)}")
    scale_kinds = FLOATS if mode == "affine" else (mx.uint8,)
    for part in sorted(wanted):
        if getattr(weight, part).dtype not in scale_kinds:
            dtype = getattr(weight, part).dtype
            raise TypeError(f"{name}.{part} is {dtype}; mode {mode} takes {_listed(scale_kinds)}")


def _listed(dtypes: Sequence[mx.Dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("mlx.core.") for dtype in dtypes)
