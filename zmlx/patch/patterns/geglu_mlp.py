"""The gated product of a dense GeGLU MLP in one pass over its two weights.

Before   self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
After    self.down_proj(quantized_glu(x, gate weights, up weights))

As `swiglu_mlp`, for the two GELUs of mlx.nn: `gelu` and `gelu_approx` (tanh).
"""

from __future__ import annotations

from zmlx.patch.gated import GatedMLP

OPTIONS: dict[str, str] = {
    # bits that activations may be rounded to, 8 or 16, where that is faster
    "activation_bits": "int",
}

PATTERN = GatedMLP("geglu_mlp", frozenset({"gelu", "gelu_tanh"}))
