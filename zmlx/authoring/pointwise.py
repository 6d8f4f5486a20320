"""Kernels that compute formulas element by element: the source, the reference, the launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import indent

import mlx.core as mx

from zmlx.authoring.formula.evaluate import Program, program
from zmlx.authoring.formula.formula import Formula
from zmlx.authoring.formula.inference import Types
from zmlx.authoring.formula.kinds import FLOATS, TYPES, inside
from zmlx.authoring.formula.metal import prelude, printed
from zmlx.backend import for_kernels
from zmlx.backend.definition import Definition, Launch
from zmlx.backend.launch import launcher
from zmlx.backend.names import check_name
from zmlx.backend.vmapping import inside_vmap

#: what a kernel's own variables are called; variables of formulas have other names
RESERVED = frozenset({"count", "threads", "elem", "turn", "T"})
_THREADGROUP = 256
#: Arrays with at least this many elements are walked with several elements a thread, which hides
#: the memory's latency; on smaller ones more threads do.
_LARGE = 1 << 18
_TURNS = 4
#: Grids count threads along x with 32 bits.
_WIDTH = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a kernel does with arrays of certain dtypes.

    Attributes:
        definition: the source for these types.
        results: dtype of each output.
        template: values of the source's template but the number of turns.
        program: the formulas in MLX operations; None when one of them is opaque.
    """

    definition: Definition
    results: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, mx.Dtype], ...]
    program: Program | None


class Pointwise:
    """A kernel whose outputs are formulas of the elements of its inputs.

    Args:
        name: a C identifier.
        variables: a name for each input.
        formulas: one for each output.
        like: for each output the input whose dtype it has; None for the dtype of the value.
        header: Metal text before the kernel.
        contiguous: copy inputs that are not row contiguous, rather than to index by strides.
    """

    def __init__(
        self,
        name: str,
        variables: Sequence[str],
        formulas: Sequence[Formula],
        *,
        like: Sequence[int | None] | None = None,
        header: str = "",
        contiguous: bool = True,
    ) -> None:
        check_name(name, "kernel")
        for variable in variables:
            check_name(variable, f"kernel {name!r}, variable")
            if variable in RESERVED:
                raise ValueError(
                    f"kernel {name!r}: {variable!r} is a name that its source uses; rename it"
                )
        self.name = name
        self.variables = tuple(variables)
        self.formulas = tuple(formulas)
        self.like = tuple(like) if like is not None else (None,) * len(formulas)
        self.header = header
        self.contiguous = contiguous
        self.opaque = next((f.opaque for f in formulas if f.tree is None), "")
        self._plans: dict[tuple[mx.Dtype, ...], Plan] = {}

    def plan(self, dtypes: tuple[mx.Dtype, ...]) -> Plan:
        """Return what the kernel does with these dtypes.

        Raises:
            TypeError: a dtype is not one that kernels have.
            FormulaError: a formula uses an operator that does not take these types.
        """
        found = self._plans.get(dtypes)
        if found is None:
            found = self._plans[dtypes] = self._planned(dtypes)
        return found

    def _planned(self, dtypes: tuple[mx.Dtype, ...]) -> Plan:
        kinds = []
        for variable, dtype in zip(self.variables, dtypes, strict=True):
            kind = inside(dtype)
            if kind is None:
                raise TypeError(
                    f"{self.name}: {variable!r} is {dtype}, which Metal does not have; "
                    "convert it, for example with astype(mx.float32)"
                )
            kinds.append(kind)
        known = dict(zip(self.variables, kinds, strict=True))
        types = [Types(formula.text, known, kinds[0]) for formula in self.formulas]
        results = tuple(
            dtypes[like] if like is not None else self._result(formula, of, dtypes)
            for formula, of, like in zip(self.formulas, types, self.like, strict=True)
        )
        template = (
            ("T", TYPES[kinds[0]]),
            *((f"O{i}", dtype) for i, dtype in enumerate(results)),
        )
        run = self._program(dict(zip(self.variables, dtypes, strict=True)), results, known)
        return Plan(self._definition(known), results, template, run)

    def _result(self, formula: Formula, types: Types, dtypes: tuple[mx.Dtype, ...]) -> mx.Dtype:
        """Return the dtype of a value: that of the inputs together, if it can hold the value."""
        joined = dtypes[0]
        for dtype in dtypes[1:]:
            joined = mx.result_type(joined, dtype)
        if formula.tree is None or joined in FLOATS:
            return joined
        kind = types.of(formula.tree)
        if kind == "float":
            return mx.float32
        return mx.int32 if joined == mx.bool_ and kind != "bool" else joined

    def _program(
        self, dtypes: dict[str, mx.Dtype], results: tuple[mx.Dtype, ...], known: dict[str, str]
    ) -> Program | None:
        if self.opaque:
            return None
        trees = [f.tree for f in self.formulas if f.tree is not None]
        types = Types(self.formulas[0].text, known, known[self.variables[0]])
        return program(trees, dtypes, results, types)

    def _definition(self, known: dict[str, str]) -> Definition:
        trees = [f.tree for f in self.formulas if f.tree is not None]
        before = prelude(trees)
        header = "\n".join(part for part in (self.header.strip("\n"), before.strip("\n")) if part)
        return Definition(
            name=self.name,
            input_names=tuple(f"{name}_in" for name in self.variables),
            output_names=tuple(f"out{i}" for i in range(len(self.formulas))),
            source=self._source(known),
            header=header + "\n" if header else "",
            ensure_row_contiguous=self.contiguous,
        )

    def _source(self, known: dict[str, str]) -> str:
        first = f"{self.variables[0]}_in"
        used = [name for name in known if any(f.mentions(name) for f in self.formulas)]
        body = "".join(self._load(name, known[name]) for name in used)
        body += "".join(self._computed(known))
        return (
            "uint64_t count = 1;\n"
            f"for (int axis = 0; axis < {first}_ndim; ++axis) {{\n"
            f"  count *= {first}_shape[axis];\n"
            "}\n"
            "const uint64_t threads = uint64_t(threads_per_grid.x) * threads_per_grid.y;\n"
            "uint64_t elem = uint64_t(thread_position_in_grid.y) * threads_per_grid.x\n"
            "    + thread_position_in_grid.x;\n"
            "for (int turn = 0; turn < TURNS && elem < count; ++turn) {\n"
            + indent(body, "  ")
            + "  elem += threads;\n"
            "}\n"
        )

    def _load(self, name: str, kind: str) -> str:
        array = f"{name}_in"
        if self.contiguous:
            return f"const {kind} {name} = static_cast<{kind}>({array}[elem]);\n"
        return (
            f"int64_t {name}_at = 0;\n"
            f"for (uint64_t axis = {array}_ndim, rest = elem; axis-- > 0;) {{\n"
            f"  {name}_at += int64_t(rest % {array}_shape[axis]) * {array}_strides[axis];\n"
            f"  rest /= {array}_shape[axis];\n"
            "}\n"
            f"const {kind} {name} = static_cast<{kind}>({array}[{name}_at]);\n"
        )

    def _computed(self, known: dict[str, str]) -> list[str]:
        """Return the statements that compute and write the outputs."""
        first = known[self.variables[0]]
        lines: list[str] = []
        if all(formula.tree is not None for formula in self.formulas):
            trees = [f.tree for f in self.formulas if f.tree is not None]
            statements, texts = printed(trees, Types("", known, first), self._temporary())
            lines += [f"{statement}\n" for statement in statements]
        else:
            for text in dict.fromkeys(f.prelude.strip() for f in self.formulas if f.prelude):
                lines.append(f"{text}\n")
            texts = [f.text for f in self.formulas]
        for i, text in enumerate(texts):
            lines.append(f"out{i}[elem] = static_cast<O{i}>({text});\n")
        return lines

    def _temporary(self) -> str:
        """Return a beginning for names of temporaries that no variable has."""
        prefixes = itertools.chain(["t"], (f"t{n}_" for n in itertools.count()))
        return next(p for p in prefixes if not any(v.startswith(p) for v in self.variables))

    def __call__(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Compute the outputs for arrays of one shape, lazily, where kernels run now."""
        plan = self.plan(tuple([array.dtype for array in arrays]))
        run = plan.program
        backend = for_kernels(has_reference=run is not None)
        if run is not None and (backend == "reference" or inside_vmap()):
            return run(arrays)
        if inside_vmap():
            raise ValueError(
                f"{self.name} cannot be used inside mx.vmap, because {self.opaque}; call it with "
                "the whole batch instead"
            )
        # MLX asks for the tangents of operations that a custom function replaces, too.
        held = [mx.stop_gradient(array) for array in arrays]
        return self.launched(plan, launcher(plan.definition, backend), held)

    def launched(self, plan: Plan, launch: Launch, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Compute the outputs with the kernel; nothing is launched for empty arrays."""
        shape, size = arrays[0].shape, arrays[0].size
        if size == 0:
            return [mx.zeros(shape, dtype) for dtype in plan.results]
        if not shape:
            # Metal passes 0-d arrays by reference, which cannot be indexed.
            flat = self.launched(plan, launch, [array.reshape(1) for array in arrays])
            return [array.reshape(()) for array in flat]
        turns = _TURNS if size >= _LARGE else 1
        threads = -(-size // turns)
        grid = (threads, 1, 1) if threads <= _WIDTH else (_WIDTH, -(-threads // _WIDTH), 1)
        return launch(
            inputs=arrays,
            output_shapes=[shape] * len(plan.results),
            output_dtypes=plan.results,
            grid=grid,
            threadgroup=(_THREADGROUP, 1, 1),
            template=(*plan.template, ("TURNS", turns)),
        )
