"""Reductions of few long rows, as logits over a vocabulary are: logsumexp and argmax.

    logsumexp   y = log(sum_i exp(x[i]))
    argmax      y = the first i with x[i] = max_j x[j], where NaN is above everything

MLX gives a row to one threadgroup, which then reads it alone. Here each row is divided into parts
of `PART` elements, a threadgroup for each, and a second launch combines what they found: no
threadgroup relies on what another one of its launch wrote. Elements are read one by one, since rows
of odd lengths begin anywhere; with so many threads enough of them are on the way. Everything is
computed in float32, and logsumexp is rounded once.

NaN and infinities are treated as in MLX (0.32.4). argmax is that of MLX bit for bit, for any row:
the first NaN if there is one, 0 of -inf alone. It compares integers that are ordered as floats are.
logsumexp is NaN where an element is, unless +inf is among them, which gives inf (in MLX's kernel
for CUDA that depends on their order); of -inf alone it is -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from zmlx.backend.definition import Definition, Launch
from zmlx.kernels.rows import REDUCTIONS, SIMD, check_rows, count_rows
from zmlx.kernels.spec import KernelSpec, Sample, register

#: Threads of a threadgroup that has a part of a row, and elements that each of them has.
THREADS = 256
ITEMS = 8
#: Elements of a part; those of a thread are apart by the number of threads.
PART = THREADS * ITEMS

Compile = Callable[[Definition], Launch]

_POSITION = """
threadgroup float partial[32];
uint lane = thread_index_in_simdgroup;
uint group = simdgroup_index_in_threadgroup;
uint groups = simdgroups_per_threadgroup;
uint thread_in_row = thread_position_in_threadgroup.x;
"""
#: This thread's elements of a part of `x`, and where they are; -inf beyond the row's end.
VALUES = f"""{_POSITION}
uint length = x_shape[x_ndim - 1];
uint parts = (length + {PART - 1}) / {PART};
uint part = threadgroup_position_in_grid.x;
size_t start = size_t(part / parts) * length;
uint first = part % parts * {PART} + thread_in_row;
float values[{ITEMS}];
for (uint i = 0; i < {ITEMS}; ++i) {{
  uint at = first + i * {THREADS};
  values[i] = at < length ? float(x[start + at]) : -INFINITY;
}}
"""
#: A row's parts, of which this thread has those from `start + thread_in_row` on.
_PARTS = f"""{_POSITION}
uint threads = threads_per_threadgroup.x;
uint row = threadgroup_position_in_grid.x;
uint parts = PARTS;
size_t start = size_t(row) * parts;
"""
#: An integer that grows with the float. Both zeros have the same, and NaN the largest.
ORDER = """
inline uint order_of(float value) {
  uint bits = as_type<uint>(value == 0.0f ? 0.0f : value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0xffffffffu;
  }
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
"""
_LEAST = """
inline uint row_least(
    uint value, threadgroup uint* partial, uint lane, uint group, uint groups) {
  value = simd_min(value);
  if (lane == 0) {
    partial[group] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_min(lane < groups ? partial[lane] : 0xffffffffu);
}
"""
# `base` is what is subtracted: exp(-inf - -inf) would be NaN.
_LOGSUMEXP_PARTS = f"""{VALUES}
float largest = -INFINITY;
for (uint i = 0; i < {ITEMS}; ++i) {{
  largest = values[i] > largest ? values[i] : largest;
}}
largest = row_max(largest, partial, lane, group, groups);
float base = largest > -INFINITY ? largest : 0.0f;
float total = 0.0f;
for (uint i = 0; i < {ITEMS}; ++i) {{
  total += metal::exp(values[i] - base);
}}
total = row_sum(total, partial, lane, group, groups);
if (thread_in_row == 0) {{
  maxima[part] = largest;
  sums[part] = total;
}}
"""
_LOGSUMEXP_WHOLE = f"""{_PARTS}
float largest = -INFINITY;
for (uint i = thread_in_row; i < parts; i += threads) {{
  largest = metal::max(largest, maxima[start + i]);
}}
largest = row_max(largest, partial, lane, group, groups);
float base = largest > -INFINITY ? largest : 0.0f;
float total = 0.0f;
for (uint i = thread_in_row; i < parts; i += threads) {{
  total += sums[start + i] * metal::exp(maxima[start + i] - base);
}}
total = row_sum(total, partial, lane, group, groups);
if (thread_in_row == 0) {{
  out[row] = T(base < INFINITY ? metal::log(total) + base : base);
}}
"""
# The larger an element, the smaller its rank; none has the largest rank, that of no element.
_CHOICE = """
threadgroup uint ranks_of_groups[32];
threadgroup uint indices_of_groups[32];
uint least = row_least(best, ranks_of_groups, lane, group, groups);
uint found = row_least(
    best == least ? index : 0xffffffffu, indices_of_groups, lane, group, groups);
"""
_ARGMAX_PARTS = f"""{VALUES}
uint best = 0xffffffffu;
uint index = first;
for (uint i = 0; i < {ITEMS}; ++i) {{
  uint rank = ~order_of(values[i]);
  if (rank < best) {{
    best = rank;
    index = first + i * {THREADS};
  }}
}}
{_CHOICE}
if (thread_in_row == 0) {{
  ranks[part] = least;
  indices[part] = found;
}}
"""
_ARGMAX_WHOLE = f"""{_PARTS}
uint best = 0xffffffffu;
uint index = 0;
for (uint i = thread_in_row; i < parts; i += threads) {{
  uint rank = ranks[start + i];
  if (rank < best) {{
    best = rank;
    index = indices[start + i];
  }}
}}
{_CHOICE}
if (thread_in_row == 0) {{
  out[row] = found;
}}
"""


def _pair(
    name: str, known: tuple[str, str], parts: str, whole: str, header: str
) -> tuple[Definition, Definition]:
    """Return a reduction's two kernels; `known` are the names of what the first finds of parts."""
    return (
        Definition(f"{name}_parts", ("x",), known, parts, header),
        Definition(name, known, ("out",), whole, header),
    )


_LOGSUMEXP = _pair("logsumexp", ("maxima", "sums"), _LOGSUMEXP_PARTS, _LOGSUMEXP_WHOLE, REDUCTIONS)
_ARGMAX = _pair("argmax", ("ranks", "indices"), _ARGMAX_PARTS, _ARGMAX_WHOLE, ORDER + _LEAST)


def _reduced(
    pair: tuple[Definition, Definition],
    compiled: Compile,
    x: mx.array,
    *,
    known: mx.Dtype,
    out: mx.Dtype,
) -> mx.array:
    """Launch both kernels; `known` and `out` are the dtypes of their outputs."""
    length = check_rows(x=x)
    rows, parts = count_rows(x), -(-length // PART)
    of_parts = compiled(pair[0])(
        inputs=[x],
        output_shapes=[(rows, parts)] * 2,
        output_dtypes=[known] * 2,
        grid=(rows * parts * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    threads = min(1024, SIMD * -(-parts // SIMD))
    return compiled(pair[1])(
        inputs=of_parts,
        output_shapes=[(*x.shape[:-1], 1)],
        output_dtypes=[out],
        grid=(rows * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=[("T", out), ("PARTS", parts)],
    )[0]


def launch_logsumexp(compiled: Compile, x: mx.array) -> mx.array:
    """Compute logsumexp over the last axis, which stays.

    Args:
        compiled: compiles a definition.
        x: (..., V) float32, float16 or bfloat16, not empty.

    Returns:
        (..., 1) in the dtype of `x`.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `x` has no axes or no elements.
    """
    if x.size == 0:  # MLX says so
        return mx.logsumexp(x, axis=-1, keepdims=True)
    return _reduced(_LOGSUMEXP, compiled, x, known=mx.float32, out=x.dtype)


def launch_argmax(compiled: Compile, x: mx.array) -> mx.array:
    """Find the first largest element along the last axis, which stays; NaN is above all.

    Args:
        compiled: compiles a definition.
        x: (..., V) float32, float16 or bfloat16, not empty.

    Returns:
        (..., 1) uint32.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `x` has no axes or no elements.
    """
    if x.size == 0:  # MLX says so
        return mx.argmax(x, axis=-1, keepdims=True)
    return _reduced(_ARGMAX, compiled, x, known=mx.uint32, out=mx.uint32)


def _argmax_reference(x: mx.array) -> mx.array:
    return mx.argmax(x, axis=-1, keepdims=True)


def _argmax_sample(*, dtype: mx.Dtype) -> Sample:
    x = mx.random.normal((2, 9001), key=mx.random.key(1)).astype(dtype)
    return Sample((mx.minimum(x, 3).astype(dtype),))  # several are 3


ARGMAX = register(
    KernelSpec(
        name="argmax",
        domain="reductions",
        formula="y = the first i with x[i] = max_j x[j]; NaN is above all",
        shapes=("x (..., V) float", "y (..., 1) uint32"),
        reference=_argmax_reference,
        sample=_argmax_sample,
        contract={"metal": "exact", "cuda": "exact"},
        fused=launch_argmax,
        tolerance={"uint32": 0.0},
    )
)
