"""What is tried before a program runs takes its constants as the program does."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend.cuda import addresses
from zmlx.graph import probing
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import FUSED

X, WEIGHT, OTHER, OUT = (Value((8,), mx.float32, name) for name in ("x", "weight", "other", "out"))
CONSTANTS = {WEIGHT: mx.arange(8.0), OTHER: mx.ones(8)}


@pytest.mark.parametrize("backend", ["cuda", "emulator"])
def test_constants_of_the_operation_are_in_force(backend, monkeypatch):
    monkeypatch.setattr(probing, "for_kernels", lambda **_: backend)
    monkeypatch.setattr(addresses, "_addresses", lambda arrays: list(range(len(arrays))))
    seen = []

    def fused(x, weight):
        seen.append((addresses.current(), weight))
        return x * weight

    before = Graph((X,), (OUT,), CONSTANTS, (Node("Multiply", (X, WEIGHT), (OUT,)),))
    node = Node(f"{FUSED}scaled", (X, WEIGHT), (OUT,), (fused,))
    probing.probe(before, Graph((X,), (OUT,), CONSTANTS, (node,)))
    [(held, weight)] = seen
    assert weight is CONSTANTS[WEIGHT]
    if backend == "cuda":
        assert held.knows(weight)
        assert not held.knows(CONSTANTS[OTHER])
    else:
        assert held is None
    assert addresses.current() is None
