"""Why an operation cannot be part of a tiny program."""

from __future__ import annotations

from zmlx.backend.signature import dtype_name
from zmlx.graph.nodes import Node
from zmlx.graph.tiny.elements import LAZY, reduced_length
from zmlx.graph.tiny.literals import DTYPES, WIDE
from zmlx.graph.tiny.lowering import LOWERED, sorted_axis
from zmlx.graph.tiny.phases import SCANS

#: Most elements of a value that a program computes.
MOST_ELEMENTS = 16_384
#: Bytes of threadgroup memory: Metal has 32 KB, some of which reductions need.
MEMORY = 30 * 1024
#: Longest row that is sorted: a key is compared with each of its row.
LONGEST_SORT = 1_024
_MOST_STEPS = 64


def refusal(node: Node) -> str | None:
    """Return why a node cannot be part of a tiny program, or None if it can.

    Sizes of inputs do not matter here: a program may look up a few rows of a large array.
    """
    if node.op not in LAZY | LOWERED | {"ArgReduce", "Scan"}:
        return "it is not among the operations of tiny programs"
    for value in node.outputs:
        if not 0 < value.size <= MOST_ELEMENTS:
            return f"an output has {value.size} elements; 1 to {MOST_ELEMENTS} are possible"
    for value in (*node.inputs, *node.outputs):
        if value.dtype not in DTYPES:
            return f"it has values of {dtype_name(value.dtype)}"
        if value.size >= 1 << 32:
            return "an input has more elements than an index of 32 bits counts"
    check = _CHECKS.get(node.op)
    return check(node) if check else None


def _sorts(node: Node) -> str | None:
    x = node.inputs[0]
    if not x.shape or x.shape[sorted_axis(node)] > LONGEST_SORT:
        return f"it sorts more than {LONGEST_SORT} elements, or none"
    return f"it sorts {dtype_name(x.dtype)}" if x.dtype in WIDE else None


def _reduces(node: Node) -> str | None:
    wide = node.outputs[0].dtype in WIDE or node.inputs[0].dtype in WIDE
    if wide and (reduced_length(node) > _MOST_STEPS or node.op == "ArgReduce"):
        return "it reduces numbers of 64 bits, which lanes cannot exchange"
    return None if node.inputs[0].size <= MOST_ELEMENTS else "it reduces too many elements"


def _scans(node: Node) -> str | None:
    if node.arguments[0] >= len(SCANS):
        return "it adds up logarithms"
    return "it is of 64 bits" if node.outputs[0].dtype in WIDE else None


def _scatters(node: Node) -> str | None:
    steps = node.inputs[1].shape[node.arguments[1]]
    return None if steps <= _MOST_STEPS else f"it writes {steps} elements along the axis"


def _convolves(node: Node) -> str | None:
    x, weight = node.inputs
    _, _, _, _, stretch, groups, flipped = node.arguments
    if len(x.shape) != 3 or groups != x.shape[-1] or weight.shape[0] != groups:
        return "it is no convolution along one axis with a filter for each channel"
    if stretch != [1] or flipped or weight.shape[1] > 16:
        return "its input is stretched, its filter turned around or longer than 16"
    return None


def _updates(node: Node) -> str | None:
    kind, _, _, strides = node.arguments
    return None if kind == 4 and set(strides) <= {1} else "it has strides, or adds"


def _views(node: Node) -> str | None:
    same = node.inputs[0].dtype.size == node.outputs[0].dtype.size
    return None if same else "it looks at elements of one size as another"


def _pads(node: Node) -> str | None:
    return None if node.inputs[1].size == 1 else "it pads with several numbers"


def _turns(node: Node) -> str | None:
    x, offset, *_ = node.inputs
    if offset.size not in (1, x.shape[0]):
        return "its offset is neither one nor one for each batch"
    return None if node.arguments[0] % 2 == 0 else "it turns an odd number of dimensions"


_CHECKS = {
    "ArgPartition": _sorts,
    "ArgReduce": _reduces,
    "ArgSort": _sorts,
    "Convolution": _convolves,
    "Pad": _pads,
    "Partition": _sorts,
    "Reduce": _reduces,
    "RoPE": _turns,
    "Scan": _scans,
    "ScatterAxis": _scatters,
    "SliceUpdate": _updates,
    "Sort": _sorts,
    "View": _views,
}
