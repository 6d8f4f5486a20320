"""Attention of the new token with the update of the cache, its norms and its rotary embedding.

Before   q, k = rope(rms_norm(q)), rope(rms_norm(k))          stock: some ten kernels
         keys, values = slice_update(keys, k), slice_update(values, v)
         y = scaled_dot_product_attention(q, keys[..., :n + 1, :], values[..., :n + 1, :])
After    y = decode_attention(q, k, v, keys, values, state)   one, which writes in place

The position is a number in what was traced, for the trace is of one step; afterwards it is read
from `state`, so that the graph is that of every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from zmlx.graph.fused import DecodeAttention, LatentAttention
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.recording import Attention, Norm, Rope
from zmlx.graph.rewriting import taken_over
from zmlx.graph.views import origin, repeated


@dataclass(frozen=True)
class _Write:
    """An update of a cache's buffer by the new token."""

    buffer: Value
    new: Value
    updated: Value


@dataclass(frozen=True)
class _Head:
    """What becomes of a projection before attention."""

    raw: Value
    norm: Value | None = None
    eps: float | None = None
    rope: Rope | None = None
    freqs: Value | None = None


@dataclass(frozen=True)
class Fused:
    """A graph whose attention is fused.

    Attributes:
        graph: the graph; the states, `counters` and `after` are its last inputs.
        written: the inputs that it writes to -> what they became in the traced graph.
    """

    graph: Graph
    written: Mapping[Value, Value]


@dataclass(frozen=True)
class Place:
    """Where the new token is written in a buffer.

    Attributes:
        write: its row.
        length: rows that hold tokens, then.
        position: of the token.
        state: int32 (3,), what `decode_attention` takes in their place.
    """

    write: int
    length: int
    position: int
    state: Value

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What the state holds."""
        return self.write, self.length, self.position


def fuse_attention(
    graph: Graph, position: int, places: Mapping[Value, Place], counters: Value, after: Value
) -> Fused:
    """Return the graph with fused attention.

    Args:
        graph: a step of one token of one sequence, traced at a position.
        position: how many tokens there were before.
        places: input that is a buffer of keys or values -> where the token is written in it.
        counters: of `decode_attention`, for all attention of the step.
        after: an array on which the step before depends; the first attention waits for it.
    """
    finder = _Finder(graph, position, places, counters)
    states = list(dict.fromkeys(place.state for place in places.values()))
    nodes: list[Node] = []
    written: dict[Value, Value] = {}
    later: set[Value] = set()
    for node in graph.nodes:
        waits = not later.intersection(node.inputs)
        if node.op == "ScaledDotProductAttention":
            found = finder.fused(node, after if waits else None)
            if found is not None:
                fused, writes = found
                nodes.append(fused)
                written.update((write.buffer, write.updated) for write in writes)
                later.update(node.outputs)
        if not waits:
            later.update(node.outputs)
    nodes += positions_read(graph, position, states[0])
    outputs = tuple(value for value in graph.outputs if value not in written.values())
    inputs = (*graph.inputs, *states, counters, after)
    base = Graph(inputs, outputs, graph.constants, graph.nodes)
    return Fused(taken_over(base, nodes), written)


class _Finder:
    """Finds what attention reads, in a graph traced at a position."""

    def __init__(
        self, graph: Graph, position: int, places: Mapping[Value, Place], counters: Value
    ) -> None:
        self.graph = graph
        self.position = position
        self.places = places
        self.counters = counters

    def fused(self, node: Node, after: Value | None) -> tuple[Node, tuple[_Write, _Write]] | None:
        """Return the fused node for an attention, and what it writes; None if it stays as it is."""
        q, k, v, *_ = node.inputs
        if q.shape[0] != 1 or q.shape[2] != 1 or q.dtype != node.outputs[0].dtype:
            return None
        arguments: Attention = node.arguments  # type: ignore[assignment]
        if arguments.has_mask:
            return self.over_latents(node, arguments, after) if k is v else None
        keys, values = self.write(k), self.write(v)
        if keys is None or values is None or keys.buffer is values.buffer:
            return None
        state = self.places[keys.buffer].state
        if self.places[values.buffer].state is not state:
            return None
        return self.over_heads(node, arguments, (keys, values), after), (keys, values)

    def over_heads(
        self, node: Node, arguments: Attention, writes: tuple[_Write, _Write], after: Value | None
    ) -> Node:
        """Return the fused node for attention over keys and values of heads."""
        q, _, _, *rest = node.inputs
        keys, values = writes
        query, key = self.heads(q, keys.new)
        extra = [query.norm, key.norm, query.freqs, *rest, after]
        operation = DecodeAttention(
            heads=q.shape[1],
            kv_heads=keys.new.shape[1],
            head_dim=q.shape[3],
            value_dim=values.new.shape[3],
            scale=arguments.scale,
            shape=node.outputs[0].shape,
            eps=query.eps,
            rope=query.rope,
            has_sinks=arguments.has_sinks,
            has_after=after is not None,
        )
        raw = (query.raw, key.raw, origin(self.graph, values.new), keys.buffer, values.buffer)
        state = self.places[keys.buffer].state
        given = (value for value in extra if value is not None)
        inputs = (*raw, state, self.counters, *given)
        return Node("FusedDecodeAttention", inputs, node.outputs, (operation,))

    def over_latents(
        self, node: Node, arguments: Attention, after: Value | None
    ) -> tuple[Node, tuple[_Write, _Write]] | None:
        """Return the fused node for attention over latents (DeepSeek's MLA).

        The mask is what rotated parts of queries and keys add to the scores.
        """
        q, k, _, mask, *sinks = node.inputs
        latents, found = self.write(k), self.rotated_scores(mask, arguments.scale)
        if latents is None or found is None or sinks or k.shape[1] != 1:
            return None
        q_pe, rope_keys = found
        state = self.places[latents.buffer].state
        apart = rope_keys.buffer is not latents.buffer
        one_key = rope_keys.new.shape[1] == 1 and q_pe.shape[:3] == q.shape[:3]
        if not (apart and one_key and self.places[rope_keys.buffer].state is state):
            return None
        query, key = self.heads(q_pe, rope_keys.new)
        if query.eps is not None:
            query, key = self.head(q_pe, normed=False), self.head(rope_keys.new, normed=False)
        latent = self.head(latents.new)
        latent = _Head(origin(self.graph, latents.new)) if latent.rope is not None else latent
        operation = LatentAttention(
            heads=q.shape[1],
            latent_dim=q.shape[3],
            rope_dim=q_pe.shape[3],
            scale=arguments.scale,
            shape=node.outputs[0].shape,
            eps=latent.eps,
            rope=query.rope,
            has_after=after is not None,
        )
        raw = (origin(self.graph, q), query.raw, latent.raw, key.raw)
        extra = (latent.norm, query.freqs, after)
        given = tuple(value for value in extra if value is not None)
        inputs = (*raw, latents.buffer, rope_keys.buffer, state, self.counters, *given)
        return Node("FusedLatentAttention", inputs, node.outputs, (operation,)), (
            latents,
            rope_keys,
        )

    def rotated_scores(self, mask: Value, scale: float) -> tuple[Value, _Write] | None:
        """Return q_pe and the update of rotated keys in scale * q_pe @ keys.T, if it is that."""
        graph = self.graph
        product = graph.producers.get(mask)
        if product is None or product.op != "Matmul":
            return None
        scaled, turned = graph.producers.get(product.inputs[0]), product.inputs[1]
        node = graph.producers.get(turned)
        if node is not None and node.op == "Broadcast":
            node = graph.producers.get(node.inputs[0])
        if node is None or node.op != "Transpose" or list(node.arguments[0]) != [0, 1, 3, 2]:
            return None
        keys = self.write(node.inputs[0])
        if keys is None or scaled is None or scaled.op != "Multiply":
            return None
        for q_pe, factor in (scaled.inputs, scaled.inputs[::-1]):
            number = graph.constants.get(repeated(graph, factor))
            if number is not None and number.size == 1:
                return (q_pe, keys) if _is_scale(number, scale) else None
        return None

    def write(self, value: Value) -> _Write | None:
        """Return the update of a buffer whose tokens a value is, if it is that."""
        node = self.graph.producers.get(value)
        length = value.shape[2]
        if node is not None and node.op == "Slice":
            start, stop, strides = node.arguments
            source = node.inputs[0]
            whole = (*source.shape[:2], length, *source.shape[3:])
            if any(start) or tuple(stop) != whole or any(step != 1 for step in strides):
                return None
            value, node = source, self.graph.producers.get(source)
        if node is None or node.op != "SliceUpdate":
            return None
        kind, start, stop, strides = node.arguments
        buffer, new = node.inputs
        place = self.places.get(buffer)
        row = (*buffer.shape[:2], 1, *buffer.shape[3:])
        if place is None or place.length != length or new.shape != row:
            return None
        end = (*buffer.shape[:2], place.write + 1, *buffer.shape[3:])
        plain = kind == 4 and all(step == 1 for step in strides)
        here = tuple(start) == (0, 0, place.write, 0) and tuple(stop) == end
        return _Write(buffer, new, value) if plain and here else None

    def heads(self, q: Value, k: Value) -> tuple[_Head, _Head]:
        """Return what a fused kernel does to queries and keys: the same to both, or nothing."""
        query, key = self.head(q), self.head(k)
        same_rope = query.rope == key.rope and query.freqs is key.freqs
        if not same_rope:
            return _Head(origin(self.graph, q)), _Head(origin(self.graph, k))
        if query.eps != key.eps:  # one is not normed, or otherwise
            query, key = self.head(q, normed=False), self.head(k, normed=False)
        return query, key

    def head(self, value: Value, *, normed: bool = True) -> _Head:
        """Return how a value comes from a projection."""
        graph, dim = self.graph, value.shape[-1]
        raw, rope, freqs = origin(graph, value), None, None
        node = graph.producers.get(raw)
        if node is not None and self.rotates(node) and raw.shape[-1] == dim:
            rope = node.arguments
            freqs = node.inputs[2] if rope.has_freqs else None  # type: ignore[attr-defined]
            raw = origin(graph, node.inputs[0])
            node = graph.producers.get(raw)
        if normed and node is not None and node.op == "RMSNorm" and raw.shape[-1] == dim:
            norm: Norm = node.arguments  # type: ignore[assignment]
            source = origin(graph, node.inputs[0])
            if norm.has_weight and source.dtype == value.dtype:
                return _Head(source, node.inputs[1], norm.eps, rope, freqs)  # type: ignore[arg-type]
        return _Head(raw, None, None, rope, freqs)  # type: ignore[arg-type]

    def rotates(self, node: Node) -> bool:
        """Return whether a node rotates heads, all of them by the position."""
        # Rows of one array have positions that follow on each other.
        heads = node.op == "RoPE" and node.inputs[0].shape[-2] == 1
        return heads and is_number(self.graph, node.inputs[1], self.position)


def is_number(graph: Graph, value: Value, number: int) -> bool:
    """Return whether a value is a whole number as a constant."""
    array = graph.constants.get(value)
    if array is None or array.size != 1 or not mx.issubdtype(array.dtype, mx.integer):
        return False
    return bool(array.item() == number)


def positions_read(graph: Graph, position: int, state: Value) -> list[Node]:
    """Return every node that reads the position as a number, with the one in `state`.

    A constant that is the position by chance is one in the trace of one position only.
    """
    where = Value((1,), state.dtype)
    made = [Node("Slice", (state,), (where,), ((2,), (3,), (1,)))]
    forms: dict[tuple[tuple[int, ...], mx.Dtype], Value] = {((1,), state.dtype): where}

    def as_form(shape: tuple[int, ...], dtype: mx.Dtype) -> Value:
        known = forms.get((shape, dtype))
        if known is not None:
            return known
        value = forms[shape, dtype] = Value(shape, dtype)
        if shape == (1,):
            made.append(Node("AsType", (where,), (value,), (dtype,)))
        else:
            made.append(Node("Reshape", (as_form((1,), dtype),), (value,), (shape,)))
        return value

    found = []
    for node in graph.nodes:
        if node.op == "Arange" and node.outputs[0].size == 1 and node.arguments[0] == position:
            value = node.outputs[0]
            if mx.issubdtype(value.dtype, mx.integer):
                source = as_form((1,), value.dtype)
                found.append(Node("Reshape", (source,), (value,), ((1,),)))
            continue
        numbers = [is_number(graph, value, position) for value in node.inputs]
        if any(numbers):
            inputs = (
                as_form((1,) if node.op == "RoPE" else value.shape, value.dtype) if here else value
                for value, here in zip(node.inputs, numbers, strict=True)
            )
            found.append(Node(node.op, tuple(inputs), node.outputs, node.arguments))
    return [*made, *found] if found else []


def _is_scale(number: mx.array, scale: float) -> bool:
    """Return whether a constant is the scale; in 16 bits as far as they go."""
    error = 2.0**-8 if number.dtype.size == 2 else 1e-6
    return abs(number.astype(mx.float32).item() - scale) <= error * abs(scale)
