"""Kernels are counted per operation and backend, as MLX compiles, and for whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import made
from zoo.disk import make_checkpoint

from zmlx.bench import dispatches as command_module
from zmlx.bench.dispatches import command, count, hollow
from zmlx.bench.shapes import unfilled_model
from zmlx.graph.compiled import _FUSABLE, fused, trace_compiled
from zmlx.graph.dispatches import BACKENDS, dispatches
from zmlx.graph.layout import Layout, contiguity
from zmlx.graph.nodes import Graph, Node
from zmlx.graph.step import Step
from zmlx.graph.trace import trace

F = mx.sin(mx.arange(24, dtype=mx.float32)).reshape(4, 6)
IDS = mx.array([0, 2, 1])
CACHE = mx.zeros((1, 2, 256, 64), mx.bfloat16)
LONG = mx.zeros((1, 2, 4096, 64), mx.bfloat16)
KEY = mx.ones((1, 2, 1, 64), mx.bfloat16)
QUERY = mx.ones((1, 8, 1, 64), mx.bfloat16)
WIDE = mx.ones((1, 8, 1, 576), mx.bfloat16)
ROWS = mx.ones((1, 3, 128))
WEIGHT = mx.quantize(mx.ones((64, 128)), group_size=32, bits=4)
BACKWARDS = mx.quantize(mx.ones((1024, 64)), group_size=32, bits=4)
EXPERTS = mx.quantize(mx.ones((4, 64, 128)), group_size=32, bits=4)
SCALE, MASK, SINKS = mx.ones((128,)), mx.zeros((1, 300), mx.bfloat16), mx.ones((8,), mx.bfloat16)
mx.eval(F, CACHE, LONG, KEY, QUERY, WIDE, ROWS, WEIGHT, BACKWARDS, EXPERTS, SCALE, MASK, SINKS)


def put(cache: mx.array, key: mx.array) -> mx.array:
    cache[:, :, 3:4] = key
    return cache


def attend(q: mx.array, k: mx.array, length: int = 0, **more: Any) -> mx.array:
    if length:
        k = k[:, :, :length]
    return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.1, **more)


def rope(x: mx.array, dims: int = 64) -> mx.array:
    return mx.fast.rope(x, dims, traditional=False, base=1e4, scale=1.0, offset=3)


def chosen(x: mx.array, ids: mx.array) -> mx.array:
    x = x.reshape(1, 1, 1, 1, -1)
    return mx.gather_qmm(x, *EXPERTS, None, ids, True, 32, 4)


#: What is done, with what, launches on Metal, launches on CUDA.
CASES: list[tuple[Callable[..., Any], tuple[mx.array, ...], int, int]] = [
    (lambda x: [x[1:], x.T, x[None], mx.broadcast_to(x, (3, 4, 6)), x.reshape(2, 12)], (F,), 0, 0),
    (lambda x: [*mx.split(x, 2, 1), x.reshape(2, 2, 6)[:, 0], x.view(mx.int32)], (F,), 0, 0),
    (lambda x: x.T.reshape(24), (F,), 1, 1),
    (lambda x: x[:, ::2].reshape(4, 3, 1), (F,), 0, 0),
    (lambda x: x[:, :4].reshape(16), (F,), 1, 1),
    (lambda x: mx.contiguous(x.T), (F,), 1, 1),
    (lambda x: mx.contiguous(x.T, allow_col_major=True), (F,), 0, 0),
    (lambda x: x * 2 + x.T[:4, :4].sum(), (F,), 3, 4),
    (lambda x: mx.sin(x.T), (F,), 1, 1),
    (lambda x: mx.concatenate([x, x, x]), (F,), 3, 3),
    (lambda x: mx.pad(x, 1), (F,), 2, 2),
    (lambda x: mx.arange(3) + x.size, (F,), 2, 2),
    (lambda x: mx.softmax(x, -1), (F,), 1, 1),
    (lambda x: mx.softmax(x.T, -1), (F,), 2, 2),
    (lambda x: mx.logsumexp(x, -1), (F,), 1, 1),
    (lambda x: mx.argpartition(x, 2), (F,), 1, 1),
    (mx.sort, (mx.zeros((1, 5000)),), 4, 4),
    (mx.argmax, (F,), 1, 1),
    (lambda x: mx.sum(x, -1), (F,), 1, 1),
    (lambda x: mx.sum(x, 0), (F,), 1, 1),
    (mx.sum, (mx.zeros((10000,)),), 2, 2),
    (lambda x: mx.sum(x[:, ::2], 1), (F,), 2, 2),
    (lambda x: mx.cumsum(x, 1), (F,), 1, 1),
    (lambda x: mx.cumsum(mx.broadcast_to(x[:, :1], (4, 6)), 1), (F,), 2, 2),
    (lambda x, i: x[i], (F, IDS), 1, 1),
    (lambda x, i: x.at[i].add(1), (F, IDS), 1, 1),
    (lambda x, i: [x.at[i].add(1), x], (F, IDS), 2, 2),
    (put, (CACHE, KEY), 1, 1),
    (lambda c, k: [put(c * 1, k), c], (CACHE, KEY), 2, 2),
    (lambda c, k: [put(c[...], k), c], (CACHE, KEY), 2, 2),
    (lambda x, i: mx.slice(x, i, (0,), (2, 6)), (F, mx.array([1])), 2, 2),
    (lambda x, i: mx.slice_update(x, x[:2] + 1, i, (0,)), (F, mx.array([1])), 3, 3),
    (lambda x: x @ x.T, (F,), 1, 1),
    (lambda x: x[::2] @ x.T, (F,), 2, 2),
    (lambda x: mx.addmm(x[0, :4], x, x.T), (F,), 1, 1),
    (lambda x: mx.addmm(x[:, :4], x, x.T), (F,), 1, 2),
    (lambda x: mx.quantized_matmul(x, *WEIGHT, True, 32, 4), (ROWS,), 1, 1),
    (lambda x: mx.quantized_matmul(x[:, ::2], *WEIGHT, True, 32, 4), (ROWS,), 2, 2),
    (lambda x: mx.quantized_matmul(x, *BACKWARDS, False, 32, 4), (mx.ones((1, 1024)),), 2, 1),
    # Both count the rows; CUDA copies these indices, which are the same for both experts.
    (chosen, (ROWS[0, 0], mx.array([[[1, 3]]], mx.uint32)), 2, 3),
    (lambda x: mx.dequantize(x, *WEIGHT[1:], group_size=32, bits=4), (WEIGHT[0],), 1, 1),
    (lambda x: mx.fast.rms_norm(x, SCALE, 1e-5), (ROWS,), 1, 1),
    (lambda x: mx.fast.rms_norm(x[:, ::2], SCALE, 1e-5), (ROWS,), 2, 2),
    # A row of a wider array: only Metal sees that there is no other row.
    (lambda x: mx.fast.rms_norm(x[:, :1, :64], SCALE[:64], 1e-5), (ROWS,), 1, 2),
    (lambda x: mx.fast.layer_norm(x, SCALE, None, 1e-5), (ROWS,), 1, 1),
    (rope, (QUERY,), 1, 1),
    (lambda x: rope(x, 32), (QUERY,), 1, 1),
    (lambda x: [rope(x, 32), x], (QUERY,), 2, 2),
    (lambda x: rope(x.reshape(1, 1, 8, 64).transpose(0, 2, 1, 3)), (QUERY,), 1, 1),
    (lambda q, k: attend(q, k, 200), (QUERY, CACHE), 1, 1),
    (lambda q, k: attend(q, k, 300), (QUERY, LONG), 1, 1),
    (lambda q, k: attend(q.astype(mx.float32), k, 2000), (QUERY, LONG.astype(mx.float32)), 2, 3),
    (attend, (QUERY, LONG), 2, 1),
    (lambda q, k: attend(q, k, 300, sinks=SINKS), (QUERY, LONG), 1, 2),
    # scale, product, softmax, product; a mask is added; there is no kernel of this width.
    (lambda q, k: attend(q, k, 300, mask=MASK), (QUERY, LONG), 1, 5),
    (attend, (WIDE, WIDE), 4, 4),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_an_operation(number: int, backend: str) -> None:
    function, arrays, metal, cuda = CASES[number]
    mx.eval(arrays)
    counted = dispatches(trace(function, *arrays), backend)
    assert sum(counted.values()) == {"metal": metal, "cuda": cuda}[backend], counted
    assert all(counted.values())


def test_what_is_empty_launches_nothing() -> None:
    graph = trace(lambda x: mx.sin(x[:0]), F)
    assert dispatches(graph, "cuda") == {}


def test_an_operation_beyond_the_shapes_of_a_step_is_counted() -> None:
    graph = fused(trace(lambda x: mx.logaddexp(mx.sin(x), mx.erf(x)), F))
    assert dispatches(graph, "metal") == {"Compiled": 1}


def test_fused_nodes_count_as_they_say() -> None:
    graph = trace(lambda x: mx.sin(x) + 1, F)
    (sine,) = (node for node in graph.nodes if node.op == "Sin")

    def kernel(x: mx.array) -> mx.array:
        return mx.sin(x)

    def total() -> int:
        node = Node("FusedSine", sine.inputs, sine.outputs, (kernel,))
        others = [other for other in graph.nodes if other is not sine]
        return sum(dispatches(graph.with_nodes([node, *others]), "metal").values())

    assert total() == 2
    kernel.launches = 3  # type: ignore[attr-defined]
    assert total() == 4


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="metal and cuda, not for 'vulkan'"):
        dispatches(trace(mx.sin, F), "vulkan")


def flags(array: mx.array) -> tuple[int, ...]:
    """Return an evaluated array's strides in elements, as numpy's view of the same memory has."""
    import numpy as np

    return tuple(step // array.itemsize for step in np.asarray(array).strides)


VIEWS: list[Callable[[mx.array], mx.array]] = [
    lambda x: x[1:, ::2],
    lambda x: x.T,
    lambda x: x.T[:, :2],
    lambda x: x[::-1],
    lambda x: x[None, :, None],
    lambda x: mx.split(x, 3, 1)[1],
    lambda x: x[:, 1:4].reshape(2, 2, 3),
    lambda x: mx.broadcast_to(x[:1], (4, 6)),
    lambda x: mx.as_strided(x, (3, 2), (1, 6), 4),
    lambda x: mx.sin(x.T),
    lambda x: x.T + mx.sin(x.T),
    lambda x: x.T * 2,
    lambda x: x.T + x.reshape(6, 4),
]


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="numpy reads arrays of a CPU in place")
@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_arrays_lie_as_mlx_lays_them(number: int) -> None:
    from zmlx.graph.dispatches import _count, _Place

    graph = trace(VIEWS[number], F)
    place = _Place(graph, "metal")
    for position, node in enumerate(graph.nodes):
        place.position = position
        place.at.update(zip(node.outputs, _count(place, node)[1], strict=True))
    made = VIEWS[number](F * 1)
    mx.eval(made)
    at = place.at[graph.outputs[0]]
    assert at.shape == made.shape
    lengthy = [axis for axis, length in enumerate(at.shape) if length > 1]
    found, expected = at.strides, flags(made)
    assert [found[axis] for axis in lengthy] == [expected[axis] for axis in lengthy]
    assert (at.rows, at.columns) == contiguity(at.shape, at.strides)[1:]
    assert isinstance(at, Layout)


def compiled_names(graph: Graph) -> list[str]:
    """Return the names of compiled primitives, without broadcasts: MLX has more of these."""
    names = ["".join(n.arguments[0]) for n in graph.nodes if n.op == "Compiled"]
    return joined(names)


def joined(names: list[str]) -> list[str]:
    """Leave broadcasts out, and what is then only one operation: that is one kernel anyway."""
    bare = (name.replace("Broadcast", "") for name in names)
    return sorted(name for name in bare if name not in _FUSABLE)


def dot_names(arrays: list[mx.array]) -> list[str]:
    """Return the same of the graph that MLX would evaluate."""
    text = StringIO()
    mx.export_to_dot(text, *arrays)
    labels = [line.split('"')[1] for line in text.getvalue().splitlines() if "label" in line]
    return joined([label[8:] for label in labels if label.startswith("Compiled")])


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3", "minimax", "gpt2", "lfm2_moe", "gemma4"],
)
def test_compiled_parts_are_those_of_mlx(name: str) -> None:
    model = made(name, "float32-4bit")
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache), [c.state for c in cache])
    step, token = Step(model, cache), mx.array([[5]])
    graph, regions = trace_compiled(step, token, *step.arrays)
    found = compiled_names(fused(graph, regions))
    assert found
    assert found == dot_names(step(token, *step.arrays))


def several(x: mx.array, y: mx.array) -> list[mx.array]:
    inner = mx.exp(x) + y
    return [mx.tanh(inner) * 2, inner, mx.sum(inner * y, 0) - 1, mx.abs(x).T]


def deep(x: mx.array, y: mx.array) -> list[mx.array]:
    for _ in range(30):
        x = mx.sin(x) * y
    return [x]


def broad(x: mx.array, y: mx.array) -> list[mx.array]:
    parts = [mx.sum(x * i, 1, keepdims=True) for i in range(40)]
    total = y
    for part in parts:
        total = total + part
    return [total]


def shared(x: mx.array, y: mx.array) -> list[mx.array]:
    row = mx.broadcast_to(y[:1], x.shape)
    return [mx.sin(x) * row, mx.cumsum(row + x, 0)]


@pytest.mark.parametrize("function", [several, deep, broad, shared])
def test_a_whole_graph_is_joined_as_mlx_compiles_it(
    function: Callable[..., list[mx.array]],
) -> None:
    graph = fused(trace(function, F, 2 * F))
    assert compiled_names(graph) == dot_names(mx.compile(function)(F, 2 * F))


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "lfm2-8b-a1b"])
def test_a_published_shape_takes_no_memory(shape: str) -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    counted = count(hollow(unfilled_model(shape)), BACKENDS)
    assert mx.get_peak_memory() - before < 20_000_000
    for backend in BACKENDS:
        assert counted[backend]["stock"]["QuantizedMatmul"] > 80
    # A long vocabulary is divided among threadgroups, and a second launch joins them.
    for variants in counted.values():
        for operation in ("ArgReduce", "LogSumExp"):
            assert (variants["stock"][operation], variants["patched"][operation]) == (1, 2)


def test_a_layer_of_llama_is_what_one_counts_by_hand() -> None:
    model = made("llama", "bfloat16-4bit")
    counted = count(model, ["cuda"])["cuda"]["stock"]
    layers = len(model.layers)
    # Two norms, four projections, two ropes, two writes of the cache, two residuals, three
    # products of the MLP and its activation, attention (this width has no kernel) and, in this
    # configuration, seven biases but one; then the embedding and the end.
    assert counted["RMSNorm"] == 2 * layers + 1
    assert counted["QuantizedMatmul"] == 7 * layers + 1
    assert counted["RoPE"] == counted["SliceUpdate"] == 2 * layers
    assert counted["Compiled"] == layers
    assert counted["ScaledDotProductAttention"] == 4 * layers
    assert counted["Gather"] == 3
    assert [counted[op] for op in ("ArgReduce", "LogSumExp", "Subtract")] == [1, 1, 1]


def test_a_longer_context_takes_attention_in_two_parts() -> None:
    model = hollow(unfilled_model("llama-3.2-1b"))
    short, long = (count(model, ["metal"], n)["metal"]["stock"] for n in (300, 5000))
    assert long["ScaledDotProductAttention"] == 2 * short["ScaledDotProductAttention"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", "qwen3_moe")
    return tmp_path / "model"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


def test_the_command_prints_json(checkpoint: Path) -> None:
    result = invoke(str(checkpoint), "--json", "--backend", "cuda", "--context", "40")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["model"] == str(checkpoint)
    assert report["context"] == 40
    stock = report["kernels"]["cuda"]["stock"]
    assert list(report["kernels"]) == ["cuda"]
    assert stock["total"] == sum(stock["by_operation"].values()) > 50
    assert stock["by_operation"]["GatherMM"] > 0


def test_the_command_prints_a_table(checkpoint: Path) -> None:
    result = invoke(str(checkpoint))
    assert result.exit_code == 0, result.output
    for text in ("metal, stock", "cuda, stock", "kernels per token", "GatherMM"):
        assert text in result.output


def test_a_replayed_step_gets_a_column() -> None:
    model = made("llama", "bfloat16-4bit")
    counts = count(model, ["metal", "cuda"])
    for backend, attentions in (("metal", 2), ("cuda", 1)):
        stock, patched = counts[backend]["stock"], counts[backend]["patched"]
        layers = len(model.layers)
        assert patched["FusedDecodeAttention"] == attentions * layers
        assert patched["FusedProducts"] == 3 * layers
        assert "RoPE" not in patched
        assert patched["ArgReduce"] == stock["ArgReduce"]  # outside of what is replayed
        assert sum(patched.values()) < 0.5 * sum(stock.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a model's folder or --shape"),
        (("somewhere", "--shape", "llama-3.2-1b"), "give a model's folder or --shape"),
        (("--shape", "llama-9"), "unknown shape 'llama-9'; known: .*llama-3.2-1b"),
        (("/nowhere/at/all",), "no config.json there"),
        (("--shape", "llama-3.2-1b", "--backend", "vulkan"), "not one of"),
        (("--shape", "llama-3.2-1b", "--context", "0"), "0 is not in the range"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    import re

    result = invoke(*arguments)
    assert result.exit_code != 0
    assert re.search(message, result.output)


def test_a_model_that_cannot_be_traced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("dbrx", "float32")
    monkeypatch.setattr(command_module, "_model", lambda folder, shape: model)
    result = invoke("some-dbrx")
    assert result.exit_code == 1
    assert "some-dbrx: the function reads what an array holds" in result.output
