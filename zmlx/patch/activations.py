"""How many bits of activations the products of a pattern keep: its option `activation_bits`."""

from __future__ import annotations

from zmlx.kernels.short_activations import SHORT
from zmlx.kernels.spec import KernelSpec
from zmlx.patch.pattern import PatchConfig

_WIDTHS = (8, 16)


def activation_bits(config: PatchConfig) -> int:
    """Return the bits that the option asks for; 16 if it is not there.

    Raises:
        ValueError: it asks for another number than 8 or 16.
    """
    bits = int(config.options.get("activation_bits", 16))
    if bits not in _WIDTHS:
        raise ValueError(f"activation_bits = {bits}: the kernels keep 8 or 16 bits of activations")
    return bits


def product_kernel(spec: KernelSpec, config: PatchConfig, *, quantized: bool = True) -> KernelSpec:
    """Return the kernel of a product for the bits of activations that are asked for.

    The option is a wish: the kernel itself is returned where there is none for 8 bits, where the
    weight is not quantized, and where the profile does not admit what rounding them costs.

    Raises:
        ValueError: as `activation_bits`.
    """
    short = SHORT.get(spec.name)
    if activation_bits(config) == 16 or short is None or not quantized:
        return spec
    contract = short.contract.get(config.backend)
    return short if contract is not None and contract in config.admits else spec
