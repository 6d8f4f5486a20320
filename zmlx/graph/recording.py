"""Calls that MLX's export cannot name, recorded while a function is traced.

`mx.fast.rms_norm` and its like are one operation on a GPU and many on a CPU, and some operations
cannot be exported at all. While a function is traced, in the thread that traces, such a function
of MLX's returns a marker of the result's shape and dtype in place of the result. The trace then
puts one node where the marker is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from zmlx.backend.vmapping import inside_vmap, marking

#: One trace at a time: what it puts into `mlx.core` is for the whole process.
_LOCK = threading.Lock()
#: Where markers start: far from the numbers of any model, so that no two constants are merged.
_FIRST_MARKER = 0x5A4D_4C58_0000_0000


class Norm(NamedTuple):
    """Arguments of "RMSNorm" (inputs: x, weight?) and "LayerNorm" (x, weight?, bias?)."""

    eps: float
    has_weight: bool
    has_bias: bool = False


class Rope(NamedTuple):
    """Arguments of "RoPE"; inputs: x, offset (an array, of one number or one for each row), freqs?.

    `base` is None where `freqs` are given.
    """

    dims: int
    traditional: bool
    base: float | None
    scale: float
    has_freqs: bool


class Attention(NamedTuple):
    """Arguments of "ScaledDotProductAttention"; inputs: queries, keys, values, mask?, sinks?."""

    scale: float
    causal: bool
    has_mask: bool
    has_sinks: bool


class Packing(NamedTuple):
    """Arguments of "QuantizeWeights" (inputs: w, global_scale?; outputs: packed, scales, biases?)
    and of "DequantizeWeights" (inputs: packed, scales, biases?, global_scale?).

    What is None is MLX's default for the mode; `dtype` is of dequantized weights.
    """

    group_size: int | None
    bits: int | None
    mode: str
    has_biases: bool
    has_global_scale: bool
    dtype: mx.Dtype | None = None


#: What a primitive reads: a value of a graph.
V = TypeVar("V")


def own_form(
    op: str, inputs: tuple[V, ...], arguments: tuple[Any, ...], dimensions: Callable[[V], int]
) -> tuple[tuple[V, ...], tuple[Any, ...]]:
    """Return inputs and arguments of a primitive as the classes above have them.

    That is where a GPU's primitive was traced without being recorded. MLX gives it the number 1 for
    a weight and 0 for a bias that is not there.

    Args:
        op: the primitive's name.
        inputs: what it reads.
        arguments: its state in MLX.
        dimensions: tells the number of axes of an input.
    """
    if op in ("RMSNorm", "LayerNorm"):
        x, *rest = inputs
        given = [dimensions(value) > 0 for value in rest]
        kept_ones = tuple(value for value, there in zip(rest, given, strict=True) if there)
        return (x, *kept_ones), Norm(arguments[0], *given)
    if op == "RoPE" and arguments[-1]:
        dims, traditional, base, scale, _ = arguments
        freqs = len(inputs) == 3
        return inputs, Rope(dims, traditional, None if freqs else base, scale, freqs)
    if op == "ScaledDotProductAttention":
        scale, causal, has_sinks, *_ = arguments
        has_mask = len(inputs) - has_sinks > 3
        return inputs, Attention(scale, causal, has_mask, has_sinks)
    return inputs, arguments


@dataclass(frozen=True)
class Call:
    """A recorded call: what a node says, with arrays in place of values."""

    op: str
    inputs: tuple[mx.array, ...]
    outputs: tuple[mx.array, ...]
    arguments: tuple[Any, ...]


#: A node's name, inputs and arguments.
Described = tuple[str, tuple[mx.array, ...], tuple[Any, ...]]


def _present(*arrays: mx.array | None) -> tuple[mx.array, ...]:
    return tuple(array for array in arrays if array is not None)


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> Described:
    return "RMSNorm", _present(x, weight), Norm(float(eps), weight is not None)


def _layer_norm(
    x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **_: Any
) -> Described:
    arguments = Norm(float(eps), weight is not None, bias is not None)
    return "LayerNorm", _present(x, weight, bias), arguments


def _rope(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    **_: Any,
) -> Described:
    # A lone number is the same to MLX as an array of it, and a graph has arrays only.
    where = offset if isinstance(offset, mx.array) else mx.array(offset, mx.int32)
    arguments = Rope(dims, traditional, base, float(scale), freqs is not None)
    return "RoPE", _present(a, where, freqs), arguments


def _attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **_: Any,
) -> Described:
    array = mask if isinstance(mask, mx.array) else None
    arguments = Attention(float(scale), isinstance(mask, str), array is not None, sinks is not None)
    return "ScaledDotProductAttention", _present(q, k, v, array, sinks), arguments


def _quantize(
    w: mx.array,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: mx.array | None = None,
    **_: Any,
) -> Described:
    arguments = Packing(group_size, bits, mode, mode == "affine", global_scale is not None)
    return "QuantizeWeights", _present(w, global_scale), arguments


def _dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: mx.array | None = None,
    dtype: mx.Dtype | None = None,
    **_: Any,
) -> Described:
    given = biases is not None, global_scale is not None
    arguments = Packing(group_size, bits, mode, *given, dtype)
    return "DequantizeWeights", _present(w, scales, biases, global_scale), arguments


def _contiguous(a: mx.array, allow_col_major: bool = False, **_: Any) -> Described:
    return "Contiguous", (a,), (bool(allow_col_major),)


def _bitwise_invert(a: mx.array, **_: Any) -> Described:
    return "BitwiseInvert", (a,), ()


def _to_fp8(x: mx.array, **_: Any) -> Described:
    return "ToFP8", (x,), ()


def _from_fp8(x: mx.array, dtype: mx.Dtype = mx.bfloat16, **_: Any) -> Described:
    return "FromFP8", (x,), (dtype,)


#: (where it is, its name, how a call of it is described)
_RECORDED: tuple[tuple[ModuleType, str, Callable[..., Described]], ...] = (
    (mx.fast, "rms_norm", _rms_norm),
    (mx.fast, "layer_norm", _layer_norm),
    (mx.fast, "rope", _rope),
    (mx.fast, "scaled_dot_product_attention", _attention),
    (mx, "quantize", _quantize),
    (mx, "dequantize", _dequantize),
    (mx, "contiguous", _contiguous),
    (mx, "bitwise_invert", _bitwise_invert),
    (mx, "to_fp8", _to_fp8),
    (mx, "from_fp8", _from_fp8),
)


def kept(arrays: Iterable[mx.array]) -> tuple[mx.array, ...]:
    """Return the same arrays as other Python objects: `x += y` changes the caller's object."""
    return tuple(array.astype(array.dtype) for array in arrays)


class Recorder:
    """The calls of one trace.

    Args:
        seed: an int64 scalar that the traced function gets; markers depend on it, as everything
            that MLX may not evaluate while it traces depends on an input.
    """

    def __init__(self, seed: mx.array) -> None:
        self.calls: list[Call] = []
        self._markers = 0
        self._seed = seed
        self._thread = threading.get_ident()

    def recording(
        self, original: Callable[..., Any], describe: Callable[..., Described]
    ) -> Callable[..., Any]:
        """Return what stands for a function of MLX's while a trace runs."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread or inside_vmap():
                return original(*args, **kwargs)
            # Checks the arguments with MLX's own words; it is not computed, for nobody reads it.
            result = original(*args, **kwargs)
            op, inputs, arguments = describe(*args, **kwargs)
            alone = isinstance(result, mx.array)
            markers = tuple(self._marker(array) for array in ([result] if alone else result))
            self.calls.append(Call(op, kept(inputs), kept(markers), arguments))
            return markers[0] if alone else markers

        return recorded

    def _marker(self, result: mx.array) -> mx.array:
        self._markers += 1
        number = mx.array(_FIRST_MARKER + self._markers, mx.int64)
        return mx.broadcast_to((self._seed + number).astype(result.dtype), result.shape)


@contextmanager
def recorded(seed: mx.array) -> Iterator[Recorder]:
    """Record calls of this thread until the block ends; `mlx.core` is then as it was."""
    with _LOCK:
        recorder, vmap = Recorder(seed), mx.vmap
        originals = [(module, name, getattr(module, name)) for module, name, _ in _RECORDED]
        try:
            for (module, name, original), (*_, describe) in zip(originals, _RECORDED, strict=True):
                setattr(module, name, recorder.recording(original, describe))
            mx.vmap = marking(vmap)
            yield recorder
        finally:
            mx.vmap = vmap
            for module, name, original in originals:
                setattr(module, name, original)
