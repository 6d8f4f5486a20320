"""Operations over rows: the reference, the launch and the transformations of a `RowKernel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from zmlx.authoring.folds import ALONG_ROWS, identity, merged
from zmlx.authoring.formula.errors import NotDifferentiable
from zmlx.authoring.formula.evaluate import program
from zmlx.authoring.formula.inference import Types
from zmlx.authoring.formula.kinds import TYPES
from zmlx.authoring.formula.tree import Name, Number, Tree, names
from zmlx.authoring.rows import Form, Pass, RowKernel
from zmlx.backend import for_kernels
from zmlx.backend.launch import launcher
from zmlx.backend.outputs import alone, together
from zmlx.backend.replay import Replay
from zmlx.backend.vmapping import inside_vmap

#: threads of a threadgroup where nothing is tuned, and where nothing is said, for long rows
USUAL = 256
_MOST = 1024
#: elements of a row that is long
_LONG = 16384
_CANDIDATES = (32, 64, 128, 256, 512, 1024)
#: Grids count threads along x with 32 bits.
_WIDTH = 1 << 30
#: Shapes that an operation remembers; more than that start over.
_REMEMBERED = 4096
_BACKENDS_TUNED = ("metal", "cuda")


class RowOperation:
    """An operation over the last axis; made by `zmlx.api.reduce` and `map_reduce`.

    Attributes:
        name: the kernel's name.
        kernel: its formulas and sources.
    """

    def __init__(
        self, kernel: RowKernel, *, threadgroup: int | str | None = None, length: int | None = None
    ) -> None:
        """Make the operation of a kernel.

        Args:
            kernel: the kernel.
            threadgroup: most threads of a threadgroup, a multiple of 32 up to 1,024, or "auto";
                None for 256, and 1,024 where rows are long.
            length: the length that rows must have; None for any.

        Raises:
            ValueError: the threadgroup or the length is none.
        """
        if threadgroup not in ("auto", None) and (
            not isinstance(threadgroup, int)
            or isinstance(threadgroup, bool)
            or not 32 <= threadgroup <= 1024
            or threadgroup % 32
        ):
            raise ValueError(
                f'{kernel.name}: threadgroup={threadgroup!r}; give "auto" or a multiple of 32 '
                "from 32 to 1024"
            )
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(f"{kernel.name}: d={length!r}; give the length of a row, 1 or more")
        self.name = kernel.name
        self.kernel = kernel
        self._threadgroup = threadgroup
        self._length = length
        self._opaque = kernel.opaque
        self._forms: dict[tuple[tuple[tuple[int, ...], mx.Dtype], ...], _Known] = {}
        self._references: dict[tuple[Form, tuple[mx.Dtype, ...]], _Reference] = {}
        function = mx.custom_function(self._forward)
        function.vjp(self._vjp)
        function.jvp(self._jvp)
        function.vmap(self._vmap)
        self._function = function
        # What is tuned has to be launched with values before it is recorded.
        settled = _concrete if threadgroup == "auto" else None
        self._replay = Replay(function, self._launch, settled)

    def __call__(self, *arrays: mx.array) -> Any:
        """Compute the operation, lazily.

        Args:
            arrays: the first holds rows along its last axis, of any length from 0; others have its
                shape, or that of a row, of the rows (with a last axis of 1), or none.

        Returns:
            An array, or a tuple of them when there are several outputs.

        Raises:
            TypeError: there are too many or too few arguments, or one has a dtype that Metal has
                not.
            ValueError: the shapes do not fit.
        """
        inputs = self.kernel.inputs
        if len(arrays) != len(inputs):
            raise TypeError(
                f"{self.name} takes {len(inputs)} arrays ({', '.join(inputs)}); got {len(arrays)}"
            )
        for array in arrays:
            if not isinstance(array, mx.array):
                raise TypeError(f"{self.name} takes mx.arrays; got a {type(array).__name__}")
        return self._replay.in_force(arrays, has_reference=not self._opaque)

    def _known(self, arrays: Sequence[mx.array]) -> _Known:
        """Return what arrays mean to the kernel; looked up for shapes and dtypes seen before."""
        key = tuple([(array.shape, array.dtype) for array in arrays])
        found = self._forms.get(key)
        if found is None:
            form = self.kernel.form(arrays)
            if self._length is not None and arrays[0].shape[-1] != self._length:
                raise ValueError(
                    f"{self.name} takes rows of {self._length} elements; got shape "
                    f"{arrays[0].shape}"
                )
            if len(self._forms) >= _REMEMBERED:
                self._forms.clear()
            dtypes = tuple([array.dtype for array in arrays])
            reference = None if self._opaque else self._reference_of(form, dtypes)
            found = self._forms[key] = _Known(form, self.kernel.results(form, dtypes), reference)
        return found

    def _reference_of(self, form: Form, dtypes: tuple[mx.Dtype, ...]) -> _Reference:
        """Return the reference for a form; shapes of one form share it."""
        found = self._references.get((form, dtypes))
        if found is None:
            found = self._references[form, dtypes] = _Reference(self.kernel, form, dtypes)
        return found

    def source(self, *dtypes: mx.Dtype) -> str:
        """Return the body of the kernel for whole rows of these dtypes; float32 by default."""
        given = dtypes or (mx.float32,) * len(self.kernel.inputs)
        form = self.kernel.form([mx.zeros((1, 2), dtype) for dtype in given])
        return self.kernel.definition(form).source

    def _forward(self, *arrays: mx.array) -> Any:
        backend = for_kernels(has_reference=not self._opaque)
        if backend == "reference" or (inside_vmap() and not self._opaque):
            return alone(self._reference(arrays))
        if inside_vmap():
            raise ValueError(
                f"{self.name} cannot be used inside mx.vmap, because {self._opaque}; call it with "
                "the whole batch instead"
            )
        # MLX asks for the tangents of operations that a custom function replaces, too.
        return alone(self._launched([mx.stop_gradient(array) for array in arrays], backend))

    def _launch(self, *arrays: mx.array) -> Any:
        return alone(self._launched(list(arrays), for_kernels(has_reference=False)))

    def _reference(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        reference = self._known(arrays).reference
        assert reference is not None
        return reference(arrays)

    def _launched(self, arrays: list[mx.array], backend: str) -> list[mx.array]:
        known = self._known(arrays)
        form, dtypes = known.form, known.results
        first = arrays[0]
        shape = first.shape[:-1] if self.kernel.per_row else first.shape
        length = first.shape[-1]
        rows = first.size // length if length else _product(first.shape[:-1])
        if 0 in shape:
            return [mx.zeros(shape, dtype) for dtype in dtypes]
        definition = self.kernel.definition(form)
        launch = launcher(definition, backend)
        # Metal passes 0-d arrays by reference, which cannot be indexed.
        inputs = [array if array.shape else array.reshape(1) for array in arrays]
        template = (("T", TYPES[form.kinds[0]]), *((f"O{i}", t) for i, t in enumerate(dtypes)))

        def launched(threads: int) -> list[mx.array]:
            grid, group = self._geometry(rows, length, threads)
            return launch(
                inputs=inputs,
                output_shapes=[shape or (1,)] * len(dtypes),
                output_dtypes=dtypes,
                grid=grid,
                threadgroup=group,
                template=template,
            )

        threads = self._threads(definition, backend, inputs, launched)
        return [array.reshape(shape) if not shape else array for array in launched(threads)]

    def _threads(
        self, definition: Any, backend: str, inputs: list[mx.array], launch: Callable[..., Any]
    ) -> int:
        if self._threadgroup is None:
            return _MOST if inputs[0].shape[-1] >= _LONG else USUAL
        if self._threadgroup != "auto":
            assert isinstance(self._threadgroup, int)
            return self._threadgroup
        if backend not in _BACKENDS_TUNED or not self.kernel.joined:
            return USUAL
        from zmlx.tuning import best_threadgroup  # noqa: PLC0415 - only what is tuned needs it

        return best_threadgroup(
            definition,
            backend,
            inputs=inputs,
            launch=launch,
            candidates=_CANDIDATES,
            key=("rows", inputs[0].shape),
        )

    def _geometry(
        self, rows: int, length: int, threads: int
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return grid and threadgroup: short rows get no more threads than they have elements."""
        if not self.kernel.joined:
            width = min(rows, _WIDTH)
            return (width, -(-rows // width), 1), (USUAL, 1, 1)
        group = min(threads, -(-max(length, 1) // 32) * 32)
        width = min(rows, _WIDTH // group)
        return (width * group, -(-rows // width), 1), (group, 1, 1)

    def _vjp(self, primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        self._refuse_gradient()
        arrays, several = together(primals), list(together(cotangents))
        moved = [i for i, a in enumerate(arrays) if mx.issubdtype(a.dtype, mx.floating)]
        _, found = mx.vjp(self._of(arrays, moved), [arrays[i] for i in moved], several)
        gradients = [mx.zeros_like(array) for array in arrays]
        for i, gradient in zip(moved, found, strict=True):
            gradients[i] = gradient
        return gradients

    def _jvp(self, primals: Any, tangents: Any) -> list[mx.array]:
        self._refuse_gradient()
        arrays, given = together(primals), together(tangents)
        moved = [i for i, tangent in enumerate(given) if tangent is not None]
        values = [arrays[i] for i in moved], [given[i] for i in moved]
        return mx.jvp(self._of(arrays, moved), *values)[1]

    def _of(self, arrays: Sequence[mx.array], moved: Sequence[int]) -> Callable[..., Any]:
        """Return the reference as a function of some of its arguments, the others held."""

        def function(*some: mx.array) -> list[mx.array]:
            values = list(arrays)
            for i, array in zip(moved, some, strict=True):
                values[i] = array
            return self._reference(values)

        return function

    def _refuse_gradient(self) -> None:
        if self._opaque:
            raise NotDifferentiable(
                f"{self.name} has no gradient, because {self._opaque}; write it with known "
                "functions, or give a gradient with mx.custom_function"
            )

    def _vmap(self, arrays: Any, axes: Any) -> tuple[Any, Any]:
        several = together(arrays)
        where = axes if isinstance(axes, tuple) else (axes,)
        places = self.kernel.form([_without(a, i) for a, i in zip(several, where, strict=True)])
        # A value per column or per row would need a meaning that kernels do not give it.
        if all(place == "element" for place in places.places):
            size = next(a.shape[i] for a, i in zip(several, where, strict=True) if i is not None)
            moved = [
                mx.broadcast_to(a, (size, *a.shape)) if i is None else mx.moveaxis(a, i, 0)
                for a, i in zip(several, where, strict=True)
            ]
            result = self._function(*moved)
        else:
            self._refuse_gradient()
            batched = mx.vmap(lambda *some: alone(self._reference(some)), in_axes=tuple(where))
            result = batched(*several)
        return result, tuple(0 for _ in result) if isinstance(result, tuple) else 0


@dataclass(frozen=True)
class _Known:
    """What an operation knows of arguments of certain shapes and dtypes.

    Attributes:
        form: what they mean to the kernel.
        results: dtype of each output.
        reference: the kernel in MLX operations; None when a formula is opaque.
    """

    form: Form
    results: tuple[mx.Dtype, ...]
    reference: _Reference | None


class _Reference:
    """A kernel over rows in MLX operations, for inputs of one form.

    A row's results keep a last axis of 1, so that they fit beside its elements.
    """

    def __init__(self, kernel: RowKernel, form: Form, dtypes: tuple[mx.Dtype, ...]) -> None:
        self.kernel = kernel
        known, kinds = kernel.scope(form)
        self.dtypes: dict[str, mx.Dtype] = {kernel.element: dtypes[0], "d": mx.int32}
        self.dtypes |= dict(zip(kernel.inputs, dtypes, strict=True))
        for step, kind in zip(kernel.passes, kinds, strict=True):
            self.dtypes |= {step.accumulator: TYPES[kind], step.result: TYPES[kind]}
        self.types = Types("", known, form.kinds[0])
        self.folds = [
            (step.result, self._folded(step, kind))
            for step, kind in zip(kernel.passes, kinds, strict=True)
        ]
        self.writes = [
            self._program(_tree(written.tree), dtype)
            for written, dtype in zip(kernel.writes, kernel.results(form, dtypes), strict=True)
        ]
        self.needs_length = any("d" in run.names for run in self._programs)

    @property
    def _programs(self) -> list[_Program]:
        return [*self.writes, *(run for _, fold in self.folds for run in fold.programs)]

    def __call__(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Compute the outputs: accumulators in their own type, results rounded at the end."""
        first = arrays[0]
        values = dict(zip(self.kernel.inputs, arrays, strict=True))
        values[self.kernel.element] = first
        if self.needs_length:
            values["d"] = mx.array(first.shape[-1], mx.int32)
        for result, fold in self.folds:
            values[result] = fold(first, values)
        shape = first.shape
        rows = (*shape[:-1], 1) if self.kernel.per_row else shape
        outputs = [_shaped(run(values), rows) for run in self.writes]
        return [value.reshape(shape[:-1]) for value in outputs] if self.kernel.per_row else outputs

    def _program(self, tree: Tree, dtype: mx.Dtype) -> _Program:
        return _Program(tree, self.dtypes, dtype, self.types)

    def _folded(self, step: Pass, kind: str) -> _AtOnce | _OneByOne:
        dtype, found, operator = TYPES[kind], step.fold(), step.operator()
        init = self._program(_tree(step.init.tree), dtype)
        if found is None or operator != found.operator or not ALONG_ROWS[operator]:
            return _OneByOne(step.accumulator, init, self._program(_tree(step.update.tree), dtype))
        start = step.init.tree
        neutral = isinstance(start, Number) and start.value == identity(operator, kind).value
        both = merged(operator, Name(step.accumulator), Name(step.result))
        return _AtOnce(
            step,
            operator,
            init,
            self._program(found.term, dtype),
            None if neutral else self._program(both, dtype),
        )


class _Program:
    """A formula in MLX operations, of values by their names."""

    def __init__(
        self, tree: Tree, dtypes: Mapping[str, mx.Dtype], result: mx.Dtype, types: Types
    ) -> None:
        self.names = tuple(sorted(names(tree)))
        used = {name: dtypes[name] for name in self.names}
        self._run = program([tree], used, [result], types, shaped=False)

    def __call__(self, values: Mapping[str, mx.array]) -> mx.array:
        return self._run([values[name] for name in self.names])[0]


class _AtOnce:
    """A fold of rows by the operation that MLX has for it."""

    def __init__(
        self, step: Pass, operator: str, init: _Program, term: _Program, joint: _Program | None
    ) -> None:
        along = ALONG_ROWS[operator]
        assert along is not None
        self.step, self.along, self.init, self.term, self.joint = step, along, init, term, joint
        self.programs = [init, term, *([joint] if joint else [])]

    def __call__(self, first: mx.array, values: Mapping[str, mx.array]) -> mx.array:
        if first.shape[-1] == 0:
            return _shaped(self.init(values), (*first.shape[:-1], 1))
        terms = self.term(values)
        result = self.along(_shaped(terms, first.shape))
        if result.dtype != terms.dtype:
            result = result.astype(terms.dtype)
        if self.joint is None:
            return result
        begin = self.init(values)
        return self.joint({**values, self.step.accumulator: begin, self.step.result: result})


class _OneByOne:
    """Any other update of rows, from left to right, all rows together."""

    def __init__(self, accumulator: str, init: _Program, update: _Program) -> None:
        self.accumulator, self.init, self.update = accumulator, init, update
        self.programs = [init, update]

    def __call__(self, first: mx.array, values: Mapping[str, mx.array]) -> mx.array:
        length = first.shape[-1]
        result = _shaped(self.init(values), (*first.shape[:-1], 1))
        for column in range(length):
            here = {
                name: value[..., column : column + 1]
                if value.shape and value.shape[-1] == length
                else value
                for name, value in values.items()
            }
            result = self.update({**here, self.accumulator: result})
        return result


def _shaped(value: mx.array, shape: tuple[int, ...]) -> mx.array:
    return value if value.shape == shape else mx.broadcast_to(value, shape)


def _tree(tree: Tree | None) -> Tree:
    assert tree is not None
    return tree


def _without(array: mx.array, axis: int | None) -> mx.array:
    """Return an array of the shape that one example of a batch has."""
    shape = list(array.shape)
    if axis is not None:
        del shape[axis]
    return mx.zeros(shape, array.dtype)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _concrete(arrays: Sequence[mx.array]) -> bool:
    from zmlx.tuning.tracing import traced  # noqa: PLC0415 - only what is tuned needs it

    return not traced(arrays)
