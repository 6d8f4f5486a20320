"""Products on tensor cores: the text for CUDA, run on the CPU, against references."""

from __future__ import annotations

import sys

import mlx.core as mx
import pytest
from cuda_block import Block
from kernels.test_vector_products import agree, exact, float64, near, normal, weight
from precompiled import COMPILER

from zmlx.kernels.vectors import (
    Weight,
    expert_combination,
    expert_gated_product,
    expert_products,
    gated_product,
    plain,
    products,
    tensor_cores,
)

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="no g++ with its sanitizers"
)
#: float32 rounding of a sum, relative to the sum of its terms' sizes
ROUNDING = 1e-7
#: packing, columns (no multiple of a chunk's), vectors, dtype
FORMS = [
    (("affine", 64, 4), 320, 1, mx.bfloat16),
    (("affine", 32, 4), 288, 2, mx.float16),
    (("affine", 128, 4), 384, 3, mx.bfloat16),
    (("affine", 64, 4), 256, 8, mx.bfloat16),
    (("affine", 32, 4), 224, 7, mx.bfloat16),
    (("affine", 64, 8), 192, 8, mx.bfloat16),
    (("affine", 32, 8), 224, 5, mx.bfloat16),
    (("affine", 128, 8), 384, 2, mx.float16),
    (("mxfp4", 32, 4), 352, 1, mx.bfloat16),
    (("mxfp4", 32, 4), 320, 4, mx.float16),
    (("nvfp4", 16, 4), 416, 3, mx.bfloat16),
    (("nvfp4", 16, 4), 160, 1, mx.float16),
    (("mxfp8", 32, 8), 160, 2, mx.bfloat16),
    (("mxfp8", 32, 8), 96, 1, mx.float16),
    (("dense", 0, 0), 200, 4, mx.bfloat16),
    (("dense", 0, 0), 72, 1, mx.float16),
]
INDICES = mx.array([[4, 0, 3], [1, 1, 2]], mx.uint32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def block(folder):
    return Block(folder)


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: "-".join(map(str, (*f[0], f[1], f[2], str(f[3])[9:])))
)
def test_errors_are_those_of_float32(form, block):
    packing, columns, tokens, dtype = form
    x, w = normal(tokens, columns, dtype=dtype), weight(37, columns, packing=packing, dtype=dtype)
    [y] = products(x, [w], compile=block)
    truth, sizes = exact(x, w)
    assert (y.dtype, len(block.seen)) == (dtype, 1)
    with mx.stream(mx.cpu):
        best = mx.abs(truth.astype(dtype).astype(mx.float64) - truth)
        assert mx.all(mx.abs(float64(y) - truth) <= best + ROUNDING * sizes).item()


@pytest.mark.parametrize("tokens", [1, 9])
def test_several_weights_share_a_launch_and_a_norm(tokens, block):
    x, norm = normal(tokens, 2048), 1 + normal(2048, seed=2) / 4
    weights = [weight(rows, 2048, seed=rows, bias=True) for rows in (37, 9, 21, 16)]
    found = products(x, weights, norm=norm, eps=0.5, compile=block)
    assert len(block.seen) == 1
    for y, w in zip(found, weights, strict=True):
        agree(y, plain.product(plain.wide, x, w, None, norm, 0.5), norm=norm)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_norm_is_stocks_to_the_last_bit(dtype, block):
    x, norm = normal(2, 256, dtype=dtype), 1 + normal(256, seed=2, dtype=dtype) / 4
    one = Weight(mx.eye(256, dtype=dtype), mode="dense", group_size=0, bits=0)
    [y] = products(x, [one], norm=norm, compile=block)
    stock = mx.fast.rms_norm(x, norm, 1e-6)
    assert mx.sum(y != stock).item() <= 2  # a sum in another order moves a tie
    agree(y, stock)


def test_what_is_added_is_rounded_as_stock_does(block):
    x, w, residual = normal(3, 256), weight(21, 256, bias=True), normal(3, 21, seed=3)
    [y] = products(x, [w], residual=residual, compile=block)
    [product] = products(x, [w], compile=block)
    assert mx.array_equal(y, residual + product).item()
    [wide] = products(x, [w], residual=residual.astype(mx.float32), compile=block)
    assert wide.dtype == mx.float32
    assert mx.array_equal(wide, residual.astype(mx.float32) + product).item()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "clipped_swiglu"])
def test_activations(activation, block):
    gated = activation != "relu2"
    x = 2 * normal(2 if gated else 5, 256)
    gate, up = (weight(19, 256, seed=s, bias=s == 3) for s in (3, 4))
    y = gated_product(x, gate if gated else None, up, activation, compile=block)
    agree(y, plain.gated(plain.wide, x, gate if gated else None, up, activation), 1e-5)
    assert len(block.seen) == 1


def test_scales_of_another_dtype(block):
    x, w = normal(2, 320), weight(19, 320, dtype=mx.float32, bias=True)
    [y] = products(x, [w], compile=block)
    assert y.dtype == mx.float32
    agree(y, plain.product(plain.wide, x, w))


#: warps, split, depth, turns, blocks and rounds of 19 tiles; 768 columns are 6 chunks
LAYOUTS = [(8, 2, 2, 2, 2, 3), (8, 1, 2, 3, 3, 1), (8, 8, 1, 1, 5, 4), (16, 4, 2, 1, 1, 5)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_are_dealt_out(layout, block, monkeypatch):
    """Several sets of warps, turns and rounds, with ends that are odd."""
    monkeypatch.setattr(tensor_cores, "layout_of", lambda *_: tensor_cores.Layout(*layout))
    x, norm = normal(2, 768), 1 + normal(768, seed=2) / 4
    gate, up = weight(301, 768), weight(301, 768, seed=2)
    y = gated_product(x, gate, up, "silu", norm=norm, compile=block)
    agree(y, plain.gated(plain.wide, x, gate, up, "silu", None, norm), norm=norm)
    residual = normal(2, 301, seed=3)
    [y] = products(x, [up], residual=residual, compile=block)
    agree(y, plain.product(plain.wide, x, up, None, None, 1e-6, residual))


def test_addresses_that_are_no_multiple_of_16_bytes(folder):
    x, w, norm = normal(2, 320), weight(19, 320), 1 + normal(320, seed=2) / 4
    truth = plain.product(plain.wide, x, w, None, norm)
    agree(products(x, [w], norm=norm, compile=Block(folder, ["x", "norm"]))[0], truth, norm=norm)
    h, down = normal(2, 3, 320), weight(5, 19, 320)
    scores = normal(2, 3, seed=3)
    y = expert_combination(h, INDICES, scores, down, compile=Block(folder, ["h"]))
    near(y, plain.combination(plain.wide, h, INDICES, scores, down), 2e-6)


EXPERTS = [("affine", 64, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("dense", 0, 0)]


@pytest.mark.parametrize("packing", EXPERTS, ids=lambda p: "-".join(map(str, p)))
def test_experts(packing, block):
    small = packing[0] == "mxfp4"
    gate, up = (weight(5, 19, 768, packing=packing, seed=s, bias=small) for s in (7, 8))
    x, norm = normal(2, 768), 1 + normal(768, seed=2) / 4
    activation = "clipped_swiglu" if small else "silu"
    y = expert_gated_product(x, INDICES, gate, up, activation, norm=norm, compile=block)
    truth = plain.gated(plain.wide, x[:, None], gate, up, activation, INDICES, norm)
    agree(y, truth, 1e-5, norm=norm)
    h = normal(2, 3, 768, seed=4)
    agree(expert_products(h, INDICES, up, compile=block), plain.product(plain.wide, h, up, INDICES))
    y = expert_products(x, INDICES, up, compile=block)
    agree(y, plain.product(plain.wide, x[:, None], up, INDICES))
    scores = mx.softmax(normal(2, 3, seed=5, dtype=mx.float32), axis=-1)
    y = expert_combination(h, INDICES, scores, up, compile=block)
    assert y.dtype == mx.float32
    near(y, plain.combination(plain.wide, h, INDICES, scores, up), 2e-6)
    assert len(block.seen) == 4


@pytest.mark.parametrize("chosen", [1, 8, 10])
def test_what_is_added_to_a_combination_is_rounded_as_stock_does(chosen, block):
    down, h = weight(12, 19, 320, bias=True), normal(2, chosen, 320)
    indices = mx.random.randint(0, 12, (2, chosen), key=mx.random.key(3)).astype(mx.int32)
    scores, shared, residual = (normal(2, n, seed=n) for n in (chosen, 19, 19))
    plainly = expert_combination(h, indices, scores, down, compile=block)
    near(plainly, plain.combination(plain.wide, h, indices, scores, down), 2e-2)
    y = expert_combination(
        h, indices, scores, down, shared=shared, residual=residual, dtype=mx.float16, compile=block
    )
    assert mx.array_equal(y, (plainly.astype(mx.float16) + shared) + residual).item()


def test_closer_to_the_truth_than_stock(block):
    """Contract tighter: rows of 2,048, which stock sums in bfloat16 on some GPUs."""
    x, w = normal(1, 2048), weight(64, 2048)
    truth, _ = exact(x, w)
    [found], stock = products(x, [w], compile=block), plain.stock(x, w)
    with mx.stream(mx.cpu):
        ours, theirs = (mx.max(mx.abs(float64(y) - truth)).item() for y in (found, stock))
        best = mx.max(mx.abs(float64(truth.astype(mx.bfloat16)) - truth)).item()
    assert ours <= max(theirs, best * (1 + 1e-3))


def test_what_tensor_cores_do_not_take():
    def taken(x, w, **options):
        seen = []

        def compile(definition):
            seen.append(definition)
            return lambda output_shapes, output_dtypes, **_: [
                mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]

        products(x, [w], compile=compile, **options)
        return seen[0].cuda is not None

    x = normal(1, 256)
    assert taken(x, weight(19, 256))
    assert not taken(x.astype(mx.float32), weight(19, 256, dtype=mx.float32))
    assert not taken(x, weight(19, 256, packing=("affine", 64, 3)))
    assert not taken(x, weight(19, 256, packing=("dense", 0, 0), dtype=mx.float32))
    assert not taken(normal(1, 100), weight(19, 100, packing=("dense", 0, 0)))
    assert not taken(normal(1, 28672), weight(19, 28672))  # more than a block's shared memory
    assert taken(normal(8, 14336), weight(19, 14336))  # several launches
