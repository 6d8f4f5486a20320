"""Writes the body of a kernel: scopes, variables, and the elements of values where they are needed.

An element is written once in a scope: whoever asks again gets the variable. It is written in the
outermost scope that knows its index, so that nothing constant stays in a loop. Elements of the
kernel's inputs whose place is known at the beginning are loaded there, before the first barrier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny.elements import element
from zmlx.graph.tiny.elementwise import HEADERS, REQUIRED
from zmlx.graph.tiny.index import Index, ravel, variable
from zmlx.graph.tiny.literals import literal, type_name

#: Most elements that a thread loads before the kernel's first phase: they stay in registers.
_MOST_EARLY = 24


class NotReadyError(Exception):
    """A value is asked for that other threads store in the same phase."""


@dataclass(frozen=True)
class Sources:
    """Where elements come from.

    Attributes:
        inputs: the kernel's inputs -> their names.
        numbers: values of one element that are known.
        producers: value -> the node that makes it, and which of the node's outputs it is.
        stored: values in threadgroup memory -> their names.
    """

    inputs: Mapping[Value, str]
    numbers: Mapping[Value, bool | int | float]
    producers: Mapping[Value, tuple[Node, int]]
    stored: Mapping[Value, str]


@dataclass
class _Scope:
    depth: int
    parent: _Scope | None = None
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[Value, Index], str] = field(default_factory=dict)


class Writer:
    """The text of one kernel, as it grows.

    Attributes:
        sources: where elements come from.
        levels: stored value -> the phase in which it is stored, as far as that is decided.
        level: the phase that is written.
        uniform: stored values that every thread has in a register from their phase on.
        reads: stored value -> the last phase in which it is read from threadgroup memory.
        used: names of the inputs that are read, in their order of use.
        arrays: further arrays in threadgroup memory: name -> dtype and size.
        loads: lines that stand before the first phase.
    """

    def __init__(self, sources: Sources, levels: Mapping[Value, int]) -> None:
        self.sources = sources
        self.levels = levels
        self.level = 0
        self.uniform: frozenset[Value] = frozenset()
        self.reads: dict[Value, int] = {}
        self.used: dict[str, None] = {}
        self.arrays: dict[str, tuple[mx.Dtype, int]] = {}
        self.loads: list[str] = []
        self._early: dict[tuple[Value, Index], str] = {}
        self._kernel = self._scope = _Scope(0)
        self._floor = 0
        self._names = 0
        self._headers: dict[str, None] = {}

    @property
    def body(self) -> str:
        """The kernel's body so far."""
        return "\n".join((*self.loads, *self._kernel.lines)) + "\n"

    @property
    def header(self) -> str:
        """What has to stand before the kernel."""
        return "".join(self._headers)

    @property
    def depth(self) -> int:
        """Of the scope that is written to; 0 is the kernel's own."""
        return self._scope.depth

    def line(self, text: str) -> None:
        """Write a line, and note what has to stand before the kernel for it."""
        self._scope.lines.append(text)
        for name, header in HEADERS.items():
            if f"{name}(" in text:
                if name in REQUIRED:
                    self._headers[HEADERS[REQUIRED[name]]] = None
                self._headers[header] = None

    def name(self, letter: str) -> str:
        """Return a name that is not taken."""
        self._names += 1
        return f"{letter}{self._names}"

    def declare(self, dtype: mx.Dtype, expression: str, *, cast: bool = True) -> str:
        """Write a variable with a value, rounded to its dtype, and return its name."""
        name, kind = self.name("v"), type_name(dtype)
        plain = not cast or dtype in (mx.float32, mx.bool_)
        self.line(f"{kind} {name} = {expression if plain else f'{kind}({expression})'};")
        return name

    def atom(self, expression: str, limit: int) -> Index:
        """Write an index that is computed; it is known in this scope only."""
        if limit == 1:
            return Index()
        name = self.name("p")
        self.line(f"uint {name} = {expression};")
        return variable(name, limit, self.depth)

    @contextmanager
    def block(self, start: str) -> Iterator[None]:
        """Write a scope of its own, such as of an `if`."""
        outer = self._scope
        self._scope = _Scope(outer.depth + 1, outer)
        yield
        inner, self._scope = self._scope, outer
        outer.lines += [f"{start} {{", *(f"  {line}" for line in inner.lines), "}"]

    @contextmanager
    def row(self, start: str) -> Iterator[None]:
        """Write a block for the threads of one row: what is found there stays there."""
        with self.block(start):
            self._floor = self.depth
            yield
            self._floor = 0

    @contextmanager
    def loop(self, count: int) -> Iterator[Index]:
        """Write a loop, and give its index."""
        name = self.name("i")
        with self.block(f"for (uint {name} = 0; {name} < {count}u; ++{name})"):
            yield variable(name, count, self.depth)

    def shared(self, name: str, dtype: mx.Dtype, size: int) -> None:
        """Add an array in threadgroup memory."""
        self.arrays[name] = (dtype, size)

    def note_read(self, value: Value) -> None:
        """Note that this phase reads a stored value.

        Raises:
            NotReadyError: this phase stores it.
        """
        if self.levels.get(value, self.level) >= self.level:
            raise NotReadyError
        self.reads[value] = self.level

    def know(self, value: Value, position: Index, text: str) -> None:
        """Let everyone in this scope find an element in a variable."""
        self._scope.known[value, position] = text

    def element(self, value: Value, at: tuple[Index, ...], *, anew: bool = False) -> str:
        """Return a variable or constant that holds an element of a value.

        Args:
            value: what is asked for.
            at: its index.
            anew: compute it even if it is stored, since it is to be stored now.

        Raises:
            NotReadyError: other threads store it in this phase.
        """
        if value in self.sources.numbers:
            return literal(self.sources.numbers[value], value.dtype)
        position = ravel(at, value.shape)
        found = self._found(value, position)
        if found is None:
            here = self._scope
            outermost = max(position.depth, self._floor)
            while self._scope.depth > outermost and self._scope.parent is not None:
                self._scope = self._scope.parent
            try:
                found = self._written(value, position, at, anew)
                self._scope.known[value, position] = found
            finally:
                self._scope = here
        return found

    def _found(self, value: Value, position: Index) -> str | None:
        scope: _Scope | None = self._scope
        while scope is not None:
            if (value, position) in scope.known:
                return scope.known[value, position]
            scope = scope.parent
        return self._early.get((value, position))

    def _written(self, value: Value, position: Index, at: tuple[Index, ...], anew: bool) -> str:
        if value in self.sources.stored and not anew:
            return self._read(value, position)
        if value in self.sources.inputs:
            return self._loaded(value, position)
        node, number = self.sources.producers[value]
        return element(self, node, number, at)

    def _read(self, value: Value, position: Index) -> str:
        if value in self.uniform:
            return "uniform"
        self.note_read(value)
        place = f"{self.sources.stored[value]}[{position.text}]"
        return self.declare(value.dtype, place, cast=False)

    def _loaded(self, value: Value, position: Index) -> str:
        name = self.sources.inputs[value]
        self.used[name] = None
        place = f"{name}[{position.text}]" if value.shape else name
        if not position.early or len(self.loads) >= _MOST_EARLY:
            return self.declare(value.dtype, place, cast=False)
        variable_name = self.name("v")
        self.loads.append(f"{type_name(value.dtype)} {variable_name} = {place};")
        self._early[value, position] = variable_name
        return variable_name
