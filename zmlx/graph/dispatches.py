"""How many kernels a graph launches on a GPU, without one and without running it.

The rules are read from the `eval_gpu` of each primitive of MLX 0.32.4, for Metal and for CUDA. A
view (a reshape in place, a slice, a broadcast, a transposition) launches nothing; a copy that an
operation needs because its input does not lie as it wants counts for that operation, and so does
the copy of a buffer that is written to while something else still reads it. Inputs of the graph lie
in row order and may be overwritten, as caches are; constants lie in row order.

Where MLX decides by the machine, the count is for an H200 and for a Max or Pro chip of Apple's.
Libraries that MLX calls on CUDA (cuBLAS, cuDNN) count as one kernel a call; they may launch a
second one to join partial sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from zmlx.graph import layout
from zmlx.graph.layout import Layout
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import FUSED, emit
from zmlx.graph.recording import Attention, Rope
from zmlx.graph.reductions import reduction_launches
from zmlx.graph.trace import trace_plain

#: Backends for which kernels can be counted.
BACKENDS = ("metal", "cuda")


def dispatches(graph: Graph, backend: str) -> Mapping[str, int]:
    """Return how many kernels a graph launches, by operation.

    Args:
        graph: as traced, with the parts that MLX compiles joined by `zmlx.graph.compiled.fused`.
            A fused node (its name begins with "Fused") counts as one kernel, or as many as its
            first argument's attribute `launches` says.
        backend: "metal" or "cuda".

    Returns:
        Name of the operation -> launches, the most first; operations that launch none are left out.

    Raises:
        ValueError: the backend is not one of these.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels are counted for {' and '.join(BACKENDS)}, not for {backend!r}")
    counted: Counter[str] = Counter()
    place = _Place(graph, backend)
    for position, node in enumerate(graph.nodes):
        place.position = position
        launches, made = _count(place, node)
        place.at.update(zip(node.outputs, made, strict=True))
        counted[node.op] += launches
    return {op: launches for op, launches in counted.most_common() if launches}


class _Place:
    """Where the arrays of a graph lie, and which of them are still needed, while it is walked."""

    def __init__(self, graph: Graph, backend: str) -> None:
        self.graph = graph
        self.cuda = backend == "cuda"
        self.backend = backend
        self.position = 0
        self.at: dict[Value, Layout] = {}
        for value in (*graph.inputs, *graph.constants):
            self.at[value] = layout.whole(value.shape)

    @cached_property
    def last_read(self) -> dict[Value, int]:
        """Position of the last node that reads each value; outputs are read at the very end."""
        last = {v: i for i, node in enumerate(self.graph.nodes) for v in node.inputs}
        last.update(dict.fromkeys(self.graph.outputs, len(self.graph.nodes)))
        return last

    @cached_property
    def sharing(self) -> dict[Value, list[Value]]:
        """The values that lie in the same buffer as each one."""
        groups: dict[Value, list[Value]] = {}
        for node in self.graph.nodes:
            shared = node.inputs[0] if node.op in _VIEWS and node.inputs else None
            for value in node.outputs:
                group = groups.setdefault(shared, [shared]) if shared else [value]
                if shared:
                    group.append(value)
                groups[value] = group
        return groups

    def donatable(self, value: Value) -> bool:
        """Return whether nothing but the current node still needs a value's buffer."""
        group = self.sharing.get(value, [value])
        return not any(
            member in self.graph.constants or self.last_read.get(member, -1) > self.position
            for member in group
        )


@dataclass(frozen=True)
class _Call:
    """A node with the layouts of its inputs."""

    place: _Place
    node: Node
    at: list[Layout]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.outputs[0].shape

    def new(self) -> list[Layout]:
        return [layout.whole(value.shape) for value in self.node.outputs]

    def copies(self, inputs: Sequence[Layout] | None = None) -> int:
        """Return how many inputs are copied if all have to lie in row order."""
        return sum(not at.rows for at in (self.at if inputs is None else inputs))


Counted = tuple[int, list[Layout]]


def _count(place: _Place, node: Node) -> Counted:
    call = _Call(place, node, [place.at[value] for value in node.inputs])
    if node.op.startswith(FUSED):
        launches = getattr(node.arguments[0], "launches", 1)
        return launches if isinstance(launches, int) else launches[place.backend], call.new()
    if all(value.size == 0 for value in node.outputs):
        return 0, call.new()
    view = _VIEWS.get(node.op)
    if view is not None:
        return view(call)
    return _LAUNCHES.get(node.op, _elementwise)(call)


# Views


def _unary_view(function: Callable[[_Call, Layout], Layout]) -> Callable[[_Call], Counted]:
    return lambda call: (0, [function(call, call.at[0])])


def _reshape(call: _Call) -> Counted:
    found = layout.reshaped(call.at[0], call.shape)
    return (1, call.new()) if found is None else (0, [found])


def _contiguous(call: _Call) -> Counted:
    (column_order,) = call.node.arguments
    at = call.at[0]
    fits = at.data_size <= at.size + 16384 // call.node.inputs[0].dtype.size
    if fits and (at.rows or (column_order and at.columns)):
        return 0, [at]
    return 1, call.new()


def _view(call: _Call) -> Counted:
    at = call.at[0]
    before, after = call.node.inputs[0].dtype.size, call.node.outputs[0].dtype.size
    if before == after:
        return 0, [at]
    in_place = at.rows or (after < before and at.strides[-1] == 1)
    return int(not in_place), call.new()


_VIEWS: dict[str, Callable[[_Call], Counted]] = {
    "AsStrided": _unary_view(lambda call, at: layout.strided(at, *call.node.arguments[:2])),
    "Broadcast": _unary_view(lambda call, at: layout.broadcast(at, call.shape)),
    "BroadcastAxes": _unary_view(lambda call, at: layout.broadcast(at, call.shape)),
    "Contiguous": _contiguous,
    "Copy": _unary_view(lambda _, at: at),
    "Depends": lambda call: (0, call.at[: len(call.node.outputs)]),
    "ExpandDims": _unary_view(lambda call, at: layout.expanded(at, *call.node.arguments)),
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Slice": _unary_view(lambda call, at: layout.sliced(at, call.shape, call.node.arguments[2])),
    "Split": lambda call: (0, [layout.split(call.at[0], v.shape) for v in call.node.outputs]),
    "Squeeze": _unary_view(lambda call, at: layout.squeezed(at, *call.node.arguments)),
    "StopGradient": _unary_view(lambda _, at: at),
    "Transpose": _unary_view(lambda call, at: layout.transposed(at, *call.node.arguments)),
    "Unflatten": _reshape,
    "View": _view,
}


# Operations


def _elementwise(call: _Call) -> Counted:
    """Count what reads its inputs however they lie: one kernel."""
    return 1, [layout.combined(call.at, value.shape) for value in call.node.outputs]


def _one(call: _Call) -> Counted:
    return 1, call.new()


def _after_copies(call: _Call) -> Counted:
    return 1 + call.copies(), call.new()


def _concatenate(call: _Call) -> Counted:
    return sum(at.size > 0 for at in call.at), call.new()


def _written(call: _Call) -> int:
    """Return the copies before an input is written to: none where its buffer can be taken."""
    at = call.at[0]
    in_order = at.rows if call.node.op.startswith("Scatter") else at.contiguous
    taken = in_order and at.data_size == at.size > 1 and call.place.donatable(call.node.inputs[0])
    return int(not taken)


def _update(launches: int) -> Callable[[_Call], Counted]:
    return lambda call: (_written(call) + launches, call.new())


def _by_rows(call: _Call) -> Counted:
    """Count what reads rows one after the other, like softmax."""
    at = call.at[0]
    return (1, [at]) if at.last_is_whole else (2, call.new())


def _log_sum_exp(call: _Call) -> Counted:
    return 2 - call.at[0].last_is_whole, call.new()


def _norm(call: _Call) -> Counted:
    at = call.at[0]
    in_place = at.last_is_whole
    if in_place and len(at.shape) > 1:
        step = at.strides[-2]
        lone = not call.place.cuda and at.shape[-2] == 1
        in_place = step in (0, at.shape[-1]) or lone
    return (1, [at]) if in_place else (2, call.new())


def _scan(call: _Call) -> Counted:
    at, axis = call.at[0], call.node.arguments[1]
    in_place = at.contiguous and at.strides[axis] != 0
    return (1, [at]) if in_place else (2, call.new())


def _sort(call: _Call) -> Counted:
    axis = call.node.arguments[-1]
    blocks = -(-call.at[0].shape[axis] // (2048 if call.node.inputs[0].dtype.size > 4 else 4096))
    # Blocks are sorted, then merged in pairs: partition and merge, and at the end a copy.
    merges = (blocks - 1).bit_length()
    return (1 if blocks == 1 else 2 + 2 * merges), call.new()


def _reduce(call: _Call) -> Counted:
    launches = reduction_launches(
        call.at[0], call.node.arguments[1], call.node.outputs[0].size, cuda=call.place.cuda
    )
    return launches, call.new()


def _matrix_copies(operands: Sequence[Layout]) -> int:
    """Return how many operands of a product are copied: those that are no (transposed) matrix."""
    copied = 0
    for at in operands:
        outer, inner = at.strides[-2:]
        plain = inner == 1 and outer == at.shape[-1]
        turned = outer == 1 and inner == at.shape[-2]
        copied += not (plain or turned or (inner == 1 and at.shape[-2] == 1))
    return copied


def _matmul(call: _Call) -> Counted:
    return 1 + _matrix_copies(call.at[:2]), call.new()


def _addmm(call: _Call) -> Counted:
    bias = call.at[2]
    _, beta = call.node.arguments
    # On CUDA a bias for each column is added by the product itself; anything else is copied first.
    in_product = beta == 1 and bias.strides[-1] == 1 and bias.data_size == call.shape[-1]
    copied = int(call.place.cuda and not in_product)
    return 1 + copied + _matrix_copies(call.at[:2]), call.new()


def _gather_mm(call: _Call) -> Counted:
    def lies_well(at: Layout) -> bool:
        batches = zip(at.strides[1:-2], at.shape[:-3], at.strides[:-3], strict=False)
        return at.rows or (
            all(inner * length == outer for inner, length, outer in batches)
            and not _matrix_copies([at])
        )

    copied = sum(not lies_well(at) for at in call.at[:2])
    if call.place.cuda:
        copied += call.copies(call.at[2:])
    return 1 + copied, call.new()


def _quantized_matmul(call: _Call) -> Counted:
    x = call.at[0]
    copied = not (x.rows if call.place.cuda else _is_matrix(x))
    transposed = call.node.arguments[3]
    # Metal's vector by untransposed matrix is split over a long K and then summed.
    long = not call.place.cuda and not transposed and x.shape[-1] >= 1024
    return 1 + copied + long, call.new()


def _gather_qmm(call: _Call) -> Counted:
    x, *_, left, right = call.at
    if call.place.cuda:
        return 1 + call.copies([x, left, right]), call.new()
    return 1 + (not _is_matrix(x)), call.new()


def _is_matrix(at: Layout) -> bool:
    return at.strides[-1] == 1 and (len(at.shape) < 2 or at.strides[-2] == at.shape[-1])


def _rope(call: _Call) -> Counted:
    at, value = call.at[0], call.node.inputs[0]
    partial = Rope(*call.node.arguments).dims < at.shape[-1]
    taken = call.place.donatable(value)
    if call.place.cuda:
        lies_well = len(at.shape) <= 4 or at.rows
        copied = not lies_well or (partial and not taken)
        return 1 + copied, call.new() if copied and not at.rows else [at]
    if partial:
        return 1 + (not (at.rows and taken)), call.new()
    *_, heads, length, width = (1, *at.shape)
    in_turn = len(at.shape) == 4 and at.strides[:3] == (
        length * heads * width,
        width,
        heads * width,
    )
    batch = [n for n in at.shape[:-3] if n != 1]
    return 1 + (not (at.rows or not batch or in_turn)), call.new()


def _attention(call: _Call) -> Counted:
    return (_attention_cuda if call.place.cuda else _attention_metal)(call)


def _attention_cuda(call: _Call) -> Counted:
    q, k, v, *_ = call.at
    arguments = Attention(*call.node.arguments)
    width, length = q.shape[-1], q.shape[2]
    vector = width == v.shape[-1] and width in (64, 96, 128) and length < 4
    if not vector or arguments.has_mask:
        return _unfused(call)
    half = call.node.inputs[0].dtype in (mx.float16, mx.bfloat16)
    if half and length == 1 and k.shape[2] >= 256 and _in_cache(k) and _in_cache(v):
        sinks = arguments.has_sinks and call.node.inputs[-1].dtype != mx.float32
        return 1 + sinks, call.new()
    copied = (not _lies_as_query(q)) + (not _lies_as_keys(k)) + (not _lies_as_keys(v))
    return copied + (2 if k.shape[2] > 1024 else 1), _heads_last(call)


def _attention_metal(call: _Call) -> Counted:
    q, k, v, *_ = call.at
    width, value_width, length = q.shape[-1], v.shape[-1], q.shape[2]
    groups = q.shape[1] // k.shape[1]
    widths = (width == value_width and width in (64, 96, 128, 256)) or (
        (width, value_width) == (192, 128)
    )
    if length > 8 or not widths or length > k.shape[2] or length * groups > 32:
        return _unfused(call)
    copied = (not _lies_as_query(q)) + (not _lies_as_keys(k)) + (not _lies_as_keys(v))
    long = groups > 1 and k.shape[2] >= 4096
    return copied + 1 + long, call.new()


def _in_cache(at: Layout) -> bool:
    """Return whether keys or values are the first part of mlx-lm's cache."""
    capacity = at.strides[1] // at.strides[2] if at.strides[2] else 0
    return at.strides[-1] == 1 and capacity >= at.shape[2] and capacity % 256 == 0


def _lies_as_query(at: Layout) -> bool:
    if at.rows:
        return True
    if 1 not in at.shape[:2]:
        return False
    turned = 1 if at.shape[0] == 1 else 0
    width = at.shape[3]
    strides = at.strides[turned], at.strides[2], at.strides[3]
    return strides == (width, width * at.shape[turned], 1)


def _lies_as_keys(at: Layout) -> bool:
    if at.strides[-1] != 1:
        return False
    return 1 in at.shape[:2] or at.strides[0] == at.strides[1] * at.shape[1]


def _heads_last(call: _Call) -> list[Layout]:
    """Return the layout that CUDA's attention gives its result: (batch, length, heads, width)."""
    batch, heads, length, width = call.shape
    made = layout.whole((batch, length, heads, width))
    return [layout.transposed(made, (0, 2, 1, 3))]


def _unfused(call: _Call) -> Counted:
    """Count the operations that MLX makes of attention where it has no kernel for it."""
    node = call.node
    empty = [mx.zeros(value.shape, value.dtype) for value in node.inputs]
    with mx.stream(mx.cpu):
        inner = trace_plain(lambda *arrays: list(emit(node, arrays)), *empty)
    place = _Place(inner, call.place.backend)
    place.at.update(zip(inner.inputs, call.at, strict=True))
    launches = 0
    for position, part in enumerate(inner.nodes):
        place.position = position
        counted, made = _count(place, part)
        place.at.update(zip(part.outputs, made, strict=True))
        launches += counted
    return launches, [place.at[value] for value in inner.outputs]


_LAUNCHES: dict[str, Callable[[_Call], Counted]] = {
    "AddMM": _addmm,
    "Arange": _one,
    "ArgPartition": _sort,
    "ArgReduce": _one,
    "ArgSort": _sort,
    "Concatenate": _concatenate,
    "Convolution": _after_copies,
    "DequantizeWeights": _after_copies,
    "DynamicSlice": lambda call: (2, call.new()),
    "DynamicSliceUpdate": _update(2),
    "Full": _one,
    "Gather": _one,
    "GatherAxis": _one,
    "GatherMM": _gather_mm,
    "GatherQMM": _gather_qmm,
    "Hadamard": _after_copies,
    "LayerNorm": _norm,
    "LogSumExp": _log_sum_exp,
    "Matmul": _matmul,
    "Pad": lambda call: (2, call.new()),
    "Partition": _sort,
    "QuantizeWeights": _after_copies,
    "QuantizedMatmul": _quantized_matmul,
    "RMSNorm": _norm,
    "Reduce": _reduce,
    "RoPE": _rope,
    "ScaledDotProductAttention": _attention,
    "Scan": _scan,
    "Scatter": _update(1),
    "ScatterAxis": _update(1),
    "SliceUpdate": _update(1),
    "Softmax": _by_rows,
    "Sort": _sort,
}
