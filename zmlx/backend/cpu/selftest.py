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

#: mode, group size, bits
FORMS = (
    *(("affine", 64, bits) for bits in (2, 3, 4, 5, 6, 8)),
    ("mxfp4", 32, 4),
    ("nvfp4", 16, 4),
    ("mxfp8", 32, 8),
    ("dense", 0, 0),
)

_PRODUCTS = (
    "quantized_matmul",
    "quantized_glu",
    "gather_quantized_matmul",
    "gather_quantized_glu",
    "gather_quantized_combine",
)


def failures(library: ModuleType) -> list[str]:
    """Return one line for each operation and format that is off by more than float32 rounding."""
    found = []
    before = library.kernels()
    try:
        for kernels in library.available_kernels():
            library.set_kernels(kernels)
            for mode, group_size, bits in FORMS:
                form = {"group_size": group_size, "bits": bits, "mode": mode}
                for name, value, truth in _cases(library, form):
                    error = float((mx.max(mx.abs(value - truth)) / mx.max(mx.abs(truth))).item())  # type: ignore[arg-type]
                    if not error < 1e-5:
                        what = f"{mode}, {bits} bits" if bits else mode
                        found.append(f"error: {name}, {what}, {kernels}: off by {error:.1e}")
    finally:
        library.set_kernels(before)
    return found


def _weight(shape: tuple[int, ...], form: dict[str, Any], seed: int) -> tuple[list[Any], mx.array]:
    """Return values, scales and biases, and what they stand for."""
    dense = mx.random.normal(shape, key=mx.random.key(seed))
    if form["mode"] == "dense":
        return [dense, None, None], dense
    w, scales, *rest = mx.quantize(dense, **form)
    biases = rest[0] if rest else None
    return [w, scales, biases], mx.dequantize(w, scales, biases, **form).astype(mx.float32)


def _cases(library: ModuleType, form: dict[str, Any]) -> list[tuple[str, mx.array, mx.array]]:
    inputs = 192
    x = mx.random.normal((3, inputs), key=mx.random.key(1))
    one, values = _weight((19, inputs), form, 2)
    experts, each = _weight((3, 19, inputs), form, 3)
    indices = mx.array([[2], [0], [1]], dtype=mx.uint32)
    weights = mx.array([[0.5], [2.0], [1.0]])
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in form.items()}
    y = x @ values.T
    routed = (x[:, None, None, :] @ each[indices].swapaxes(-1, -2)).squeeze(-2)
    h = x[:, None, :]
    found = []
    # With float32 results the forms for short activations keep all of them.
    for suffix in ("", "_a8"):
        call = {name: getattr(library, name + suffix) for name in _PRODUCTS}
        matmul = call["quantized_matmul"](x, *one, **form)
        glu = call["quantized_glu"](x, *one, *one, activation="silu", **both)
        gather = call["gather_quantized_matmul"](h[..., None, :], *experts, indices, **form)
        gather_glu = call["gather_quantized_glu"](
            x, indices, *experts, *experts, activation="silu", **both
        )
        combine = call["gather_quantized_combine"](h, indices, weights, *experts, **form)
        results = (matmul, glu, gather.squeeze(-2), gather_glu, combine)
        truths = (
            y,
            y * mx.sigmoid(y) * y,
            routed,
            routed * mx.sigmoid(routed) * routed,
            (routed * weights[..., None]).sum(axis=-2),
        )
        names = [name + suffix for name in _PRODUCTS]
        found += list(zip(names, results, truths, strict=True))
    return found


def main(path: str) -> int:
    """Load and try the library at a path; return the exit code."""
    library = native.open_library(Path(path))
    library.set_num_threads(2)
    mx.set_default_device(mx.cpu)  # a GPU may round what it is compared with to fewer bits
    lines = failures(library)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
