"""How each lazy operation's element follows from elements of its inputs.

Views only change the index. Elementwise operations write one variable. What has to look at a few
elements of an input, such as a short reduction, a convolution or a lookup, writes a short loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny.elementwise import EXPRESSIONS, expression
from zmlx.graph.tiny.index import (
    Index,
    constant,
    quotient,
    ravel,
    remainder,
    scaled,
    total,
    unravel,
)
from zmlx.graph.tiny.literals import FLOATS, SIGNED, literal, type_name

if TYPE_CHECKING:
    from zmlx.graph.tiny.writer import Writer

_At = tuple[Index, ...]

#: Views -> the index into the input, from the node and the index into the output.
_VIEWS: dict[str, Callable[[Node, int, _At], _At]] = {}
_FORMULAS: dict[str, Callable[[Writer, Node, int, _At], str]] = {}


def element(writer: Writer, node: Node, number: int, at: _At) -> str:
    """Write what computes an element of a node's output; return the variable that holds it."""
    view = _VIEWS.get(node.op)
    if view is not None:
        return writer.element(node.inputs[0], view(node, number, at))
    formula = _FORMULAS.get(node.op)
    if formula is not None:
        return formula(writer, node, number, at)
    names = [writer.element(value, at) for value in node.inputs]
    return writer.declare(node.outputs[number].dtype, expression(node, number, names))


# ---- views ---------------------------------------------------------------------------------------


def _same_order(node: Node, number: int, at: _At) -> _At:
    return unravel(ravel(at, node.outputs[0].shape), node.inputs[0].shape)


def _same_place(node: Node, number: int, at: _At) -> _At:
    return at


def _broadcast(node: Node, number: int, at: _At) -> _At:
    shape = node.inputs[0].shape
    kept = at[len(at) - len(shape) :]
    return tuple(
        Index() if length == 1 else index for index, length in zip(kept, shape, strict=True)
    )


def _transpose(node: Node, number: int, at: _At) -> _At:
    found = dict(zip(node.arguments[0], at, strict=True))
    return tuple(found[axis] for axis in range(len(at)))


def _slice(node: Node, number: int, at: _At) -> _At:
    starts, _, strides = node.arguments
    return tuple(
        total(constant(start), scaled(index, stride))
        for index, start, stride in zip(at, starts, strides, strict=True)
    )


def _split(node: Node, number: int, at: _At) -> _At:
    borders, axis = node.arguments
    start = borders[number - 1] if number else 0
    return _replaced(at, axis, total(constant(start), at[axis]))


def _replaced(at: _At, axis: int, index: Index) -> _At:
    axis %= len(at)
    return (*at[:axis], index, *at[axis + 1 :])


_VIEWS.update(
    Broadcast=_broadcast,
    BroadcastAxes=_broadcast,
    Contiguous=_same_place,
    Copy=_same_place,
    ExpandDims=_same_order,
    Flatten=_same_order,
    Full=_broadcast,
    Reshape=_same_order,
    Slice=_slice,
    Split=_split,
    Squeeze=_same_order,
    StopGradient=_same_place,
    Transpose=_transpose,
    Unflatten=_same_order,
)


# ---- choices between inputs ----------------------------------------------------------------------


def _within(index: Index, start: int, end: int) -> bool | None:
    """Whether an index is in a range, if that is known of all its values."""
    if index.low >= start and index.high < end:
        return True
    return False if index.high < start or index.low >= end else None


def _concatenate(writer: Writer, node: Node, number: int, at: _At) -> str:
    axis = node.arguments[0] % len(at)
    start, parts = 0, []
    for value in node.inputs:
        end = start + value.shape[axis]
        inside = _within(at[axis], start, end)
        if inside:
            return writer.element(value, _replaced(at, axis, total(at[axis], constant(-start))))
        if inside is None:
            parts.append((value, start, end))
        start = end
    position = writer.atom(at[axis].text, start)
    result = _undefined(writer, node.outputs[0])
    # Separate conditions, no else: what is written around a scope may come between two of them.
    for value, start, end in parts:
        conditions = [f"{position.text} >= {start}u"] if start else []
        conditions += [f"{position.text} < {end}u"] if end < position.high + 1 else []
        with writer.block(f"if ({' && '.join(conditions)})"):
            inner = writer.atom(f"{position.text} - {start}u", end - start)
            writer.line(f"{result} = {writer.element(value, _replaced(at, axis, inner))};")
    return result


def _undefined(writer: Writer, value: Value) -> str:
    name = writer.name("v")
    writer.line(f"{type_name(value.dtype)} {name};")
    return name


def _inside(writer: Writer, at: _At, starts: Sequence[int], shape: Sequence[int]) -> str | None:
    """Return the condition that an index is in a box, "" if it always is, None if it never is."""
    conditions = []
    for index, start, length in zip(at, starts, shape, strict=True):
        inside = _within(index, start, start + length)
        if inside is False:
            return None
        if inside is None:
            if index.low < start:
                conditions.append(f"{index.text} >= {start}u")
            if index.high >= start + length:
                conditions.append(f"{index.text} < {start + length}u")
    return " && ".join(conditions)


def _boxed(writer: Writer, inner: Value, starts: Sequence[int], at: _At, otherwise: str) -> str:
    """Return an element of a value that covers a box of the output; `otherwise` around it."""
    condition = _inside(writer, at, starts, inner.shape)
    if condition is None:
        return otherwise
    moved = tuple(total(i, constant(-s)) for i, s in zip(at, starts, strict=True))
    if not condition:
        return writer.element(inner, moved)
    result = writer.declare(inner.dtype, otherwise)
    with writer.block(f"if ({condition})"):
        places = tuple(
            writer.atom(i.text, n) if i.terms else i
            for i, n in zip(moved, inner.shape, strict=True)
        )
        writer.line(f"{result} = {writer.element(inner, places)};")
    return result


def _pad(writer: Writer, node: Node, number: int, at: _At) -> str:
    starts = [0] * len(at)
    for axis, low in zip(node.arguments[0], node.arguments[1], strict=True):
        starts[axis] = low
    filling = writer.element(node.inputs[1], ())
    return _boxed(writer, node.inputs[0], starts, at, filling)


def _slice_update(writer: Writer, node: Node, number: int, at: _At) -> str:
    starts = list(node.arguments[1])
    old = writer.element(node.inputs[0], at)
    return _boxed(writer, node.inputs[1], starts, at, old)


# ---- lookups -------------------------------------------------------------------------------------


def _looked_up(writer: Writer, value: Value, at: _At, length: int) -> Index:
    """Return an index that the program computes; negative ones count from the end."""
    name = writer.element(value, at)
    if value.dtype in SIGNED:
        return writer.atom(f"uint({name} < 0 ? {name} + {length} : {name})", length)
    return writer.atom(f"uint({name})", length)


def _gather_axis(writer: Writer, node: Node, number: int, at: _At) -> str:
    source, indices = node.inputs
    axis = node.arguments[0] % len(at)
    found = _looked_up(writer, indices, at, source.shape[axis])
    return writer.element(source, _replaced(at, axis, found))


def _gather(writer: Writer, node: Node, number: int, at: _At) -> str:
    source, *indices = node.inputs
    where, place = at[: -len(source.shape)], list(at[-len(source.shape) :])
    for axis, value in zip(node.arguments[0], indices, strict=True):
        start = _looked_up(writer, value, where, source.shape[axis])
        place[axis] = total(start, place[axis])
    return writer.element(source, tuple(place))


def _scatter_axis(writer: Writer, node: Node, number: int, at: _At) -> str:
    source, indices, updates = node.inputs
    kind, axis = node.arguments[0], node.arguments[1] % len(at)
    result = writer.declare(source.dtype, writer.element(source, at))
    with writer.loop(indices.shape[axis]) as step:
        where = _replaced(at, axis, step)
        name = writer.element(indices, where)
        wrapped = f"({name} < 0 ? {name} + {source.shape[axis]} : {name})"
        found = wrapped if indices.dtype in SIGNED else name
        with writer.block(f"if (uint({found}) == {at[axis].text})"):
            update = writer.element(updates, where)
            added = f"{type_name(source.dtype)}({result} + {update})"
            writer.line(f"{result} = {update if kind else added};")
    return result


# ---- sums over few elements ----------------------------------------------------------------------


def accumulator(value: Value) -> mx.Dtype:
    """Return the dtype in which a reduction to a value runs: of 32 bits at least."""
    if value.dtype in FLOATS:
        return mx.float32
    if value.dtype in (mx.int8, mx.int16):
        return mx.int32
    return mx.uint32 if value.dtype in (mx.uint8, mx.uint16) else value.dtype


#: Of `Reduce`'s kinds: what joins two, from their names.
JOINS: tuple[Callable[[str, str], str], ...] = (
    lambda a, b: f"{a} && {b}",
    lambda a, b: f"{a} || {b}",
    lambda a, b: f"{a} + {b}",
    lambda a, b: f"{a} * {b}",
    lambda a, b: f"tiny_smaller({a}, {b})",
    lambda a, b: f"tiny_larger({a}, {b})",
)


def reduced_place(node: Node, at: _At, position: Index) -> _At:
    """Return the index into a reduction's input.

    Args:
        node: the reduction.
        at: the index into its output, where the reduced axes have length 1.
        position: the position among the elements that are added up.
    """
    shape = node.inputs[0].shape
    axes = sorted(axis % len(shape) for axis in node.arguments[1])
    inner = unravel(position, [shape[axis] for axis in axes])
    place = list(at)
    for axis, index in zip(axes, inner, strict=True):
        place[axis] = index
    return tuple(place)


def reduced_length(node: Node) -> int:
    """Return how many elements a reduction adds up for each of its results."""
    return node.inputs[0].size // node.outputs[0].size


def _reduce(writer: Writer, node: Node, number: int, at: _At) -> str:
    wide = accumulator(node.outputs[0])
    join, length = JOINS[node.arguments[0]], reduced_length(node)

    def contribution(position: Index) -> str:
        name = writer.element(node.inputs[0], reduced_place(node, at, position))
        return as_dtype(wide, name, node.inputs[0].dtype)

    result = writer.declare(wide, contribution(constant(0)))
    kind = type_name(wide)
    if length <= 4:
        for position in range(1, length):
            writer.line(f"{result} = {kind}({join(result, contribution(constant(position)))});")
    else:
        with writer.loop(length - 1) as step:
            part = contribution(total(step, constant(1)))
            writer.line(f"{result} = {kind}({join(result, part)});")
    if wide == node.outputs[0].dtype:
        return result
    return writer.declare(node.outputs[0].dtype, result)


def as_dtype(wanted: mx.Dtype, name: str, given: mx.Dtype) -> str:
    """Return a variable's value in another dtype."""
    if wanted == mx.bool_ != given:
        return f"{name} != {literal(0, given)}"
    return name if wanted == given else f"{type_name(wanted)}({name})"


def _convolution(writer: Writer, node: Node, number: int, at: _At) -> str:
    (x, weight), (strides, before, _, dilation, *_) = node.inputs, node.arguments
    batch, time, channel = at
    sums = writer.declare(mx.float32, "0.0f")
    for tap in range(weight.shape[1]):
        start = tap * dilation[0] - before[0]
        moment = total(scaled(time, strides[0]), constant(start))
        factor = writer.element(weight, (channel, constant(tap), Index()))
        if _within(moment, 0, x.shape[1]) is False:
            continue
        if _within(moment, 0, x.shape[1]):
            value = writer.element(x, (batch, moment, channel))
            writer.line(f"{sums} += float({value}) * float({factor});")
            continue
        with writer.block(f"if ({moment.text} < {x.shape[1]}u)"):
            inner = writer.atom(moment.text, x.shape[1])
            value = writer.element(x, (batch, inner, channel))
            writer.line(f"{sums} += float({value}) * float({factor});")
    return writer.declare(node.outputs[0].dtype, sums)


# ---- positions -----------------------------------------------------------------------------------


def _arange(writer: Writer, node: Node, number: int, at: _At) -> str:
    start, _, step = node.arguments
    dtype = node.outputs[0].dtype
    kind = type_name(dtype)
    index = f"{kind}({at[0].text})"
    first, by = literal(start, dtype), literal(step, dtype)
    product = f"tiny_product({index}, {by})" if dtype == mx.float32 else f"{index} * {by}"
    return writer.declare(dtype, f"{first} + {product}")


def _number_of_elements(writer: Writer, node: Node, number: int, at: _At) -> str:
    axes, inverted, dtype = node.arguments
    count = math.prod(node.inputs[0].shape[axis] for axis in axes)
    return literal(1 / count if inverted else count, dtype)


def _rope(writer: Writer, node: Node, number: int, at: _At) -> str:
    x, dims = node.inputs[0], node.arguments[0]
    if _within(at[-1], 0, dims) is False:
        return writer.element(x, at)
    if _within(at[-1], 0, dims):
        return _turned(writer, node, at, at[-1])
    result = writer.declare(x.dtype, writer.element(x, at))
    with writer.block(f"if ({at[-1].text} < {dims}u)"):
        inner = writer.atom(at[-1].text, dims)
        writer.line(f"{result} = {_turned(writer, node, at, inner)};")
    return result


def _turned(writer: Writer, node: Node, at: _At, place: Index) -> str:
    """Write one element of a pair that is turned by its angle, in float32."""
    x, dims, traditional = node.inputs[0], node.arguments[0], node.arguments[1]
    half = dims // 2
    if traditional:
        pair, side = quotient(place, 2), remainder(place, 2)
        places = (scaled(pair, 2), total(scaled(pair, 2), constant(1)))
    else:
        pair, side = remainder(place, half), quotient(place, half)
        places = (pair, total(pair, constant(half)))
    first, second = (
        as_dtype(mx.float32, writer.element(x, (*at[:-1], p)), x.dtype) for p in places
    )
    angle = _angle(writer, node, at, pair)
    cosine = writer.declare(mx.float32, f"metal::precise::cos({angle})")
    sine = writer.declare(mx.float32, f"metal::precise::sin({angle})")
    return writer.declare(
        node.outputs[0].dtype,
        f"{side.text} == 0u ? {first} * {cosine} - {second} * {sine}"
        f" : {first} * {sine} + {second} * {cosine}",
    )


def _angle(writer: Writer, node: Node, at: _At, pair: Index) -> str:
    _, offset, *freqs = node.inputs
    dims, _, base, scale, *_ = node.arguments
    batch = (at[0],) if offset.size > 1 else (Index(),) * len(offset.shape)
    start = writer.element(offset, batch)
    position = f"float(int({start}) + int({at[-2].text}))"
    if freqs:
        inverse = f"1.0f / {writer.element(freqs[0], (pair,))}"
    else:
        power = literal(math.log2(base), mx.float32)
        inverse = f"metal::exp2(-(float({pair.text}) / {dims // 2}.0f) * {power})"
    rate = writer.declare(mx.float32, inverse)
    return writer.declare(mx.float32, f"({literal(scale, mx.float32)} * {position}) * {rate}")


_FORMULAS.update(
    Arange=_arange,
    Concatenate=_concatenate,
    Convolution=_convolution,
    Gather=_gather,
    GatherAxis=_gather_axis,
    NumberOfElements=_number_of_elements,
    Pad=_pad,
    Reduce=_reduce,
    RoPE=_rope,
    ScatterAxis=_scatter_axis,
    SliceUpdate=_slice_update,
)

#: Operations whose elements are computed where they are needed.
LAZY = frozenset((*_VIEWS, *_FORMULAS, *EXPRESSIONS, "DivMod"))
#: Operations that only say where an element is.
VIEWS = frozenset(_VIEWS)
#: Operations whose elements lie in the order of those of their inputs of the same size.
IN_ORDER = frozenset(
    (*EXPRESSIONS, *(op for op, view in _VIEWS.items() if view in (_same_order, _same_place)))
)
