"""Layers with quantized weights read them with the fused kernels.

Before   y = mx.quantized_matmul(x, w, s, b) [+ bias]         QuantizedLinear
         y = mx.gather_qmm(x, w, s, b, rhs_indices=i)         QuantizedSwitchLinear
After    one kernel each, sums in float32, bias added before the only rounding.

Also `QuantizedEmbedding.as_linear`, the output projection of models with tied embeddings, and the
products per head of latent attention (QuantizedMultiLinear). All modes of `mx.quantize`. Layers in
training mode, and shapes or dtypes that a kernel does not take, run the stock operation.

On GPUs only large weights are replaced, in effect the output head, for up to 8 rows; why is said in
`zmlx.patch.layers`.
"""

from __future__ import annotations

import mlx.nn as nn

from zmlx.patch.layers import (
    EMBEDDING,
    MULTI_LINEAR,
    QUANTIZED_LINEAR,
    SWITCH_LINEAR,
    LayerPattern,
)
from zmlx.patch.pattern import PatchConfig, Proposal, Refused

OPTIONS: dict[str, str] = {
    # bits that activations may be rounded to, 8 or 16, where that is faster
    "activation_bits": "int",
    # on GPUs: MiB of a weight from which on it is replaced
    "least_mib": "int",
}


class QuantizedLinear(LayerPattern):
    """Quantized linear layers, embeddings used as output projections, and expert layers."""

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept the library's own classes; name those that look like them."""
        verdict = super().examine(module, path, parent, config)
        if verdict is None and "scales" in module and "weight" in module:
            return Refused(f"{type(module).__name__} is not a quantized layer that we know")
        return verdict


PATTERN = QuantizedLinear(
    "quantized_linear",
    {
        ("mlx.nn.layers.quantized", "QuantizedLinear"): QUANTIZED_LINEAR,
        ("mlx.nn.layers.quantized", "QuantizedEmbedding"): EMBEDDING,
        ("mlx_lm.models.switch_layers", "QuantizedSwitchLinear"): SWITCH_LINEAR,
        ("mlx_lm.models.mla", "QuantizedMultiLinear"): MULTI_LINEAR,
    },
)
