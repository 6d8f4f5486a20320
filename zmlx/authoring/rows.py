"""Kernels over rows: fold the last axis once or twice, then write a value per row or per element.

A threadgroup takes a row. Its threads fold every so-many-th element, a simdgroup's threads join
their results by shuffles, the simdgroups theirs through threadgroup memory. An accumulator whose
update is no fold that can be joined is computed by one thread for each row, from left to right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import indent

import mlx.core as mx

from zmlx.authoring.folds import Fold, fold, identity, merged
from zmlx.authoring.formula.formula import Formula
from zmlx.authoring.formula.inference import Types
from zmlx.authoring.formula.kinds import FLOATS, TYPES, common, inside
from zmlx.authoring.formula.metal import prelude, printed
from zmlx.authoring.formula.tree import Name, Number, Tree
from zmlx.backend.definition import Definition
from zmlx.backend.names import check_name

#: what a kernel's own variables are called; inputs have other names
RESERVED = frozenset(
    {"d", "row", "rows", "lane", "group", "column", "next", "turn", "axis", "offset", "part", "T"}
)
#: Elements of a row that a thread has under way at once, where it has that many.
TURNS = 8
#: types that Metal shuffles between the threads of a simdgroup
_SHUFFLED = ("float", "int", "uint")


@dataclass(frozen=True)
class Pass:
    """One fold of a row.

    Attributes:
        accumulator: the name that the update has for the accumulator.
        result: the name that later formulas have for the row's result.
        init: the value to begin with.
        update: the accumulator after one more element.
        joint: how two results are joined, of `a` and `b`; None to derive it from the update.
    """

    accumulator: str
    result: str
    init: Formula
    update: Formula
    joint: Formula | None = None

    def fold(self) -> Fold | None:
        """Return the fold that the update is, None if it is none or is opaque."""
        return None if self.update.tree is None else fold(self.update.tree, self.accumulator)

    def operator(self) -> str | None:
        """Return the operator with which partial results are joined, where it is a known one."""
        if self.joint is None:
            found = self.fold()
            return found.operator if found else None
        if self.joint.tree is None:
            return None
        joined = fold(self.joint.tree, "a")
        return joined.operator if joined and joined.term == Name("b") else None

    def formulas(self) -> list[Formula]:
        """Return the formulas of the pass."""
        return [self.init, self.update, *([self.joint] if self.joint else [])]


@dataclass(frozen=True)
class Form:
    """What a kernel's source depends on besides its formulas.

    Attributes:
        kinds: for each input the type of its elements inside the kernel.
        places: for each input "element", "column", "row" or "scalar": what it has a value for.
    """

    kinds: tuple[str, ...]
    places: tuple[str, ...]


@dataclass
class RowKernel:
    """A kernel over rows.

    Attributes:
        name: a C identifier.
        inputs: names of the arrays; the first has the rows.
        element: what formulas call an element of the first input.
        passes: the folds, in their order.
        writes: the outputs: formulas of an element, or of a row's results.
        per_row: whether an output has one value for each row.
        outputs: names of the outputs.
        header: Metal text before the kernel.
    """

    name: str
    inputs: tuple[str, ...]
    element: str
    passes: tuple[Pass, ...]
    writes: tuple[Formula, ...]
    per_row: bool
    outputs: tuple[str, ...]
    header: str = ""
    _definitions: dict[Form, Definition] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse names that would not compile."""
        check_name(self.name, "kernel")
        taken = {p.accumulator for p in self.passes} | {p.result for p in self.passes}
        for name in (*self.inputs, *self.outputs):
            check_name(name, f"kernel {self.name!r}")
            if name in RESERVED | taken:
                raise ValueError(
                    f"kernel {self.name!r}: {name!r} is a name that its source uses; rename it"
                )

    @property
    def opaque(self) -> str:
        """Why the kernel has no reference; empty when it has one."""
        formulas = [f for p in self.passes for f in p.formulas()] + list(self.writes)
        return next((f.opaque for f in formulas if f.tree is None), "")

    @property
    def joined(self) -> bool:
        """Whether several threads can share a row."""
        return all(p.joint is not None or p.operator() is not None for p in self.passes)

    def scope(self, form: Form) -> tuple[dict[str, str], list[str]]:
        """Return the types of all names, and for each pass the type of its accumulator."""
        known = {"d": "int", self.element: form.kinds[0]}
        known |= zip(self.inputs, form.kinds, strict=True)
        accumulators = []
        for step in self.passes:
            kind = self.accumulated(step, known, form.kinds[0])
            accumulators.append(kind)
            known |= {step.accumulator: kind, step.result: kind}
        return known, accumulators

    def accumulated(self, step: Pass, known: Mapping[str, str], t: str) -> str:
        """Return the type that holds the initial value and every update."""
        if step.init.tree is None or step.update.tree is None:
            return "float"
        kind = Types(step.init.text, known, t).of(step.init.tree)
        while True:
            kinds = {**known, step.accumulator: kind}
            updated = Types(step.update.text, kinds, t).of(step.update.tree)
            wider = kind if updated == kind else common(kind, updated)
            if wider == kind:
                return kind
            kind = wider

    def results(self, form: Form, dtypes: Sequence[mx.Dtype]) -> tuple[mx.Dtype, ...]:
        """Return the dtype of each output.

        For floating-point inputs it is the first one's. For whole numbers it is float32 where the
        value is a float; else int32, or the wider type that C computes in, or bool.
        """
        known, _ = self.scope(form)
        found = []
        for written in self.writes:
            if dtypes[0] in FLOATS or written.tree is None:
                found.append(dtypes[0])
            else:
                found.append(TYPES[Types(written.text, known, form.kinds[0]).of(written.tree)])
        return tuple(found)

    def form(self, arrays: Sequence[mx.array]) -> Form:
        """Return what arrays mean to the kernel.

        Raises:
            TypeError: a dtype is not one that kernels have.
            ValueError: the shapes do not fit.
        """
        first = arrays[0].shape
        if not first:
            raise ValueError(f"{self.name} takes rows, and a 0-d array has none; give it an axis")
        kinds, places = [], []
        for name, array in zip(self.inputs, arrays, strict=True):
            kind = inside(array.dtype)
            if kind is None:
                raise TypeError(
                    f"{self.name}: {name!r} is {array.dtype}, which Metal does not have; "
                    "convert it, for example with astype(mx.float32)"
                )
            kinds.append(kind)
            places.append(self._place(name, array.shape, first))
        return Form(tuple(kinds), tuple(places))

    def _place(self, name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> str:
        if shape == first:
            return "element"
        if shape == first[-1:]:
            return "column"
        if shape == (*first[:-1], 1):
            return "row"
        if shape in ((), (1,)):
            return "scalar"
        raise ValueError(
            f"{self.name}: {name!r} has shape {shape} beside {self.inputs[0]!r} of shape {first}; "
            f"it takes {first}, {first[-1:]} for a value per column, {(*first[:-1], 1)} for one "
            "per row, or ()"
        )

    def definition(self, form: Form) -> Definition:
        """Return the kernel for a form of its inputs."""
        found = self._definitions.get(form)
        if found is None:
            trees = [f.tree for p in self.passes for f in p.formulas()]
            trees += [f.tree for f in self.writes]
            trees += [merged(op, Name("a"), Name("b")) for p in self.passes if (op := p.operator())]
            before = prelude([tree for tree in trees if tree is not None])
            parts = [part for part in (self.header.strip("\n"), before.strip("\n")) if part]
            found = self._definitions[form] = Definition(
                name=self.name,
                input_names=tuple(f"{name}_in" for name in self.inputs),
                output_names=tuple(f"{name}_out" for name in self.outputs),
                source=_Source(self, form).text(),
                header="\n".join(parts) + "\n" if parts else "",
            )
        return found


class _Source:
    """Writes the source of a kernel over rows."""

    def __init__(self, kernel: RowKernel, form: Form) -> None:
        self.kernel = kernel
        self.form = form
        self.known, self.accumulators = kernel.scope(form)
        self.temporaries = 0

    def text(self) -> str:
        kernel = self.kernel
        first = f"{kernel.inputs[0]}_in"
        head = (
            "uint64_t rows = 1;\n"
            f"for (int axis = 0; axis < {first}_ndim - 1; ++axis) {{\n"
            f"  rows *= {first}_shape[axis];\n"
            "}\n"
            f"const int d = {first}_shape[{first}_ndim - 1];\n"
        )
        if kernel.joined:
            head += (
                "const uint64_t row = uint64_t(threadgroup_position_in_grid.y)"
                " * threadgroups_per_grid.x\n"
                "    + threadgroup_position_in_grid.x;\n"
                "const int lane = thread_position_in_threadgroup.x;\n"
                "const int group = threads_per_threadgroup.x;\n"
            )
        else:
            head += (
                "const uint64_t row = uint64_t(thread_position_in_grid.y) * threads_per_grid.x\n"
                "    + thread_position_in_grid.x;\n"
                "const int lane = 0;\n"
                "const int group = 1;\n"
            )
        head += "if (row >= rows) {\n  return;\n}\n"
        passes = "".join(
            self.fold(number, step, kind)
            for number, (step, kind) in enumerate(
                zip(kernel.passes, self.accumulators, strict=True), 1
            )
        )
        return head + passes + self.write()

    def prefix(self) -> str:
        """Return a beginning for names of temporaries that stands nowhere else in the source."""
        self.temporaries += 1
        return f"t{self.temporaries}_"

    def formula(self, written: Formula, into: str) -> str:
        """Return the statements that compute a formula into a place."""
        if written.tree is None:
            return f"{into} = {written.text};\n"
        types = Types(written.text, self.known, self.form.kinds[0])
        statements, (text,) = printed([written.tree], types, self.prefix())
        return "".join(f"{line}\n" for line in (*statements, f"{into} = {text};"))

    def loads(self, formulas: Sequence[Formula]) -> list[tuple[str, str, str]]:
        """Return (type, name, value) of what formulas use of the inputs, at row and column."""
        found = []
        places = zip(self.kernel.inputs, self.form.kinds, self.form.places, strict=True)
        for name, kind, place in places:
            names = {name, self.kernel.element} if name == self.kernel.inputs[0] else {name}
            index = {
                "element": "row * d + column",
                "column": "column",
                "row": "row",
                "scalar": "0",
            }[place]
            for called in sorted(names):
                if any(f.mentions(called) for f in formulas):
                    found.append((kind, called, f"static_cast<{kind}>({name}_in[{index}])"))
        return found

    def over_columns(self, formulas: Sequence[Formula], body: str) -> str:
        """Return the loop of a thread over its columns; `body` uses what `loads` gives.

        Most of it goes in turns of several elements, which are all loaded before the body runs:
        where it stores, compilers could not move a load before it.
        """
        loads = self.loads(formulas)
        held = "".join(f"{kind} {name}_held[{TURNS}];\n" for kind, name, _ in loads)
        load = "".join(f"{name}_held[turn] = {value};\n" for _, name, value in loads)
        given = "".join(f"const {kind} {name} = {name}_held[turn];\n" for kind, name, _ in loads)
        alone = "".join(f"const {kind} {name} = {value};\n" for kind, name, value in loads)
        turn = f"for (int turn = 0; turn < {TURNS}; ++turn) {{\n"
        at = "  const int column = next + turn * group;\n"
        several = f"{held}{turn}{at}{indent(load, '  ')}}}\n" if loads else ""
        several += f"{turn}{at}{indent(given + body, '  ')}}}\n"
        return (
            "{\nint next = lane;\n"
            f"for (; next + {TURNS - 1} * group < d; next += {TURNS} * group) {{\n"
            + indent(several, "  ")
            + "}\nfor (int column = next; column < d; column += group) {\n"
            + indent(alone + body, "  ")
            + "}\n}\n"
        )

    def fold(self, number: int, step: Pass, kind: str) -> str:
        acc = step.accumulator
        stored = "int" if kind == "bool" else kind
        operator = step.operator() if self.kernel.joined else None
        start = step.init
        if operator is not None:
            start = Formula("", identity(operator, stored))
        text = self.formula(start, f"{stored} {acc}")
        text += self.over_columns([step.update], self.formula(step.update, acc))
        if not self.kernel.joined:
            return text + f"const {stored} {step.result} = {acc};\n"
        text += self.join(number, step, stored, operator)
        return text + self.begin(step, stored, operator)

    def begin(self, step: Pass, stored: str, operator: str | None) -> str:
        """Return the statements that count the initial value in, once."""
        acc, result = step.accumulator, step.result
        if operator is None or _is_identity(step.init.tree, operator, stored):
            return f"const {stored} {result} = {acc};\n"
        first = f"init_{result}"
        init = self.formula(step.init, f"const {stored} {first}")
        return init + self.merge(operator, step, stored, f"const {stored} {result}", first, acc)

    def merge(
        self, operator: str | None, step: Pass, stored: str, into: str, a: str, b: str
    ) -> str:
        """Return the statement that joins two partial results."""
        if operator is not None:
            tree = merged(operator, Name(a), Name(b))
            types = Types("", {a: stored, b: stored})
            return f"{into} = {printed([tree], types)[1][0]};\n"
        assert step.joint is not None
        lines = f"const {stored} a = {a};\nconst {stored} b = {b};\n"
        if step.joint.tree is None:
            return lines + f"{into} = {step.joint.text};\n"
        types = Types(step.joint.text, {**self.known, "a": stored, "b": stored})
        statements, (text,) = printed([step.joint.tree], types, self.prefix())
        return lines + "".join(f"{line}\n" for line in (*statements, f"{into} = {text};"))

    def join(self, number: int, step: Pass, stored: str, operator: str | None) -> str:
        """Return the statements that join the threads' results of a row."""
        acc, shared = step.accumulator, f"shared{number}"
        if stored not in _SHUFFLED:
            # Every thread's result goes through threadgroup memory.
            count, index, mine = "group", "lane", "true"
            text, size = "", 1024
        else:
            count, index = "group / 32", "simdgroup_index_in_threadgroup"
            mine, size = "thread_index_in_simdgroup == 0", 32
            inner = f"const {stored} part = simd_shuffle_xor({acc}, offset);\n"
            inner += self.merge(operator, step, stored, acc, acc, "part")
            text = (
                "for (ushort offset = 16; offset > 0; offset /= 2) {\n"
                + indent(inner, "  ")
                + "}\n"
            )
        inner = f"const {stored} part = {shared}[index];\n"
        inner += self.merge(operator, step, stored, acc, acc, "part")
        return (
            text
            + f"threadgroup {stored} {shared}[{size}];\n"
            + f"if ({mine}) {{\n  {shared}[{index}] = {acc};\n}}\n"
            + "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
            + f"{acc} = {shared}[0];\n"
            + f"for (int index = 1; index < {count}; ++index) {{\n"
            + indent(inner, "  ")
            + "}\n"
        )

    def write(self) -> str:
        kernel = self.kernel
        lines = ""
        for number, (name, written) in enumerate(zip(kernel.outputs, kernel.writes, strict=True)):
            at = "row" if kernel.per_row else "row * d + column"
            text = written.text
            if written.tree is not None:
                types = Types(written.text, self.known, self.form.kinds[0])
                statements, (text,) = printed([written.tree], types, self.prefix())
                lines += "".join(f"{line}\n" for line in statements)
            lines += f"{name}_out[{at}] = static_cast<O{number}>({text});\n"
        if kernel.per_row:
            return f"if (lane == 0) {{\n{indent(lines, '  ')}}}\n"
        return self.over_columns(kernel.writes, lines)


def _is_identity(init: Tree | None, operator: str, kind: str) -> bool:
    return isinstance(init, Number) and init.value == identity(operator, kind).value
