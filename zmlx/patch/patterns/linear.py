"""Layers whose weights are plain floats read them with the fused kernels.

Before   y = x @ w.T [+ bias]                                 Linear
         y = mx.gather_mm(x, w.T, rhs_indices=i)              SwitchLinear
After    one kernel each, sums in float32, bias added before the only rounding.

Also `Embedding.as_linear` and the products per head of latent attention (MultiLinear): routers of
quantized models, and models that are not quantized. Layers in training mode run the stock
operation. On GPUs MLX's own operations stay: they have float32 sums too.
"""

from __future__ import annotations

from zmlx.patch.layers import EMBEDDING, LINEAR, MULTI_LINEAR, SWITCH_LINEAR, LayerPattern

OPTIONS: dict[str, str] = {}

PATTERN = LayerPattern(
    "linear",
    {
        ("mlx.nn.layers.linear", "Linear"): LINEAR,
        ("mlx.nn.layers.embedding", "Embedding"): EMBEDDING,
        ("mlx_lm.models.switch_layers", "SwitchLinear"): SWITCH_LINEAR,
        ("mlx_lm.models.mla", "MultiLinear"): MULTI_LINEAR,
    },
)
