"""The gated product of a dense SwiGLU MLP in one pass over its two weights.

Before   self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
After    self.down_proj(quantized_glu(x, gate weights, up weights))

The names are whatever the model calls them; the expression is found in the model's own forward, and
nothing else of that forward changes.
"""

from __future__ import annotations

from zmlx.patch.gated import GatedMLP

OPTIONS: dict[str, str] = {
    # bits that activations may be rounded to, 8 or 16, where that is faster
    "activation_bits": "int",
}

PATTERN = GatedMLP("swiglu_mlp", frozenset({"silu"}))
