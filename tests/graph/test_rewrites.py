"""Rewrites on small graphs: what they fuse computes the same; what only looks alike stays."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest

from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import run
from zmlx.graph.rewrite.clusters import fold_constants, fuse_small
from zmlx.graph.rewrite.experts import fuse_experts
from zmlx.graph.rewrite.gates import gated
from zmlx.graph.rewrite.products import MOST_WEIGHTS, fuse_products
from zmlx.graph.rewrite.shapes import settled
from zmlx.graph.rewriting import taken_over
from zmlx.graph.same import difference
from zmlx.graph.trace import trace

WIDTH, ROWS = 64, 96
EXPERTS, CHOSEN = 8, 2


def normal(*shape, seed=0, dtype=mx.float32):
    array = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(array)
    return array


def quantized(*shape, seed=1):
    weight = normal(*shape, seed=seed) / shape[-1] ** 0.5
    packed = mx.quantize(weight, group_size=32, bits=4)
    mx.eval(packed)
    return packed


def product(x, weight, **options):
    return mx.quantized_matmul(x, *weight, transpose=True, group_size=32, bits=4, **options)


def operations(graph):
    return Counter(node.op for node in graph.nodes)


def fused(rewrite, function, *arrays):
    """Return the operations of a rewritten graph, after it gave what the function does."""
    graph = trace(function, *arrays)
    rewritten = rewrite(graph)
    for number, form in enumerate((graph, settled(rewritten))):
        truth = function(*arrays)
        truth = [truth] if isinstance(truth, mx.array) else truth
        for a, b in zip(run(form, arrays), truth, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), number
            assert mx.allclose(a, b, rtol=2e-4, atol=2e-4), (number, mx.abs(a - b).max())
    return operations(rewritten)


def computed(array):
    """Return an array that a trace takes for a constant."""
    mx.eval(array)
    return array


X = normal(1, 1, WIDTH, seed=9)
WEIGHTS = [quantized(ROWS, WIDTH, seed=seed) for seed in range(5)]
DENSE = computed(normal(ROWS, WIDTH, seed=7) / 8)
NORM = computed(1 + normal(WIDTH, seed=8) / 4)
BIAS = normal(ROWS, seed=11)
BACK = quantized(WIDTH, ROWS, seed=12)
SQUARE = computed(DENSE[:WIDTH])


# ---- products ------------------------------------------------------------------------------------


def test_products_of_one_x_are_together():
    found = fused(fuse_products, lambda x: [product(x, w) for w in WEIGHTS[:3]], X)
    assert found == {"FusedProducts": 1}
    found = fused(fuse_products, lambda x: [product(x, w) for w in WEIGHTS], X)
    assert found == {"FusedProducts": -(-len(WEIGHTS) // MOST_WEIGHTS)}


def test_a_norm_goes_into_the_product():
    found = fused(fuse_products, lambda x: product(mx.fast.rms_norm(x, NORM, 1e-5), WEIGHTS[0]), X)
    assert found == {"FusedProducts": 1}


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: mx.fast.rms_norm(x, None, 1e-5),
        lambda x: mx.fast.rms_norm(x, NORM + 1, 1e-5),
        lambda x: mx.fast.layer_norm(x, NORM, None, 1e-5),
        lambda x: mx.fast.rms_norm(x.reshape(1, 2, 32), NORM[:32], 1e-5).reshape(1, 1, WIDTH),
    ],
    ids=["no weight", "a weight that is computed", "LayerNorm", "of heads"],
)
def test_other_norms_stay(norm):
    found = fused(fuse_products, lambda x: product(norm(x), WEIGHTS[0]), X)
    assert found["FusedProducts"] == 1
    assert found["RMSNorm"] + found["LayerNorm"] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: product(x, WEIGHTS[0]) + BIAS,
        lambda x: BIAS + product(x, WEIGHTS[0]),
        lambda x: (x @ DENSE.T) + BIAS,
        lambda x: mx.addmm(BIAS, x, DENSE.T),
        lambda x: mx.addmm(BIAS, x.squeeze(0), DENSE.T),
        lambda x: x @ DENSE.T,
    ],
)
def test_biases_go_into_the_product(function):
    views = {"Squeeze", "Reshape", "Flatten", "Unflatten", "Gather"}
    assert set(fused(fuse_products, function, X)) - views == {"FusedProducts"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: mx.addmm(BIAS, x, DENSE.T, alpha=2.0),
        lambda x: mx.addmm(BIAS, x, DENSE.T, beta=0.5),
        lambda x: mx.addmm(x[..., :1] * BIAS, x, DENSE.T),
        lambda x: x[0] @ mx.concatenate([DENSE, DENSE]).T,
        lambda x: x @ (DENSE * 1).T,
        lambda x: mx.quantized_matmul(x, *BACK, transpose=False, group_size=32, bits=4),
        lambda x: x @ SQUARE,
        lambda x: (x + mx.zeros((3, 1, 1))) @ DENSE.T,
    ],
    ids=[
        "alpha",
        "beta",
        "a bias that is computed",
        "joined weights",
        "weights that are computed",
        "not transposed",
        "not transposed, dense",
        "three rows",
    ],
)
def test_other_products_stay(function):
    assert not any(op.startswith("Fused") for op in fused(fuse_products, function, X))


def test_weights_that_are_given_are_no_constants():
    found = fused(fuse_products, lambda x, w: x @ w.T, X, DENSE)
    assert "FusedProducts" not in found


def test_a_reshaped_weight_is_not_the_weight():
    """The rows of a weight that was made of another one are not that one's."""
    packed, scales, biases = quantized(2 * ROWS, WIDTH)

    def function(x):
        parts = [a.reshape(2, ROWS, -1) for a in (packed, scales, biases)]
        return mx.quantized_matmul(
            mx.broadcast_to(x[None], (1, 2, 1, WIDTH)), *parts, group_size=32, bits=4
        )

    assert not any(op.startswith("Fused") for op in fused(fuse_products, function, X))
    turned = computed(mx.contiguous(DENSE.reshape(2, ROWS // 2, WIDTH)) * 1)
    found = fused(fuse_products, lambda x: x @ turned.reshape(ROWS, WIDTH).T, X)
    assert "FusedProducts" not in found


def test_a_weight_for_each_head():
    weight = quantized(4, ROWS, WIDTH)
    found = fused(fuse_products, lambda x: product(x, weight), normal(1, 4, 1, WIDTH))
    assert found == {"FusedHeadProducts": 1}
    # One row for all heads is repeated for each.
    found = fused(fuse_products, lambda x: product(x, weight), X[None])
    assert found == {"Broadcast": 1, "FusedHeadProducts": 1}
    # Two rows for each are not.
    found = fused(fuse_products, lambda x: product(x, weight), normal(1, 4, 2, WIDTH))
    assert "FusedHeadProducts" not in found


def test_a_residual_goes_into_the_product():
    residual = normal(1, 1, ROWS)
    found = fused(fuse_products, lambda x, r: r + product(x, WEIGHTS[0]), X, residual)
    assert found == {"FusedProducts": 1}
    found = fused(fuse_products, lambda x, r: product(x, WEIGHTS[0]) + BIAS + r, X, residual)
    assert found == {"FusedProducts": 1}


@pytest.mark.parametrize(
    ("function", "additions"),
    [
        (lambda x, r: (y := product(x, WEIGHTS[0])) + mx.sin(y), 1),  # depends on the product
        (lambda x, r: [y := product(x, WEIGHTS[0]), y + r], 1),  # the product is returned
        (lambda x, r: [(y := product(x, WEIGHTS[0])) + r, y * r], 1),  # is read twice
        (lambda x, r: product(x, WEIGHTS[0]) + 1e-3, 1),  # a number
        (lambda x, r: product(x, WEIGHTS[0]) + r[..., :1], 0),  # a residual as any other
        (lambda x, r: product(x, WEIGHTS[0]) + mx.broadcast_to(r, (2, 1, ROWS)), 1),
        (lambda x, r: product(x, WEIGHTS[0]) + product(x, WEIGHTS[1]), 1),
        (lambda x, r: product(x, WEIGHTS[0]) - r, 0),
    ],
)
def test_other_additions_stay(function, additions):
    found = fused(fuse_products, function, X, normal(1, 1, ROWS))
    assert found["FusedProducts"] == 1
    assert found["Add"] == additions


def test_both_sides_of_an_addition_are_products_with_biases():
    def function(x):
        return (product(x, WEIGHTS[0]) + BIAS) + (product(x * 2, WEIGHTS[1]) + BIAS)

    found = fused(fuse_products, function, X)
    assert found["FusedProducts"] + found["QuantizedMatmul"] == 2


def test_products_of_other_dtypes():
    half = X.astype(mx.float16)
    dense = DENSE.astype(mx.float16)
    found = fused(
        fuse_products, lambda x: [x @ dense.T, (x @ dense.T + BIAS), product(x, WEIGHTS[0])], half
    )
    assert found["FusedProducts"] >= 1
    assert found["Add"] == 1  # a bias of float32 changes the dtype


# ---- gates ---------------------------------------------------------------------------------------


def mlp(activation):
    return lambda x: product(activation(product(x, WEIGHTS[0]), product(x, WEIGHTS[1])), BACK)


def clipped(limit=7.0, alpha=1.702, low=None):
    def activation(g, u):
        g = mx.minimum(g, limit)
        u = mx.clip(u, -limit if low is None else low, limit)
        return g * mx.sigmoid(alpha * g) * (u + 1)

    return activation


RIGHT = {
    "silu": lambda g, u: nn.silu(g) * u,
    "silu, turned": lambda g, u: u * (g * mx.sigmoid(g)),
    "silu by exp": lambda g, u: g * u * mx.sigmoid(g),
    "gelu": lambda g, u: nn.gelu(g) * u,
    "gelu_tanh": lambda g, u: nn.gelu_approx(g) * u,
    "clipped_swiglu": clipped(),
    "silu of the other one": lambda g, u: nn.silu(u) * g,
    "reshaped": lambda g, u: (nn.silu(g.reshape(ROWS)) * u.reshape(ROWS)).reshape(1, 1, ROWS),
}


@pytest.mark.parametrize("name", RIGHT)
def test_known_activations_are_found(name):
    found = fused(fuse_products, mlp(RIGHT[name]), X)
    assert not set(found) - {"FusedGatedProduct", "FusedProducts", "Reshape"}, found
    assert found["FusedGatedProduct"] == found["FusedProducts"] == 1


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "clipped_swiglu"])
def test_known_activations_in_sixteen_bits(name):
    weights = [[a.astype(mx.bfloat16) if a.dtype == mx.float32 else a for a in w] for w in WEIGHTS]

    def function(x):
        return RIGHT[name](product(x, weights[0]), product(x, weights[1]))

    graph = trace(
        lambda x: function(x) @ DENSE[:, :ROWS].astype(mx.bfloat16), X.astype(mx.bfloat16)
    )
    products = [node.outputs[0] for node in graph.nodes if node.op == "QuantizedMatmul"]
    result = next(node.inputs[0] for node in graph.nodes if node.op == "Matmul")
    found = gated(graph, result, products)
    assert found is not None
    assert found.activation == name


ALIKE = {
    "gelu_fast": lambda g, u: nn.gelu_fast_approx(g) * u,
    "half of it": lambda g, u: nn.silu(g) * u * 0.5,
    "a little more": lambda g, u: nn.silu(g * 1.001) * u,
    "scaled": lambda g, u: nn.silu(g) * (u + 1e-3),
    "of itself": lambda g, u: nn.silu(g) * g,
    "cut above": lambda g, u: nn.silu(mx.minimum(g, 500.0)) * u,
    "cut below": lambda g, u: nn.silu(mx.maximum(g, -500.0)) * u,
    "chosen": lambda g, u: mx.where(g > 500, 0.0, nn.silu(g)) * u,
    "another limit": clipped(limit=7.01),
    "another alpha": clipped(alpha=1.7),
    "not symmetric": clipped(low=-6.0),
    "mish": lambda g, u: nn.mish(g) * u,
    "relu": lambda g, u: nn.relu(g) * u,
    "tanh": lambda g, u: mx.tanh(g) * u,
    "sigmoid": lambda g, u: mx.sigmoid(g) * u,
    "erf": lambda g, u: mx.erf(g) * u,
    "another cubic": lambda g, u: 0.5 * g * (1 + mx.tanh(0.79788 * (g + 0.0446 * g**3))) * u,
    "reversed": lambda g, u: nn.silu(g) * u[..., ::-1],
    "scaled by a vector": lambda g, u: nn.silu(g) * u * BIAS,
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_looks_like_an_activation_stays(name):
    found = fused(fuse_products, mlp(ALIKE[name]), X)
    assert "FusedGatedProduct" not in found
    assert found["FusedProducts"] == 2  # gate and up together, and down


@pytest.mark.parametrize(
    "function",
    [lambda y: nn.relu2(y), lambda y: mx.maximum(y, 0) ** 2, lambda y: nn.relu(y) * nn.relu(y)],
)
def test_squared_relu_is_known(function):
    graph = trace(lambda x: product(function(product(x, WEIGHTS[0])), BACK), X)
    products = [node.outputs[0] for node in graph.nodes if node.op == "QuantizedMatmul"]
    found = gated(graph, graph.producers[products[1]].inputs[0], products)
    assert found is not None
    assert (found.activation, found.gate, found.up) == ("relu2", None, products[0])


@pytest.mark.parametrize(
    "function",
    [nn.relu, nn.relu6, lambda y: mx.square(y), lambda y: mx.minimum(nn.relu(y), 500) ** 2],
)
def test_other_rectifiers_stay(function):
    graph = trace(lambda x: product(function(product(x, WEIGHTS[0])), BACK), X)
    products = [node.outputs[0] for node in graph.nodes if node.op == "QuantizedMatmul"]
    assert gated(graph, graph.producers[products[1]].inputs[0], products) is None


def test_products_inside_of_a_gate_that_are_returned():
    def function(x):
        g, u = product(x, WEIGHTS[0]), product(x, WEIGHTS[1])
        h = nn.silu(g) * u
        return [product(h, BACK), g, h]

    found = fused(fuse_products, function, X)
    assert found["FusedGatedProduct"] == 1
    assert found["QuantizedMatmul"] == 1


def test_a_gate_of_products_of_two_inputs_stays():
    def function(x, y):
        return product(nn.silu(product(x, WEIGHTS[0])) * product(y, WEIGHTS[1]), BACK)

    assert "FusedGatedProduct" not in fused(fuse_products, function, X, X * 2)


# ---- experts -------------------------------------------------------------------------------------

GATE, UP, OTHER = (quantized(EXPERTS, ROWS, WIDTH, seed=s) for s in (21, 22, 23))
DOWN = quantized(EXPERTS, WIDTH, ROWS, seed=24)
INDICES = mx.array([[[5, 2]]], mx.uint32)
SCORES = mx.array([[[0.7, 0.3]]])


def gathered(x, weight, indices):
    return mx.gather_qmm(x, *weight, rhs_indices=indices, transpose=True, group_size=32, bits=4)


def switch(x, indices, activation=lambda g, u: nn.silu(g) * u, others=None):
    x = mx.expand_dims(x, (-2, -3))
    up, gate = gathered(x, UP, indices), gathered(x, GATE, indices if others is None else others)
    return gathered(activation(gate, up), DOWN, indices).squeeze(-2)


def combined(y, scores):
    return (y * scores[..., None]).sum(axis=-2)


def test_experts_are_two_kernels():
    found = fused(fuse_experts, lambda x, i, s: combined(switch(x, i), s), X, INDICES, SCORES)
    assert found["FusedExpertGatedProduct"] == found["FusedExpertCombination"] == 1
    assert "GatherQMM" not in found
    assert "Reduce" not in found


def test_shared_experts_and_residual_are_added_in_the_second():
    def function(x, i, s, r):
        shared = product(nn.silu(product(x, WEIGHTS[0])) * product(x, WEIGHTS[1]), BACK)
        return r + (combined(switch(x, i), s) + shared)

    found = fused(
        lambda g: fuse_products(fuse_experts(g)), function, X, INDICES, SCORES, normal(1, 1, WIDTH)
    )
    assert "Add" not in found
    assert found["FusedExpertCombination"] == found["FusedProducts"] == 1


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda y, s: (y * s[..., None]).sum(axis=-1), "FusedExpertProducts"),
        (lambda y, s: (y * s[..., None]).max(axis=-2), "FusedExpertProducts"),
        (lambda y, s: (y * y[..., :1]).sum(axis=-2), "FusedExpertProducts"),
        (lambda y, s: [y, combined(y, s)], "FusedExpertProducts"),
        (lambda y, s: (y * mx.broadcast_to(s[..., :1, None], y.shape)).sum(axis=-2), None),
        (
            lambda y, s: (y * s.swapaxes(-1, -2)[..., :1]).sum(axis=-2),
            "FusedExpertProducts",
        ),
        (
            lambda y, s: (y.reshape(1, 4, 2, 16) * s[..., None]).sum(axis=-2),
            "FusedExpertProducts",
        ),
    ],
    ids=["rows", "max", "itself", "returned", "one score", "turned", "reshaped"],
)
def test_other_sums_over_experts_stay(function, kept):
    found = fused(
        fuse_experts,
        lambda x, i, s: function(switch(x, i)[0], s[0]),
        X,
        INDICES,
        SCORES,
    )
    assert "FusedExpertCombination" not in found
    assert kept is None or kept in found


def test_gate_and_up_of_other_experts_stay():
    found = fused(
        fuse_experts, lambda x, i, j: switch(x, i, others=j), X, INDICES, INDICES[..., ::-1]
    )
    assert "FusedExpertGatedProduct" not in found


def test_an_unknown_activation_of_experts_stays():
    found = fused(fuse_experts, lambda x, i: switch(x, i, lambda g, u: mx.tanh(g) * u), X, INDICES)
    assert "FusedExpertGatedProduct" not in found
    assert found["FusedExpertProducts"] == 1


def test_rows_that_experts_take_in_another_order_stay():
    turned = mx.array([[[1, 0]]], mx.uint32)

    def function(h, i):
        return mx.gather_qmm(
            h, *DOWN, lhs_indices=turned, rhs_indices=i, transpose=True, group_size=32, bits=4
        )

    found = fused(fuse_experts, function, normal(1, 1, CHOSEN, 1, ROWS), INDICES)
    assert "GatherQMM" in found


@pytest.mark.parametrize("own", [True, False])
def test_biases_of_experts(own):
    bias = normal(EXPERTS, WIDTH)

    def function(h, i, j):
        return gathered(h, DOWN, i) + mx.expand_dims(bias[i if own else j], -2)

    found = fused(
        fuse_experts, function, normal(1, 1, CHOSEN, 1, ROWS), INDICES, INDICES[..., ::-1]
    )
    assert found["Add"] == (0 if own else 1)


# ---- what is left --------------------------------------------------------------------------------


def test_small_operations_are_together():
    def function(x):
        y = mx.softmax(x * 2, axis=-1)
        return y / y.sum(axis=-1, keepdims=True)

    assert fused(fuse_small, function, X) == {"FusedSmall": 1}


def test_small_operations_on_both_sides_of_a_large_one_stay_apart():
    big = normal(2048, 2048)

    def function(x):
        before = mx.exp(x * 0.1) + 1
        after = big @ before.reshape(-1, 1)
        return mx.tanh(after[:1] * 0.01) * before.sum() + before.max()

    found = fused(fuse_small, function, normal(1, 2048))
    assert found["FusedSmall"] <= 2
    assert found["Matmul"] == 1


def test_outputs_inside_of_small_operations_are_made():
    def function(x):
        y = x + 1
        z = y * 2
        return [y, mx.exp(z), z]

    assert fused(fuse_small, function, X) == {"FusedSmall": 1}


def test_operations_that_share_nothing_are_one_kernel():
    found = fused(fuse_small, lambda x, y: [mx.exp(x), mx.tanh(y)], X, normal(1, 7, seed=3))
    assert found == {"FusedSmall": 1}


def test_one_operation_stays_what_it_is():
    assert fused(fuse_small, lambda x: mx.exp(x), X) == {"Exp": 1}


def test_one_operation_between_kernels_becomes_one():
    """Else a recording would end there."""

    def function(x):
        y, gate = product(x, WEIGHTS[0]), product(x, WEIGHTS[1])
        return product(y * gate, BACK)

    assert fused(lambda g: fuse_small(fuse_products(g)), function, X) == {
        "FusedProducts": 2,
        "FusedSmall": 1,
    }

    def at_the_end(x):
        return product(x, WEIGHTS[0]) * product(x, WEIGHTS[1])

    found = fused(lambda g: fuse_small(fuse_products(g)), at_the_end, X)
    assert found == {"FusedProducts": 1, "Multiply": 1}


def test_constants_are_folded():
    graph = fold_constants(trace(lambda x: x * (NORM + 1) + mx.arange(WIDTH) * 2, X))
    assert operations(graph) == {"Multiply": 1, "Add": 1}
    assert mx.allclose(run(graph, [X])[0], X * (NORM + 1) + mx.arange(WIDTH) * 2)


def test_large_constants_are_not_folded():
    large = normal(512, 512)
    graph = fold_constants(trace(lambda x: x + (large * 2)[0, :1], X))
    assert operations(graph)["Multiply"] == 1


def test_nodes_that_are_taken_over():
    a, b, c = (Value((1,), mx.float32) for _ in range(3))
    graph = Graph((a,), (c,), {}, (Node("Exp", (a,), (b,)), Node("Exp", (b,), (c,))))
    shorter = taken_over(graph, [Node("Abs", (a,), (c,))])
    assert [node.op for node in shorter.nodes] == ["Abs"]


# ---- the same function ---------------------------------------------------------------------------


def test_traces_of_one_function_are_the_same():
    function = mlp(RIGHT["silu"])
    assert difference(trace(function, X), trace(function, X)) is None


TABLE = normal(10, WIDTH, seed=31)


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (lambda x: x + 1, lambda x: x + 2, "a constant 1.0 is 2.0"),
        (lambda x: x + TABLE[3], lambda x: x + TABLE[4], "Gather: a constant 3 is 4"),
        (lambda x: x + 1, lambda x: x - 1, "Add() is Subtract()"),
        (lambda x: x[..., :3], lambda x: x[..., :4], "Slice"),
        (lambda x: x.sum(), lambda x: x.max(), "Reduce"),
        (lambda x: mx.exp(mx.exp(x)), lambda x: mx.exp(x), "2 operations are 1"),
        (lambda x: [x, x], lambda x: x, "other inputs or outputs"),
        (lambda x: [mx.exp(x), mx.sin(x)], lambda x: [mx.sin(x), mx.exp(x)], "is"),
    ],
)
def test_traces_of_other_functions_are_not(one, other, text):
    unlike = difference(trace(one, X), trace(other, X))
    assert unlike is not None
    assert text in unlike


def test_a_row_of_a_table_is_not_a_weight():
    """As large as a norm's weight, but another one at each position."""
    rows = [mx.array(row) for row in TABLE.tolist()]
    one, other = (trace(lambda x, row=row: x + row, X) for row in rows[:2])
    assert difference(one, other) == f"Broadcast: a constant of ({WIDTH},) is of ({WIDTH},)"
    copied = trace(lambda x: x + mx.array(TABLE.tolist()[0]), X)
    assert difference(one, copied) is None


def test_the_same_values_that_are_returned_in_another_order():
    graph = trace(lambda x: [mx.exp(x), mx.sin(x)], X)
    turned = Graph(graph.inputs, graph.outputs[::-1], graph.constants, graph.nodes)
    assert difference(graph, turned) == "it returns another value"
