"""What kernels are run with: the values that parameters of their samples take."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend.signature import dtype_name
from zmlx.kernels.spec import SOURCE_BACKENDS, KernelSpec

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


def configurations(spec: KernelSpec, backend: str = "") -> list[dict[str, Any]]:
    """Return the keyword arguments of a kernel's sample, every combination of them.

    Of a kernel whose source is another one for each of them, on a backend that compiles sources,
    there are as many as its longest list of values has, and every value is in one of them.

    Raises:
        KeyError: a parameter of the sample has values neither in `VALUES` nor in the spec.
    """
    names = list(inspect.signature(spec.sample).parameters)
    known = {**VALUES, **spec.values}
    values = [known[name] for name in names]
    if spec.fused is not None and backend in SOURCE_BACKENDS:
        return [dict(zip(names, chosen, strict=True)) for chosen in _turning(values)]
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]


def _turning(values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return choices in which every value is, none of which repeats its neighbour's pairs."""
    longest = max(len(some) for some in values)
    # The n-th list moves on by n more when it starts over, so that lists of one length part.
    return [
        tuple(some[(i + n * (i // len(some))) % len(some)] for n, some in enumerate(values))
        for i in range(longest)
    ]


def in_words(configuration: Mapping[str, Any]) -> str:
    """Return a configuration as text, such as "float16, length 33"."""
    return ", ".join(
        dtype_name(value) if isinstance(value, mx.Dtype) else f"{name} {value}"
        for name, value in configuration.items()
    )
