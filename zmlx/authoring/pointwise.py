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
from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher
from zmlx.backend.names import check_name
from zmlx.backend.vmapping import inside_vmap

#: what a kernel's own variables are called; variables of formulas have other names
RESERVED = frozenset({"count", "threads", "elem", "turn", "T"})
_THREADGROUP = 256
#: Arrays with at least this many elements are walked with several elements a thread, which hides
#: the memory's latency; on smaller ones more threads do.
_LARGE = 1 << 18
#: Bytes of an array that a thread of a large one takes.
_TURN_BYTES = 16
#: Larger arrays have a grid of several rows, and indices of 64 bits.
_WIDTH = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a kernel does with arrays of certain dtypes.

    Attributes:
        whole: the source for these types, for grids of one thread for so many elements.
        guarded: the same for grids of more threads than there are elements.
        results: dtype of each output.
        template: values of the source's template but TURNS.
        program: the formulas in MLX operations; None when one of them is opaque.
    """

    whole: Definition
    guarded: Definition
    results: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, mx.Dtype | int], ...]
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
        whole, guarded = (self._definition(known, whole) for whole in (True, False))
        return Plan(whole, guarded, results, template, run)

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

    def _definition(self, known: dict[str, str], whole: bool) -> Definition:
        trees = [f.tree for f in self.formulas if f.tree is not None]
        before = prelude(trees)
        header = "\n".join(part for part in (self.header.strip("\n"), before.strip("\n")) if part)
        return Definition(
            name=self.name,
            input_names=tuple(f"{name}_in" for name in self.variables),
            output_names=tuple(f"out{i}" for i in range(len(self.formulas))),
            source=self._source(known, whole),
            header=header + "\n" if header else "",
            ensure_row_contiguous=self.contiguous,
        )

    def _source(self, known: dict[str, str], whole: bool) -> str:
        """Return the body.

        Args:
            known: the type of each variable.
            whole: each thread computes TURNS elements, all of which exist; else one at most.
        """
        used = [name for name in known if any(f.mentions(name) for f in self.formulas)]
        computed = "".join(self._computed(known))
        if not whole:
            return self._guarded(
                indent("".join(self._load(n, known[n]) for n in used), "  "), computed
            )
        # All is loaded before anything is stored, for a store may be to what is loaded next as far
        # as compilers know, and loads should be under way together.
        held = "".join(f"{known[name]} {name}_held[TURNS];\n" for name in used)
        loads = "".join(self._load(name, known[name], f"{name}_held[turn]") for name in used)
        values = "".join(f"const {known[name]} {name} = {name}_held[turn];\n" for name in used)
        loop = "for (int turn = 0; turn < TURNS; ++turn) {\n"
        at = "  const uint elem = thread_position_in_grid.x + turn * threads;\n"
        return (
            "const uint threads = threads_per_grid.x;\n"
            + (f"{held}{loop}{at}{indent(loads, '  ')}}}\n" if used else "")
            + f"{loop}{at}{indent(values + computed, '  ')}}}\n"
        )

    def _guarded(self, loads: str, computed: str) -> str:
        first = f"{self.variables[0]}_in"
        return (
            "uint64_t count = 1;\n"
            f"for (int axis = 0; axis < {first}_ndim; ++axis) {{\n"
            f"  count *= {first}_shape[axis];\n"
            "}\n"
            "const uint64_t elem = uint64_t(thread_position_in_grid.y) * threads_per_grid.x\n"
            "    + thread_position_in_grid.x;\n"
            "if (elem < count) {\n" + loads + indent(computed, "  ") + "}\n"
        )

    def _load(self, name: str, kind: str, into: str = "") -> str:
        """Return the statements that load an element; `into` a place, or a constant of the name."""
        array, into = f"{name}_in", into or f"const {kind} {name}"
        if self.contiguous:
            return f"{into} = static_cast<{kind}>({array}[elem]);\n"
        return (
            f"int64_t {name}_at = 0;\n"
            f"for (uint64_t axis = {array}_ndim, rest = elem; axis-- > 0;) {{\n"
            f"  {name}_at += int64_t(rest % {array}_shape[axis]) * {array}_strides[axis];\n"
            f"  rest /= {array}_shape[axis];\n"
            "}\n"
            f"{into} = static_cast<{kind}>({array}[{name}_at]);\n"
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
        """Compute the outputs for arrays of one shape, lazily, where kernels run now.

        Raises:
            ValueError: it is called inside `mx.vmap`, and a formula is opaque.
        """
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
        return self._launched(plan, backend, [mx.stop_gradient(array) for array in arrays])

    def launched(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Compute the outputs with the kernel, wherever it is called."""
        plan = self.plan(tuple([array.dtype for array in arrays]))
        return self._launched(plan, for_kernels(has_reference=False), arrays)

    def _launched(self, plan: Plan, backend: str, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Compute the outputs with the kernel; nothing is launched for empty arrays."""
        shape, size = arrays[0].shape, arrays[0].size
        if size == 0:
            return [mx.zeros(shape, dtype) for dtype in plan.results]
        if not shape:
            # Metal passes 0-d arrays by reference, which cannot be indexed.
            flat = self._launched(plan, backend, [array.reshape(1) for array in arrays])
            return [array.reshape(()) for array in flat]
        if size <= _WIDTH:
            turns = _turns(size, (*[array.dtype for array in arrays], *plan.results))
            definition, grid = plan.whole, (size // turns, 1, 1)
            template = (*plan.template, ("TURNS", turns))
        else:
            definition, grid = plan.guarded, (_WIDTH, -(-size // _WIDTH), 1)
            template = plan.template
        return launcher(definition, backend)(
            inputs=arrays,
            output_shapes=[shape] * len(plan.results),
            output_dtypes=plan.results,
            grid=grid,
            threadgroup=(_THREADGROUP, 1, 1),
            template=template,
        )


def _turns(size: int, dtypes: Sequence[mx.Dtype]) -> int:
    """Return how many elements each thread computes; the size is a multiple of it."""
    if size < _LARGE:
        return 1
    turns = max(1, _TURN_BYTES // max(dtype.size for dtype in dtypes))
    while size % turns:
        turns //= 2
    return turns
