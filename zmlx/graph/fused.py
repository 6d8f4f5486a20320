"""The fused operations of a graph: each is called with a node's inputs, and launches one kernel.

They are equal when they compute the same, so that graphs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from zmlx.graph import recording
from zmlx.kernels.decode_attention import Rope, decode_attention
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
        w, scales, biases = [*given, None, None][:3]
        return Weight(w, scales, biases, bias, self.mode, self.group_size, self.bits)


class _Inputs:
    """Takes a node's inputs from the front."""

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self._arrays = list(arrays)

    def take(self, there: bool = True) -> mx.array | None:
        return self._arrays.pop(0) if there else None

    def next(self) -> mx.array:
        return self._arrays.pop(0)

    def weight(self, stored: Stored) -> Weight:
        taken, self._arrays = self._arrays[: stored.count], self._arrays[stored.count :]
        return stored.weight(taken)


def _rows(x: mx.array, width: int) -> mx.array:
    return x if x.ndim == 2 and x.shape[1] == width else x.reshape(-1, width)


def _shaped(y: mx.array, shape: Shape) -> mx.array:
    return y if y.shape == shape else y.reshape(shape)


def _rope(rope: recording.Rope, inputs: _Inputs) -> Rope:
    freqs = inputs.take(rope.has_freqs)
    return Rope(rope.dims, rope.traditional, rope.base, rope.scale, freqs)


@dataclass(frozen=True)
class Products:
    """Products of one x with some weights. Inputs: x, norm?, weights, residual?."""

    width: int
    weights: tuple[Stored, ...]
    shapes: tuple[Shape, ...]
    eps: float | None = None
    has_residual: bool = False

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Return a product for each weight."""
        inputs = _Inputs(arrays)
        x = _rows(inputs.next(), self.width)
        norm = inputs.take(self.eps is not None)
        weights = [inputs.weight(stored) for stored in self.weights]
        residual = inputs.take(self.has_residual)
        if residual is not None:
            residual = residual.reshape(x.shape[0], -1)
        made = products(x, weights, norm=norm, eps=self.eps or 0.0, residual=residual)
        return [_shaped(y, shape) for y, shape in zip(made, self.shapes, strict=True)]


@dataclass(frozen=True)
class GatedProduct:
    """A gated product of x. Inputs: x, norm?, gate, up."""

    width: int
    gate: Stored
    up: Stored
    activation: str
    shape: Shape
    eps: float | None = None

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the product."""
        inputs = _Inputs(arrays)
        x = _rows(inputs.next(), self.width)
        norm = inputs.take(self.eps is not None)
        gate, up = inputs.weight(self.gate), inputs.weight(self.up)
        y = gated_product(x, gate, up, self.activation, norm=norm, eps=self.eps or 0.0)
        return _shaped(y, self.shape)


@dataclass(frozen=True)
class ExpertGatedProduct:
    """Gated products of x with chosen experts. Inputs: x, indices, norm?, gate, up."""

    width: int
    gate: Stored
    up: Stored
    activation: str
    shape: Shape
    eps: float | None = None

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the products."""
        inputs = _Inputs(arrays)
        x = _rows(inputs.next(), self.width)
        indices = inputs.next().reshape(x.shape[0], -1)
        norm = inputs.take(self.eps is not None)
        gate, up = inputs.weight(self.gate), inputs.weight(self.up)
        y = expert_gated_product(
            x, indices, gate, up, self.activation, norm=norm, eps=self.eps or 0.0
        )
        return _shaped(y, self.shape)


@dataclass(frozen=True)
class ExpertProducts:
    """Products of a row for each chosen expert. Inputs: x, indices, weight."""

    width: int
    weight: Stored
    shape: Shape

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the products."""
        inputs = _Inputs(arrays)
        x, indices = inputs.next(), inputs.next()
        indices = indices.reshape(1, -1)
        x = x.reshape(1, indices.shape[1], self.width)
        return _shaped(expert_products(x, indices, inputs.weight(self.weight)), self.shape)


@dataclass(frozen=True)
class ExpertCombination:
    """A weighted sum over chosen experts. Inputs: h, indices, scores, down, shared?, residual?."""

    width: int
    down: Stored
    shape: Shape
    has_shared: bool = False
    has_residual: bool = False

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the sum."""
        inputs = _Inputs(arrays)
        h, indices, scores = inputs.next(), inputs.next(), inputs.next()
        indices = indices.reshape(1, -1)
        down = inputs.weight(self.down)
        shared, residual = inputs.take(self.has_shared), inputs.take(self.has_residual)
        y = expert_combination(
            h.reshape(1, indices.shape[1], self.width),
            indices,
            scores.reshape(indices.shape),
            down,
            shared=None if shared is None else shared.reshape(1, -1),
            residual=None if residual is None else residual.reshape(1, -1),
        )
        return _shaped(y, self.shape)


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one token, whose keys and values are written to the cache in place.

    Inputs: q, k, v, keys, values, state, q_norm?, k_norm?, freqs?, sinks?, after?.
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

    def __call__(self, *arrays: mx.array) -> mx.array:
        """Return the attention's output."""
        inputs = _Inputs(arrays)
        q, k, v, keys, values, state = (inputs.next() for _ in range(6))
        normed = self.eps is not None
        q_norm, k_norm = inputs.take(normed), inputs.take(normed)
        rope = None if self.rope is None else _rope(self.rope, inputs)
        sinks = inputs.take(self.has_sinks)
        y = decode_attention(
            q.reshape(1, self.heads, self.head_dim),
            k.reshape(1, self.kv_heads, self.head_dim),
            v.reshape(1, self.kv_heads, self.value_dim),
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
        )
        return _shaped(y, self.shape)
