"""Products of few vectors on GPUs' sources: every packing, any number of rows, what is refused."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend import current
from zmlx.kernels.vectors import (
    Weight,
    expert_combination,
    expert_gated_product,
    expert_products,
    gated_product,
    plain,
    products,
    tiling,
)
from zmlx.kernels.vectors.linear import _tiling, compiler

GROUPS, BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
AFFINE = [("affine", group_size, bits) for group_size in GROUPS for bits in BITS]
PACKINGS = [*AFFINE, ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8), ("dense", 0, 0)]
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
#: float32 rounding of a sum, relative to the sum of its terms' sizes
ROUNDING = 1e-7


@pytest.fixture(autouse=True)
def from_source(monkeypatch):
    """On the CPU, run sources in the emulator; on a GPU they run anyway."""
    if current() == "cpu":
        monkeypatch.setenv("ZMLX_BACKEND", "emulator")


def normal(*shape, seed=1, dtype=mx.bfloat16):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def weight(*shape, packing=("affine", 64, 4), dtype=mx.bfloat16, seed=1, bias=False):
    mode, group_size, bits = packing
    values = normal(*shape, seed=seed, dtype=mx.float32)
    more = normal(*shape[:-1], seed=seed + 50, dtype=dtype) if bias else None
    if mode == "dense":
        return Weight(values.astype(dtype), bias=more, mode=mode, group_size=0, bits=0)
    w, scales, *rest = mx.quantize(values, group_size, bits, mode)
    if not rest:
        return Weight(w, scales, None, more, mode, group_size, bits)
    return Weight(w, scales.astype(dtype), rest[0].astype(dtype), more, mode, group_size, bits)


def float64(array):
    return array.astype(mx.float64)


def exact(x, w):
    """Return the product without its bias in float64, and the sum of the sizes of its terms."""
    with mx.stream(mx.cpu):
        one = Weight(w.w, w.scales, w.biases, None, *w.packing)
        values = plain.wide(mx.eye(w.columns).astype(mx.float64), one)
        return float64(x) @ values, mx.abs(float64(x)) @ mx.abs(values)


def near(found, truth, allowed):
    """Within rounding once, and `allowed` of the largest element for sums in float32."""
    assert found.shape == truth.shape
    with mx.stream(mx.cpu):
        truth = truth.astype(mx.float64)
        best = mx.abs(truth.astype(found.dtype).astype(mx.float64) - truth)
        error = mx.abs(found.astype(mx.float64) - truth)
        limit = mx.max(best) + allowed * mx.max(mx.abs(truth))
        assert mx.all(error <= limit).item(), (mx.max(error).item(), limit.item())


def agree(found, truth, allowed=2e-6, norm=None):
    """Against a result that the reference rounded too: where that is a tie, one rounding apart.

    With a norm of 16 bits before it, also an element of that may be one rounding apart.
    """
    assert (found.shape, found.dtype) == (truth.shape, truth.dtype)
    step = {mx.float32: allowed, mx.bfloat16: 2**-7, mx.float16: 2**-10}[found.dtype]
    found, truth = found.astype(mx.float32), truth.astype(mx.float32)
    slack = 2e-6 if norm is None or norm.dtype == mx.float32 else 1e-3
    limit = step * mx.abs(truth) + slack * mx.max(mx.abs(truth))
    assert mx.all(mx.abs(found - truth) <= limit).item()


@pytest.fixture
def launched(monkeypatch):
    """Definitions that calls compile, with the arguments of their launches."""
    seen = []

    def compile(definition):
        inner = compiler()(definition)

        def launch(**given):
            seen.append((definition, given))
            return inner(**given, init_value=float("nan"))

        return launch

    compile.seen = seen
    return compile


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: "-".join(map(str, p)))
def test_errors_are_those_of_float32(packing, launched):
    for number, dtype in enumerate(FLOATS):
        x, w = normal(1 + number, 384, dtype=dtype), weight(19, 384, packing=packing, dtype=dtype)
        [y] = products(x, [w], compile=launched)
        truth, sizes = exact(x, w)
        assert y.dtype == dtype
        with mx.stream(mx.cpu):
            best = mx.abs(truth.astype(dtype).astype(mx.float64) - truth)
            error = mx.abs(float64(y) - truth)
            assert mx.all(error <= best + ROUNDING * sizes).item()
    assert len(launched.seen) == len(FLOATS)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
def test_several_weights_share_a_launch_and_a_norm(tokens, launched):
    x, norm = normal(tokens, 2048), 1 + normal(2048, seed=2) / 4
    weights = [weight(rows, 2048, seed=rows, bias=True) for rows in (37, 9, 21)]
    found = products(x, weights, norm=norm, eps=0.5, compile=launched)
    assert len(launched.seen) == 1
    for y, w in zip(found, weights, strict=True):
        agree(y, plain.product(plain.wide, x, w, None, norm, 0.5), norm=norm)


def test_a_residual_is_added_to_the_rounded_product(launched):
    x, w, residual = normal(3, 256), weight(21, 256, bias=True), normal(3, 21, seed=3)
    [y] = products(x, [w], residual=residual, compile=launched)
    [product] = products(x, [w])
    assert mx.array_equal(y, residual + product).item()
    [wide] = products(x, [w], residual=residual.astype(mx.float32))
    assert wide.dtype == mx.float32
    assert mx.array_equal(wide, residual.astype(mx.float32) + product).item()
    assert len(launched.seen) == 1


def test_the_norm_is_stocks_to_the_last_bit():
    """With a weight that is the identity the product is what came out of the norm."""
    x, norm = normal(2, 256, dtype=mx.bfloat16), 1 + normal(256, seed=2) / 4
    one = Weight(mx.eye(256, dtype=mx.bfloat16), mode="dense", group_size=0, bits=0)
    [y] = products(x, [one], norm=norm)
    stock = mx.fast.rms_norm(x, norm, 1e-6)
    differing = mx.sum(y != stock).item()
    assert differing <= 2  # a sum in another order moves a tie
    agree(y, stock)


def test_packings_that_differ_take_a_launch_each(launched):
    x, norm = normal(2, 4096), mx.ones(4096, mx.bfloat16)
    packings = (("affine", 64, 4), ("affine", 64, 6), ("affine", 64, 4), ("mxfp4", 32, 4))
    weights = [weight(17 + n, 4096, packing=p, seed=n) for n, p in enumerate(packings)]
    found = products(x, weights, norm=norm, compile=launched)
    assert len(launched.seen) == 3
    for y, w in zip(found, weights, strict=True):
        agree(y, plain.product(plain.wide, x, w, None, norm), norm=norm)


def test_weights_with_a_bias_and_without_take_a_launch_each(launched):
    """As where a layer computes attention and MLP of the same vector."""
    x = normal(1, 2048)
    weights = [weight(17 + n, 2048, seed=n, bias=n in (1, 3)) for n in range(4)]
    found = products(x, weights, compile=launched)
    assert len(launched.seen) == 2
    for y, w in zip(found, weights, strict=True):
        agree(y, plain.product(plain.wide, x, w))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    ("columns", "packing"),
    [
        (32, AFFINE[0]),
        (96, AFFINE[1]),
        (160, ("nvfp4", 16, 4)),
        (77, ("dense", 0, 0)),
        (1056, AFFINE[2]),
    ],
)
def test_columns_that_are_no_multiple_of_a_pass(columns, packing, dtype, launched):
    x, w = normal(3, columns, dtype=dtype), weight(9, columns, packing=packing, dtype=dtype)
    norm = 1 + normal(columns, seed=2, dtype=dtype) / 4
    [y] = products(x, [w], norm=norm, compile=launched)
    agree(y, plain.product(plain.wide, x, w, None, norm), norm=norm)
    assert len(launched.seen) == 1


def test_many_rows_go_through_few_threadgroups(monkeypatch, launched):
    monkeypatch.setattr("zmlx.kernels.vectors.sources.MOST", 16)
    x, w = normal(1, 4096), weight(301, 4096)
    norm = 1 + normal(4096, seed=2) / 4
    [y] = products(x, [w], norm=norm, compile=launched)
    agree(y, plain.product(plain.wide, x, w, None, norm), norm=norm)
    [(_, given)] = launched.seen
    assert given["grid"][0] == 2 * given["threadgroup"][0]


@pytest.mark.parametrize("columns", [14336, 8192])
def test_vectors_too_long_for_threadgroup_memory(columns, launched):
    x, w = normal(4, columns), weight(5, columns)
    norm = mx.ones(columns, mx.bfloat16)
    assert not _tiling(mx.bfloat16, 4, (w,), 1).staged
    [y] = products(x, [w], norm=norm, compile=launched)
    near(y, exact(mx.fast.rms_norm(x, norm, 1e-6), w)[0], 2e-6)
    [(definition, _)] = launched.seen
    assert "norm" not in definition.input_names


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "clipped_swiglu"])
def test_activations(activation):
    for dtype in (mx.float32, mx.bfloat16):
        x = 2 * normal(2, 256, dtype=dtype)
        gate, up = (weight(19, 256, dtype=dtype, seed=s, bias=s == 3) for s in (3, 4))
        y = gated_product(x, gate, up, activation)
        agree(y, plain.gated(plain.wide, x, gate, up, activation), 1e-5)


def test_gelu_far_out():
    """Of gates from -12 to 12: erf is ours."""
    gate = Weight(mx.linspace(-12, 12, 400).reshape(400, 1) * mx.ones((1, 8)) / 8, None)
    gate = Weight(gate.w, mode="dense", group_size=0, bits=0)
    up = Weight(mx.ones((400, 8)) / 8, mode="dense", group_size=0, bits=0)
    y = gated_product(mx.ones((1, 8)), gate, up, "gelu")[0]
    a = mx.linspace(-12, 12, 400)
    assert mx.max(mx.abs(y - a * (1 + mx.erf(a / 2**0.5)) / 2)).item() < 2e-6


def test_gates_that_are_not_there_or_packed_otherwise(launched):
    x, norm = normal(2, 256), 1 + normal(256, seed=2) / 4
    gate, up = weight(19, 256, packing=("affine", 32, 8)), weight(19, 256, seed=4)
    y = gated_product(x, None, up, "relu2", norm=norm, compile=launched)
    agree(y, plain.gated(plain.wide, x, None, up, "relu2", None, norm), norm=norm)
    assert len(launched.seen) == 1
    y = gated_product(x, gate, up, "silu", norm=norm, compile=launched)
    assert len(launched.seen) == 3
    truth = plain.gated(plain.wide, x, gate, up, "silu", None, norm)
    assert mx.allclose(y, truth, rtol=2e-2, atol=2e-2).item()


INDICES = mx.array([[4, 0, 3], [1, 1, 2]], mx.uint32)
#: GPT-OSS has biases, 2,880 columns and small floats; others affine weights, or none
EXPERTS = [("affine", 64, 4), ("affine", 32, 3), ("mxfp4", 32, 4), ("dense", 0, 0)]


@pytest.mark.parametrize("packing", EXPERTS, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_experts(packing, dtype, launched):
    gate, up = (
        weight(5, 19, 768, packing=packing, dtype=dtype, seed=s, bias=packing[0] == "mxfp4")
        for s in (7, 8)
    )
    x, norm = normal(2, 768, dtype=dtype), 1 + normal(768, seed=2, dtype=dtype) / 4
    activation = "clipped_swiglu" if packing[0] == "mxfp4" else "silu"
    y = expert_gated_product(x, INDICES, gate, up, activation, norm=norm, compile=launched)
    agree(
        y, plain.gated(plain.wide, x[:, None], gate, up, activation, INDICES, norm), 1e-5, norm=norm
    )

    h = normal(2, 3, 768, dtype=dtype, seed=4)
    agree(
        expert_products(h, INDICES, up, compile=launched), plain.product(plain.wide, h, up, INDICES)
    )
    y = expert_products(x, INDICES, up, compile=launched)
    agree(y, plain.product(plain.wide, x[:, None], up, INDICES))

    scores = mx.softmax(normal(2, 3, seed=5, dtype=mx.float32), axis=-1)
    y = expert_combination(h, INDICES, scores, up, compile=launched)
    assert y.dtype == mx.float32
    near(y, plain.combination(plain.wide, h, INDICES, scores, up), 2e-6)
    assert len(launched.seen) == 4


def test_what_is_added_to_a_combination_is_rounded_as_stock_does(launched):
    down, h = weight(5, 19, 256, bias=True), normal(2, 3, 256)
    scores, shared, residual = normal(2, 3, seed=3), normal(2, 19, seed=4), normal(2, 19, seed=5)
    plainly = expert_combination(h, INDICES, scores, down)
    y = expert_combination(
        h, INDICES, scores, down, shared=shared, residual=residual, compile=launched
    )
    assert mx.array_equal(y, (plainly + shared) + residual).item()
    wide = scores.astype(mx.float32)
    y = expert_combination(h, INDICES, wide, down, dtype=mx.bfloat16, residual=residual)
    plainly = expert_combination(h, INDICES, wide, down)
    assert (plainly.dtype, y.dtype) == (mx.float32, mx.bfloat16)
    assert mx.array_equal(y, plainly.astype(mx.bfloat16) + residual).item()
    assert len(launched.seen) == 1


def test_closer_to_the_truth_than_stock():
    """Contract tighter: rows of 2,048, which stock sums in bfloat16 on some GPUs."""
    x, w = normal(1, 2048), weight(64, 2048)
    truth, _ = exact(x, w)
    [found], stock = products(x, [w]), plain.stock(x, w)
    with mx.stream(mx.cpu):
        ours, theirs = (mx.max(mx.abs(float64(y) - truth)).item() for y in (found, stock))
        best = mx.max(mx.abs(float64(truth.astype(mx.bfloat16)) - truth)).item()
    assert ours <= max(theirs, best * (1 + 1e-3))


def test_views_and_other_layouts():
    """Not contiguous, or at an address that is no multiple of 16 bytes."""
    x = normal(256, 3).T
    w = weight(19, 256)
    truth = plain.product(plain.wide, x, w)
    agree(products(x, [w])[0], truth)
    odd = mx.concatenate([mx.zeros(3, mx.bfloat16), x.flatten()])[3:].reshape(3, 256)
    agree(products(odd, [w])[0], truth)
    part = Weight(w.w[2:], w.scales[2:], w.biases[2:])
    agree(products(x, [part])[0], truth[:, 2:])
    agree(products(x[None, :, None], [w])[0], truth[None, :, None])


def test_inside_of_compile_nothing_is_evaluated():
    x, w, residual = normal(1, 256), weight(19, 256), normal(1, 19, seed=3)

    @mx.compile
    def step(x, residual):
        [y] = products(x, [w], residual=residual)
        return y

    for factor in (1.0, 2.0):
        truth = plain.product(plain.wide, x * factor, w, None, None, 1e-6, residual)
        agree(step(x * factor, residual), truth)


def test_empty_and_tiny():
    w = weight(19, 256)
    assert products(mx.zeros((0, 256), mx.bfloat16), [w])[0].shape == (0, 19)
    tiny = Weight(mx.ones((1, 4)), mode="dense", group_size=0, bits=0)
    assert products(mx.ones((1, 4)), [tiny])[0].item() == 4


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((4096, 2048, 1, 1), lambda t: t.rows == 4 and t.split == 1 and t.depth == 2),
        ((2048, 4096, 1, 1), lambda t: t.split == 2),
        ((2048, 8192, 1, 1), lambda t: t.split == 4),
        ((512, 2048, 1, 1), lambda t: t.rows * t.split <= 2),
        ((768, 2048, 8, 2), lambda t: t.rows == 2),
    ],
)
def test_tilings_keep_a_gpu_busy(shape, fits):
    rows, columns, chosen, matrices = shape
    found = tiling.tiling(
        tiling_format(rows, columns), rows=rows, launches=chosen, matrices=matrices, tokens=1,
        itemsize=2,
    )  # fmt: skip
    assert fits(found), found
    simdgroups = -(-rows // found.rows) * chosen * found.split
    assert simdgroups >= min(tiling.ENOUGH, rows * chosen)


def tiling_format(rows, columns):
    from zmlx.kernels.vectors.formats import format_of

    empty = mx.zeros((rows, columns // 8), mx.uint32)
    return format_of(
        Weight(empty, mx.zeros((rows, columns // 64)), mx.zeros((rows, columns // 64)))
    )


def refused(text, function, *args, error=ValueError, **options):
    with pytest.raises(error, match=text):
        function(*args, **options)


def test_what_does_not_fit_is_refused():
    x, w = normal(2, 256), weight(19, 256)
    experts, scores = weight(5, 19, 256), normal(2, 3)
    h = normal(2, 3, 256)
    refused("0 weights; it takes 1 to 4", products, x, [])
    refused("5 weights", products, x, [w] * 5)
    refused("one weight, not with 2", products, x, [w, w], residual=normal(2, 19))
    refused(r"residual has shape \(19,\)", products, x, [w], residual=normal(19))
    refused(r"weight 0 has 256 columns, x has 128", products, normal(2, 128), [w])
    refused(r"norm has shape \(255,\)", products, x, [w], norm=normal(255))
    refused("x is .*int32", products, mx.zeros((1, 256), mx.int32), [w], error=TypeError)
    refused("x has no axes", products, mx.array(1.0), [w])
    refused(r"weight 0.w has shape \(5, 19, 32\); it takes \(N, K\)", products, x, [experts])
    wrong = Weight(w.w, w.scales, w.biases, mode="affine", group_size=64, bits=7)
    refused("no mode affine in groups of 64, 7 bits", products, x, [wrong])
    refused("given scales", products, x, [Weight(w.w, w.scales)])
    refused(r"scales has shape \(18, 4\)", products, x, [Weight(w.w, w.scales[1:], w.biases)])
    refused(
        "w is .*float32; mode affine takes uint32", products, x,
        [Weight(w.w.astype(mx.float32), w.scales, w.biases)], error=TypeError,
    )  # fmt: skip
    refused(
        "scales is .*int32; mode affine", products, x,
        [Weight(w.w, w.scales.astype(mx.int32), w.biases)], error=TypeError,
    )  # fmt: skip
    refused(r"bias is .* \(18,\)", products, x, [Weight(w.w, w.scales, w.biases, normal(18))])
    refused("activation 'tanh': expected silu", gated_product, x, w, w, "tanh")
    refused("clipped_swiglu takes a gate", gated_product, x, None, w, "clipped_swiglu")
    refused("they must be the same", gated_product, x, w, weight(18, 256), "silu")
    refused(r"indices have shape \(2, 3\)", expert_products, h[:1], INDICES, experts)
    refused("indices are .*float32", expert_products, h, INDICES * 1.0, experts, error=TypeError)
    refused(r"indices have shape", expert_gated_product, x[:1], INDICES, experts, experts, "silu")
    refused(r"scores have shape", expert_combination, h, INDICES, scores[:1], experts)
    refused(
        r"shared has shape", expert_combination, h, INDICES, scores, experts, shared=normal(2, 18)
    )


def test_other_shapes_of_gathered_products_go_to_stock():
    """Several rows for each expert, or more experts than the kernels are meant for."""
    from zmlx.kernels.quantized import GATHER_QUANTIZED_MATMUL
    from zmlx.kernels.vectors import fused

    w = weight(5, 19, 256)
    form = {"group_size": 64, "bits": 4}
    compiled = []
    for x, indices, kernels in (
        (normal(2, 1, 1, 256), INDICES, 1),
        (normal(2, 3, 1, 256), INDICES, 1),
        (normal(2, 3, 2, 256), INDICES, 0),
        (normal(40, 1, 1, 256), mx.zeros((40, 2), mx.uint32), 0),
    ):
        compiled.clear()
        y = fused.gather_matmul(
            lambda d: compiled.append(d) or compiler()(d),
            x,
            w.w,
            w.scales,
            w.biases,
            indices,
            **form,
        )
        form_of = (w.w, w.scales, w.biases, indices)
        assert len(compiled) == kernels
        if kernels:
            wide = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:]))
            agree(y, GATHER_QUANTIZED_MATMUL.reference(wide, *form_of, **form))
        else:
            parts = form_of[:3]
            stock = mx.gather_qmm(x, *parts, rhs_indices=indices, transpose=True, **form)
            assert mx.array_equal(y, stock).item()
