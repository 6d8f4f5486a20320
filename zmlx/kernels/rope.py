"""Rotary position embeddings, as attention kernels take them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import mlx.core as mx

from zmlx.kernels.rows import FLOATS


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary position embedding, as `mx.fast.rope` computes it.

    Attributes:
        dims: leading elements of a head that are rotated; even.
        traditional: rotate neighbours, not the two halves.
        base: angles are position * base^(-2i/dims); None where `freqs` is given.
        scale: what positions are multiplied by.
        freqs: (dims / 2,) float32, what positions are divided by, in place of `base`.
        multiplier: a number that the rotated elements are multiplied by first, in their dtype, as
            YaRN does.

    Raises:
        ValueError: `dims` is odd or not positive, both or neither of `base` and `freqs` are given,
            `base` is not positive, or `freqs` has another shape.
        TypeError: `freqs` is not of floats.
    """

    dims: int
    traditional: bool = False
    base: float | None = 10000.0
    scale: float = 1.0
    freqs: mx.array | None = None
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.dims < 2 or self.dims % 2:
            raise ValueError(f"rope rotates pairs; dims={self.dims} must be even and positive")
        if (self.base is None) == (self.freqs is None):
            raise ValueError("rope takes either a base or freqs; give one, and None for the other")
        if self.base is not None and self.base <= 0:
            raise ValueError(f"rope: base={self.base} must be positive")
        if self.freqs is not None and self.freqs.shape != (self.dims // 2,):
            raise ValueError(
                f"rope: freqs has shape {self.freqs.shape}; dims={self.dims} needs "
                f"({self.dims // 2},)"
            )
        if self.freqs is not None and self.freqs.dtype not in FLOATS:
            raise TypeError(f"rope: freqs is {self.freqs.dtype}; it takes float32")

    def __call__(self, heads: mx.array, position: mx.array) -> mx.array:
        """Rotate heads (B, H, D) of one token, with MLX's operations; `position` is (B,) or ()."""
        if self.multiplier != 1.0:
            turned = self.multiplier * heads[..., : self.dims]
            heads = mx.concatenate([turned, heads[..., self.dims :]], axis=-1)
        rotated = mx.fast.rope(
            heads[:, :, None],
            self.dims,
            traditional=self.traditional,
            base=self.base,
            scale=self.scale,
            offset=position,
            freqs=self.freqs,
        )
        return rotated.squeeze(2)


def kind_of(rope: Rope | None) -> str:
    """Return how a source gets the frequencies: "" for no embedding, "base" or "freqs"."""
    if rope is None:
        return ""
    return "base" if rope.freqs is None else "freqs"


def rope_template(rope: Rope | None) -> tuple[tuple[str, int], ...]:
    """Return what a kernel's template is told of an embedding."""
    if rope is None:
        return ()
    return (
        ("DIMS", rope.dims),
        ("TRADITIONAL", int(rope.traditional)),
        ("BASE", 0 if rope.base is None else bits(math.log2(rope.base))),
        ("ROPE_SCALE", bits(rope.scale)),
        ("MULTIPLIER", bits(rope.multiplier)),
    )


def bits(number: float) -> int:
    """Return a float32's bits as the int that a template takes: numbers as inputs cost more."""
    value: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return value
