"""What kernels are run with: the values that parameters of their samples take."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend.signature import dtype_name
from zmlx.kernels.spec import KernelSpec

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)

#: parameter of a sample -> its values; lengths are around sizes of simdgroups and threadgroups
VALUES: Mapping[str, Sequence[Any]] = {
    "packing": (
        *(
            ("affine", group_size, bits)
            for group_size in (32, 64, 128)
            for bits in (2, 3, 4, 5, 6, 8)
        ),
        ("mxfp4", 32, 4),
        ("nvfp4", 16, 4),
        ("mxfp8", 32, 8),
        ("dense", 0, 0),
    ),
    "dtype": _FLOATS,
    "scale_dtype": _FLOATS,
    "activation": ("silu", "gelu", "gelu_tanh"),
    "traditional": (False, True),
    "length": (3, 33, 255, 1025),
}


def configurations(spec: KernelSpec) -> list[dict[str, Any]]:
    """Return the keyword arguments of a kernel's sample, every combination of them.

    Raises:
        KeyError: a parameter of the sample has values neither in `VALUES` nor in the spec.
    """
    names = list(inspect.signature(spec.sample).parameters)
    known = {**VALUES, **spec.values}
    values = [known[name] for name in names]
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]


def in_words(configuration: Mapping[str, Any]) -> str:
    """Return a configuration as text, such as "float16, length 33"."""
    return ", ".join(
        dtype_name(value) if isinstance(value, mx.Dtype) else f"{name} {value}"
        for name, value in configuration.items()
    )
