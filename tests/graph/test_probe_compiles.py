"""What is tried before a program runs: kernels are compiled together."""

from __future__ import annotations

import threading

import mlx.core as mx

from zmlx.backend.cuda.side_by_side import run
from zmlx.graph import probing
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import FUSED

X, OUT = (Value((8,), mx.float32, name) for name in ("x", "out"))


def test_all_kinds_are_compiled_before_the_first_one_runs(monkeypatch):
    monkeypatch.setattr(probing, "for_kernels", lambda **_: "cuda")
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
    before = Graph((X,), (OUT,), {}, (Node("Multiply", (X, X), (OUT,)),))
    node = Node(f"{FUSED}square", (X, X), (OUT,), (lambda x, again: x * again,))
    probing.probe(before, Graph((X,), (OUT,), {}, (node,)))
