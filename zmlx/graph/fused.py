"""The fused operations of a graph: each is called with a node's inputs, and launches one kernel.

They are equal when they compute the same, so that graphs can be compared. A reshape between two of
them costs the host as much as a third of a launch, so each says in which shapes it takes and makes
arrays without one (`settled` in zmlx.graph.rewrite.shapes): `takes` for its inputs, None where any
does, and `makes` for its outputs, None where it makes whatever is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx

from zmlx.graph import recording
from zmlx.kernels.decode_attention import decode_attention
from zmlx.kernels.decode_attention_latent import decode_attention_latent
from zmlx.kernels.rope import Rope
from zmlx.kernels.vectors import (
    Weight,
    expert_combination,
    expert_gated_product,
    expert_products,
    gated_product,
    products,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """How a weight lies among a node's inputs: its values, and after them what is true here."""

    mode: str
    group_size: int
    bits: int
    has_bias: bool = False

    @property
    def count(self) -> int:
        """Number of inputs."""
        parts = {"affine": 3, "dense": 1}.get(self.mode, 2)
        return parts + self.has_bias

    def weight(self, arrays: Sequence[mx.array]) -> Weight:
        """Return the weight that some inputs are."""
        given = list(arrays)
        bias = given.pop() if self.has_bias else None
        scales, biases = [*given[1:], None, None][:2]
        return Weight(given[0], scales, biases, bias, self.mode, self.group_size, self.bits)


class _Inputs:
    """Takes a node's inputs from the front, in the shapes that are wanted."""

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self._arrays = list(arrays)

    def next(self, shape: Shape | None = None) -> mx.array:
        return _shaped(self._arrays.pop(0), shape)

    def take(self, there: bool, shape: Shape | None = None) -> mx.array | None:
        return self.next(shape) if there else None

    def weight(self, stored: Stored) -> Weight:
        taken, self._arrays = self._arrays[: stored.count], self._arrays[stored.count :]
        return stored.weight(taken)

    def rope(self, rope: recording.Rope | None) -> Rope | None:
        if rope is None:
            return None
        return Rope(rope.dims, rope.traditional, rope.base, rope.scale, self.take(rope.has_freqs))


def _shaped(array: mx.array, shape: Shape | None) -> mx.array:
    return array if shape is None or array.shape == shape else array.reshape(shape)


@dataclass(frozen=True)
class Products:
    """Products of one x with some weights. Inputs: x, norm?, weights, residual?."""

    width: int
    weights: tuple[Stored, ...]
    shapes: tuple[Shape, ...]
    eps: float | None = None
    has_residual: bool = False

    @property
    def makes(self) -> tuple[Shape, ...] | None:
        """The shapes of its outputs; None for any."""
        return None

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its inputs; None for any."""
        parts = (self.eps is not None) + sum(stored.count for stored in self.weights)
        residual = (self._residual_shape,) if self.has_residual else ()
        return ((1, 1, self.width), *(None,) * parts, *residual)

    @property
    def _residual_shape(self) -> Shape:
        return (1, 1, _size(self.shapes[0]))

    def making(self, shapes: tuple[Shape, ...]) -> Products:
        """Return the same with outputs of other shapes."""
        return replace(self, shapes=shapes)

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return a product for each weight."""
        inputs = _Inputs(arrays)
        x = inputs.next((1, 1, self.width))
        norm = inputs.take(self.eps is not None)
        weights = [inputs.weight(stored) for stored in self.weights]
        residual = inputs.take(self.has_residual, self._residual_shape)
        return products(
            x, weights, norm=norm, eps=self.eps or 0.0, residual=residual, shapes=self.shapes
        )


@dataclass(frozen=True)
class GatedProduct:
    """A gated product of x. Inputs: x, norm?, gate, up."""

    width: int
    gate: Stored
    up: Stored
    activation: str
    rows: int
    eps: float | None = None

    @property
    def makes(self) -> tuple[Shape, ...]:
        """The shape of its output."""
        return ((1, 1, self.rows),)

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its inputs; None for any."""
        parts = (self.eps is not None) + self.gate.count + self.up.count
        return ((1, 1, self.width), *(None,) * parts)

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the product."""
        inputs = _Inputs(arrays)
        x = inputs.next((1, 1, self.width))
        norm = inputs.take(self.eps is not None)
        gate, up = inputs.weight(self.gate), inputs.weight(self.up)
        return gated_product(x, gate, up, self.activation, norm=norm, eps=self.eps or 0.0)


@dataclass(frozen=True)
class ExpertGatedProduct:
    """Gated products of x with chosen experts. Inputs: x, indices, norm?, gate, up."""

    width: int
    gate: Stored
    up: Stored
    activation: str
    chosen: int
    rows: int
    eps: float | None = None

    @property
    def makes(self) -> tuple[Shape, ...]:
        """The shape of its output."""
        return ((1, 1, self.chosen, self.rows),)

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its inputs; None for any."""
        parts = (self.eps is not None) + self.gate.count + self.up.count
        return ((1, 1, self.width), (1, 1, self.chosen), *(None,) * parts)

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the products."""
        inputs = _Inputs(arrays)
        x, indices = inputs.next((1, 1, self.width)), inputs.next((1, 1, self.chosen))
        norm = inputs.take(self.eps is not None)
        gate, up = inputs.weight(self.gate), inputs.weight(self.up)
        return expert_gated_product(
            x, indices, gate, up, self.activation, norm=norm, eps=self.eps or 0.0
        )


@dataclass(frozen=True)
class ExpertProducts:
    """Products of a row for each chosen expert. Inputs: x, indices, weight."""

    width: int
    weight: Stored
    chosen: int
    shape: Shape

    @property
    def makes(self) -> tuple[Shape, ...] | None:
        """The shape of its output; None for any."""
        return None

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its inputs; None for any."""
        rows = (1, 1, self.chosen)
        return ((*rows, self.width), rows, *(None,) * self.weight.count)

    def making(self, shapes: tuple[Shape, ...]) -> ExpertProducts:
        """Return the same with an output of another shape."""
        return replace(self, shape=shapes[0])

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the products."""
        inputs = _Inputs(arrays)
        rows = (1, 1, self.chosen)
        x, indices = inputs.next((*rows, self.width)), inputs.next(rows)
        return expert_products(x, indices, inputs.weight(self.weight), shape=self.shape)


@dataclass(frozen=True)
class ExpertCombination:
    """A weighted sum over chosen experts. Inputs: h, indices, scores, down, shared?, residual?."""

    width: int
    down: Stored
    chosen: int
    rows: int
    dtype: mx.Dtype
    has_shared: bool = False
    has_residual: bool = False

    @property
    def makes(self) -> tuple[Shape, ...]:
        """The shape of its output."""
        return ((1, 1, self.rows),)

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its inputs; None for any."""
        rows = (1, 1, self.chosen)
        extra = ((1, 1, self.rows),) * (self.has_shared + self.has_residual)
        return ((*rows, self.width), rows, rows, *(None,) * self.down.count, *extra)

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the sum."""
        inputs = _Inputs(arrays)
        rows, result = (1, 1, self.chosen), (1, 1, self.rows)
        h, indices, scores = inputs.next((*rows, self.width)), inputs.next(rows), inputs.next(rows)
        down = inputs.weight(self.down)
        shared = inputs.take(self.has_shared, result)
        residual = inputs.take(self.has_residual, result)
        return expert_combination(
            h, indices, scores, down, shared=shared, residual=residual, dtype=self.dtype
        )


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one token, whose keys and values are written to the cache in place.

    Inputs: q, k, v, keys, values, state, counters, q_norm?, k_norm?, freqs?, sinks?, after?.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    shape: Shape
    eps: float | None = None
    rope: recording.Rope | None = None
    has_sinks: bool = False
    has_after: bool = False

    #: on Metal no threadgroup may rely on what another one wrote, so sums are combined apart
    launches: ClassVar[Mapping[str, int]] = {"metal": 2, "cuda": 1}

    @property
    def makes(self) -> tuple[Shape, ...] | None:
        """The shape of its output; None for any."""
        return None

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its first inputs; any do for the others."""
        return (
            (1, self.heads, self.head_dim),
            (1, self.kv_heads, self.head_dim),
            (1, self.kv_heads, self.value_dim),
        )

    def making(self, shapes: tuple[Shape, ...]) -> DecodeAttention:
        """Return the same with an output of another shape."""
        return replace(self, shape=shapes[0])

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the attention's output."""
        inputs = _Inputs(arrays)
        q, k, v = (inputs.next(shape) for shape in self.takes)
        keys, values, state, counters = (inputs.next() for _ in range(4))
        normed = self.eps is not None
        q_norm, k_norm = inputs.take(normed), inputs.take(normed)
        rope = inputs.rope(self.rope)
        sinks = inputs.take(self.has_sinks)
        return decode_attention(
            q,
            k,
            v,
            keys,
            values,
            state,
            scale=self.scale,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=self.eps or 0.0,
            rope=rope,
            sinks=sinks,
            after=inputs.take(self.has_after),
            counters=counters,
            shape=self.shape,
        )


@dataclass(frozen=True)
class LatentAttention:
    """Attention of one token over latents, which it writes to the cache in place.

    Inputs: q, q_pe, latent, k_pe, latents, rope_keys, state, counters, norm?, freqs?, after?.
    """

    heads: int
    latent_dim: int
    rope_dim: int
    scale: float
    shape: Shape
    eps: float | None = None
    rope: recording.Rope | None = None
    has_after: bool = False

    launches: ClassVar[Mapping[str, int]] = DecodeAttention.launches

    @property
    def makes(self) -> tuple[Shape, ...] | None:
        """The shape of its output; None for any."""
        return None

    @property
    def takes(self) -> tuple[Shape | None, ...]:
        """The shapes of its first inputs; any do for the others."""
        heads = (1, self.heads)
        latent = (1, self.latent_dim)
        return ((*heads, self.latent_dim), (*heads, self.rope_dim), latent, (1, self.rope_dim))

    def making(self, shapes: tuple[Shape, ...]) -> LatentAttention:
        """Return the same with an output of another shape."""
        return replace(self, shape=shapes[0])

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the attention's output."""
        inputs = _Inputs(arrays)
        q, q_pe, latent, k_pe = (inputs.next(shape) for shape in self.takes)
        latents, rope_keys, state, counters = (inputs.next() for _ in range(4))
        norm = inputs.take(self.eps is not None)
        rope = inputs.rope(self.rope)
        return decode_attention_latent(
            q,
            q_pe,
            latent,
            k_pe,
            latents,
            rope_keys,
            state,
            scale=self.scale,
            norm=norm,
            eps=self.eps or 0.0,
            rope=rope,
            after=inputs.take(self.has_after),
            counters=counters,
            shape=self.shape,
        )


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
