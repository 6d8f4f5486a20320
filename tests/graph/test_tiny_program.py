"""What a tiny program promises as an object: sharing, laziness, limits, and what it refuses."""

from __future__ import annotations

import itertools
import random
import re

import mlx.core as mx
import pytest
from tiny_cases import agree, program_of, traced

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny import TooLarge, refusal, tiny_program
from zmlx.graph.tiny.index import ravel, unravel, variable


def normal(*shape, dtype=mx.float32, seed=0):
    array = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(array)
    return array


def layer(bias, scale):
    return lambda x: (mx.softmax(x, axis=-1) + bias) * scale


def test_layers_share_a_kernel_though_constants_differ():
    x, first, second = normal(2, 32), normal(32, seed=1), normal(32, seed=2)
    one, other = program_of(layer(first, 2.0), x), program_of(layer(second, 2.0), x)
    assert one.definition is other.definition
    agree(one(x)[0], layer(first, 2.0)(x), 1e-6)
    agree(other(x)[0], layer(second, 2.0)(x), 1e-6)


def test_a_number_is_part_of_the_text():
    x, bias = normal(2, 32), normal(32, seed=1)
    one, other = program_of(layer(bias, 2.0), x), program_of(layer(bias, 2.5), x)
    assert one.definition != other.definition
    assert one.definition.name != other.definition.name
    assert "2.5f" in other.definition.source
    agree(other(x)[0], layer(bias, 2.5)(x), 1e-6)


def test_inputs_that_nothing_needs_are_not_passed():
    x, y = normal(8), normal(8, seed=1)
    nodes, inputs, outputs, constants = traced(lambda x, y: (x + 1, mx.exp(y)), x, y)
    program = tiny_program(nodes, inputs, outputs[:1], constants)
    assert program.definition.input_names == ("a0",)
    agree(program(x, y)[0], x + 1)


def test_a_program_of_no_inputs():
    program = program_of(lambda: mx.arange(7) * 3)
    agree(program()[0], mx.arange(7) * 3)


def test_an_input_and_a_constant_can_be_returned():
    x, held = normal(4), normal(3, seed=1)
    a, b = Value((4,), mx.float32), Value((3,), mx.float32)
    one, other = tiny_program([], [a], [a, b], {b: held})(x)
    agree(one, x)
    agree(other, held)


def test_it_is_lazy_and_can_be_compiled():
    x = normal(1, 64)
    program = program_of(lambda x: x - x.max(), x)
    agree(mx.compile(lambda x: program(program(x)[0])[0])(x), x - x.max())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((), "takes 1 arrays, not 0"),
        ((mx.zeros((3,)),), r"made for float32 \(4,\)"),
        ((mx.zeros((4,), mx.int32),), "array 0 is int32"),
    ],
)
def test_other_arrays_than_it_was_made_for(arrays, words):
    program = program_of(lambda x: x + 1, mx.zeros((4,)))
    with pytest.raises(ValueError, match=words):
        program(*arrays)


def unary(op, shape, dtype=mx.float32, out=None, arguments=()):
    x = Value(shape, dtype)
    return Node(op, (x,), (Value(out or shape, dtype),), arguments)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (unary("QuantizedMatmul", (4,)), "not among the operations"),
        (unary("Exp", (16_385,)), "16385 elements"),
        (unary("Exp", (0, 4)), "0 elements"),
        (unary("Exp", (4,), mx.complex64), "complex64"),
        (unary("Sort", (1025,), arguments=(0,)), "more than 1024"),
        (unary("ArgSort", (8,), mx.int64, arguments=(0,)), "sorts int64"),
        (unary("Scan", (8,), mx.int64, arguments=(2, 0, False, True)), "64 bits"),
        (unary("Scan", (8,), arguments=(4, 0, False, True)), "logarithms"),
        (unary("Reduce", (2, 80), mx.int64, (2, 1), (2, [1])), "64 bits"),
        (unary("Reduce", (2, 16_000), mx.float32, (2, 1), (2, [1])), "too many"),
    ],
)
def test_refusals(node, words):
    assert re.search(words, refusal(node) or "")
    with pytest.raises(ValueError, match="cannot be part of a tiny program"):
        tiny_program([node], node.inputs, node.outputs, {})


def test_more_refusals_of_what_depends_on_arguments():
    x, weight = Value((1, 4, 8), mx.float32), Value((8, 3, 8), mx.float32)
    out = Value((1, 2, 8), mx.float32)
    dense = Node("Convolution", (x, weight), (out,), ([1], [0], [0], [1], [1], 1, False))
    assert "filter for each channel" in refusal(dense)
    offset = Value((3,), mx.int32)
    turned = Node("RoPE", (x, offset), (x,), (8, False, 1e4, 1.0))
    assert "offset" in refusal(turned)
    wide = Node("View", (x,), (Value((1, 4, 4), mx.int64),), (mx.int64,))
    assert "one size as another" in refusal(wide)


def test_what_comes_from_nowhere_or_goes_nowhere():
    node = unary("Exp", (4,))
    with pytest.raises(ValueError, match="neither an input nor a constant"):
        tiny_program([node], [], node.outputs, {})
    with pytest.raises(ValueError, match="one output or more"):
        tiny_program([node], node.inputs, [], {})
    with pytest.raises(ValueError, match="each of them once"):
        tiny_program([node], node.inputs, [*node.outputs, *node.outputs], {})


def test_too_much_to_store_and_too_many_arrays():
    x = normal(9, 1000)
    with pytest.raises(TooLarge, match="bytes have to be stored"):
        program_of(lambda x: mx.argsort(x, axis=-1), x)
    many = [normal(2, seed=seed) for seed in range(29)]
    with pytest.raises(TooLarge, match="30 arrays"):
        program_of(lambda *arrays: sum(arrays[1:], arrays[0]), *many)


def test_threadgroup_memory_is_used_again():
    def chain(x):
        for _ in range(5):
            x = x + mx.argsort(x, axis=-1).astype(mx.float32)
        return x

    x = normal(1, 1024)
    program = program_of(chain, x)
    assert len(re.findall(r"^threadgroup \w+ s\d", program.definition.source, re.M)) < 10
    agree(program(x)[0], chain(x))


def test_threads_follow_from_sizes():
    assert program_of(lambda x: x + 1, normal(20)).threads == 32
    assert program_of(lambda x: x + 1, normal(100)).threads == 128
    assert program_of(lambda x: x + 1, normal(10_000)).threads == 512


def test_a_norm_waits_once_and_loads_its_weight_before():
    weight = normal(2048, seed=1)
    x = normal(1, 2048)
    out, w, value = (Value(s, mx.float32) for s in ((1, 2048), (2048,), (1, 2048)))
    norm = Node("RMSNorm", (value, w), (out,), (1e-6,))
    program = tiny_program([norm], [value], [out], {w: weight})
    before, after = program.definition.source.split("threadgroup_barrier(")
    assert "a1[" in before
    assert "a1[" not in after
    agree(program(x)[0], mx.fast.rms_norm(x, weight, 1e-6), 1e-6)


def evaluated(index, thread):
    text = re.sub(r"\b(\d+)u\b", r"\1", index.text).replace("/", "//")
    return eval(text, {}, {"t": thread})


def test_index_arithmetic_against_numbers():
    chosen = random.Random(0)
    for _ in range(300):
        shape = [chosen.choice([1, 2, 3, 4, 6]) for _ in range(3)]
        size = shape[0] * shape[1] * shape[2]
        order = chosen.choice(list(itertools.permutations(range(3))))
        at = unravel(variable("t", size), shape)
        turned = ravel([at[a] for a in order], [shape[a] for a in order])
        flat = unravel(turned, [size // shape[0], shape[0]])
        expected = mx.arange(size).reshape([shape[a] for a in order])
        back = mx.transpose(expected, [order.index(a) for a in range(3)]).reshape(-1).tolist()
        for thread in range(size):
            assert evaluated(turned, thread) == back[thread]
            assert evaluated(flat[0], thread) == back[thread] // shape[0]
            assert evaluated(flat[1], thread) == back[thread] % shape[0]


def test_a_reshape_there_and_back_is_nothing():
    position = variable("t", 24)
    assert ravel(unravel(position, (2, 3, 4)), (2, 3, 4)) == position
    assert unravel(ravel(unravel(position, (2, 12)), (2, 12)), (24,)) == (position,)
