"""The strict look itself: a text through the rules and through clang."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.backend.definition import Definition, Template
from zmlx.backend.strict import compiler, messages, module, rewrite, rules, signature
from zmlx.backend.strict.diagnosis import Diagnosis
from zmlx.backend.strict.outline import outline
from zmlx.backend.strict.tokens import Parts, tokens


def check(
    definition: Definition,
    *,
    input_dtypes: Sequence[mx.Dtype],
    output_dtypes: Sequence[mx.Dtype],
    template: Template | None = None,
    input_shapes: Sequence[Sequence[int]] | None = None,
) -> list[Diagnosis]:
    """Look for what Apple's compiler would refuse in a kernel, as one launch compiles it.

    Args:
        definition: the kernel.
        input_dtypes: one for each input.
        output_dtypes: one for each output.
        template: as the launch takes it.
        input_shapes: one for each input: MLX passes inputs of fewer than 8 elements in the
            constant address space, and 0-d ones by reference. Without them all are long vectors.

    Returns:
        What is wrong, in the order of the text; an empty list when nothing was found.

    Raises:
        ClangUnavailable: there is no clang here.
        ValueError: the arguments do not fit the definition.
    """
    arguments = signature.Arguments(input_dtypes, output_dtypes, template or (), input_shapes)
    found = _check(Parts(signature.parts(definition, arguments)))
    return [*_open_end(definition.header), *found]


def _open_end(header: str) -> list[Diagnosis]:
    """Find a last line of a header that takes in the signature: MLX puts no line break between."""
    *_, last = header.split("\n")
    if not (last.lstrip().startswith("#") or "//" in last):
        return []
    message = "MLX writes the kernel behind the header's last line, which takes it in"
    return [
        Diagnosis("header", header.count("\n") + 1, 1, message, "end the header with a newline")
    ]


def check_text(text: str, *, name: str = "text") -> list[Diagnosis]:
    """Look for what Apple's compiler would refuse in a whole text with kernels.

    MLX's prelude stands before it, as before every kernel of MLX. Templates are looked at in
    their explicit instantiations, so there should be some.

    Args:
        text: Metal, without includes of MLX's files (`flattened` puts them in).
        name: what diagnoses call it.

    Returns:
        As `check`.

    Raises:
        ClangUnavailable: there is no clang here.
    """
    return _check(Parts([(name, text)]))


def _check(parts: Parts) -> list[Diagnosis]:
    found = tokens(parts.text)
    seen = outline([token for token in found if not token.directive])
    edits = rewrite.edits(found, seen)
    ran = compiler.run(parts.marked(edits))
    broken = list(rules.broken(parts, found, seen))
    known = {(d.part, d.line, d.column) for d in broken}
    told = messages.diagnoses(ran.messages, parts, edits)
    # What a rule says of a place is said in Metal's words; clang's follows from it.
    diagnoses = [*broken, *(d for d in told if (d.part, d.line, d.column) not in known)]
    diagnoses += module.faults(ran.module)
    order = {name: number for number, name in enumerate(parts.names)}
    return sorted(diagnoses, key=lambda d: (order.get(d.part, len(order)), d.line, d.column))
