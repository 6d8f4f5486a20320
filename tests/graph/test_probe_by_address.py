"""What is tried before a program runs takes its constants as the program does."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

from zmlx.backend.cuda import addresses
from zmlx.backend.cuda.side_by_side import run
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
    assert len(seen) == (2 if backend == "cuda" else 1)  # launched once only to be compiled
    for held, weight in seen:
        assert weight is CONSTANTS[WEIGHT]
        if backend == "cuda":
            assert held.knows(weight)
            assert not held.knows(CONSTANTS[OTHER])
        else:
            assert held is None
    assert addresses.current() is None


def test_all_kinds_are_compiled_before_the_first_one_runs(monkeypatch):
    monkeypatch.setattr(probing, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(addresses, "_addresses", lambda arrays: list(range(len(arrays))))
    seen = []

    def fused(name):
        def function(x):
            run(lambda: seen.append((name, threading.current_thread().name[:4])))
            return x * 2

        return function

    outs = [Value((8,), mx.float32, f"out {n}") for n in range(3)]
    two = Value((8,), mx.float32, "two")
    held = {two: mx.full((8,), 2.0)}
    plain = [Node("Multiply", (X, two), (out,)) for out in outs]
    both = fused("both")  # of two nodes of one kind, one is tried
    nodes = [
        Node(f"{FUSED}twice", (X,), (out,), (function,))
        for out, function in zip(outs, (both, both, fused("other")), strict=True)
    ]
    before = Graph((X,), tuple(outs), held, tuple(plain))
    probing.probe(before, Graph((X,), tuple(outs), held, tuple(nodes)))
    assert sorted(seen[:2]) == [("both", "zmlx"), ("other", "zmlx")]
    assert seen[2:] == [("both", "Main"), ("other", "Main")]


def test_an_input_may_be_read_twice(monkeypatch):
    monkeypatch.setattr(probing, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(addresses, "_addresses", lambda arrays: list(range(len(arrays))))
    before = Graph((X,), (OUT,), {}, (Node("Multiply", (X, X), (OUT,)),))
    node = Node(f"{FUSED}square", (X, X), (OUT,), (lambda x, again: x * again,))
    probing.probe(before, Graph((X,), (OUT,), {}, (node,)))
