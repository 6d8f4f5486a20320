"""The types that values have inside a kernel, and how C combines them.

Floating point is float32, whatever the arrays hold. Integers of 8 and 16 bits become int32, as in
C; wider ones stay what they are.
"""

from __future__ import annotations

import mlx.core as mx

#: type inside a kernel -> MLX's dtype, in the order in which C widens them
TYPES: dict[str, mx.Dtype] = {
    "bool": mx.bool_,
    "int": mx.int32,
    "uint": mx.uint32,
    "int64_t": mx.int64,
    "uint64_t": mx.uint64,
    "float": mx.float32,
}
_RANK = {kind: rank for rank, kind in enumerate(TYPES)}

#: dtype of an array -> type of its elements inside a kernel
_INSIDE: dict[mx.Dtype, str] = {
    mx.float32: "float",
    mx.float16: "float",
    mx.bfloat16: "float",
    mx.bool_: "bool",
    mx.int8: "int",
    mx.int16: "int",
    mx.uint8: "int",
    mx.uint16: "int",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.int64: "int64_t",
    mx.uint64: "uint64_t",
}

#: type that a formula may convert to -> dtype that the value is rounded or cut to
CASTS: dict[str, mx.Dtype] = {
    "float": mx.float32,
    "half": mx.float16,
    "float16_t": mx.float16,
    "bfloat": mx.bfloat16,
    "bfloat16_t": mx.bfloat16,
    "bool": mx.bool_,
    "char": mx.int8,
    "int8_t": mx.int8,
    "uchar": mx.uint8,
    "uint8_t": mx.uint8,
    "short": mx.int16,
    "int16_t": mx.int16,
    "ushort": mx.uint16,
    "uint16_t": mx.uint16,
    "int": mx.int32,
    "int32_t": mx.int32,
    "uint": mx.uint32,
    "uint32_t": mx.uint32,
    "long": mx.int64,
    "int64_t": mx.int64,
    "ulong": mx.uint64,
    "uint64_t": mx.uint64,
    "size_t": mx.uint64,
}

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def inside(dtype: mx.Dtype) -> str | None:
    """Return the type that elements of an array have in a kernel; None for complex and float64."""
    return _INSIDE.get(dtype)


def promoted(kind: str) -> str:
    """Return what C makes of one operand of arithmetic."""
    return "int" if kind == "bool" else kind


def common(*kinds: str) -> str:
    """Return the type in which C combines these."""
    return max((promoted(kind) for kind in kinds), key=_RANK.__getitem__)
