"""Puts what a program stores and returns into phases, as few as its dependences allow."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import mlx.core as mx

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny.elements import reduced_length
from zmlx.graph.tiny.literals import WIDE
from zmlx.graph.tiny.phases import SIMD, UNROLLED, Root, Target, is_fold, write
from zmlx.graph.tiny.writer import NotReadyError, Sources, Writer

#: Most threads of a program: more would leave each of them few registers.
MOST_THREADS = 512


def threads_for(nodes: Sequence[Node], outputs: Sequence[Value]) -> int:
    """Return how many threads a program gets: a multiple of 32, up to `MOST_THREADS`."""
    wanted = max(value.size for value in outputs)
    for node in nodes:
        if node.op == "Rank":
            wanted = max(wanted, node.outputs[0].size * 8)
        elif is_fold(node):
            rows, length = node.outputs[0].size, reduced_length(node)
            wanted = max(wanted, rows * SIMD if rows > 1 or length <= 256 else length // 4)
        elif node.op == "Scan":
            wanted = max(wanted, node.outputs[0].size // node.outputs[0].shape[-1] * SIMD)
    return min(MOST_THREADS, -(-wanted // SIMD) * SIMD)


class Schedule:
    """Phases of a program.

    Attributes:
        phases: the roots of each.
        levels: stored value -> its phase.
        uniform: stored values that every thread gets into a register.
    """

    def __init__(self, sources: Sources, target: Target) -> None:
        self.phases: list[list[Root]] = []
        self.levels: dict[Value, int] = {}
        self.uniform: dict[Value, None] = {}
        self._sources = sources
        self._target = target
        self._homes: dict[Value, Root] = {}

    def add(self, value: Value) -> None:
        """Find a phase for a value, after all that it needs."""
        needed = self._needed(value)
        before = max((self.levels[v] for v in needed), default=-1)
        kind, rows = self._kind(value)
        if kind in ("rows", "flat") and before >= 0 and self._joins(value, needed, before):
            return
        ready = max((self.levels[v] + (v not in self.uniform) for v in needed), default=0)
        while len(self.phases) <= ready:
            self.phases.append([])
        phase = self.phases[ready]
        last = phase[-1] if phase else None
        root = Root(kind, rows)
        if last and kind in ("flat", "rows") and last.like(kind, rows, value):
            root = last
        else:
            phase.append(root)
        self._put(value, root, ready)
        if kind == "block":
            self.uniform[value] = None

    def _put(self, value: Value, root: Root, level: int) -> None:
        root.jobs.append(value)
        self._homes[value] = root
        if value in self._sources.stored:
            self.levels[value] = level

    def _kind(self, value: Value) -> tuple[str, int]:
        node, _ = self._sources.producers.get(value, (None, 0))
        if node is None or value not in self._sources.stored:
            return "flat", 1
        if node.op == "Rank":
            return "ranks", 1
        if node.op == "Scan":
            return "scans", value.size // value.shape[node.arguments[1]]
        if not is_fold(node):
            return "flat", 1
        long = reduced_length(node) > UNROLLED * SIMD
        if long and value.size == 1 and node.op == "Reduce" and self._target.groups > 1:
            return "block", 1
        return "rows", value.size

    def _needed(self, value: Value) -> list[Value]:
        """Return the stored values that a value is computed from."""
        node, _ = self._sources.producers.get(value, (None, 0))
        pending = list(node.inputs) if node else []
        seen: dict[Value, None] = {}
        while pending:
            other = pending.pop()
            if other in seen:
                continue
            seen[other] = None
            if other not in self._sources.stored and other in self._sources.producers:
                pending += self._sources.producers[other][0].inputs
        return [v for v in seen if v in self._sources.stored]

    def _joins(self, value: Value, needed: Sequence[Value], level: int) -> bool:
        """Put a value to the root that it depends on, if each thread needs only what is its own."""
        homes = {id(r): r for v in needed if self.levels[v] == level for r in [self._homes[v]]}
        root = next(iter(homes.values()))
        if len(homes) > 1 or not self._fits(value, root):
            return False
        scratch = Writer(self._sources, self.levels)
        scratch.level, scratch.uniform = level, frozenset(self.uniform)
        try:
            write(scratch, self._target, Root(root.kind, root.rows, [*root.jobs, value]))
        except NotReadyError:
            return False
        self._put(value, root, level)
        return True

    def _fits(self, value: Value, root: Root) -> bool:
        kind, _ = self._kind(value)
        if root.kind == "flat":
            return kind == "flat" and value.size == root.jobs[0].size
        if root.kind != "rows" or kind not in ("flat", "rows"):
            return False
        if kind == "rows":
            return value.size == root.rows and value.dtype not in WIDE
        if value.size % root.rows:
            return False
        rounds = -(-root.rows // self._target.groups) * -(-value.size // (root.rows * SIMD))
        return rounds <= 4 * -(-value.size // self._target.threads) + 4


def written(
    schedule: Schedule, sources: Sources, arrays: Mapping[Value, Sequence[str]], threads: int
) -> Writer:
    """Write all phases of a schedule.

    Args:
        schedule: what is computed when.
        sources: where elements come from.
        arrays: value -> names of the arrays to which its elements go.
        threads: of the threadgroup.
    """
    writer = Writer(sources, schedule.levels)
    target = Target(arrays, threads)
    for level, phase in enumerate(schedule.phases):
        writer.level = level
        if level:
            writer.line("threadgroup_barrier(mem_flags::mem_threadgroup);")
        for root in phase:
            write(writer, target, root)
    return writer


def slots(
    values: Mapping[Value, int], reads: Mapping[Value, int], short: Container[Value]
) -> tuple[dict[Value, str], dict[str, tuple[mx.Dtype, int]]]:
    """Give stored values their arrays in threadgroup memory; what is read no more makes place.

    Args:
        values: stored value -> the phase that writes it.
        reads: the same -> the last phase that reads it; values that are not in it need no place.
        short: values of which 16 bits hold all numbers.

    Returns:
        Value -> name, and name -> dtype and size.
    """
    names: dict[Value, str] = {}
    arrays: dict[str, tuple[mx.Dtype, int]] = {}
    free_from: dict[str, int] = {}
    for value, level in sorted(values.items(), key=lambda item: item[1]):
        if value not in reads:
            continue
        dtype = mx.uint16 if value in short else value.dtype
        fitting = [n for n, f in free_from.items() if f < level and arrays[n][0] == dtype]
        name = min(fitting, key=lambda n: abs(arrays[n][1] - value.size), default=f"s{len(arrays)}")
        size = max(arrays.get(name, (dtype, 0))[1], value.size)
        names[value], arrays[name] = name, (dtype, size)
        free_from[name] = reads[value]
    return names, arrays
