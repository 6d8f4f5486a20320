"""What a graph is: values, and nodes that make them with MLX's operations or fused ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class Value:
    """An array of a graph: its shape and dtype. Two values are the same if they are one object."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    name: str = ""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        op: the name of MLX's primitive ("QuantizedMatmul", "RMSNorm"), or of a fused operation.
        inputs: the values that it reads, in the primitive's order.
        outputs: the values that it makes.
        arguments: the primitive's state (axes, shapes, numbers), in its order.
    """

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Graph:
    """A function of arrays.

    Attributes:
        inputs: the values that a call gives.
        outputs: the values that it returns; inputs and constants may be among them.
        constants: the arrays that the function holds, such as weights.
        nodes: every operation, after those that make its inputs.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[Value, mx.array]
    nodes: tuple[Node, ...] = field(default=())

    @cached_property
    def producers(self) -> Mapping[Value, Node]:
        """The node that makes each value; inputs and constants have none."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def consumers(self) -> Mapping[Value, tuple[Node, ...]]:
        """The nodes that read each value, once for each time that they read it."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    def with_nodes(self, nodes: Iterable[Node]) -> Graph:
        """Return the same function with other nodes, without those whose outputs nobody reads."""
        kept: list[Node] = []
        wanted = set(self.outputs)
        for node in reversed(list(nodes)):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.inputs)
        held = {value: array for value, array in self.constants.items() if value in wanted}
        return Graph(self.inputs, self.outputs, held, tuple(reversed(kept)))
