"""A connected subgraph of operations on small arrays as one kernel of one threadgroup."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher
from zmlx.backend.signature import dtype_name
from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny.costs import Costs
from zmlx.graph.tiny.literals import type_name
from zmlx.graph.tiny.lowering import Lowering
from zmlx.graph.tiny.phases import Target
from zmlx.graph.tiny.refusals import MEMORY, refusal
from zmlx.graph.tiny.schedule import Schedule, slots, threads_for, written
from zmlx.graph.tiny.writer import Sources, Writer

#: Most arrays that a kernel takes on Metal, outputs included; a few are left to MLX.
_MOST_ARRAYS = 28


class TooLarge(ValueError):
    """A subgraph needs more memory or arrays than one kernel has; make two programs of it."""


@dataclass(frozen=True)
class _Structure:
    """What decides a kernel's text, with names in place of values: equal ones share the kernel.

    Attributes:
        inputs: shape and dtype of each input, constants with several elements included.
        numbers: constants of one element.
        nodes: op, inputs, shapes and dtypes of outputs, arguments; values are counted.
        outputs: numbers of values.
    """

    inputs: tuple[Hashable, ...]
    numbers: tuple[Hashable, ...]
    nodes: tuple[Hashable, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class _Kernel:
    """A generated kernel.

    Attributes:
        definition: its text.
        threads: of its threadgroup.
        used: which of the inputs it reads, in the order of its own.
    """

    definition: Definition
    threads: int
    used: tuple[int, ...]


#: structure -> its kernel; the layers of a model have few
_KERNELS: dict[_Structure, _Kernel] = {}


class TinyProgram:
    """A subgraph that runs as one launch; a function of the arrays of its inputs.

    Attributes:
        inputs: the values that a call takes.
        outputs: the values that it returns.
        definition: the kernel.
        reads: the values that the kernel reads, constants among them, in its order.
        threads: of its only threadgroup.
        launches: 1.
    """

    launches = 1

    def __init__(
        self,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        kernel: _Kernel,
        constants: Mapping[Value, mx.array],
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.definition = kernel.definition
        self.threads = kernel.threads
        self._used = kernel.used
        self._constants = tuple(constants.values())
        self.reads = tuple((*self.inputs, *constants)[number] for number in kernel.used)

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Launch, lazily, where kernels run now.

        Args:
            arrays: in the order, and with shapes and dtypes, of `inputs`.

        Returns:
            An array for each of `outputs`.

        Raises:
            ValueError: too many or too few arrays, or one of another shape or dtype.
        """
        if len(arrays) != len(self.inputs):
            raise ValueError(f"the program takes {len(self.inputs)} arrays, not {len(arrays)}")
        for number, (array, value) in enumerate(zip(arrays, self.inputs, strict=True)):
            if array.shape != value.shape or array.dtype != value.dtype:
                raise ValueError(
                    f"array {number} is {dtype_name(array.dtype)} {array.shape}; the program was "
                    f"made for {dtype_name(value.dtype)} {value.shape}"
                )
        everything = (*arrays, *self._constants)
        launch = launcher(self.definition, for_kernels(has_reference=False))
        return launch(
            inputs=[everything[number] for number in self._used],
            output_shapes=self._shapes,
            output_dtypes=self._dtypes,
            grid=(self.threads, 1, 1),
            threadgroup=(self.threads, 1, 1),
        )

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [value.shape for value in self.outputs]

    @cached_property
    def _dtypes(self) -> list[mx.Dtype]:
        return [value.dtype for value in self.outputs]


def tiny_program(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Mapping[Value, mx.array],
) -> TinyProgram:
    """Make one kernel of a subgraph.

    Args:
        nodes: the operations, each after those that make its inputs.
        inputs: values from elsewhere, each of which a call gives.
        outputs: values to return; they are different ones.
        constants: arrays that are there when the program is made. Those of one element become
            part of the kernel's text, so they are evaluated here; others stay arrays.

    Returns:
        The program. Programs that differ only in what inputs and larger constants hold share the
        kernel.

    Raises:
        TooLarge: what has to be stored at once does not fit, or there are too many arrays.
        ValueError: a node cannot be part of a program (the text says why), a value comes from
            nowhere, or there are no outputs or one of them twice.
    """
    for node in nodes:
        reason = refusal(node)
        if reason:
            raise ValueError(f"{node.op} cannot be part of a tiny program: {reason}")
    if not outputs or len(set(outputs)) < len(outputs):
        raise ValueError("a tiny program has one output or more, and each of them once")
    needed = _needed(nodes, outputs)
    numbers, arrays = _constants(needed, inputs, outputs, constants)
    given = (*inputs, *arrays)
    structure = _structure(needed, given, outputs, numbers)
    kernel = _KERNELS.get(structure)
    if kernel is None:
        kernel = _KERNELS.setdefault(structure, _generated(needed, given, outputs, numbers))
    return TinyProgram(inputs, outputs, kernel, {value: constants[value] for value in arrays})


def _needed(nodes: Sequence[Node], outputs: Sequence[Value]) -> list[Node]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


def _constants(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Mapping[Value, mx.array],
) -> tuple[dict[Value, Any], list[Value]]:
    """Return the constants that are read: those of one element with it, and the others.

    Raises:
        ValueError: a value comes from nowhere.
    """
    known = {*inputs}
    numbers: dict[Value, Any] = {}
    arrays: dict[Value, None] = {}
    made = {v for node in nodes for v in node.outputs}
    for value in (*(v for node in nodes for v in node.inputs), *outputs):
        if value in known or value in made:
            continue
        if value not in constants:
            raise ValueError(
                f"a value of shape {value.shape} is neither an input nor a constant nor made by "
                "one of the nodes"
            )
        if value.size == 1:
            numbers[value] = constants[value].item()
        else:
            arrays[value] = None
    return numbers, list(arrays)


def _structure(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    numbers: Mapping[Value, Any],
) -> _Structure:
    counts: dict[Value, int] = {}
    for value in (*inputs, *numbers, *(v for node in nodes for v in node.outputs)):
        counts.setdefault(value, len(counts))
    described = [
        (
            node.op,
            tuple(counts[v] for v in node.inputs),
            tuple((v.shape, v.dtype) for v in node.outputs),
            repr(node.arguments),
        )
        for node in nodes
    ]
    return _Structure(
        tuple((v.shape, v.dtype) for v in inputs),
        tuple((v.shape, v.dtype, repr(number)) for v, number in numbers.items()),
        tuple(described),
        tuple(counts[v] for v in outputs),
    )


def _generated(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    numbers: Mapping[Value, Any],
) -> _Kernel:
    lowered = Lowering(nodes)
    lowered.numbers.update(numbers)
    kept = _needed(lowered.nodes, outputs)
    names = {value: f"a{number}" for number, value in enumerate(inputs)}
    threads = threads_for(kept, outputs)
    plain = Sources(
        names,
        lowered.numbers,
        {v: (node, n) for node in kept for n, v in enumerate(node.outputs)},
        {},
    )
    try:
        return _kernel(plain, kept, outputs, threads, Costs(kept, names, outputs, threads))
    except TooLarge:
        sparing = Costs(kept, names, outputs, threads, sparing=True)
        return _kernel(plain, kept, outputs, threads, sparing)


def _kernel(
    plain: Sources, nodes: Sequence[Node], outputs: Sequence[Value], threads: int, costs: Costs
) -> _Kernel:
    """Write a kernel twice: the first text tells what is read from threadgroup memory, and when."""
    stored = costs.stored
    sources = replace(plain, stored={value: f"t{number}" for number, value in enumerate(stored)})
    returned = {value: [f"o{number}"] for number, value in enumerate(outputs)}
    schedule = _scheduled(sources, nodes, outputs, returned, threads)
    first = written(schedule, sources, returned, threads)
    ranks = {value for node in nodes if node.op == "Rank" for value in node.outputs}
    places, arrays = slots(schedule.levels, first.reads, ranks)
    targets = {
        value: [*([places[value]] if value in places else []), *returned.get(value, [])]
        for value in (*stored, *outputs)
    }
    sources = replace(plain, stored={value: places.get(value, "") for value in stored})
    writer = written(schedule, sources, targets, threads)
    return _finished(writer, arrays, outputs, threads)


def _scheduled(
    sources: Sources,
    nodes: Sequence[Node],
    outputs: Sequence[Value],
    returned: Mapping[Value, Sequence[str]],
    threads: int,
) -> Schedule:
    schedule = Schedule(sources, Target(returned, threads))
    made = [value for node in nodes for value in node.outputs]
    for value in made:
        if value in sources.stored or value in returned:
            schedule.add(value)
    for value in outputs:
        if value not in made:
            schedule.add(value)
    return schedule


def _finished(
    writer: Writer,
    arrays: Mapping[str, tuple[mx.Dtype, int]],
    outputs: Sequence[Value],
    threads: int,
) -> _Kernel:
    shared = {**arrays, **writer.arrays}
    total = sum(dtype.size * size for dtype, size in shared.values())
    if total > MEMORY:
        raise TooLarge(f"{total} bytes have to be stored at once; {MEMORY} fit")
    used = sorted(writer.used, key=lambda name: int(name[1:]))
    if len(used) + len(outputs) > _MOST_ARRAYS:
        raise TooLarge(
            f"it reads and writes {len(used) + len(outputs)} arrays; a kernel takes {_MOST_ARRAYS}"
        )
    lines = [f"threadgroup {type_name(d)} {name}[{n}];" for name, (d, n) in shared.items()]
    body = "".join(f"{line}\n" for line in lines) + _positions(writer.body) + writer.body
    digest = sha256((writer.header + body).encode()).hexdigest()[:12]
    definition = Definition(
        name=f"tiny_{digest}",
        input_names=tuple(used),
        output_names=tuple(f"o{number}" for number in range(len(outputs))),
        source=body,
        header=writer.header,
    )
    return _Kernel(definition, threads, tuple(int(name[1:]) for name in used))


def _positions(body: str) -> str:
    """Return the lines that declare where a thread stands, those that are needed."""
    declared = {
        "tid": "thread_position_in_threadgroup.x",
        "lane": "thread_index_in_simdgroup",
        "group": "simdgroup_index_in_threadgroup",
    }
    words = set(re.findall(r"\w+", body))
    return "".join(f"uint {word} = {text};\n" for word, text in declared.items() if word in words)
