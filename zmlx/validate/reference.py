"""The higher-precision reference of a model, without a second copy of it.

Inside `reference(model, dtype)` the model computes in float32, or in float64, with the very weights
that it has: linear, embedding and expert layers bring their weight to that dtype (dequantised, or
converted) at every call, one layer or one expert at a time, and multiply it with the plain products
of MLX; every other parameter stands there in that dtype. The conversions are exact. On leaving,
every class and every array is the one that was there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from zmlx import backend


def _weight(module: Any, expert: int | None = None) -> mx.array:
    """Return a layer's weight, or that of one expert, in the dtype of the reference."""
    dtype = module.reference_dtype
    part = slice(None) if expert is None else expert
    if "scales" not in module:
        weight: mx.array = module["weight"][part]
        return weight.astype(dtype)
    scales, biases = module["scales"], module.get("biases")
    # Affine scales are floating and carry the dtype; those of other modes are packed bytes.
    floating = mx.issubdtype(scales.dtype, mx.floating)
    scales = scales[part].astype(dtype) if floating else scales[part]
    return mx.dequantize(
        module["weight"][part],
        scales,
        None if biases is None else biases[part].astype(dtype),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=_global_scale(module, part),
        dtype=None if floating else mx.float32,
    ).astype(dtype)


def _global_scale(module: Any, part: Any) -> mx.array | None:
    scale: mx.array | None = module.get("global_scale")
    return scale if scale is None or scale.ndim == 0 else scale[part]


def _linear(self: Any, x: mx.array) -> mx.array:
    y = x @ _weight(self).T
    return y + self["bias"] if "bias" in self else y


def _embedding(self: Any, x: mx.array) -> mx.array:
    return _weight(self)[x]


def _as_linear(self: Any, x: mx.array) -> mx.array:
    return x @ _weight(self).T


def _switch(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """Multiply each row (..., M, K) with the weight of its expert, one expert after the other."""
    outer = np.broadcast_shapes(x.shape[:-2], indices.shape)
    rows = mx.broadcast_to(x, (*outer, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
    chosen = np.broadcast_to(np.array(indices), outer).reshape(-1)
    parts, places = [], []
    for expert in np.unique(chosen).tolist():
        place = np.flatnonzero(chosen == expert)
        y = rows[mx.array(place)] @ _weight(self, expert).T
        parts.append(y + self["bias"][expert] if "bias" in self else y)
        places.append(place)
    order = mx.array(np.argsort(np.concatenate(places)))
    return mx.concatenate(parts)[order].reshape(*outer, x.shape[-2], -1)


def _multi(self: Any, x: mx.array, transpose: bool = True) -> mx.array:
    weight = _weight(self)
    return x @ (weight.swapaxes(-1, -2) if transpose else weight)


#: class of the library -> what its form in the reference does instead
_FORMS: dict[type, dict[str, Any]] = {
    nn.Linear: {"__call__": _linear},
    nn.QuantizedLinear: {"__call__": _linear},
    nn.Embedding: {"__call__": _embedding, "as_linear": _as_linear},
    nn.QuantizedEmbedding: {"__call__": _embedding, "as_linear": _as_linear},
    SwitchLinear: {"__call__": _switch},
    QuantizedSwitchLinear: {"__call__": _switch},
    MultiLinear: {"__call__": _multi},
    QuantizedMultiLinear: {"__call__": _multi},
}
#: parameters of those layers that are converted at every call and not kept in the wide dtype
_CONVERTED = ("weight", "scales", "biases", "global_scale")


def reference_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype that is the truth for a model.

    float64 for a model without 16-bit parameters where MLX has it (on the CPU), else float32.
    """
    halves = (mx.float16, mx.bfloat16)
    has_halves = any(array.dtype in halves for _, array in _parameters(model))
    return mx.float32 if has_halves or backend.current() != "cpu" else mx.float64


@contextmanager
def reference(model: nn.Module, dtype: mx.Dtype) -> Iterator[nn.Module]:
    """Make a stock model compute in a wider dtype while the context lasts.

    Args:
        model: an unpatched model; other threads must not use it meanwhile.
        dtype: mx.float32 or mx.float64.

    Yields:
        The same model.
    """
    forms = {
        base: type(base.__name__, (base,), {**form, "reference_dtype": dtype})
        for base, form in _FORMS.items()
    }
    swapped = _known_layers(model)
    before = _other_parameters(model)
    try:
        model.update(tree_unflatten([(path, array.astype(dtype)) for path, array in before]))
        for _, module in swapped:
            module.__class__ = forms[type(module)]
        yield model
    finally:
        for base, module in swapped:
            module.__class__ = base
        model.update(tree_unflatten(before))


def extra_bytes(model: nn.Module, dtype: mx.Dtype) -> int:
    """Return a bound in bytes on what the reference needs beside the model.

    That is the largest weight in the wide dtype, three times over for the intermediates of its
    dequantisation, and the other parameters.
    """
    largest = 0
    for _, module in _known_layers(model):
        size = module["weight"].size
        if "scales" in module:
            size = size * 32 // module.bits
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            size //= module["weight"].shape[0]
        largest = max(largest, size)
    others = sum(array.size for _, array in _other_parameters(model))
    return int(dtype.size) * (3 * largest + others)


def _known_layers(model: nn.Module) -> list[tuple[type, Any]]:
    return [(type(m), m) for _, m in model.named_modules() if type(m) in _FORMS]


def _other_parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Return path and array of the floating parameters that are not converted at every call."""
    converted = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if type(module) in _FORMS
        for name in _CONVERTED
    }
    return [
        (path, array)
        for path, array in _parameters(model)
        if path not in converted and mx.issubdtype(array.dtype, mx.floating)
    ]


def _parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(model.parameters())
    return list(flat)
