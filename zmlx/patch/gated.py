"""A dense MLP whose forward holds a gated product of two projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.quantized import QUANTIZED_GLU
from zmlx.kernels.vectors.fused import few_rows
from zmlx.patch.activations import product_kernel
from zmlx.patch.expressions import GatedProduct, gated_products
from zmlx.patch.forward import ForwardRefused, expression, own_forward, rewritten
from zmlx.patch.pattern import (
    KernelUse,
    PatchConfig,
    PatchPattern,
    Proposal,
    Refused,
    library_class,
)
from zmlx.patch.weights import kernel_configuration, paired_form, parts, refusal


class GatedMLP(PatchPattern):
    """Replaces `act(self.gate(x)) * self.up(x)` in an MLP's forward, for some activations."""

    order = 1

    def __init__(self, name: str, activations: frozenset[str]) -> None:
        self._name = name
        self._activations = activations

    def name(self) -> str:
        """Return the pattern's name."""
        return self._name

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept a forward that holds the expression, over two of the library's linear layers."""
        try:
            forward = own_forward(type(module))
        except ForwardRefused as refusal:
            looks_gated = {"gate_proj", "up_proj"} <= set(module.children())
            return Refused(str(refusal)) if looks_gated else None
        sites = [s for s in gated_products(forward) if s.activation in self._activations]
        if len(sites) != 1:
            return None
        site = sites[0]
        layers = [module.get(site.gate), module.get(site.up)]
        for name, layer in zip((site.gate, site.up), layers, strict=True):
            reason = projection_refusal(layer)
            if reason is not None:
                return Refused(f"{name}: {reason}")
        try:
            quantized = all(layer is not None and "scales" in layer for layer in layers)
            spec = product_kernel(QUANTIZED_GLU, config, quantized=quantized)
        except ValueError as wrong:
            return Refused(str(wrong))
        uses = tuple(
            KernelUse(spec, {**kernel_configuration(layer), "activation": site.activation})
            for layer in layers
        )

        def members(base: type) -> dict[str, Any]:
            return {
                "__call__": _rewritten(base, site),
                "_zmlx_ready": _ready if config.backend == "cpu" else _ready_for_few,
                "_zmlx_glu": _product(spec.implementation(config.backend), site),
            }

        return Proposal(
            (config.backend, spec), members, uses, f"{site.gate} and {site.up} in one pass"
        )


#: layers whose weights may be read: theirs is the product with the weight, plus a bias
_LINEAR = (nn.QuantizedLinear, nn.Linear)


def projection_refusal(layer: Any) -> str | None:
    """Return why a child is not a linear layer whose weights may be read, or None."""
    if not isinstance(layer, nn.Module):
        return "not a layer"
    cls = library_class(layer)
    if cls not in _LINEAR:
        return f"{cls.__name__} is not a QuantizedLinear or Linear"
    return refusal(layer)


def _rewritten(base: type, site: GatedProduct) -> Any:
    holes = {"x": site.x}
    fused = expression(
        f"self._zmlx_glu(self.{site.gate}, self.{site.up}, x)"
        f" if self._zmlx_ready(self.{site.gate}, self.{site.up}, x) else stock",
        **holes,
        stock=site.node,
    )
    return rewritten(own_forward(base), {site.node: fused})


def _ready(self: Any, gate: Any, up: Any, x: mx.array) -> bool:
    """Whether both layers are still the library's own: an adapter may have wrapped one since."""
    return not self._training and library_class(gate) in _LINEAR and library_class(up) in _LINEAR


def _ready_for_few(self: Any, gate: Any, up: Any, x: mx.array) -> bool:
    """The same on GPUs, whose kernels take few rows: prompts run what stood here before."""
    return few_rows(x) and _ready(self, gate, up, x)


def _product(kernel: Callable[..., mx.array], site: GatedProduct) -> Any:
    activation = site.activation

    def _zmlx_glu(self: Any, gate: Any, up: Any, x: mx.array) -> mx.array:
        return kernel(
            x,
            *parts(gate),
            *parts(up),
            gate.get("bias"),
            up.get("bias"),
            activation=activation,
            **paired_form(gate, up),
        )

    return _zmlx_glu
