"""What the patterns ask of a quantized layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def affine(module: nn.Module) -> str | None:
    """Return why a layer's weight is not one of affine mode that the kernels take, or None."""
    mode = getattr(module, "mode", None)
    if "scales" not in module:
        return f"{type(module).__name__} is not quantized"
    if mode != "affine":
        return f"quantization mode {mode}: the kernels take affine"
    if module.get("biases") is None:
        return "affine weights without biases"
    if getattr(module, "global_scale", None) is not None:
        return "weights with a global scale"
    for part in ("scales", "biases"):
        if module[part].dtype not in FLOATS:
            return f"{part} of {module[part].dtype}: the kernels take float32, float16 and bfloat16"
    return None


def kernel_configuration(module: Any) -> dict[str, Any]:
    """Return the configuration in which a layer's kernel is probed.

    Activations usually have the dtype of the scales; with others the kernel promotes as stock does.
    """
    dtype = module["scales"].dtype
    return {
        "group_size": module.group_size,
        "bits": module.bits,
        "dtype": dtype,
        "scale_dtype": dtype,
    }
