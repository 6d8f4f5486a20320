"""Tiny random models, and the same models in a higher precision.

model = build("qwen3_moe", dtype=mx.bfloat16, quantize={"bits": 4, "group_size": 32}, seed=0)
truth = reference(model, mx.float32)
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import math
import sys
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import quantize_model
from zoo.configs import Config, config_of
from zoo.devices import on_cpu

#: Spread of the noise on parameters that are born constant: norms, biases, correction biases.
NOISE = 0.2

#: `hf_olmo` is only probed for by mlx-lm's olmo, which exits the process without it.
_PROBED = {"olmo": "hf_olmo"}


#: Name -> dtype, quantization, activations. The last one shows faults in the arithmetic on bfloat16
#: scales that the rounding of bfloat16 activations hides: 3 % of the logits' spread in stock.
FORMS: dict[str, tuple[mx.Dtype, dict[str, int] | None, mx.Dtype | None]] = {
    "float32": (mx.float32, None, None),
    "float32-4bit": (mx.float32, {"bits": 4, "group_size": 64}, None),
    "bfloat16-4bit": (mx.bfloat16, {"bits": 4, "group_size": 32}, None),
    "bfloat16-4bit-float32": (mx.bfloat16, {"bits": 4, "group_size": 32}, mx.float32),
}


def module_of(name: str) -> ModuleType:
    """Import the module of a model type."""
    probed = _PROBED.get(name)
    if probed and probed not in sys.modules:
        sys.modules[probed] = ModuleType(probed)
    return importlib.import_module(f"mlx_lm.models.{name}")


def made(name: str, form: str) -> nn.Module:
    """Return the model of a type in one of `FORMS`."""
    dtype, quantize, activations = FORMS[form]
    return build(name, dtype=dtype, quantize=quantize, activations=activations)


def build(
    name: str,
    *,
    dtype: mx.Dtype = mx.float32,
    quantize: dict[str, int] | None = None,
    activations: mx.Dtype | None = None,
    seed: int = 0,
    config: Config | None = None,
) -> nn.Module:
    """Return an evaluated random model of a type.

    Args:
        name: the type's module in `mlx_lm.models`.
        dtype: of the parameters that mlx-lm would convert.
        quantize: None, or `bits` and `group_size` for mlx-lm's affine quantization.
        activations: another dtype for the quantized model's norms, biases and embeddings, and so
            for its activations; errors of the layers' own arithmetic then show at its precision.
        seed: of every random number; equal arguments give equal models.
        config: used instead of the one in `configs`.
    """
    module = module_of(name)
    mx.random.seed(seed)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config or config_of(name)))
    model.update(tree_map(_perturbed, model.parameters()))
    may_cast = getattr(model, "cast_predicate", lambda _: True)
    model.update(
        tree_unflatten(
            [
                (path, p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p)
                for path, p in tree_flatten(model.parameters())
                if may_cast(path)
            ]
        )
    )
    if quantize:
        model = _quantized(model, **quantize)
    if activations:
        _widen(model, activations)
    _fill_packed(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def reference(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Return a twin whose weights are dequantized and whose parameters all have `dtype`.

    The weights are those that the quantized model stands for, scale * q + bias, computed in float32
    or, for a float64 twin, in float64.
    """
    twin = copy.deepcopy(model)
    with on_cpu():
        dense = [(path, _dense(m, dtype)) for path, m in twin.named_modules() if _is_quantized(m)]
        if dense:
            twin.update_modules(tree_unflatten(dense))
        twin.set_dtype(dtype)
        for _, m in twin.named_modules():
            if type(m) is SwitchLinear:
                m.__class__ = _GatheredLinear
        mx.eval(twin.parameters())
    return twin


def _quantized(model: nn.Module, bits: int, group_size: int) -> nn.Module:
    chosen = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def predicate(path: str, module: nn.Module) -> Any:
        # afm7's fused layer has a `to_quantized` that mlx-lm itself cannot call.
        able = "mode" in inspect.signature(module.to_quantized).parameters
        return able and chosen(path, module)

    with redirect_stdout(io.StringIO()):  # it prints what it did
        quantized, _ = quantize_model(model, {}, group_size, bits, quant_predicate=predicate)
    return quantized


def _widen(model: nn.Module, dtype: mx.Dtype) -> None:
    """Give all floating parameters a dtype, but not the scales and biases of quantized layers."""
    for _, m in model.named_modules():
        kept = (
            ("scales", "biases")
            if _is_quantized(m) and not isinstance(m, nn.QuantizedEmbedding)
            else ()
        )
        for name in [name for name in m if name not in kept]:
            value = m[name]
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                m[name] = value.astype(dtype)


class _GatheredLinear(SwitchLinear):
    """`SwitchLinear` in any dtype: MLX's own gathered product on CPU takes float32 only."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = x @ self.weight.swapaxes(-1, -2)[indices]
        return y + self.bias[indices][..., None, :] if "bias" in self else y


def _perturbed(p: mx.array) -> mx.array:
    """Return random values in place of constant ones, which would hide errors."""
    if not mx.issubdtype(p.dtype, mx.floating) or p.size == 0 or (p.max() != p.min()).item():
        return p
    spread = NOISE if p.ndim <= 1 else 1 / math.sqrt(p.shape[-1])
    if p.ndim > 1 and (p != 0).any().item():
        spread = NOISE
    return p + spread * mx.random.normal(p.shape, dtype=p.dtype)


def _fill_packed(model: nn.Module) -> None:
    """Give layers that are born packed (zeros) random codes, scales and signs."""
    for _, m in model.named_modules():
        if not hasattr(m, "signs") and type(m).__name__ != "HadamardQuantizedLinear":
            continue
        width = m.scales.shape[-1] * m.group_size
        m.weight = mx.random.randint(0, 2**31 - 1, m.weight.shape).astype(mx.uint32)
        spread = mx.random.uniform(0.5, 1.5, m.scales.shape) / math.sqrt(width)
        m.scales = spread.astype(mx.float16)
        m.biases = (-1.5 * spread).astype(mx.float16)
        if hasattr(m, "signs"):
            m.signs = mx.where(mx.random.uniform(shape=m.signs.shape) < 0.5, -1.0, 1.0)


_QUANTIZED: dict[type, type] = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, tuple(_QUANTIZED))


def _dense(module: Any, dtype: mx.Dtype) -> nn.Module:
    born = next(born for quantized, born in _QUANTIZED.items() if isinstance(module, quantized))
    # Made without its constructor: only the parameters and the forward matter.
    dense = born.__new__(born)
    nn.Module.__init__(dense)
    dense.weight = _weight(module).astype(dtype)
    if "bias" in module:
        dense.bias = module.bias.astype(dtype)
    return dense


def _weight(module: Any) -> mx.array:
    return mx.dequantize(
        module.weight,
        module.scales.astype(mx.float32),
        module.biases.astype(mx.float32),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
