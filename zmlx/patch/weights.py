"""What the patterns ask of a layer that holds a weight, quantized or not."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.spec import KernelSpec

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
#: modes of mx.quantize without biases -> group size, bits
SMALL_FLOATS = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


def refusal(module: nn.Module) -> str | None:
    """Return why the kernels do not take a layer's weight, or None."""
    if "scales" not in module:
        return _dense_refusal(module)
    mode = getattr(module, "mode", None)
    if getattr(module, "global_scale", None) is not None:
        return "weights with a global scale"
    if mode in SMALL_FLOATS:
        packed = (module.group_size, module.bits)
        return None if packed == SMALL_FLOATS[mode] else f"mode {mode} in groups and bits {packed}"
    if mode != "affine":
        return f"quantization mode {mode} is not known"
    if module.get("biases") is None:
        return "affine weights without biases"
    for part in ("scales", "biases"):
        if module[part].dtype not in FLOATS:
            return f"{part} of {module[part].dtype}: the kernels take float32, float16 and bfloat16"
    return None


def _dense_refusal(module: nn.Module) -> str | None:
    weight = module.get("weight")
    if weight is None:
        return f"{type(module).__name__} holds no weight"
    if weight.dtype not in FLOATS:
        return f"weights of {weight.dtype}: the kernels take float32, float16 and bfloat16"
    return None


def parts(module: Any) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Return a layer's values, scales and biases; None for what its mode has not."""
    return module["weight"], module.get("scales"), module.get("biases")


def form(module: Any) -> dict[str, Any]:
    """Return how a layer's weight is stored, as the kernels take it."""
    if "scales" not in module:
        return {"group_size": 0, "bits": 0, "mode": "dense"}
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def paired_form(gate: Any, up: Any) -> dict[str, Any]:
    """Return the same of two layers, for kernels that take both."""
    one, other = form(gate), form(up)
    return {
        "gate_group_size": one["group_size"],
        "gate_bits": one["bits"],
        "gate_mode": one["mode"],
        "up_group_size": other["group_size"],
        "up_bits": other["bits"],
        "up_mode": other["mode"],
    }


def product_dtype(x: mx.array, module: Any) -> mx.Dtype:
    """Return the dtype of a stock product of activations with a layer's weight."""
    mode = form(module)["mode"]
    if mode in SMALL_FLOATS:
        return x.dtype
    return mx.result_type(x, module["scales" if mode == "affine" else "weight"])


def kernel_configuration(module: Any, spec: KernelSpec | None = None) -> dict[str, Any]:
    """Return the configuration in which a layer's kernel is probed.

    With a kernel, only what its sample takes.

    Activations usually have the dtype of the scales, or of the weight where there are none of
    floats; with others the kernel promotes as stock does.
    """
    stored = form(module)
    deciding = module["scales" if stored["mode"] == "affine" else "weight"].dtype
    dtype = deciding if deciding in FLOATS else mx.bfloat16
    configuration = {
        "packing": (stored["mode"], stored["group_size"], stored["bits"]),
        "dtype": dtype,
        "scale_dtype": dtype,
    }
    taken = configuration if spec is None else inspect.signature(spec.sample).parameters
    return {name: value for name, value in configuration.items() if name in taken}
