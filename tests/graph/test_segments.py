"""Graphs of launches: what is recorded of them, where values lie, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from emulated_cuda import emulate_cuda
from simulated_recording import SimulatedRecording

from zmlx.backend.cuda.launching import takes_clusters
from zmlx.backend.definition import CudaBody, Definition
from zmlx.backend.launch import launcher
from zmlx.graph.arena import Arena
from zmlx.graph.launches import LAUNCH, NotRecordable, traced_launches
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import built
from zmlx.graph.placing import alone, views
from zmlx.graph.planning import steps
from zmlx.graph.replayed import Replayed
from zmlx.graph.segments import segments
from zmlx.graph.trace import TraceError, trace

SUM = "uint i = thread_position_in_grid.x; out[i] = x[i] + y[i];"
BY_HAND = "unsigned i = threadIdx.x; out[i] = x[i] + y[i];"
PLUS = Definition("plus", ("x", "y"), ("out",), SUM)
TIMES = mx.array([2.0, 3.0, 5.0, 7.0])


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    emulate_cuda(monkeypatch)


def plus(x, y, of=PLUS, **options):
    [out] = launcher(of, "cuda")(
        inputs=[x, y],
        output_shapes=[(4,)],
        output_dtypes=[mx.float32],
        grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
        **options,
    )
    return out


def graph_of(function, *arrays):
    """Return a graph whose one node is a function that launches kernels."""
    inputs = tuple(Value(array.shape, array.dtype) for array in arrays)
    made = function(*arrays)
    outputs = tuple(Value(array.shape, array.dtype) for array in made)
    node = Node("FusedAll", inputs, outputs, (function,))
    return Graph(inputs, outputs, {}, (node,))


def launches_of(function, *arrays):
    return traced_launches(graph_of(function, *arrays), arrays)


def ran(graph, *arrays, buffers=()):
    """Run a graph of launches in its parts; return its outputs and the parts."""
    parts = segments(graph, buffers)
    held = dict(zip(graph.inputs, arrays, strict=True))
    head = built(parts.head, [held[v] for v in parts.head.inputs])
    held.update(zip(parts.head.outputs, head, strict=True))
    recording = SimulatedRecording(parts, steps(parts, graph.constants))
    found = recording([held[v] for v in parts.copied], [held[v] for v in parts.buffers])
    held.update(zip(parts.results, found, strict=True))
    return built(parts.tail, [held[v] for v in parts.tail.inputs]), parts


def test_what_MLX_computes_is_before_and_after():
    def step(x, y):
        first = mx.exp(x)
        for _ in range(4):
            first = plus(first, y)
        return [mx.sin(first) * TIMES, first]

    x, y = mx.array([0.1, 0.2, 0.3, 0.4]), mx.arange(4).astype(mx.float32)
    found, parts = ran(launches_of(step, x, y), x, y)
    assert [node.op for node in parts.head.nodes] == ["Exp"]
    assert len(parts.launches) == 4
    assert parts.tail.nodes[-1].op == "Multiply"
    last = np.exp(x) + 4 * np.array(y)
    np.testing.assert_allclose(found[0], np.sin(last) * np.array(TIMES), rtol=1e-6)
    np.testing.assert_allclose(found[1], last, rtol=1e-6)


def test_a_launch_that_the_first_operations_need_is_before():
    def step(x, y):
        h = mx.exp(plus(x, y))
        for _ in range(3):
            h = plus(h, x)
        return [plus(h, y)]

    x, y = TIMES, mx.ones(4)
    found, parts = ran(launches_of(step, x, y), x, y)
    assert [node.op for node in parts.head.nodes] == [LAUNCH, "Exp"]
    assert len(parts.launches) == 4
    truth = np.exp(np.array(TIMES) + 1) + 3 * np.array(TIMES) + 1
    np.testing.assert_allclose(found[0], truth, rtol=1e-6)


def test_an_input_that_is_returned_is_returned():
    x = mx.ones(4)
    found, parts = ran(launches_of(lambda x: [plus(plus(x, x), x), x], x), x)
    assert found[1] is x
    assert len(parts.results) == 1


def test_parts_and_other_shapes_are_read_where_they_lie():
    def step(x, y):
        sums = plus(x, y)
        wide = mx.concatenate([x, y])
        low, high = mx.split(wide, 2)
        turned = high.reshape(2, 2)[1:].reshape(2)
        for part in (low, high, mx.broadcast_to(turned, (2, 2))):
            sums = plus(sums, part)
        return [sums]

    x, y = TIMES, mx.arange(4).astype(mx.float32)
    with pytest.raises(NotRecordable, match="y of plus has to be copied first"):
        ran(launches_of(step, x, y), x, y)


def test_what_is_read_before_the_wait_has_to_be_a_constant(monkeypatch):
    body = CudaBody("out[threadIdx.x] = w[threadIdx.x] + x[threadIdx.x];", early=("w",))
    early = Definition(
        "early", ("x", "w"), ("out",), "uint i = 0; out[i] = x[i] + w[i];", cuda=body
    )
    monkeypatch.setattr("zmlx.backend.cuda.handwritten.architecture", lambda: 90)

    def sums(x, w):
        return launcher(early, "cuda")(
            inputs=[x, w],
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
        )

    weight = mx.ones(4)
    graph = launches_of(lambda x: sums(plus(x, x), weight), TIMES)
    found = steps(segments(graph, ()), graph.constants)
    assert [array.tolist() for array in found.fixed] == [weight.tolist()]
    for w in (lambda x: x, lambda x: plus(x, weight)):
        graph = launches_of(lambda x, w=w: sums(plus(x, x), w(x)), TIMES)
        with pytest.raises(NotRecordable, match="early reads w while it may be written"):
            steps(segments(graph, ()), graph.constants)


def test_a_part_of_what_a_launch_makes():
    pair = Definition(
        "pair",
        ("x",),
        ("out",),
        "uint i = thread_position_in_grid.x; out[i] = x[i % 4] * (i / 4 + 1);",
    )

    def step(x):
        [both] = launcher(pair, "cuda")(
            inputs=[x],
            output_shapes=[(2, 4)],
            output_dtypes=[mx.float32],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
        )
        one, two = mx.split(both, 2)
        return [plus(plus(one.squeeze(0), two.reshape(4)), both[1:].reshape(4))]

    found, parts = ran(launches_of(step, TIMES), TIMES)
    assert not parts.head.nodes
    np.testing.assert_allclose(found[0], 5 * np.array(TIMES))


def test_a_buffer_is_written_where_it_lies():
    write = Definition(
        "write",
        ("x", "rows"),
        ("out",),
        "uint i = thread_position_in_grid.x; ((device float*)rows)[i + 4] = x[i]; out[i] = x[i];",
        ensure_row_contiguous=False,
        updated_inputs=("rows",),
    )

    def step(x, rows):
        [out] = launcher(write, "cuda")(
            inputs=[x, rows],
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
        )
        return [plus(out, x)]

    rows = mx.zeros((3, 4)) + 0
    mx.eval(rows)
    graph = launches_of(step, TIMES, rows)
    found, parts = ran(graph, TIMES, rows, buffers=graph.inputs[1:])
    assert parts.buffers == graph.inputs[1:]
    assert parts.copied == graph.inputs[:1]
    np.testing.assert_allclose(rows, [[0] * 4, np.array(TIMES), [0] * 4])
    np.testing.assert_allclose(found[0], 2 * np.array(TIMES))


def test_operations_between_launches_are_refused():
    def step(x):
        for _ in range(5):
            x = mx.exp(plus(x, x))
        return [x]

    with pytest.raises(NotRecordable, match="of 5 launches 1 follow each other, between Exp"):
        segments(launches_of(step, mx.zeros(4)), ())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_value": 0.0}, "outputs with a first value"),
        ({"stream": mx.default_stream(mx.cpu)}, "a stream of its"),
    ],
)
def test_launches_that_are_not_recorded(options, said):
    with pytest.raises((NotRecordable, TraceError), match=said):
        launches_of(lambda x: [plus(x, x, **options)], mx.zeros(4))


def test_numbers_are_constants():
    scaled = Definition(
        "scaled", ("x", "by"), ("out",), "uint i = thread_position_in_grid.x; out[i] = x[i] * by;"
    )

    def step(x):
        [out] = launcher(scaled, "cuda")(
            inputs=[x, 3.0],
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
        )
        return [out]

    found, parts = ran(launches_of(step, TIMES), TIMES)
    assert len(parts.launches) == 1
    np.testing.assert_allclose(found[0], 3 * np.array(TIMES))


VIEWS = {
    "slice": lambda x: x[1:3, ::2, 1:],
    "one of each": lambda x: x[2, :, 3],
    "transpose": lambda x: x.transpose(2, 0, 1),
    "split": lambda x: mx.split(x, [1, 2], axis=1)[1],
    "reshape": lambda x: x.reshape(2, 2, 24),
    "a part reshaped": lambda x: x[1:].reshape(-1),
    "squeeze": lambda x: x[:, None].squeeze(1),
    "broadcast": lambda x: mx.broadcast_to(x[:1], (5, 4, 6)),
    "transposed part": lambda x: x.transpose(1, 0, 2)[2:, 1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_lie_where_MLX_has_them(name):
    x = mx.arange(96).reshape(4, 4, 6)
    graph = trace(VIEWS[name], x)
    places = {value: alone(value) for value in graph.inputs}
    for node in graph.nodes:
        found = views(node, [places[value] for value in node.inputs])
        assert found is not None, node.op
        places.update(zip(node.outputs, found, strict=True))
    [value] = graph.outputs
    place = places[value]
    assert place.base is graph.inputs[0]
    read = mx.as_strided(x, value.shape, place.at.strides, place.offset)
    assert mx.array_equal(read, VIEWS[name](x))


def test_what_computes_is_no_view():
    x = mx.arange(96).reshape(4, 4, 6)
    for function in (
        mx.exp,
        lambda x: x.transpose(1, 0, 2).reshape(-1),
        lambda x: x.astype(mx.int8),
    ):
        graph = trace(function, x)
        places = {value: alone(value) for value in graph.inputs}
        computing = 0
        for node in graph.nodes:
            found = views(node, [places[value] for value in node.inputs])
            computing += found is None
            places.update(zip(node.outputs, found or map(alone, node.outputs), strict=True))
        assert computing


def test_places_are_used_again_and_never_twice_at_once():
    arena = Arena()
    first, second = arena.take(1), arena.take(300)
    assert (first, second, arena.size) == (0, 256, 768)
    arena.give_back(first)
    assert arena.take(257) == 768
    assert arena.take(256) == first
    arena.give_back(second)
    assert (arena.take(100), arena.take(100)) == (256, 512)
    assert arena.size == 1280


def clusters_of(step, monkeypatch):
    """Return how many blocks are a cluster in the launches of a step: recorded ones, and MLX's."""
    alone, together = (
        Definition(f"plus_{n}", ("x", "y"), ("out",), SUM, cuda=CudaBody(BY_HAND, cluster=n))
        for n in (1, 2)
    )

    def clustered(x, y):
        return plus(x, y, of=together if takes_clusters() else alone)

    monkeypatch.setattr(Replayed, "_recorded", lambda self, launches: None)
    x, y = mx.arange(4).astype(mx.float32), mx.ones(4)
    graph = graph_of(lambda x, y: step(x, y, clustered), x, y)
    parts = Replayed(graph, (x, y), ())._parts
    others = [node for node in (*parts.head.nodes, *parts.tail.nodes) if node.op == LAUNCH]
    return [
        [node.arguments[0].kernel.cluster for node in nodes] for nodes in (parts.launches, others)
    ]


def test_only_recordings_launch_clusters(monkeypatch):
    """MLX, which updates the graphs that it has built, gets none, and then there are none."""

    def inside(x, y, clustered):
        first = plus(mx.exp(x), y)
        return [mx.sin(plus(clustered(first, y), y))]

    def after(x, y, clustered):
        first = mx.exp(x)
        for _ in range(4):
            first = clustered(first, y)
        return [clustered(mx.sin(first), y)]

    assert clusters_of(inside, monkeypatch) == [[1, 2, 1], []]
    assert clusters_of(after, monkeypatch) == [[1] * 4, [1]]
