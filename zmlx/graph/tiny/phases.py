"""The phases of a kernel: who computes which elements of what is stored or returned.

Between two phases stands a barrier. A phase holds roots, which do not wait for each other:

    Flat     elements that are stored, spread over all threads
    Rows     a simdgroup for each row: reductions, and stores that need nothing but their own row
    Block    one long row, reduced by all threads, in each of which the result is then known
    Ranks    the positions that sort rows of keys: each element counts those before it
    Scans    cumulative sums and the like, a simdgroup for each row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import mlx.core as mx

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny.elements import (
    JOINS,
    accumulator,
    as_dtype,
    reduced_length,
    reduced_place,
)
from zmlx.graph.tiny.index import (
    Index,
    constant,
    ravel,
    remainder,
    scaled,
    total,
    unravel,
    variable,
)
from zmlx.graph.tiny.literals import FLOATS, SIGNED, literal, type_name
from zmlx.graph.tiny.lowering import ALL, ANY, LARGEST, LEAST, PRODUCT, SUM
from zmlx.graph.tiny.writer import Writer

SIMD = 32
#: Most elements of a thread that are written out one by one; more are a loop.
UNROLLED = 8


@dataclass(frozen=True)
class Target:
    """Where the elements of a value go: names of arrays in threadgroup memory and of outputs."""

    arrays: Mapping[Value, Sequence[str]]
    threads: int

    @property
    def groups(self) -> int:
        """Simdgroups."""
        return self.threads // SIMD


@dataclass
class Root:
    """Elements that are computed in one phase, in one way."""

    kind: str
    rows: int
    jobs: list[Value] = field(default_factory=list)

    def like(self, kind: str, rows: int, value: Value) -> bool:
        """Whether a value would be computed as those here are."""
        same = (self.kind, self.rows) == (kind, rows)
        return same and (kind != "flat" or self.jobs[0].size == value.size)


def write(writer: Writer, target: Target, root: Root) -> None:
    """Write a root's part of the phase that is being written.

    Raises:
        NotReadyError: it reads what another root of this phase stores.
    """
    _KINDS[root.kind](writer, target, root)


def store(writer: Writer, target: Target, value: Value, position: Index, name: str) -> None:
    """Write a variable to every place where an element of a value goes."""
    for array in target.arrays.get(value, ()):
        writer.line(f"{array}[{position.text}] = {name};")


def _stored_now(writer: Writer, value: Value, at: tuple[Index, ...]) -> str:
    """Return an element that is to be stored: computed, unless an earlier phase did that."""
    return writer.element(value, at, anew=writer.levels.get(value, writer.level) >= writer.level)


def _flat(writer: Writer, target: Target, root: Root) -> None:
    size, threads = root.jobs[0].size, target.threads

    def stores(position: Index) -> None:
        for value in root.jobs:
            name = _stored_now(writer, value, unravel(position, value.shape))
            store(writer, target, value, position, name)

    whole, rest = divmod(size, threads)
    thread = variable("tid", threads, early=True)
    if whole <= UNROLLED:
        for step in range(whole):
            stores(total(thread, constant(step * threads)))
    else:
        with writer.loop(whole) as index:
            stores(total(thread, scaled(index, threads)))
    if rest:
        with writer.block(f"if (tid < {rest}u)"):
            stores(total(variable("tid", rest, writer.depth), constant(whole * threads)))


# ---- rows of simdgroups --------------------------------------------------------------------------


def _rows(writer: Writer, target: Target, root: Root) -> None:
    if root.rows <= target.groups:
        with writer.row(f"if (group < {root.rows}u)"):
            _row(writer, target, root, variable("group", root.rows, writer.depth))
    else:
        name = writer.name("r")
        head = f"for (uint {name} = group; {name} < {root.rows}u; {name} += {target.groups}u)"
        with writer.row(head):
            _row(writer, target, root, variable(name, root.rows, writer.depth))


def _row(writer: Writer, target: Target, root: Root, row: Index) -> None:
    for value in root.jobs:
        node, _ = writer.sources.producers.get(value, (None, 0))
        if value not in writer.sources.stored or node is None or not is_fold(node):
            _store_row(writer, target, value, row, root.rows)
            continue
        name = _arg_fold(writer, node, row) if node.op == "ArgReduce" else _fold(writer, node, row)
        writer.know(value, row, name)
        if target.arrays.get(value):
            with writer.block("if (lane == 0)"):
                store(writer, target, value, row, name)


def is_fold(node: Node) -> bool:
    """Whether a node gives one element for several of its input."""
    return node.op in ("Reduce", "ArgReduce")


def _lane(writer: Writer) -> Index:
    return variable("lane", SIMD, writer.depth, early=True)


def _positions(writer: Writer, length: int) -> Iterator[tuple[Index, str]]:
    """Give each lane its elements of a row: positions, and when they count, if not always.

    Rows of a power of two below 32 are given to several sets of lanes.
    """
    if length < SIMD and length & (length - 1) == 0:
        yield remainder(_lane(writer), length), ""
        return
    whole, rest = divmod(length, SIMD)
    if whole <= UNROLLED:
        for step in range(whole):
            yield total(_lane(writer), constant(step * SIMD)), ""
    else:
        with writer.loop(whole) as index:
            yield total(_lane(writer), scaled(index, SIMD)), ""
    if rest:
        place = f"lane + {whole * SIMD}u" if whole else "lane"
        yield writer.atom(f"metal::min({place}, {length - 1}u)", length), f"{place} < {length}u"


def _store_row(writer: Writer, target: Target, value: Value, row: Index, rows: int) -> None:
    length = value.size // rows
    for position, condition in _positions(writer, length):
        place = total(scaled(row, length), position)
        name = _stored_now(writer, value, unravel(place, value.shape))
        if length < SIMD:
            condition = f"lane < {length}u"
        if not condition:
            store(writer, target, value, place, name)
        elif target.arrays.get(value):
            with writer.block(f"if ({condition})"):
                store(writer, target, value, place, name)


def _width(length: int) -> int:
    """Return how many lanes a row is spread over."""
    return length if length < SIMD and length & (length - 1) == 0 else SIMD


def _joined_lanes(kind: int, name: str, width: int) -> str:
    """Return what joins a variable of all lanes of a row."""
    if kind in (ALL, ANY):
        return f"{'simd_all' if kind == ALL else 'simd_any'}({name})"
    if width == 1:
        return name
    if kind == SUM and width == SIMD:
        return f"simd_sum({name})"
    function = {SUM: "total", PRODUCT: "times", LEAST: "smaller", LARGEST: "larger"}[kind]
    return f"simd_{function}({name}, ushort({width // 2}))"


def _neutral(kind: int, dtype: mx.Dtype) -> str:
    """Return what changes nothing when it is joined."""
    if kind in (SUM, PRODUCT, ALL, ANY):
        return literal({SUM: 0, PRODUCT: 1, ALL: True, ANY: False}[kind], dtype)
    if dtype in FLOATS:
        return "INFINITY" if kind == LEAST else "(-INFINITY)"
    if dtype == mx.bool_:
        return literal(kind == LEAST, dtype)
    least, most = (-(1 << 31), (1 << 31) - 1) if dtype in SIGNED else (0, (1 << 32) - 1)
    return literal(most if kind == LEAST else least, dtype)


def _gathered(
    writer: Writer, node: Node, row: Index, positions: Iterator[tuple[Index, str]]
) -> tuple[str, mx.Dtype]:
    """Join a thread's own elements of a row; return the variable and its dtype."""
    kind, wide = node.arguments[0], accumulator(node.outputs[0])
    at = unravel(row, node.outputs[0].shape)
    word, join = type_name(wide), JOINS[kind]
    result = writer.declare(wide, _neutral(kind, wide))
    for position, condition in positions:
        element = writer.element(node.inputs[0], reduced_place(node, at, position))
        part = as_dtype(wide, element, node.inputs[0].dtype)
        if condition:
            part = f"({condition} ? {word}({part}) : {_neutral(kind, wide)})"
        joined = join(result, part)
        writer.line(f"{result} = {joined if wide == mx.float32 else f'{word}({joined})'};")
    return result, wide


def _fold(writer: Writer, node: Node, row: Index) -> str:
    length = reduced_length(node)
    result, wide = _gathered(writer, node, row, _positions(writer, length))
    writer.line("simdgroup_barrier(mem_flags::mem_none);")
    joined = _joined_lanes(node.arguments[0], result, _width(length))
    name = writer.declare(wide, joined)
    wanted = node.outputs[0].dtype
    return name if wide == wanted else writer.declare(wanted, name)


def _arg_fold(writer: Writer, node: Node, row: Index) -> str:
    """Write the position of a row's first least or largest element; NaN is neither, as in MLX."""
    x, length = node.inputs[0], reduced_length(node)
    at = unravel(row, node.outputs[0].shape)
    kind, sign = (LARGEST, ">") if node.arguments[0] else (LEAST, "<")
    wide = accumulator(x)
    word, axis = type_name(wide), node.arguments[1] % len(at)
    best = writer.declare(wide, _neutral(kind, wide))
    where = writer.declare(mx.uint32, "0u")
    for position, condition in _positions(writer, length):
        name = writer.element(x, (*at[:axis], position, *at[axis + 1 :]))
        better = f"{word}({name}) {sign} {best}"
        with writer.block(f"if ({better}{f' && {condition}' if condition else ''})"):
            writer.line(f"{best} = {word}({name});")
            writer.line(f"{where} = {position.text};")
    writer.line("simdgroup_barrier(mem_flags::mem_none);")
    with writer.block(f"for (ushort d = {_width(length) // 2}; d > 0; d >>= 1)"):
        writer.line(f"{word} other = simd_shuffle_xor({best}, d);")
        writer.line(f"uint place = simd_shuffle_xor({where}, d);")
        # No branches here: lanes have to stay together for the next exchange.
        same = f"(other == {best}) & (place < {where})"
        writer.line(f"bool better = (other {sign} {best}) | ({same});")
        writer.line(f"{best} = better ? other : {best};")
        writer.line(f"{where} = better ? place : {where};")
    return where


# ---- one long row --------------------------------------------------------------------------------


def _block(writer: Writer, target: Target, root: Root) -> None:
    for value in root.jobs:
        node, _ = writer.sources.producers[value]
        kind, length, row = node.arguments[0], reduced_length(node), Index()
        result, wide = _gathered(writer, node, row, _spread(writer, target, length))
        name = writer.declare(wide, _joined_lanes(kind, result, SIMD))
        if target.groups > 1:
            name = _joined_groups(writer, target, kind, name, wide)
        if wide != value.dtype:
            name = writer.declare(value.dtype, name)
        writer.know(value, row, name)
        if target.arrays.get(value):
            with writer.block("if (tid == 0)"):
                store(writer, target, value, row, name)


def _spread(writer: Writer, target: Target, length: int) -> Iterator[tuple[Index, str]]:
    """Give each thread its elements of one row, as `_flat` does."""
    threads = target.threads
    whole, rest = divmod(length, threads)
    thread = variable("tid", threads, early=True)
    if whole <= UNROLLED:
        for step in range(whole):
            yield total(thread, constant(step * threads)), ""
    else:
        with writer.loop(whole) as index:
            yield total(thread, scaled(index, threads)), ""
    if rest:
        place = f"tid + {whole * threads}u" if whole else "tid"
        yield writer.atom(f"metal::min({place}, {length - 1}u)", length), f"{place} < {length}u"


def _joined_groups(writer: Writer, target: Target, kind: int, name: str, dtype: mx.Dtype) -> str:
    """Join what the simdgroups have; every thread gets the result."""
    partial, held = writer.name("q"), mx.uint32 if dtype == mx.bool_ else dtype
    writer.shared(partial, held, target.groups)
    with writer.block("if (lane == 0)"):
        writer.line(f"{partial}[group] = {name};")
    writer.line("threadgroup_barrier(mem_flags::mem_threadgroup);")
    word, groups = type_name(dtype), target.groups
    part = f"{partial}[lane]"
    if groups < SIMD:
        part = f"lane < {groups}u ? {word}({part}) : {_neutral(kind, dtype)}"
    total_of = writer.declare(dtype, part)
    return writer.declare(dtype, _joined_lanes(kind, total_of, SIMD))


# ---- sorts and scans -----------------------------------------------------------------------------


def _ranks(writer: Writer, target: Target, root: Root) -> None:
    """Count for each key those that come before it, a few threads to a key."""
    (value,) = root.jobs
    (keys,) = writer.sources.producers[value][0].inputs
    size, length = value.size, value.shape[-1]
    share = 1
    while share < SIMD and 2 * share * size <= target.threads and 4 * share <= length:
        share *= 2
    threads, count = target.threads // share, -(-size // (target.threads // share))
    groups = -(-min(size * share, target.threads) // SIMD)
    some = writer.block(f"if (group < {groups}u)") if groups < target.groups else nullcontext()
    with some:
        if count == 1:
            _rank(writer, target, (value, keys), share, "tid" if share == 1 else f"tid / {share}u")
        else:
            with writer.loop(count) as index:
                thread = variable("tid", threads, early=True)
                place = total(thread, scaled(index, threads))
                _rank(writer, target, (value, keys), 1, place.text)


def _rank(
    writer: Writer, target: Target, values: tuple[Value, Value], share: int, place: str
) -> None:
    value, keys = values
    size, length = value.size, value.shape[-1]
    key = writer.name("k")
    at = writer.name("e")
    fits = size * share == target.threads
    writer.line(f"uint {at} = {place if fits else f'metal::min({place}, {size - 1}u)'};")
    here, start = f"{at} % {length}u", f"{at} / {length}u * {length}u"
    if size == length:
        here, start = at, "0u"
    mine = writer.atom(here, length)
    rank = writer.declare(mx.uint32, "0u")
    row = writer.atom(start, size)
    array = writer.sources.stored[keys]
    writer.line(f"uint {key} = {array}[{at}];")
    writer.note_read(keys)
    begin = f"tid % {share}u" if share > 1 else "0"
    other = writer.name("j")
    head = f"for (uint {other} = {begin}; {other} < {length}u; {other} += {share}u)"
    with writer.block(head):
        writer.line(f"uint y = {array}[{row.text} + {other}];")
        writer.line(f"{rank} += uint(y < {key} || (y == {key} && {other} < {mine.text}));")
    if share > 1:
        writer.line("simdgroup_barrier(mem_flags::mem_none);")
        writer.line(f"{rank} = simd_total({rank}, ushort({share // 2}));")
    conditions = [] if fits else [f"{place} < {size}u"]
    conditions += [f"tid % {share}u == 0u"] if share > 1 else []
    with writer.block(f"if ({' && '.join(conditions) or 'true'})"):
        rank_index = variable(rank, length, writer.depth)
        store(writer, target, value, total(row, rank_index), mine.text)


def _scans(writer: Writer, target: Target, root: Root) -> None:
    for value in root.jobs:
        name = writer.name("r")
        head = f"for (uint {name} = group; {name} < {root.rows}u; {name} += {target.groups}u)"
        with writer.row(head):
            _scan(writer, target, value, variable(name, root.rows, writer.depth))


#: Of `Scan`'s kinds: the one of `Reduce`.
SCANS = (LARGEST, LEAST, SUM, PRODUCT)


def _scan(writer: Writer, target: Target, value: Value, row: Index) -> None:
    """Give each lane a run of the row: first what it comes to, then what every element comes to."""
    node, _ = writer.sources.producers[value]
    code, axis, backwards, inclusive = node.arguments
    kind, wide, axis = SCANS[code], accumulator(value), axis % len(value.shape)
    length = value.shape[axis]
    run = -(-length // SIMD)
    others = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
    at = unravel(row, others)

    def joined(name: str, part: str) -> None:
        writer.line(f"{name} = {type_name(wide)}({JOINS[kind](name, part)});")

    def each(name: str, write_too: bool) -> None:
        with writer.loop(run) as step:
            place = writer.name("p")
            writer.line(f"uint {place} = lane * {run}u + {step.text};")
            with writer.block(f"if ({place} < {length}u)"):
                turned = f"{length - 1}u - {place}" if backwards else place
                index = (*at[:axis], writer.atom(turned, length), *at[axis + 1 :])
                element = writer.element(node.inputs[0], index)
                part = as_dtype(wide, element, node.inputs[0].dtype)
                if write_too and not inclusive:
                    _store_at(writer, target, value, index, name)
                joined(name, part)
                if write_too and inclusive:
                    _store_at(writer, target, value, index, name)

    mine = writer.declare(wide, _neutral(kind, wide))
    each(mine, False)
    writer.line("simdgroup_barrier(mem_flags::mem_none);")
    for distance in (1, 2, 4, 8, 16):
        below = writer.declare(wide, f"simd_shuffle_up({mine}, ushort({distance}))")
        with writer.block(f"if (lane >= {distance}u)"):
            joined(mine, below)
        writer.line("simdgroup_barrier(mem_flags::mem_none);")
    before = writer.declare(wide, f"simd_shuffle_up({mine}, ushort(1))")
    with writer.block("if (lane == 0)"):
        writer.line(f"{before} = {_neutral(kind, wide)};")
    each(before, True)


def _store_at(
    writer: Writer, target: Target, value: Value, at: tuple[Index, ...], name: str
) -> None:
    kept = as_dtype(value.dtype, name, accumulator(value))
    store(writer, target, value, ravel(at, value.shape), kept)


_KINDS = {"flat": _flat, "rows": _rows, "block": _block, "ranks": _ranks, "scans": _scans}
