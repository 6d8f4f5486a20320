"""The grouped selection of experts of DeepSeek's kind in one kernel, on GPUs, where asked for.

Before   return group_expert_select(x @ self.weight.T, bias, top_k, ...)     some 12 launches
After    return self._zmlx_selection(x @ self.weight.T, bias, top_k, ...)    one

Found as a call of one of mlx-lm's functions of that name (and of `mistral4_expert_select`), which
DeepSeek V3 and V3.2, Kimi, GLM 4.5 to 4.7, dots1, Exaone, MiMo, Bailing and Nemotron-H have. The
kernel is made of the function itself. Calls with more than 8 rows, and functions of which no kernel
can be made, run as they are. Where the block with the experts makes the call itself, `moe_mlp`
comes first; ask for this pattern without it.
"""

from __future__ import annotations

import ast
from typing import Any

import mlx.nn as nn

from zmlx.patch.calls import plain_calls, redirected
from zmlx.patch.forward import Forward, ForwardRefused, own_forward
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused
from zmlx.patch.selection import SELECTION, as_one_kernel

OPTIONS: dict[str, str] = {}

_FUNCTIONS = ("group_expert_select", "_group_expert_select", "mistral4_expert_select")
_USES = tuple(KernelUse(SELECTION, {"groups": groups}) for groups in (1, 4))


class DeepseekRouter(PatchPattern):
    """Modules that call one of mlx-lm's functions for grouped selection."""

    order = 3
    opt_in = "the decode_step program has the same kernel, and for batches nothing is measured yet"

    def name(self) -> str:
        """Return "deepseek_router"."""
        return "deepseek_router"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept a forward with one such call."""
        try:
            found = _calls(own_forward(type(module)))
        except ForwardRefused:
            return None
        if len(found) != 1:
            return None
        name = getattr(found[0][1], "__name__", "selection")

        def members(base: type) -> dict[str, Any]:
            forward = own_forward(base)
            calls = [(call, "selection", as_one_kernel(f)) for call, f in _calls(forward)]
            return redirected(forward, calls)

        return Proposal((config.backend,), members, _USES, f"{name} as one kernel")


def _calls(forward: Forward) -> list[tuple[ast.Call, Any]]:
    return [
        (call, function)
        for call, function in plain_calls(forward)
        if getattr(function, "__name__", "") in _FUNCTIONS
        and str(getattr(function, "__module__", "")).startswith("mlx_lm.models.")
    ]


PATTERN = DeepseekRouter()
