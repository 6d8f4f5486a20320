"""Where MLX runs here, and where kernels do: Metal, CUDA, CPU; the emulator; the references."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from zmlx_autopatch import variables

#: Backends in the order in which MLX prefers them.
BACKENDS = ("metal", "cuda", "cpu")
#: Values of ZMLX_BACKEND.
CHOICES = ("auto", "metal", "cuda", "emulator", "reference")

_chosen = variables.peeker("ZMLX_BACKEND")


def current() -> str:
    """Return the backend of MLX's default device: "metal", "cuda" or "cpu"."""
    return _of(mx.default_device().type)


def for_kernels(
    *, has_reference: bool, stream: mx.Stream | mx.Device | mx.DeviceType | None = None
) -> str:
    """Return where a kernel with a Metal source runs now.

    It is where MLX's default device is. On the CPU it is the kernel's reference or, for a kernel
    without one, the emulator. ZMLX_BACKEND chooses otherwise. Neither is remembered: a call after
    `mx.set_default_device`, inside `mx.stream` or after a change of `os.environ` sees it. Only
    what follows from both is, so that asking at each launch costs some 0.3 microseconds.

    Args:
        has_reference: whether the kernel has a reference in MLX operations.
        stream: the stream or device that the launch was given, in place of the default device.

    Returns:
        "metal", "cuda", "emulator" or "reference".

    Raises:
        zmlx_autopatch.variables.VariableError: ZMLX_BACKEND names no backend, one that is not
            here, or the reference of a kernel that has none.
    """
    device = mx.default_device().type if stream is None else _type_of(stream)
    return _resolved(_chosen(), device, has_reference)


def _type_of(place: mx.Stream | mx.Device | mx.DeviceType) -> mx.DeviceType:
    if isinstance(place, mx.DeviceType):
        return place
    device = place if isinstance(place, mx.Device) else place.device
    return device.type


def forget() -> None:
    """Look anew at what this process has; for tests that fake `mx.metal.is_available`."""
    _of.cache_clear()
    _resolved.cache_clear()


@cache
def _of(device: mx.DeviceType) -> str:
    if device == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@cache
def _resolved(_: object, device: mx.DeviceType, has_reference: bool) -> str:
    """Resolve once for each value of the variable, which is the first argument as it is stored."""
    chosen = variables.choice("ZMLX_BACKEND", CHOICES)
    here = _of(device)
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
