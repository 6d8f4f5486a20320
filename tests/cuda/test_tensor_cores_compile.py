"""Products on tensor cores go through NVIDIA's compiler, in all their forms at once."""

from __future__ import annotations

import mlx.core as mx
import pytest
from kernels.test_vector_products import normal, weight
from nvrtc_program import compile_program, is_missing
from test_catalog_compiles import programs  # noqa: F401
from test_tensor_cores import FORMS

from zmlx.backend.launch import launcher
from zmlx.kernels.vectors import (
    expert_combination,
    expert_gated_product,
    expert_products,
    gated_product,
    products,
)

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)


def compile(definition):
    assert definition.cuda is not None
    return launcher(definition, "cuda")


def launch_all():
    given = {"compile": compile}
    for packing, columns, tokens, dtype in FORMS:
        w = weight(37, columns, packing=packing, dtype=dtype)
        products(normal(tokens, columns, dtype=dtype), [w], **given)
    x, norm = normal(2, 256), normal(256)
    weights = [weight(n, 256, bias=True) for n in (16, 9, 5, 32)]
    products(x, weights, norm=norm, **given)
    for activation in ("silu", "gelu", "gelu_tanh", "clipped_swiglu"):
        gated_product(x, weights[0], weight(16, 256), activation, norm=norm, **given)
    gated_product(x, None, weights[0], "relu2", **given)
    experts, indices = weight(5, 19, 256, bias=True), mx.zeros((2, 3), mx.uint32)
    expert_gated_product(x, indices, experts, experts, "silu", norm=norm, **given)
    h, more = normal(2, 3, 256), normal(2, 19)
    expert_products(h, indices, experts, **given)
    expert_combination(h, indices, normal(2, 3), experts, residual=more, shared=more, **given)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_they_compile(architecture, programs):  # noqa: F811
    launch_all()
    [(header, bodies)] = programs.items()
    assert len(bodies) > len(FORMS)
    assert all(len(header) + len(text) < 2500 for text in bodies), "MLX hashes it at every call"
    named = (text.replace("_CASE(", f"_{k}(") for k, text in enumerate(bodies))
    log = compile_program(header, *named, architecture=architecture)
    assert log is None, f"\n{log[:3000]}"
