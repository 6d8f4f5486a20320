"""Routed experts: gate, up and activation in one pass, then down and the weighted sum in one.

Before   y = self.switch_mlp(x, inds)                         three gathered products, an activation
         y = (y * scores[..., None]).sum(axis=-2)             and a weighted sum
After    y = self._zmlx_combine(self.switch_mlp, x, inds, scores)

Two modules are replaced: the experts (mlx-lm's SwitchGLU, and on GPUs SwitchMLP), and the block
around them where its forward holds the weighted sum. Routing, scaling, shared experts and
all-reduces stay upstream's: only the statements above are swapped. A block that combines in another
way keeps its forward and gains the fused experts alone.

Which activation the experts have is found by computing it (`zmlx.patch.meaning`): SwiGLU and both
GeGLUs everywhere; on GPUs also the clipped SwiGLU of GPT-OSS, squared ReLU without a gate, and
biases. There the kernels take up to 64 chosen experts in a call, and the stock statements the rest.
"""

from __future__ import annotations

import ast
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.patch.experts import (
    Experts,
    ExpertsRefused,
    examined,
    holds_experts,
    outputs,
    weighted_sum,
)
from zmlx.patch.expressions import Combination, combinations
from zmlx.patch.forward import ForwardRefused, expression, own_forward, replaced, rewritten
from zmlx.patch.pattern import PatchConfig, PatchPattern, Proposal, Refused

OPTIONS: dict[str, str] = {
    # tokens in one call above which the stock experts run; 0 is no limit
    "max_tokens": "int",
    # bits that activations may be rounded to, 8 or 16, where that is faster
    "activation_bits": "int",
    # gate, up and activation in one pass
    "fused_swiglu": "bool",
    # of earlier versions: they change nothing. A router is one kernel inside of a decode step that
    # is recorded (decode_step, on GPUs); its selection stays upstream's, ties included
    "router_argpartition_logits": "bool",
    "router_argpartition_logits_topk": "bool",
}


class MoEMLP(PatchPattern):
    """Experts of SwitchGLU or SwitchMLP and the blocks that combine their outputs."""

    order = 0

    def name(self) -> str:
        """Return "moe_mlp"."""
        return "moe_mlp"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept experts whose activation is known, and blocks that sum their outputs."""
        try:
            if holds_experts(module):
                return _examine_experts(module, config)
            holders = [name for name, child in module.items() if holds_experts(child)]
            return _examine_block(module, holders, config) if holders else None
        except (ExpertsRefused, ForwardRefused) as refused:
            return Refused(str(refused))


def _examine_experts(module: nn.Module, config: PatchConfig) -> Proposal:
    experts = examined(module, config)
    replacement = outputs(module, experts, config)

    def members(base: type) -> dict[str, Any]:
        call, stock = replacement.make(), base.__call__

        def __call__(self: Any, x: mx.array, indices: mx.array) -> mx.array:
            if not experts.ready(self, x, indices):
                return stock(self, x, indices)  # type: ignore[no-any-return]
            return call(self, x, indices)

        return {"__call__": __call__}

    gate = experts.names[0]
    note = f"{'gate and up' if gate else 'up and activation'} in one pass ({experts.activation})"
    key = (config.backend, experts, *replacement.key)
    return Proposal(key, members, replacement.uses, note)


def _examine_block(
    module: nn.Module, holders: list[str], config: PatchConfig
) -> Proposal | Refused:
    found = combinations(own_forward(type(module)))
    sites = [site for site in found if site.experts in holders]
    if len(sites) != 1:
        return Refused(
            f"{type(module).__name__} does not hold one weighted sum over its experts:"
            " its forward stays upstream's"
        )
    site = sites[0]
    try:
        experts = examined(module[site.experts], config)
    except ExpertsRefused as refused:
        return Refused(f"{site.experts}: {refused}")
    replacement = weighted_sum(module[site.experts], experts, config, keeps_dtype=site.keeps_dtype)

    def members(base: type) -> dict[str, Any]:
        call = replacement.make()
        return {
            "__call__": _rewritten(base, site),
            "_zmlx_ready": _ready(experts),
            "_zmlx_combine": lambda self, *arguments: call(*arguments),
        }

    note = "down projection and weighted sum in one pass"
    asked = [key for key, value in config.options.items() if key.startswith("router_") and value]
    if asked:
        note += (
            f" ({', '.join(asked)}: routing stays upstream's, in decode_step one kernel on GPUs)"
        )
    key = (config.backend, experts, *replacement.key)
    return Proposal(key, members, replacement.uses, note)


def _ready(experts: Experts) -> Any:
    def _zmlx_ready(self: Any, module: Any, x: mx.array, indices: mx.array) -> bool:
        return experts.ready(module, x, indices)

    return _zmlx_ready


def _rewritten(base: type, site: Combination) -> Any:
    """Put the fused call before the statements, which stay for when it does not apply."""
    forward = own_forward(base)
    own = forward.parameters[0]
    fused = expression(
        f"{own}._zmlx_combine({own}.{site.experts}, x, indices, weights)",
        x=site.x,
        indices=site.indices,
        weights=site.weights,
    )
    ready = expression(
        f"{own}._zmlx_ready({own}.{site.experts}, x, indices)", x=site.x, indices=site.indices
    )
    combined = replaced(site.combine, {site.node: fused})
    apart = [] if site.product is None else [site.product]
    branch = ast.If(ready, [combined], [site.call, *apart, site.combine])
    removed: dict[ast.AST, Any] = {statement: [] for statement in (*apart, site.combine)}
    return rewritten(forward, {site.call: [branch], **removed})


PATTERN = MoEMLP()
