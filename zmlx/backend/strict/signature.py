"""The text that MLX writes around a kernel's source on Metal: its signature and its template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from zmlx.backend.definition import Definition, Template
from zmlx.backend.signature import ATTRIBUTES, CONSTANT_BELOW, TYPE_NAMES


@dataclass(frozen=True)
class Arguments:
    """What a launch decides of a kernel's text.

    Attributes:
        input_dtypes: one for each input.
        output_dtypes: one for each output.
        template: as the launch takes it.
        input_shapes: one for each input; without them all are long vectors.
    """

    input_dtypes: Sequence[mx.Dtype]
    output_dtypes: Sequence[mx.Dtype]
    template: Template = ()
    input_shapes: Sequence[Sequence[int]] | None = field(default=None)


def parts(definition: Definition, arguments: Arguments) -> list[tuple[str, str]]:
    """Return the whole text of a kernel: header, signature, source, and what closes it.

    Raises:
        ValueError: there are more or fewer dtypes or shapes than names, or a value of the
            template is of a kind that MLX does not take.
    """
    _same_length(definition.input_names, arguments.input_dtypes, "input_dtypes")
    _same_length(definition.output_names, arguments.output_dtypes, "output_dtypes")
    if arguments.input_shapes is not None:
        _same_length(definition.input_names, arguments.input_shapes, "input_shapes")
    name = f"custom_kernel_{definition.name}"
    template = ", ".join(f"{_kind(key, value)} {key}" for key, value in arguments.template)
    lines = [f"template <{template}>"] if template else []
    lines += [f"[[kernel]] void {name}("]
    lines += [",\n".join(_parameters(definition, arguments)) + ") {"]
    end = "}\n"
    if template:
        instance = f"{name}<{', '.join(_value(value) for _, value in arguments.template)}>"
        end += f'template [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return [
        ("header", definition.header),
        ("signature", "\n".join(lines)),
        ("source", definition.source),
        ("end of the kernel", end),
    ]


def _same_length(names: Sequence[str], given: Sequence[object], what: str) -> None:
    if len(names) != len(given):
        raise ValueError(f"{what}: {len(given)} given for {len(names)} names ({', '.join(names)})")


def _parameters(definition: Definition, arguments: Arguments) -> list[str]:
    shapes = arguments.input_shapes or [(1 << 20,)] * len(definition.input_names)
    written: list[str] = []
    for name, dtype, shape in zip(
        definition.input_names, arguments.input_dtypes, shapes, strict=True
    ):
        elements = 1
        for length in shape:
            elements *= length
        space = "constant" if elements < CONSTANT_BELOW else "device"
        written.append(f"const {space} {TYPE_NAMES[dtype]}{'*' if shape else '&'} {name}")
        if shape:
            kinds = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}
            written += [
                f"const constant {kind} {name}_{what}"
                for what, kind in kinds.items()
                if f"{name}_{what}" in definition.source
            ]
    for name, dtype in zip(definition.output_names, arguments.output_dtypes, strict=True):
        held = f"atomic<{TYPE_NAMES[dtype]}>" if definition.atomic_outputs else TYPE_NAMES[dtype]
        written.append(f"device {held}* {name}")
    written = [f"  {text} [[buffer({index})]]" for index, text in enumerate(written)]
    used = [name for name in ATTRIBUTES if re.search(name, definition.source)]
    return written + [f"  {ATTRIBUTES[name]} {name} [[{name}]]" for name in used]


def _kind(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, mx.Dtype):
        return "typename"
    raise ValueError(f"template {name!r}: {value!r} is no dtype, whole number or truth value")


def _value(value: mx.Dtype | int | bool) -> str:
    return TYPE_NAMES[value] if isinstance(value, mx.Dtype) else str(int(value))
