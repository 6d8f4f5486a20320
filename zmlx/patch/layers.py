"""Patterns over single layers: a table of the library's classes, and what replaces each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.quantized import GATHER_QUANTIZED_MATMUL, LOOKUP, QUANTIZED_MATMUL
from zmlx.kernels.spec import KernelSpec
from zmlx.patch.activations import product_kernel
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused
from zmlx.patch.weights import form, kernel_configuration, parts, refusal

#: the kernels -> builds the members of a replacement from the class that it replaces
Members = Callable[..., Callable[[type], dict[str, Any]]]

#: kernels, members
Kind = tuple[tuple[KernelSpec, ...], Members]

#: class, by the module that defines it -> kind
Layers = Mapping[tuple[str, str], Kind]


class LayerPattern(PatchPattern):
    """Replaces the forward of layers of certain classes, each with one kernel."""

    order = 2

    def __init__(self, name: str, layers: Layers) -> None:
        self._name = name
        self._layers = layers

    def name(self) -> str:
        """Return the pattern's name."""
        return self._name

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept the library's own classes, with weights that the kernels take."""
        cls = type(module)
        known = self._layers.get((cls.__module__, cls.__qualname__))
        if known is None:
            return None
        specs, members = known
        reason = refusal(module)
        if reason is not None:
            return Refused(reason)
        try:
            own_forward(cls)
            quantized = "scales" in module
            specs = tuple(product_kernel(spec, config, quantized=quantized) for spec in specs)
        except (ForwardRefused, ValueError) as refused:
            return Refused(str(refused))
        return Proposal(
            (config.backend, specs),
            lambda base: members(*(spec.implementation(config.backend) for spec in specs))(base),
            tuple(KernelUse(spec, kernel_configuration(module, spec)) for spec in specs),
            " and ".join(spec.name for spec in specs),
        )


def _quantized_linear(kernel: Any) -> Callable[[type], dict[str, Any]]:
    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        # The most frequent call of a step: it does not go through `parts` and `form`.
        def __call__(self: Any, x: mx.array) -> mx.array:
            if self._training:
                return stock(self, x)  # type: ignore[no-any-return]
            get = self.get
            return kernel(  # type: ignore[no-any-return]
                x,
                self["weight"],
                self["scales"],
                get("biases"),
                get("bias"),
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )

        return {"__call__": __call__}

    return namespace


def _dense_linear(kernel: Any) -> Callable[[type], dict[str, Any]]:
    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        def __call__(self: Any, x: mx.array) -> mx.array:
            if self._training:
                return stock(self, x)  # type: ignore[no-any-return]
            return kernel(x, *parts(self), self.get("bias"), **form(self))  # type: ignore[no-any-return]

        return {"__call__": __call__}

    return namespace


def _embedding(lookup: Any, kernel: Any) -> Callable[[type], dict[str, Any]]:
    def namespace(base: type) -> dict[str, Any]:
        stock, stock_linear = base.__call__, base.as_linear  # type: ignore[attr-defined]

        def __call__(self: Any, x: mx.array) -> mx.array:
            if self._training:
                return stock(self, x)  # type: ignore[no-any-return]
            return lookup(x, *parts(self), **form(self))  # type: ignore[no-any-return]

        def as_linear(self: Any, x: mx.array) -> mx.array:
            if self._training:
                return stock_linear(self, x)  # type: ignore[no-any-return]
            return kernel(x, *parts(self), **form(self))  # type: ignore[no-any-return]

        return {"__call__": __call__, "as_linear": as_linear}

    return namespace


def _switch_linear(kernel: Any) -> Callable[[type], dict[str, Any]]:
    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        def __call__(
            self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False
        ) -> mx.array:
            if self._training:
                return stock(self, x, indices, sorted_indices)  # type: ignore[no-any-return]
            y = kernel(x, *parts(self), indices, **form(self))
            if "bias" in self:
                y = y + mx.expand_dims(self["bias"][indices], -2)
            return y  # type: ignore[no-any-return]

        return {"__call__": __call__}

    return namespace


def _multi_linear(kernel: Any) -> Callable[[type], dict[str, Any]]:
    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        def __call__(self: Any, x: mx.array, transpose: bool = True) -> mx.array:
            heads = self["weight"].shape[0]
            if self._training or not transpose or x.ndim != 4 or x.shape[1] != heads:
                return stock(self, x, transpose)  # type: ignore[no-any-return]
            # Each head is an expert that every token of that head chooses.
            head = mx.arange(heads, dtype=mx.uint32)[None, :, None]
            chosen = mx.broadcast_to(head, x.shape[:-1])
            return kernel(x[..., None, :], *parts(self), chosen, **form(self)).squeeze(-2)  # type: ignore[no-any-return]

        return {"__call__": __call__}

    return namespace


QUANTIZED_LINEAR: Kind = ((QUANTIZED_MATMUL,), _quantized_linear)
LINEAR: Kind = ((QUANTIZED_MATMUL,), _dense_linear)
EMBEDDING: Kind = ((LOOKUP, QUANTIZED_MATMUL), _embedding)
SWITCH_LINEAR: Kind = ((GATHER_QUANTIZED_MATMUL,), _switch_linear)
MULTI_LINEAR: Kind = ((GATHER_QUANTIZED_MATMUL,), _multi_linear)
