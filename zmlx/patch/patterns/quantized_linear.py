"""Layers with affine-quantized weights read them with the fused kernels.

Before   y = mx.quantized_matmul(x, w, s, b) [+ bias]         QuantizedLinear
         y = mx.gather_qmm(x, w, s, b, rhs_indices=i)         QuantizedSwitchLinear
After    one kernel each, sums in float32, bias added before the only rounding.

Also `QuantizedEmbedding.as_linear`, the output projection of models with tied embeddings, and the
products per head of latent attention (QuantizedMultiLinear). Layers in training mode, and shapes or
dtypes that a kernel does not take, run the stock operation.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.quantized import GATHER_QUANTIZED_MATMUL, QUANTIZED_MATMUL
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused
from zmlx.patch.quantization import affine, kernel_configuration

OPTIONS: dict[str, str] = {}


def _linear(backend: str) -> Any:
    quantized_matmul = QUANTIZED_MATMUL.implementation(backend)

    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        def __call__(self: Any, x: mx.array) -> mx.array:
            if self._training:
                return stock(self, x)  # type: ignore[no-any-return]
            return quantized_matmul(
                x,
                self["weight"],
                self["scales"],
                self["biases"],
                self.get("bias"),
                group_size=self.group_size,
                bits=self.bits,
            )

        return {"__call__": __call__}

    return namespace


def _embedding(backend: str) -> Any:
    quantized_matmul = QUANTIZED_MATMUL.implementation(backend)

    def namespace(base: type) -> dict[str, Any]:
        stock = base.as_linear  # type: ignore[attr-defined]

        def as_linear(self: Any, x: mx.array) -> mx.array:
            if self._training:
                return stock(self, x)  # type: ignore[no-any-return]
            return quantized_matmul(
                x,
                self["weight"],
                self["scales"],
                self["biases"],
                group_size=self.group_size,
                bits=self.bits,
            )

        return {"as_linear": as_linear}

    return namespace


def _switch_linear(backend: str) -> Any:
    gather = GATHER_QUANTIZED_MATMUL.implementation(backend)

    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        def __call__(
            self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False
        ) -> mx.array:
            if self._training:
                return stock(self, x, indices, sorted_indices)  # type: ignore[no-any-return]
            y = gather(
                x,
                self["weight"],
                self["scales"],
                self["biases"],
                indices,
                group_size=self.group_size,
                bits=self.bits,
            )
            if "bias" in self:
                y = y + mx.expand_dims(self["bias"][indices], -2)
            return y

        return {"__call__": __call__}

    return namespace


def _multi_linear(backend: str) -> Any:
    gather = GATHER_QUANTIZED_MATMUL.implementation(backend)

    def namespace(base: type) -> dict[str, Any]:
        stock = base.__call__

        def __call__(self: Any, x: mx.array, transpose: bool = True) -> mx.array:
            heads = self["weight"].shape[0]
            if self._training or not transpose or x.ndim != 4 or x.shape[1] != heads:
                return stock(self, x, transpose)  # type: ignore[no-any-return]
            # Each head is an expert that every token of that head chooses.
            head = mx.arange(heads, dtype=mx.uint32)[None, :, None]
            y = gather(
                x[..., None, :],
                self["weight"],
                self["scales"],
                self["biases"],
                mx.broadcast_to(head, x.shape[:-1]),
                group_size=self.group_size,
                bits=self.bits,
            )
            return y.squeeze(-2)

        return {"__call__": __call__}

    return namespace


#: class, by the module that defines it -> (kernel, members of the replacement, what is replaced)
_LAYERS = {
    ("mlx.nn.layers.quantized", "QuantizedLinear"): (QUANTIZED_MATMUL, _linear, "__call__"),
    ("mlx.nn.layers.quantized", "QuantizedEmbedding"): (QUANTIZED_MATMUL, _embedding, "as_linear"),
    ("mlx_lm.models.switch_layers", "QuantizedSwitchLinear"): (
        GATHER_QUANTIZED_MATMUL,
        _switch_linear,
        "__call__",
    ),
    ("mlx_lm.models.mla", "QuantizedMultiLinear"): (
        GATHER_QUANTIZED_MATMUL,
        _multi_linear,
        "__call__",
    ),
}


class QuantizedLinear(PatchPattern):
    """Quantized linear layers, embeddings used as output projections, and expert layers."""

    order = 2

    def name(self) -> str:
        """Return "quantized_linear"."""
        return "quantized_linear"

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept the library's own classes in affine mode."""
        cls = type(module)
        known = _LAYERS.get((cls.__module__, cls.__qualname__))
        if known is None:
            if "scales" in module and "weight" in module:
                return Refused(f"{cls.__name__} is not a quantized layer that we know")
            return None
        spec, members, method = known
        reason = affine(module)
        if reason is not None:
            return Refused(reason)
        try:
            if method == "__call__":
                own_forward(cls)
        except ForwardRefused as refusal:
            return Refused(str(refusal))
        use = KernelUse(spec, kernel_configuration(module))
        return Proposal(
            (config.backend,), lambda base: members(config.backend)(base), (use,), f"{spec.name}"
        )


PATTERN = QuantizedLinear()
