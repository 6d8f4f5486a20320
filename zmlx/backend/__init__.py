"""Where MLX runs here, and where kernels do: Metal, CUDA, CPU; the emulator; the references."""

from __future__ import annotations

import mlx.core as mx

from zmlx_autopatch import variables

#: Backends in the order in which MLX prefers them.
BACKENDS = ("metal", "cuda", "cpu")
#: Values of ZMLX_BACKEND.
CHOICES = ("auto", "metal", "cuda", "emulator", "reference")


def current() -> str:
    """Return the backend of MLX's default device: "metal", "cuda" or "cpu"."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def for_kernels(*, has_reference: bool) -> str:
    """Return where a kernel with a Metal source runs now.

    It is where MLX's default device is. On the CPU it is the kernel's reference or, for a kernel
    without one, the emulator. ZMLX_BACKEND chooses otherwise.

    Args:
        has_reference: whether the kernel has a reference in MLX operations.

    Returns:
        "metal", "cuda", "emulator" or "reference".

    Raises:
        zmlx_autopatch.variables.VariableError: ZMLX_BACKEND names no backend, one that is not
            here, or the reference of a kernel that has none.
    """
    chosen = variables.choice("ZMLX_BACKEND", CHOICES)
    here = current()
    if chosen == "auto":
        return here if here != "cpu" else "reference" if has_reference else "emulator"
    if chosen in BACKENDS and chosen != here:
        raise variables.VariableError(
            f"ZMLX_BACKEND={chosen}: MLX's default device here is {here}; "
            "leave the variable unset, or take 'emulator' or 'reference'"
        )
    if chosen == "reference" and not has_reference:
        raise variables.VariableError(
            "ZMLX_BACKEND=reference: this kernel has a source and no reference; take 'emulator'"
        )
    return chosen
