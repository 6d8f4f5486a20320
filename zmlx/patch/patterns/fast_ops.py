"""Norms, rotary embeddings and attention in one operation each.

Before   mx.fast.rms_norm(...), mx.fast.rope(...),
         mx.fast.scaled_dot_product_attention(...)       a dozen operations each, where MLX has no
                                                         kernel for the device
After    one operation each, with sums in float32

Found as calls in a module's own forward, also where the call goes through a function of the
library that only chooses how to attend. Modules in training mode, and calls with arguments that the
kernels do not take, run the stock function.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.fast import ATTENTION, RMS_NORM, ROPE
from zmlx.kernels.spec import KernelSpec
from zmlx.patch.calls import plain_calls, redirected
from zmlx.patch.forward import Forward, ForwardRefused, own_forward, parse, rewritten
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused

OPTIONS: dict[str, str] = {
    # each can be turned off
    "rms_norm": "bool",
    "rope": "bool",
    "scaled_dot_product_attention": "bool",
}

_SPECS = {spec.name: spec for spec in (RMS_NORM, ROPE, ATTENTION)}

#: what a kernel's sample takes beside the dtype
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "rope": ({"traditional": False}, {"traditional": True})
}


@dataclass(frozen=True)
class Site:
    """A call in a forward.

    Attributes:
        call: the call.
        kernel: name of the function of mlx.core.fast that it calls.
        through: a function of the library that it goes through, or None.
    """

    call: ast.Call
    kernel: str
    through: Any = None


def fast_function(function: Any) -> str | None:
    """Return the name of a function of mlx.core.fast that has a kernel here, else None."""
    for name in _SPECS:
        if function is getattr(mx.fast, name):
            return name
    return None


@cache
def sites(forward: Forward, inside: bool = False) -> tuple[Site, ...]:
    """Find the calls of a forward that kernels replace.

    Args:
        forward: what `own_forward` or `parse` returned.
        inside: whether `forward` is itself a function that a module's forward calls; such calls
            are followed one level deep.
    """
    found = []
    for call, function in plain_calls(forward):
        name = fast_function(function)
        if name is not None:
            found.append(Site(call, name))
        elif not inside and _chooses_attention(function):
            found.append(Site(call, ATTENTION.name, function))
    return tuple(found)


def _chooses_attention(function: Any) -> bool:
    """Whether a function is one of mlx-lm's that ends in mx.fast's attention."""
    if not str(getattr(function, "__module__", "")).startswith("mlx_lm.models."):
        return False
    try:
        inner = sites(parse(function), inside=True)
    except ForwardRefused:
        return False
    return [site.kernel for site in inner] == [ATTENTION.name]


class FastOps(PatchPattern):
    """Modules whose forward calls norms, rotary embeddings or attention of mlx.core.fast."""

    order = 3

    def name(self) -> str:
        """Return "fast_ops"."""
        return "fast_ops"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept a forward that holds such calls."""
        try:
            forward = own_forward(type(module))
        except ForwardRefused:
            return None
        found = [s for s in sites(forward) if config.options.get(s.kernel) is not False]
        if not found:
            return None
        names = sorted({site.kernel for site in found})
        uses = tuple(
            KernelUse(_SPECS[name], {"dtype": dtype, **variant})
            for name in names
            for dtype in (mx.float32, mx.bfloat16)
            for variant in _VARIANTS.get(name, ({},))
        )

        def members(base: type) -> dict[str, Any]:
            return _members(own_forward(base), found, config.backend)

        return Proposal((config.backend, tuple(names)), members, uses, ", ".join(names))


def _members(forward: Forward, found: list[Site], backend: str) -> dict[str, Any]:
    calls = []
    for site in found:
        function = _replacement(_SPECS[site.kernel], site.through, backend)
        calls.append((site.call, getattr(site.through, "__name__", site.kernel), function))
    return redirected(forward, calls)


def _replacement(spec: KernelSpec, through: Any, backend: str) -> Callable[..., mx.array]:
    """Return the kernel, or the library's function with the kernel in it."""
    kernel = spec.implementation(backend)
    if through is None:
        return kernel
    forward = parse(through)
    (site,) = sites(forward, inside=True)
    name = ast.Name("_zmlx_kernel", ast.Load())
    scope = {**through.__globals__, "_zmlx_kernel": kernel}
    return rewritten(forward, {site.call.func: name}, scope)  # type: ignore[no-any-return]


PATTERN = FastOps()
