"""Routed experts: gate, up and activation in one pass, then down and the weighted sum in one.

Before   y = self.switch_mlp(x, inds)                         three gathered products, an activation
         y = (y * scores[..., None]).sum(axis=-2)             and a weighted sum
After    y = self._zmlx_combine(self.switch_mlp, x, inds, scores)

Two modules are replaced: the experts (mlx-lm's SwitchGLU), and the block around them where its
forward holds the weighted sum. Routing, scaling, shared experts and all-reduces stay upstream's:
only the two statements above are swapped. A block that combines in another way keeps its forward
and gains the fused experts alone.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.quantized import (
    GATHER_QUANTIZED_COMBINE,
    GATHER_QUANTIZED_GLU,
    GATHER_QUANTIZED_MATMUL,
)
from zmlx.kernels.spec import KernelSpec
from zmlx.patch.activations import activation_bits, product_kernel
from zmlx.patch.expressions import Combination, combinations
from zmlx.patch.forward import ForwardRefused, expression, own_forward, replaced, rewritten
from zmlx.patch.pattern import (
    KernelUse,
    PatchConfig,
    PatchPattern,
    Proposal,
    Refused,
    library_class,
)
from zmlx.patch.weights import (
    form,
    kernel_configuration,
    paired_form,
    parts,
    product_dtype,
    refusal,
)

OPTIONS: dict[str, str] = {
    # tokens in one call above which the stock experts run; 0 is no limit
    "max_tokens": "int",
    # bits that activations may be rounded to, 8 or 16, where that is faster
    "activation_bits": "int",
    # gate, up and activation in one pass
    "fused_swiglu": "bool",
    # routing in one kernel, for backends that have it
    "router_argpartition_logits": "bool",
    "router_argpartition_logits_topk": "bool",
}

_SWITCH = "mlx_lm.models.switch_layers"


#: layers of experts whose weights may be read
_LAYERS = ("QuantizedSwitchLinear", "SwitchLinear")


@dataclass(frozen=True)
class _Kernels:
    """The kernels of experts for a width of activations."""

    gated: KernelSpec
    down: KernelSpec
    combine: KernelSpec

    @classmethod
    def chosen(cls, config: PatchConfig) -> _Kernels:
        """Return those that the pattern's options ask for."""
        kernels = (GATHER_QUANTIZED_GLU, GATHER_QUANTIZED_MATMUL, GATHER_QUANTIZED_COMBINE)
        return cls(*(product_kernel(spec, config) for spec in kernels))


def _is(module: Any, *names: str) -> bool:
    cls = library_class(module) if isinstance(module, nn.Module) else type(module)
    return cls.__module__ == _SWITCH and cls.__qualname__ in names


class MoEMLP(PatchPattern):
    """Experts of SwitchGLU and the blocks that combine their outputs."""

    order = 0

    def name(self) -> str:
        """Return "moe_mlp"."""
        return "moe_mlp"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept SwitchGLU with SwiGLU experts, and blocks that sum its outputs."""
        if _is(module, "SwitchGLU"):
            return _examine_experts(module, config)
        holders = [name for name, child in module.items() if _is(child, "SwitchGLU")]
        return _examine_block(module, holders, config) if holders else None


def _experts_refusal(experts: nn.Module, config: PatchConfig) -> str | None:
    """Return why a SwitchGLU's weights cannot be read by the kernels, or None."""
    if config.options.get("fused_swiglu") is False:
        return "fused_swiglu is off in the profile"
    if not _is(experts.activation, "SwiGLU"):
        return f"activation {type(experts.activation).__name__} is not SwiGLU"
    try:
        activation_bits(config)
        for part in (type(experts.activation), library_class(experts)):
            own_forward(part)
    except (ForwardRefused, ValueError) as refused:
        return str(refused)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = experts.get(name)
        if layer is None or not _is(layer, *_LAYERS):
            return f"{name}: {type(layer).__name__} is not a QuantizedSwitchLinear or SwitchLinear"
        reason = refusal(layer) or ("has a bias" if "bias" in layer else None)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _glu_uses(experts: nn.Module, kernel: KernelSpec) -> tuple[KernelUse, ...]:
    return tuple(
        KernelUse(kernel, {**kernel_configuration(experts[name]), "activation": "silu"})
        for name in ("gate_proj", "up_proj")
    )


def _examine_experts(module: nn.Module, config: PatchConfig) -> Proposal | Refused:
    reason = _experts_refusal(module, config)
    if reason is not None:
        return Refused(reason)
    kernels = _Kernels.chosen(config)
    down = KernelUse(kernels.down, kernel_configuration(module["down_proj"]))
    limit = int(config.options.get("max_tokens") or 0)

    def members(base: type) -> dict[str, Any]:
        glu = kernels.gated.implementation(config.backend)
        gather = kernels.down.implementation(config.backend)
        stock = base.__call__

        def __call__(self: Any, x: mx.array, indices: mx.array) -> mx.array:
            if not _ready(self, x, indices, limit):
                return stock(self, x, indices)  # type: ignore[no-any-return]
            down = self["down_proj"]
            hidden = _gated(glu, self, x, indices)
            chosen = indices.reshape(-1, indices.shape[-1])
            y = gather(hidden[:, :, None, :], *parts(down), chosen, **form(down))
            return y.reshape(*indices.shape, y.shape[-1])

        return {"__call__": __call__}

    uses = (*_glu_uses(module, kernels.gated), down)
    return Proposal((config.backend, limit, kernels), members, uses, "gate and up in one pass")


def _examine_block(
    module: nn.Module, holders: list[str], config: PatchConfig
) -> Proposal | Refused | None:
    try:
        found = combinations(own_forward(type(module)))
    except ForwardRefused as refusal:
        return Refused(str(refusal))
    sites = [site for site in found if site.experts in holders]
    if len(sites) != 1:
        return Refused(
            f"{type(module).__name__} does not hold one weighted sum over its experts:"
            " its forward stays upstream's"
        )
    site = sites[0]
    experts = module[site.experts]
    reason = _experts_refusal(experts, config)
    if reason is not None:
        return Refused(f"{site.experts}: {reason}")
    kernels = _Kernels.chosen(config)
    down = KernelUse(kernels.combine, kernel_configuration(experts["down_proj"]))
    limit = int(config.options.get("max_tokens") or 0)

    def members(base: type) -> dict[str, Any]:
        return {
            "__call__": _rewritten(base, site),
            "_zmlx_ready": lambda self, experts, x, indices: _ready(experts, x, indices, limit),
            "_zmlx_combine": _combine(
                kernels.gated.implementation(config.backend),
                kernels.combine.implementation(config.backend),
                keeps_dtype=site.keeps_dtype,
            ),
        }

    note = "down projection and weighted sum in one pass"
    asked = [key for key, value in config.options.items() if key.startswith("router_") and value]
    if asked:
        note += f" ({', '.join(asked)}: no router kernel on {config.backend} yet)"
    uses = (*_glu_uses(experts, kernels.gated), down)
    return Proposal((config.backend, limit, kernels), members, uses, note)


def _rewritten(base: type, site: Combination) -> Any:
    """Put the fused call before the two statements, which stay for when it does not apply."""
    forward = own_forward(base)
    fused = expression(
        f"self._zmlx_combine(self.{site.experts}, x, indices, weights)",
        x=site.x,
        indices=site.indices,
        weights=site.weights,
    )
    ready = expression(
        f"self._zmlx_ready(self.{site.experts}, x, indices)", x=site.x, indices=site.indices
    )
    combined = replaced(site.combine, {site.node: fused})
    branch = ast.If(ready, [combined], [site.call, site.combine])
    return rewritten(forward, {site.call: [branch], site.combine: []})


def _ready(experts: Any, x: mx.array, indices: mx.array, limit: int) -> bool:
    """Whether the experts are still what was examined, and the kernels take the call."""
    layers = (experts["gate_proj"], experts["up_proj"], experts["down_proj"])
    return (
        not experts._training
        and all(_is(layer, *_LAYERS) for layer in layers)
        and x.shape[:-1] == indices.shape[:-1]
        and (not limit or indices.size // indices.shape[-1] <= limit)
    )


def _gated(
    kernel: Callable[..., mx.array], experts: Any, x: mx.array, indices: mx.array
) -> mx.array:
    """Return the gated products (T, k, I) of the chosen experts."""
    gate, up = experts["gate_proj"], experts["up_proj"]
    return kernel(
        x.reshape(-1, x.shape[-1]),
        indices.reshape(-1, indices.shape[-1]),
        *parts(gate),
        *parts(up),
        activation="silu",
        **paired_form(gate, up),
    )


def _combine(
    glu: Callable[..., mx.array], combine: Callable[..., mx.array], *, keeps_dtype: bool
) -> Any:
    def _zmlx_combine(
        self: Any, experts: Any, x: mx.array, indices: mx.array, weights: mx.array
    ) -> mx.array:
        down = experts["down_proj"]
        hidden = _gated(glu, experts, x, indices)
        y = combine(
            hidden,
            indices.reshape(hidden.shape[:2]),
            weights.reshape(hidden.shape[:2]),
            *parts(down),
            **form(down),
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if keeps_dtype:
            y = y.astype(product_dtype(hidden, down))
        return y

    return _zmlx_combine


PATTERN = MoEMLP()
