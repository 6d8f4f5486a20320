"""Quantized products in float64: the truth that both stock and ours are measured against."""

from __future__ import annotations

import platform
from pathlib import Path

import mlx.core as mx
import numpy as np

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
#: set of kernels -> what the processor must have, as Linux names it
NEEDS = {
    "avx512_vnni": {"avx512_vnni", "avx512vbmi", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon_dotprod": {"asimddp"},
}


def kernel_sets() -> list[str]:
    """Return the sets of kernels that this processor runs, without asking the library."""
    if platform.system() != "Linux":
        return ["portable"]
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return [*(name for name, needs in NEEDS.items() if needs <= flags), "portable"]


def wide(array: mx.array) -> np.ndarray:
    """Return an array's very values as float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weights(w, scales, biases, *, group_size: int, bits: int) -> np.ndarray:
    """Return s * q + b without any rounding to less than float64."""
    ones = mx.ones(scales.shape, mx.float32)
    q = wide(mx.dequantize(w, ones, ones * 0, group_size=group_size, bits=bits))
    repeat = [np.repeat(wide(part), group_size, axis=-1) for part in (scales, biases)]
    return q * repeat[0] + repeat[1]


def error(value: mx.array, truth: np.ndarray) -> float:
    """Return the root mean square error, relative to the root mean square of the truth."""
    difference = wide(value) - truth
    return float(np.sqrt(np.mean(difference**2)) / np.sqrt(np.mean(truth**2)))


def quantized(shape, *, group_size: int, bits: int, dtype=mx.float32, seed: int = 0):
    """Return a random quantized weight: w, scales, biases."""
    dense = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    return mx.quantize(dense, group_size=group_size, bits=bits)


def normal(*shape, dtype=mx.float32, seed: int = 9) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def single(values: np.ndarray) -> mx.array:
    """Return values rounded to float32."""
    return mx.array(values.astype(np.float32))


def tighter(ours: mx.array, stock: mx.array, truth: np.ndarray) -> bool:
    """Return whether the contract `tighter` holds."""
    floor = 4e-7 + rounding(ours.dtype)
    return error(ours, truth) <= max(error(stock, truth), floor)


def rounding(dtype: mx.Dtype) -> float:
    """Return the relative error that storing a result in a dtype may cost."""
    return {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
