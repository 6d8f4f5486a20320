"""A graph run with MLX's Python operations, each as the primitive that it was traced from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend.outputs import together
from zmlx.graph.indexing import INDEXING
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.recording import Attention, Norm, Packing, Rope

#: The arrays that a node reads. (Unpacked, a sequence fits none of MLX's declarations.)
Inputs = Any
#: Runs a node: its arguments, its inputs, the values that it makes -> the arrays.
Operation = Callable[[Any, Inputs, Sequence[Value]], Any]

#: What the names of fused operations begin with.
FUSED = "Fused"


class UnknownOperation(RuntimeError):
    """A graph has an operation that cannot be run from Python.

    Attributes:
        op: the primitive's name.
        arguments: its state.
    """

    def __init__(self, op: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(f"no way from Python to MLX's operation {op} with arguments {arguments}")
        self.op = op
        self.arguments = arguments


def run(
    graph: Graph,
    arrays: Sequence[mx.array],
    replaced: Mapping[Value, mx.array] | None = None,
) -> list[mx.array]:
    """Build what a graph computes, lazily, on the default device.

    Args:
        graph: of MLX's operations, as `trace` makes it, and of fused ones: nodes whose name begins
            with "Fused" and whose first argument is called with the inputs and returns an array or
            a sequence of them.
        arrays: one for each input of the graph, with its shape and dtype.
        replaced: arrays to read in place of constants.

    Returns:
        An array for each output of the graph.

    Raises:
        UnknownOperation: a node cannot be run.
        ValueError: the arrays do not fit the graph's inputs, or a node made others than it says.
    """
    _check(graph, arrays)
    return built(graph, arrays, replaced)


def built(
    graph: Graph,
    arrays: Sequence[mx.array],
    replaced: Mapping[Value, mx.array] | None = None,
) -> list[mx.array]:
    """Build a graph as `run` does, on arrays that may have other lengths than the traced ones."""
    held: dict[Value, mx.array] = {**graph.constants, **(replaced or {})}
    held.update(zip(graph.inputs, arrays, strict=True))
    for node in graph.nodes:
        held.update(zip(node.outputs, emit(node, [held[v] for v in node.inputs]), strict=True))
    return [held[value] for value in graph.outputs]


def emit(node: Node, inputs: Sequence[mx.array]) -> Sequence[mx.array]:
    """Run one node.

    Raises:
        UnknownOperation: it cannot be run.
        ValueError: it made arrays of other shapes or dtypes than it says.
    """
    if node.op.startswith(FUSED):
        made = together(node.arguments[0](*inputs))
    else:
        operation = _OPERATIONS.get(node.op)
        result = operation(node.arguments, inputs, node.outputs) if operation else None
        if result is None:
            raise UnknownOperation(node.op, node.arguments)
        made = together(result)
    forms = [(array.shape, array.dtype) for array in made]
    wanted = [(value.shape, value.dtype) for value in node.outputs]
    if forms != wanted:
        raise ValueError(f"{node.op} with arguments {node.arguments} made {forms}, not {wanted}")
    return made


def _check(graph: Graph, arrays: Sequence[mx.array]) -> None:
    if len(arrays) != len(graph.inputs):
        raise ValueError(f"the graph has {len(graph.inputs)} inputs; got {len(arrays)} arrays")
    for number, (value, array) in enumerate(zip(graph.inputs, arrays, strict=True)):
        if (array.shape, array.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"input {number} is {array.dtype} {array.shape}; the graph was traced with "
                f"{value.dtype} {value.shape}"
            )


def _plain(function: Callable[..., Any]) -> Operation:
    """Return the operation of a primitive without state that Python has a function for."""
    return lambda _, inputs, __: function(*inputs)


def _with(function: Callable[..., Any], *names: str) -> Operation:
    """Return an operation whose state becomes named arguments of a function."""
    return lambda state, inputs, _: function(*inputs, **dict(zip(names, state, strict=True)))


def _last_axis(function: Callable[..., mx.array]) -> Operation:
    return lambda _, inputs, __: function(inputs[0], axis=-1, keepdims=True)


#: Without state; with one, they are chosen by it below.
_PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": mx.abs,
    "Add": mx.add,
    "ArcCos": mx.arccos,
    "ArcCosh": mx.arccosh,
    "ArcSin": mx.arcsin,
    "ArcSinh": mx.arcsinh,
    "ArcTan": mx.arctan,
    "ArcTan2": mx.arctan2,
    "ArcTanh": mx.arctanh,
    "BitwiseInvert": mx.bitwise_invert,
    "Ceil": mx.ceil,
    "Conjugate": mx.conjugate,
    "Cos": mx.cos,
    "Cosh": mx.cosh,
    "Divide": mx.divide,
    "DivMod": mx.divmod,
    "Erf": mx.erf,
    "ErfInv": mx.erfinv,
    "Exp": mx.exp,
    "Expm1": mx.expm1,
    "Floor": mx.floor,
    "FloorDivide": mx.floor_divide,
    "Greater": mx.greater,
    "GreaterEqual": mx.greater_equal,
    "Imag": mx.imag,
    "Less": mx.less,
    "LessEqual": mx.less_equal,
    "Log1p": mx.log1p,
    "LogAddExp": mx.logaddexp,
    "LogicalAnd": mx.logical_and,
    "LogicalNot": mx.logical_not,
    "LogicalOr": mx.logical_or,
    "Matmul": mx.matmul,
    "Maximum": mx.maximum,
    "Minimum": mx.minimum,
    "Multiply": mx.multiply,
    "Negative": mx.negative,
    "NotEqual": mx.not_equal,
    "Power": mx.power,
    "Real": mx.real,
    "Remainder": mx.remainder,
    "Round": mx.round,
    "Select": mx.where,
    "Sigmoid": mx.sigmoid,
    "Sign": mx.sign,
    "Sin": mx.sin,
    "Sinh": mx.sinh,
    "Square": mx.square,
    "StopGradient": mx.stop_gradient,
    "Subtract": mx.subtract,
    "Tan": mx.tan,
    "Tanh": mx.tanh,
    "ToFP8": mx.to_fp8,
}

# The numbers of MLX's enumerations, in their order.
_BITWISE: tuple[Callable[..., Any], ...] = (
    mx.bitwise_and,
    mx.bitwise_or,
    mx.bitwise_xor,
    mx.left_shift,
    mx.right_shift,
)
_REDUCE = (mx.all, mx.any, mx.sum, mx.prod, mx.min, mx.max)
_ARG_REDUCE = (mx.argmin, mx.argmax)
_SCAN = (mx.cummax, mx.cummin, mx.cumsum, mx.cumprod, mx.logcumsumexp)
_LOG = (mx.log2, mx.log10, mx.log)
#: Names of quantization modes, by the number in a primitive's state.
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def _reduce(state: Any, inputs: Inputs, _: Any) -> mx.array:
    kind, axes = state
    return _REDUCE[kind](inputs[0], axis=tuple(axes), keepdims=True)


def _arg_reduce(state: Any, inputs: Inputs, _: Any) -> mx.array:
    kind, axis = state
    return _ARG_REDUCE[kind](inputs[0], axis=axis, keepdims=True)


def _scan(state: Any, inputs: Inputs, _: Any) -> mx.array:
    kind, axis, reverse, inclusive = state
    return _SCAN[kind](inputs[0], axis=axis, reverse=reverse, inclusive=inclusive)


def _equal(state: Any, inputs: Inputs, _: Any) -> mx.array:
    (equal_nan,) = state
    same = mx.equal(*inputs)
    return same | (mx.isnan(inputs[0]) & mx.isnan(inputs[1])) if equal_nan else same


def _arange(state: Any, _: Any, outputs: Sequence[Value]) -> mx.array:
    start, stop, step = state
    return mx.arange(start, stop, step, dtype=outputs[0].dtype)


def _addmm(state: Any, inputs: Inputs, _: Any) -> mx.array:
    a, b, c = inputs
    alpha, beta = state
    return mx.addmm(c, a, b, alpha, beta)


def _depends(_: Any, inputs: Inputs, outputs: Sequence[Value]) -> Any:
    count = len(outputs)
    return mx.depends(list(inputs[:count]), list(inputs[count:]))


def _pad(state: Any, inputs: Inputs, _: Any) -> mx.array:
    array, value = inputs
    widths = [(0, 0)] * array.ndim
    for axis, low, high in zip(*state, strict=True):
        widths[axis] = (low, high)
    return mx.pad(array, widths, constant_values=value)


def _convolution(state: Any, inputs: Inputs, _: Any) -> mx.array:
    stride, low, high, kernel_dilation, input_dilation, groups, flip = state
    array, weight = inputs
    return mx.conv_general(
        array,
        weight,
        stride=list(stride),
        padding=(list(low), list(high)),
        kernel_dilation=list(kernel_dilation),
        input_dilation=list(input_dilation),
        groups=groups,
        flip=flip,
    )


def _quantized_matmul(state: Any, inputs: Inputs, _: Any) -> mx.array:
    group_size, bits, mode, transpose = state
    x, w, scales, *biases = inputs
    return mx.quantized_matmul(
        x,
        w,
        scales,
        biases[0] if biases else None,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=MODES[mode],
    )


def _indices(lhs: mx.array, rhs: mx.array, left_sorted: bool, right_sorted: bool) -> Any:
    """Return the arguments that give a gathered product its indices and what is sorted in them.

    MLX takes those on one side as sorted when the ones on the other side are left out; what it then
    puts there is what the traced call got.
    """
    chosen: dict[str, Any] = {"sorted_indices": left_sorted or right_sorted}
    if not right_sorted:
        chosen["lhs_indices"] = lhs
    if not left_sorted or right_sorted:
        chosen["rhs_indices"] = rhs
    return chosen


def _gather_mm(state: Any, inputs: Inputs, _: Any) -> mx.array:
    a, b, lhs, rhs = inputs
    return mx.gather_mm(a, b, **_indices(lhs, rhs, *state))


def _gather_qmm(state: Any, inputs: Inputs, _: Any) -> mx.array:
    group_size, bits, mode, transpose, *is_sorted = state
    x, w, scales, *biases, lhs, rhs = inputs
    return mx.gather_qmm(
        x,
        w,
        scales,
        biases[0] if biases else None,
        **_indices(lhs, rhs, *is_sorted),
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=MODES[mode],
    )


def _block_masked_mm(state: Any, inputs: Inputs, _: Any) -> mx.array | None:
    # With masks for the operands, too, their number does not say which ones are there.
    if len(inputs) != 3:
        return None
    a, b, mask = inputs
    return mx.block_masked_mm(a, b, state[0], mask)


def _split(state: Any, inputs: Inputs, _: Any) -> Any:
    indices, axis = state
    return mx.split(inputs[0], list(indices), axis=axis)


def _rms_norm(state: Norm, inputs: Inputs, _: Any) -> mx.array:
    x, *rest = inputs
    return mx.fast.rms_norm(x, rest[0] if rest else None, state.eps)


def _layer_norm(state: Norm, inputs: Inputs, _: Any) -> mx.array:
    x, *rest = inputs
    weight = rest.pop(0) if state.has_weight else None
    bias = rest.pop(0) if state.has_bias else None
    return mx.fast.layer_norm(x, weight, bias, state.eps)


def _rope(state: Rope, inputs: Inputs, _: Any) -> mx.array:
    x, offset, *freqs = inputs
    return mx.fast.rope(
        x,
        state.dims,
        traditional=state.traditional,
        base=state.base,
        scale=state.scale,
        offset=offset,
        freqs=freqs[0] if freqs else None,
    )


def _attention(state: Attention, inputs: Inputs, _: Any) -> mx.array:
    q, k, v, *rest = inputs
    mask = rest.pop(0) if state.has_mask else "causal" if state.causal else None
    sinks = rest.pop(0) if state.has_sinks else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=state.scale, mask=mask, sinks=sinks)


def _quantize_weights(state: Packing, inputs: Inputs, _: Any) -> Sequence[mx.array]:
    w, *rest = inputs
    return mx.quantize(
        w,
        group_size=state.group_size,
        bits=state.bits,
        mode=state.mode,
        global_scale=rest[0] if rest else None,
    )


def _dequantize_weights(state: Packing, inputs: Inputs, _: Any) -> mx.array:
    w, scales, *rest = inputs
    return mx.dequantize(
        w,
        scales,
        rest.pop(0) if state.has_biases else None,
        group_size=state.group_size,
        bits=state.bits,
        mode=state.mode,
        global_scale=rest.pop(0) if state.has_global_scale else None,
        dtype=state.dtype,
    )


#: Name of a primitive -> how to run it. An operation returns None for arguments it cannot serve.
_OPERATIONS: dict[str, Operation] = {
    **{name: _plain(function) for name, function in _PLAIN.items()},
    **INDEXING,
    "AddMM": _addmm,
    "Arange": _arange,
    "ArgPartition": _with(mx.argpartition, "kth", "axis"),
    "ArgReduce": _arg_reduce,
    "ArgSort": _with(mx.argsort, "axis"),
    "AsStrided": _with(mx.as_strided, "shape", "strides", "offset"),
    "AsType": lambda state, inputs, _: inputs[0].astype(*state),
    "BitwiseBinary": lambda state, inputs, _: _BITWISE[state[0]](*inputs),
    "BlockMaskedMM": _block_masked_mm,
    "Broadcast": _with(mx.broadcast_to, "shape"),
    "BroadcastAxes": lambda _, inputs, outputs: mx.broadcast_to(inputs[0], outputs[0].shape),
    "Concatenate": lambda state, inputs, _: mx.concatenate(list(inputs), *state),
    "Contiguous": _with(mx.contiguous, "allow_col_major"),
    "Convolution": _convolution,
    "Copy": lambda _, inputs, __: inputs[0],
    "Depends": _depends,
    "DequantizeWeights": _dequantize_weights,
    "Equal": _equal,
    "ExpandDims": _with(mx.expand_dims, "axis"),
    "Flatten": _with(mx.flatten, "start_axis", "end_axis"),
    "FromFP8": _with(mx.from_fp8, "dtype"),
    "Full": lambda _, inputs, outputs: mx.full(outputs[0].shape, inputs[0], outputs[0].dtype),
    "GatherMM": _gather_mm,
    "GatherQMM": _gather_qmm,
    "Hadamard": _with(mx.hadamard_transform, "scale"),
    "LayerNorm": _layer_norm,
    "Log": lambda state, inputs, _: _LOG[state[0]](*inputs),
    "LogSumExp": _last_axis(mx.logsumexp),
    "Pad": _pad,
    "Partition": _with(mx.partition, "kth", "axis"),
    "QuantizeWeights": _quantize_weights,
    "QuantizedMatmul": _quantized_matmul,
    "RMSNorm": _rms_norm,
    "Reduce": _reduce,
    "Reshape": lambda _, inputs, outputs: mx.reshape(inputs[0], outputs[0].shape),
    "RoPE": _rope,
    "ScaledDotProductAttention": _attention,
    "Scan": _scan,
    "Softmax": lambda state, inputs, _: mx.softmax(inputs[0], axis=-1, precise=state[0]),
    "Sort": _with(mx.sort, "axis"),
    "Split": _split,
    "Sqrt": lambda state, inputs, _: (mx.rsqrt if state[0] else mx.sqrt)(inputs[0]),
    "Squeeze": _with(mx.squeeze, "axis"),
    "Transpose": _with(mx.transpose, "axes"),
    "Unflatten": _with(mx.unflatten, "axis", "shape"),
    "View": _with(mx.view, "dtype"),
}
