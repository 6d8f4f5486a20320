"""From a `Definition` and one call's arguments to the text of a Metal kernel, as MLX writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from zmlx.backend.definition import Definition, Template
from zmlx.backend.emulator import rewriting
from zmlx.backend.signature import ATTRIBUTES, CONSTANT_BELOW, TYPE_NAMES

#: attribute -> expression of the emulator's `Position`, where it is no field of that name
_COMPUTED = {
    "dispatch_quadgroups_per_threadgroup": "8 * p.dispatch_simdgroups_per_threadgroup",
    "grid_origin": "zmlx_origin",
    "grid_size": "p.threads_per_grid",
    "quadgroup_index_in_threadgroup": "p.thread_index_in_threadgroup / 4",
    "quadgroups_per_threadgroup": "8 * p.simdgroups_per_threadgroup",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "p.thread_index_in_simdgroup % 4",
    "threads_per_simdgroup": "32u",
}

#: What a parameter is given, in the order of `Part` in emulated.cpp.
DATA, SHAPE, STRIDES, NDIM, OUTPUT, ABSENT, UPDATED = range(7)


@dataclass(frozen=True)
class Signature:
    """What of a call shapes the kernel's text.

    Attributes:
        inputs: for each its dtype, whether it is a scalar, and whether it is small.
        outputs: dtypes.
        template: the template's values.
    """

    inputs: tuple[tuple[mx.Dtype, bool, bool], ...]
    outputs: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, mx.Dtype | int | bool], ...]

    @classmethod
    def of(
        cls, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype], template: Template | None
    ) -> Signature:
        """Return the signature of a call."""
        return cls(
            tuple((a.dtype, a.ndim == 0, a.size < CONSTANT_BELOW) for a in inputs),
            tuple(outputs),
            tuple((name, value) for name, value in template or ()),
        )


@dataclass(frozen=True)
class Assembled:
    """A kernel's text, and what its parameters are given.

    Attributes:
        metal: the text as MLX would hand it to Metal's compiler.
        text: the text for the C++ compiler, without the prelude.
        parameters: for each parameter what it is given, the input's or output's index, its name.
    """

    metal: str
    text: str
    parameters: tuple[tuple[int, int, str], ...]


def type_name(dtype: mx.Dtype) -> str:
    """Return a dtype's name in kernels.

    Raises:
        ValueError: kernels have no such type (float64).
    """
    if dtype not in TYPE_NAMES:
        raise ValueError(f"{dtype} is no type of Metal")
    return TYPE_NAMES[dtype]


def assembled(definition: Definition, signature: Signature) -> Assembled:
    """Write the kernel of a definition for one signature."""
    parameters = tuple(_parameters(definition, signature))
    attributes = [name for name in ATTRIBUTES if name in definition.source]
    declared = [_declared(definition, signature, parameter) for parameter in parameters]
    declared += [f"{ATTRIBUTES[name]} {name} [[{name}]]" for name in attributes]
    function = f"custom_kernel_{definition.name}"
    template = _template_head(signature)
    head = f"{template}[[kernel]] void {function}(\n  " + ",\n  ".join(declared) + ") {\n"
    metal = f"{definition.header}{head}{definition.source}\n}}\n"
    body = rewriting.threadgroup_variables(definition.source)
    header = rewriting.threadgroup_variables(definition.header)
    text = "\n".join(
        (
            f'#line 1 "{definition.name} (header)"',
            header,
            f'#line 1 "{definition.name} (signature)"',
            head.rstrip("\n"),
            f'#line 1 "{definition.name} (body)"',
            body,
            "}",
            '#line 1 "entry"',
            entry(
                function + _template_values(signature),
                [_argument(signature, index, part) for index, part in enumerate(parameters)]
                + [position(name) for name in attributes],
            ),
        )
    )
    return Assembled(metal, text, parameters)


def entry(function: str, arguments: Sequence[str]) -> str:
    """Return the function that the emulator calls for each thread."""
    return (
        "static const uint32_t zmlx_origin[3] = {0, 0, 0};\n"
        'extern "C" __attribute__((visibility("default"), no_sanitize("thread")))\n'
        "void zmlx_entry(void* const* b, const zmlx::emulator::Position* at) {\n"
        "  const zmlx::emulator::Position& p = *at;\n"
        f"  {function}(\n      " + ",\n      ".join(arguments) + ");\n}\n"
    )


def position(attribute: str) -> str:
    """Return what a parameter with a Metal attribute of the thread's position is given."""
    value = _COMPUTED.get(attribute, f"p.{attribute}")
    return f"zmlx::Coordinates{{{value}}}" if ATTRIBUTES[attribute] == "uint3" else f"uint({value})"


@cache
def _shape_parts(definition: Definition) -> tuple[tuple[int, ...], ...]:
    """Return, by input, which of shape, strides and ndim the source names."""
    return tuple(
        tuple(
            part
            for part, suffix in ((SHAPE, "shape"), (STRIDES, "strides"), (NDIM, "ndim"))
            if f"{name}_{suffix}" in definition.source
        )
        for name in definition.input_names
    )


def _parameters(definition: Definition, signature: Signature) -> list[tuple[int, int, str]]:
    suffix = {SHAPE: "_shape", STRIDES: "_strides", NDIM: "_ndim"}
    found = []
    for index, name in enumerate(definition.input_names):
        found.append((UPDATED if name in definition.updated_inputs else DATA, index, name))
        if not signature.inputs[index][1]:
            found += [
                (part, index, name + suffix[part]) for part in _shape_parts(definition)[index]
            ]
    found += [(OUTPUT, index, name) for index, name in enumerate(definition.output_names)]
    return found


def _declared(definition: Definition, signature: Signature, parameter: tuple[int, int, str]) -> str:
    part, index, name = parameter
    if part == SHAPE:
        return f"const constant int* {name}"
    if part == STRIDES:
        return f"const constant int64_t* {name}"
    if part == NDIM:
        return f"const constant int& {name}"
    if part == OUTPUT:
        kind = type_name(signature.outputs[index])
        return f"device {f'atomic<{kind}>' if definition.atomic_outputs else kind}* {name}"
    dtype, scalar, small = signature.inputs[index]
    space = "constant" if small else "device"
    return f"const {space} {type_name(dtype)}{'&' if scalar else '*'} {name}"


def _argument(signature: Signature, index: int, parameter: tuple[int, int, str]) -> str:
    part, source, _ = parameter
    reference = part == NDIM or (part in (DATA, UPDATED) and signature.inputs[source][1])
    return f"zmlx::{'Reference' if reference else 'Pointer'}{{b[{index}]}}"


def _template_head(signature: Signature) -> str:
    if not signature.template:
        return ""
    kinds = ", ".join(
        f"{'bool' if isinstance(v, bool) else 'int' if isinstance(v, int) else 'typename'} {name}"
        for name, v in signature.template
    )
    return f"template <{kinds}>\n"


def _template_values(signature: Signature) -> str:
    if not signature.template:
        return ""
    values = (
        str(int(value)) if isinstance(value, int) else type_name(value)
        for _, value in signature.template
    )
    return f"<{', '.join(values)}>"
