"""Products on GPUs are recorded once for each form, and stock's where they are transformed."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend import current
from zmlx.kernels import calling, spec
from zmlx.kernels.experts import EXPERT_COMBINE, EXPERT_GLU, expert_outputs, expert_sum
from zmlx.kernels.quantized import QUANTIZED_GLU, QUANTIZED_MATMUL
from zmlx.kernels.spec import relative_error
from zmlx.kernels.vectors import Weight, linear, plain

BACKEND = "emulator" if current() == "cpu" else current()
PACKING = ("affine", 32, 4)
FORM = {"group_size": 32, "bits": 4}


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    if current() == "cpu":
        monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    calling.forget()
    yield
    calling.forget()


def normal(*shape, seed=1):
    return mx.random.normal(shape, key=mx.random.key(seed))


def packed(*shape, seed=1):
    return mx.quantize(normal(*shape, seed=seed), 32, 4)


def experts(gated=True, biased=False):
    """Return the arrays of gate, up and down, and their packings."""
    arrays = []
    for seed, shape in ((1, (3, 32, 64)), (2, (3, 32, 64)), (3, (3, 16, 32))):
        bias = normal(*shape[:2], seed=seed + 5) if biased else None
        missing = seed == 1 and not gated
        arrays += (None,) * 4 if missing else (*packed(*shape, seed=seed), bias)
    return arrays, (PACKING if gated else None, PACKING, PACKING)


X, INDICES, SCORES = normal(2, 64, seed=7), mx.array([[0, 2], [1, 2]]), mx.array([[0.7, 0.3]] * 2)


def sides(arrays):
    return [Weight(*arrays[at : at + 4], *PACKING) for at in (0, 4)]


def reference(arrays, packings, activation, scores=None):
    h = EXPERT_GLU.reference(X, INDICES, *arrays[:8], activation=activation, packings=packings[:2])
    every = mx.eye(INDICES.shape[-1])
    if scores is not None:
        return EXPERT_COMBINE.reference(h, INDICES, scores, *arrays[8:], packing=packings[2])
    return mx.stack(
        [
            EXPERT_COMBINE.reference(
                h, INDICES, mx.broadcast_to(one, INDICES.shape), *arrays[8:], packing=packings[2]
            )
            for one in every
        ],
        axis=-2,
    )


@pytest.mark.parametrize(
    ("activation", "gated"), [("silu", True), ("clipped_swiglu", True), ("relu2", False)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_whole_experts(activation, gated, biased):
    arrays, packings = experts(gated, biased)
    outputs, total = expert_outputs(BACKEND), expert_sum(BACKEND)
    options = {"activation": activation, "packings": packings}
    for _ in range(3):  # run, recorded, replayed
        y = outputs(X, INDICES, *arrays, **options)
        assert relative_error(y, reference(arrays, packings, activation)) < 1e-5
        y = total(X, INDICES, SCORES, *arrays, **options, keeps_dtype=False)
        assert relative_error(y, reference(arrays, packings, activation, SCORES)) < 1e-5


def test_other_arrays_of_a_form_are_not_the_recorded_ones():
    kernel = QUANTIZED_MATMUL.implementation(BACKEND)
    for seed in range(5):
        x, weight = normal(3, 64, seed=seed), packed(16, 64, seed=seed + 9)
        truth = QUANTIZED_MATMUL.reference(x, *weight, **FORM)
        assert relative_error(kernel(x, *weight, **FORM), truth) < 1e-5


def test_python_writes_a_kernel_twice_and_never_again(monkeypatch):
    written = []
    launched = linear._launched
    monkeypatch.setattr(linear, "_launched", lambda *a, **k: written.append(1) or launched(*a, **k))
    x, weight = normal(2, 64), packed(16, 64)
    kernel = QUANTIZED_MATMUL.implementation(BACKEND)
    for _ in range(5):
        mx.eval(kernel(x, *weight, **FORM))
    assert len(written) == 2  # run once, recorded once
    mx.eval(spec.KernelSpec.implementation(QUANTIZED_MATMUL, BACKEND)(x, *weight, **FORM))
    assert len(written) == 2  # a new implementation is the same kernel
    mx.eval(kernel(x[:1], *weight, **FORM))
    assert len(written) == 3


def test_nothing_is_computed_of_nothing():
    """MLX's own product of an empty array ends the process on a CPU."""
    kernel = QUANTIZED_MATMUL.implementation(BACKEND)
    assert kernel(mx.zeros((0, 64)), *packed(16, 64), **FORM).shape == (0, 16)
    arrays, packings = experts()
    options = {"activation": "silu", "packings": packings}
    none = mx.zeros((0, 2), mx.uint32)
    assert expert_outputs(BACKEND)(X[:0], none, *arrays, **options).shape == (0, 2, 16)
    total = expert_sum(BACKEND)(X[:0], none, mx.zeros((0, 2)), *arrays, **options, keeps_dtype=True)
    assert total.shape == (0, 16)


@pytest.mark.parametrize("calls", [1, 4])
def test_gradients_are_those_of_stock(calls):
    gate, up = packed(16, 64, seed=1), packed(16, 64, seed=2)
    options = {
        "activation": "silu",
        **{f"{side}_{key}": n for side in ("gate", "up") for key, n in FORM.items()},
    }
    x = normal(2, 64)
    bias = normal(16, seed=4)

    def loss(function):
        return lambda x, b: function(x, *gate, *up, b, None, **options).square().sum()

    kernel = QUANTIZED_GLU.implementation(BACKEND)
    truth = mx.grad(loss(QUANTIZED_GLU.reference), argnums=(0, 1))(x, bias)
    for _ in range(calls):
        found = mx.grad(loss(kernel), argnums=(0, 1))(x, bias)
        kernel(x, *gate, *up, bias, None, **options)
    for one, other in zip(found, truth, strict=True):
        assert relative_error(one, other) < 1e-4


def test_batches_of_a_transformation_and_compiled_functions():
    """MLX itself cannot map a packed product."""
    weight, plain_form = normal(16, 64), {"group_size": 0, "bits": 0, "mode": "dense"}
    kernel = QUANTIZED_MATMUL.implementation(BACKEND)
    x = normal(3, 2, 64)
    for _ in range(3):
        mapped = mx.vmap(lambda a: kernel(a, weight, **plain_form))(x)
        assert relative_error(mapped, x @ weight.T) < 1e-5
        compiled = mx.compile(lambda a: kernel(a, weight, **plain_form) + 1)(x)
        assert relative_error(compiled, x @ weight.T + 1) < 1e-5


def test_what_the_kernels_do_not_take_is_stock_s():
    weight = packed(16, 64)
    kernel = QUANTIZED_MATMUL.implementation(BACKEND)
    x = normal(9, 64)
    stock = mx.quantized_matmul(x, *weight, group_size=32, bits=4)
    assert mx.array_equal(kernel(x, *weight, **FORM), stock)
    arrays, packings = experts()
    chosen = mx.zeros((2, 33), mx.uint32)
    y = expert_outputs(BACKEND)(X, chosen, *arrays, activation="silu", packings=packings)
    h = plain.gated(plain.stock, X[:, None], *sides(arrays), "silu", chosen)
    stock = mx.gather_qmm(h[:, :, None], *arrays[8:11], rhs_indices=chosen, group_size=32, bits=4)
    assert mx.array_equal(y, stock.squeeze(-2))
    with pytest.raises(ValueError, match="columns"):
        kernel(normal(2, 32), *weight, **FORM)
