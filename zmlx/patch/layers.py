"""Patterns over single layers: a table of the library's classes, and what replaces each.

On GPUs only large quantized weights gain. A launch of ours and one of MLX's read the same bytes,
but ours costs the host some 3 to 6 microseconds more (it is a custom kernel, and a step of a model
is bound by the host), so it has to win that back: ours reads at most a third faster, 0.1
microseconds for each MiB. An output head of 100 to 200 MiB does, for every token; a projection of 1
to 10 MiB does not, and the programs of decode_step take those together anyway. More rows than the
kernels take go to the stock operation after one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.quantized import GATHER_QUANTIZED_MATMUL, LOOKUP, QUANTIZED_MATMUL
from zmlx.kernels.spec import KernelSpec
from zmlx.kernels.vectors.fused import few_rows
from zmlx.patch.activations import product_kernel
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused
from zmlx.patch.weights import form, kernel_configuration, parts, refusal

#: the kernels -> builds the members of a replacement from the class that it replaces
Members = Callable[..., Callable[[type], dict[str, Any]]]

#: MiB of a quantized weight from which on a kernel of ours pays on a GPU
LEAST_MIB = 32


@dataclass(frozen=True)
class Kind:
    """How layers of a class are replaced.

    Attributes:
        kernels: those that a CPU uses.
        members: builds the members of the replacement from their implementations.
        on_gpus: the same on GPUs, from the product alone; None where MLX's operation stays.
    """

    kernels: tuple[KernelSpec, ...]
    members: Members
    on_gpus: Members | None = None


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
        reason = refusal(module) or _gpu_refusal(module, known, config)
        if reason is not None:
            return Refused(reason)
        specs, members = known.kernels, known.members
        if config.backend != "cpu" and known.on_gpus is not None:
            specs, members = (QUANTIZED_MATMUL,), known.on_gpus
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


def _gpu_refusal(module: nn.Module, kind: Kind, config: PatchConfig) -> str | None:
    """Return why MLX's own operation stays on a GPU, or None."""
    if config.backend == "cpu":
        return None
    if "scales" not in module:
        return (
            "on GPUs MLX's own product of plain floats stays: it has float32 sums, and is no slower"
        )
    if kind.on_gpus is None:
        return "on GPUs MLX's own operation stays: one launch for another gains nothing"
    least = int(config.options.get("least_mib", LEAST_MIB))
    size = sum(module[name].nbytes for name in ("weight", "scales", "biases") if name in module)
    if size >= least << 20:
        return None
    return (
        f"weights of less than {least} MiB: on GPUs a launch costs more than it gains"
        " (option least_mib)"
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


def _few_rows(kernel: Any) -> Callable[[type], dict[str, Any]]:
    """Return what replaces a linear layer on a GPU."""

    def namespace(base: type) -> dict[str, Any]:
        return {"__call__": _for_few(kernel, base.__call__)}

    return namespace


def _few_rows_tied(kernel: Any) -> Callable[[type], dict[str, Any]]:
    """Return what replaces an embedding's use as output projection on a GPU."""

    def namespace(base: type) -> dict[str, Any]:
        return {"as_linear": _for_few(kernel, base.as_linear)}  # type: ignore[attr-defined]

    return namespace


def _for_few(kernel: Any, stock: Any) -> Callable[[Any, mx.array], mx.array]:
    def product(self: Any, x: mx.array) -> mx.array:
        if not few_rows(x) or self._training:
            return stock(self, x)  # type: ignore[no-any-return]
        return kernel(x, *parts(self), self.get("bias"), **form(self))  # type: ignore[no-any-return]

    return product


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


QUANTIZED_LINEAR = Kind((QUANTIZED_MATMUL,), _quantized_linear, _few_rows)
LINEAR = Kind((QUANTIZED_MATMUL,), _dense_linear)
EMBEDDING = Kind((LOOKUP, QUANTIZED_MATMUL), _embedding, _few_rows_tied)
SWITCH_LINEAR = Kind((GATHER_QUANTIZED_MATMUL,), _switch_linear)
MULTI_LINEAR = Kind((GATHER_QUANTIZED_MATMUL,), _multi_linear)
