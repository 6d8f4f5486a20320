"""Try a freshly built library: `python -m zmlx.backend.cpu.selftest LIBRARY`.

Runs in a process of its own, so that a library that crashes takes nobody with it. Exits with 0 when
every operation, with each set of kernels that this processor runs, computes what the stock
operations give in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from zmlx.backend.cpu import native


def failures(library: ModuleType) -> list[str]:
    """Return one line for each operation and format that is off by more than float32 rounding."""
    found = []
    for kernels in library.available_kernels():
        library.set_kernels(kernels)
        for bits in (2, 3, 4, 5, 6, 8):
            for name, value, truth in _cases(library, bits):
                error = float((mx.max(mx.abs(value - truth)) / mx.max(mx.abs(truth))).item())  # type: ignore[arg-type]
                if not error < 1e-5:
                    found.append(f"error: {name}, {bits} bits, {kernels}: off by {error:.1e}")
    return found


def _cases(library: ModuleType, bits: int) -> list[tuple[str, mx.array, mx.array]]:
    size = 64
    options: dict[str, Any] = {"group_size": 64, "bits": bits}
    x = mx.random.normal((3, 3 * size), key=mx.random.key(1))
    dense = mx.quantize(mx.random.normal((19, 3 * size), key=mx.random.key(2)), size, bits)
    experts = mx.quantize(mx.random.normal((3, 19, 3 * size), key=mx.random.key(3)), size, bits)
    indices = mx.array([[2], [0], [1]], dtype=mx.uint32)
    weights = mx.array([[0.5], [2.0], [1.0]])
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in options.items()}
    y = x @ mx.dequantize(*dense, **options).T
    routed = x[:, None, None, :] @ mx.dequantize(*experts, **options)[indices].swapaxes(-1, -2)
    routed = routed.squeeze(-2)
    h = x[:, None, :]
    matmul = library.quantized_matmul(x, *dense, **options)
    glu = library.quantized_glu(x, *dense, *dense, activation="silu", **both)
    gather = library.gather_quantized_matmul(h[..., None, :], *experts, indices, **options)
    gather_glu = library.gather_quantized_glu(
        x, indices, *experts, *experts, activation="silu", **both
    )
    combine = library.gather_quantized_combine(h, indices, weights, *experts, **options)
    return [
        ("quantized_matmul", matmul, y),
        ("quantized_glu", glu, y * mx.sigmoid(y) * y),
        ("gather_quantized_matmul", gather.squeeze(-2), routed),
        ("gather_quantized_glu", gather_glu, routed * mx.sigmoid(routed) * routed),
        ("gather_quantized_combine", combine, (routed * weights[..., None]).sum(axis=-2)),
    ]


def main(path: str) -> int:
    """Load and try the library at a path; return the exit code."""
    library = native.open_library(Path(path))
    library.set_num_threads(2)
    lines = failures(library)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
