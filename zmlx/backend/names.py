"""Which names a kernel, its arrays and its template may have: those that every compiler takes."""

from __future__ import annotations

from collections.abc import Sequence

from zmlx.backend.signature import ATTRIBUTES

#: Keywords of C++ that are none of Python's identifiers' business and still compile nowhere.
_CPP = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t
    class compl const constexpr const_cast continue decltype default delete do double dynamic_cast
    else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register
    reinterpret_cast return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual
    void volatile wchar_t while xor xor_eq
"""
#: What the Metal Shading Language adds: address spaces, function kinds, scalar types.
_METAL = """
    bfloat bfloat16_t constant device fragment half int16_t int32_t int64_t int8_t kernel metal
    ptrdiff_t ray_data simdgroup size_t thread threadgroup threadgroup_imageblock uchar uint
    uint16_t uint32_t uint64_t uint8_t ulong ushort vertex
"""
_RESERVED = frozenset(_CPP.split()) | frozenset(_METAL.split()) | frozenset(ATTRIBUTES)
#: What MLX appends to an input's name for its shape, strides and number of axes.
_SUFFIXES = ("_shape", "_strides", "_ndim")


def check_name(name: object, what: str) -> None:
    """Refuse a name that no compiler would take.

    Args:
        name: the name.
        what: what it names, for the message, such as "input of kernel 'exp'".

    Raises:
        TypeError: it is not a string.
        ValueError: it is not a C identifier, or a word that C++ or Metal keeps for itself.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what}: the name is {name!r}, a {type(name).__name__}; give a string")
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(
            f"{what}: {name!r} is not a C identifier; use letters, digits and _, no digit first"
        )
    if name in _RESERVED:
        raise ValueError(f"{what}: {name!r} is a word of the Metal Shading Language; rename it")


def check_names(kernel: str, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Refuse the names of a kernel and its arrays if they would not compile.

    Raises:
        TypeError: a name is not a string, or names come as one string.
        ValueError: a name is no identifier, is reserved, or is there twice; no outputs.
    """
    check_name(kernel, "kernel")
    for what, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise TypeError(f"kernel {kernel!r}: {what}={names!r} is a string; give a list of them")
        for name in names:
            check_name(name, f"kernel {kernel!r}, {what}")
    if not output_names:
        raise ValueError(f"kernel {kernel!r} has no outputs; name at least one in output_names")
    taken: set[str] = set()
    for name in (*input_names, *output_names):
        if name in taken:
            raise ValueError(f"kernel {kernel!r}: {name!r} names two arrays; rename one")
        taken.add(name)
    for name in input_names:
        for suffix in _SUFFIXES:
            if name + suffix in taken:
                raise ValueError(
                    f"kernel {kernel!r}: {name + suffix!r} is the {suffix[1:]} of input {name!r} "
                    "in a source; rename that array"
                )
