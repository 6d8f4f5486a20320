"""How values of a program are written in a kernel: their types, and constants of one element."""

from __future__ import annotations

import math

import mlx.core as mx

from zmlx.backend.signature import TYPE_NAMES, dtype_name

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
SIGNED = (mx.int8, mx.int16, mx.int32, mx.int64)
WIDE = (mx.int64, mx.uint64)

#: dtypes that programs compute with.
DTYPES = (*FLOATS, *SIGNED, mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64)


def type_name(dtype: mx.Dtype) -> str:
    """Return a dtype as a kernel writes it; short words for those of 32 bits."""
    return {mx.uint32: "uint", mx.int32: "int"}.get(dtype) or TYPE_NAMES[dtype]


def literal(value: bool | int | float, dtype: mx.Dtype) -> str:
    """Return a number as a constant of a dtype, with all its bits.

    Raises:
        ValueError: a program does not compute with the dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a program does not compute with {dtype_name(dtype)}")
    if dtype == mx.bool_:
        return "true" if value else "false"
    if dtype in FLOATS:
        text = _float(float(value))
        return text if dtype == mx.float32 else f"{type_name(dtype)}({text})"
    if dtype == mx.int32 and int(value) > -(1 << 31):
        return f"({int(value)})" if value < 0 else str(int(value))
    if dtype == mx.uint32:
        return f"{int(value)}u"
    if dtype in WIDE:
        return f"{type_name(dtype)}({_wide(int(value))})"
    return f"{type_name(dtype)}({int(value)})"


def _float(value: float) -> str:
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = format(value, ".9g")
    if "." not in text and "e" not in text:
        text += ".0"
    return f"({text}f)" if value < 0 or text.startswith("-") else f"{text}f"


def _wide(value: int) -> str:
    """Write a number of 64 bits in two halves: there is no one suffix for all languages."""
    bits = value % (1 << 64)
    return f"(ulong({bits >> 32}u) << 32) | ulong({bits & 0xFFFFFFFF}u)"
