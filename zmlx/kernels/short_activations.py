"""Products with quantized weights whose activations are rounded to 8 bits, on CPUs.

    y[n] = sum_k w[n, k] * a * round(x[k] / a),     a = max |x| / 127 over a group of the weight

Each product of zmlx.kernels.quantized has this form beside it, with `_a8` behind its name: half the
multiplications and loads of activations on processors with AVX-512 VNNI. Others, and calls with
float32 results or with many rows, compute as without it. The rounding errs by up to a / 2 for each
activation, 0.2 to 0.7 % of a result, which is what llama.cpp's CPU kernels do (ggml's Q8_0, with
groups of 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zmlx.kernels.quantized import (
    GATHER_QUANTIZED_COMBINE,
    GATHER_QUANTIZED_GLU,
    GATHER_QUANTIZED_MATMUL,
    QUANTIZED_GLU,
    QUANTIZED_MATMUL,
)
from zmlx.kernels.spec import KernelSpec, register


def _short(spec: KernelSpec) -> KernelSpec:
    name = f"{spec.name}_a8"
    return register(
        replace(
            spec,
            name=name,
            formula=f"{spec.formula}, x rounded to 8 bits",
            contract={"cpu": "tolerant"},
            native=name,
            fused=None,
            tolerance={"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-2},
        )
    )


#: name of a product -> the same with short activations
SHORT: Mapping[str, KernelSpec] = {
    spec.name: _short(spec)
    for spec in (
        QUANTIZED_MATMUL,
        QUANTIZED_GLU,
        GATHER_QUANTIZED_MATMUL,
        GATHER_QUANTIZED_GLU,
        GATHER_QUANTIZED_COMBINE,
    )
}
