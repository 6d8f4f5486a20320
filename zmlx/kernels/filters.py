"""Top-k and top-p of few long rows without sorting them.

    top_k   y[i] = x[i] for the k largest x[i], of equal ones the first; others elsewhere
    top_p   y[i] = x[i] where sum_{x[j] > x[i]} exp(x[j]) < p * sum_j exp(x[j]); others elsewhere

Both keep what has less than so much above it: less than k elements, or less than p of the mass. The
smallest element that does is found by four bits at a time of integers that are ordered as floats
are: in each pass threadgroups add up, for each of 16 values of the next four bits, the weight of
their part of a row, and in the next one each of them finds from these sums how the smallest element
goes on. No threadgroup relies on what another one of its launch wrote. Four passes do for bfloat16,
five for float16, eight for float32, and one more launch writes the result. Sums are in float32, in
an order that is always the same.

top_p is that of mlx-lm's `apply_top_p` (0.32), which sorts a row and adds it up one by one: equal
elements stay or go together. At p = 0 the largest stay. mlx-lm's `apply_top_k` parts a row, and
which of equal elements at the boundary it keeps is not defined. Rows must not hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from zmlx.backend.definition import Definition, Launch
from zmlx.kernels.rows import check_rows, count_rows
from zmlx.kernels.spec import KernelSpec, Sample, register
from zmlx.kernels.vocabulary import ITEMS, ORDER, PART, THREADS, VALUES

#: Passes that see all bits that a float of the dtype has as float32.
_PASSES = {mx.bfloat16: 4, mx.float16: 5, mx.float32: 8}
#: Numbers of a row's state: bits found so far, the weight above them, that which is allowed above,
#: how far the last bits that were added up are to be shifted, what elements become that go.
_STATE = 5

Compile = Callable[[Definition], Launch]

_GROUPS = THREADS // 32

#: Threads that add up one of a row's 16 sums, and how many parts each of them loads at once.
_ADDERS = THREADS // 16
_AHEAD = 8
_ADD = """
  float weight = i < parts ? weights[(row * parts + i) * 16 + thread_in_row % 16] : 0.0f;
  column += weight;
  earlier += i < part % parts ? weight : 0.0f;
"""
#: What the smallest element begins with, from the sums of all parts and the state before them;
#: `earlier` is this thread's share of the sum of the parts before this one.
_SETTLE = f"""
size_t row = part / parts;
uint prefix = state[row * {_STATE}];
float above = as_type<float>(state[row * {_STATE} + 1]);
float target = as_type<float>(state[row * {_STATE} + 2]);
uint shift = state[row * {_STATE} + 3];
threadgroup float columns[{THREADS}];
threadgroup float sums[16];
float column = 0.0f;
float earlier = 0.0f;
// Without a loop, so that the loads, those of `values` too, do not wait for each other.
#pragma unroll
for (uint j = 0; j < {_AHEAD}; ++j) {{
  uint i = thread_in_row / 16 + j * {_ADDERS};
{_ADD}}}
for (uint i = thread_in_row / 16 + {_AHEAD * _ADDERS}; i < parts; i += {_ADDERS}) {{
{_ADD}}}
columns[thread_in_row] = column;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_in_row < 16) {{
  float sum = 0.0f;
#pragma unroll
  for (uint i = 0; i < {_ADDERS}; ++i) {{
    sum += columns[i * 16 + thread_in_row];
  }}
  sums[thread_in_row] = sum;
}}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (MASS && shift == 28) {{
  float total = 0.0f;
  for (uint i = 0; i < 16; ++i) {{
    total += sums[i];
  }}
  target = metal::max(target * total, 1e-37f);
}}
uint digit = 15;
for (uint i = 15; i > 0; --i) {{
  if (digit == i && above + sums[i] < target) {{
    above += sums[i];
    digit = i - 1;
  }}
}}
prefix |= digit << shift;
"""
#: The weight of this part for each value of the four bits at `next`.
_TALLY = f"""
float tally[16] = {{}};
#pragma unroll
for (uint i = 0; i < {ITEMS}; ++i) {{
  uint key = order_of(values[i]);
  bool counts = first + i * {THREADS} < length && ((key ^ prefix) >> next) >> 4 == 0;
  float weight = counts ? (MASS ? metal::exp(values[i]) : 1.0f) : 0.0f;
  uint own = key >> next & 15;
#pragma unroll
  for (uint digit = 0; digit < 16; ++digit) {{
    tally[digit] += digit == own ? weight : 0.0f;
  }}
}}
// Lanes halve what they have with each other, until each has a sum: that of digit lane / 2.
simdgroup_barrier(mem_flags::mem_none);
#pragma unroll
for (uint half_of = 8; half_of > 0; half_of /= 2) {{
  bool upper = lane & 2 * half_of;
#pragma unroll
  for (uint i = 0; i < half_of; ++i) {{
    float own = upper ? tally[i + half_of] : tally[i];
    float other = upper ? tally[i] : tally[i + half_of];
    tally[i] = own + simd_shuffle_xor(other, 2 * half_of);
  }}
}}
tally[0] += simd_shuffle_xor(tally[0], 1);
threadgroup float tallies[{_GROUPS * 16}];
if (lane % 2 == 0) {{
  tallies[group * 16 + lane / 2] = tally[0];
}}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_in_row < 16) {{
  float sum = 0.0f;
  for (uint i = 0; i < {_GROUPS}; ++i) {{
    sum += tallies[i * 16 + thread_in_row];
  }}
  next_weights[size_t(part) * 16 + thread_in_row] = sum;
}}
"""
# One thread of a row reads `wanted`: on CUDA an array of 8 bytes is in the host's memory.
_FIRST = f"""{VALUES}
bool begins = part % parts == 0 && thread_in_row == 0;
float goal = begins ? wanted[0] : 0.0f;
float others = begins ? wanted[1] : 0.0f;
uint prefix = 0;
uint next = 28;
{_TALLY}
if (begins) {{
  size_t at = size_t(part / parts) * {_STATE};
  next_state[at] = 0;
  next_state[at + 1] = as_type<uint>(0.0f);
  next_state[at + 2] = as_type<uint>(goal);
  next_state[at + 3] = next;
  next_state[at + 4] = as_type<uint>(others);
}}
"""
_NEXT = f"""{VALUES}
{_SETTLE}
uint next = shift - 4;
{_TALLY}
if (part % parts == 0 && thread_in_row == 0) {{
  next_state[row * {_STATE}] = prefix;
  next_state[row * {_STATE} + 1] = as_type<uint>(above);
  next_state[row * {_STATE} + 2] = as_type<uint>(target);
  next_state[row * {_STATE} + 3] = next;
  next_state[row * {_STATE} + 4] = state[row * {_STATE} + 4];
}}
"""
# Elements of a part are in the order of `i`, then of simdgroups, then of lanes. Those equal to the
# smallest one that is kept are counted for four values of `i` in one integer: there are up to 32 in
# a simdgroup, and up to 255 in front of an element. Sums over all simdgroups are two in an integer.
_PLACES = f"""
threadgroup float earliers[{THREADS}];
threadgroup uint counts[{_GROUPS * ITEMS // 4}];
earliers[thread_in_row] = earlier;
uint inside[{ITEMS // 4}];
#pragma unroll
for (uint w = 0; w < {ITEMS // 4}; ++w) {{
  uint equal = 0;
#pragma unroll
  for (uint b = 0; b < 4; ++b) {{
    uint i = 4 * w + b;
    bool counts_here = first + i * {THREADS} < length && order_of(values[i]) >> shift == bound;
    equal |= counts_here ? 1u << 8 * b : 0u;
  }}
  simdgroup_barrier(mem_flags::mem_none);
  inside[w] = simd_prefix_exclusive_sum(equal);
  if (lane == 31) {{
    counts[group * {ITEMS // 4} + w] = inside[w] + equal;
  }}
}}
threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
for (uint i = 0; i < {_ADDERS}; ++i) {{
  place += earliers[i * 16 + digit];
}}
uint sum = 0;
#pragma unroll
for (uint w = 0; w < {ITEMS // 4}; ++w) {{
  uint all[2] = {{0, 0}};
#pragma unroll
  for (uint g = 0; g < {_GROUPS}; ++g) {{
    uint four = counts[g * {ITEMS // 4} + w];
    inside[w] += g < group ? four : 0;
    all[0] += four & 0x00ff00ffu;
    all[1] += four >> 8 & 0x00ff00ffu;
  }}
#pragma unroll
  for (uint b = 0; b < 4; ++b) {{
    places[4 * w + b] = place + float(sum + (inside[w] >> 8 * b & 255));
    sum += all[b % 2] >> b / 2 * 16 & 65535;
  }}
}}
"""
_LAST = f"""{VALUES}
{_SETTLE}
float others = as_type<float>(state[row * {_STATE} + 4]);
uint bound = prefix >> shift;
// How much is above an element, if it is equal to the smallest one that is kept.
float place = above;
float places[{ITEMS}] = {{}};
if (!MASS) {{
{_PLACES}
}}
#pragma unroll
for (uint i = 0; i < {ITEMS}; ++i) {{
  uint at = first + i * {THREADS};
  uint key = order_of(values[i]) >> shift;
  bool kept = key > bound || (key == bound && (MASS || places[i] < target));
  if (at < length) {{
    out[start + at] = kept ? T(values[i]) : T(others);
  }}
}}
"""

_BEGIN = Definition("filter_begin", ("x", "wanted"), ("next_weights", "next_state"), _FIRST, ORDER)
_CONTINUE = Definition(
    "filter_continue", ("x", "weights", "state"), ("next_weights", "next_state"), _NEXT, ORDER
)
_END = Definition("filter_end", ("x", "weights", "state"), ("out",), _LAST, ORDER)


def _filtered(compiled: Compile, x: mx.array, wanted: mx.array, *, by_mass: bool) -> mx.array:
    length = check_rows(x=x)
    if wanted.shape != (2,) or wanted.dtype != mx.float32:
        raise ValueError(f"wanted is {wanted.dtype} {wanted.shape}; give two float32")
    if x.size == 0:
        return x
    rows, parts = count_rows(x), -(-length // PART)
    layout = {"grid": (rows * parts * THREADS, 1, 1), "threadgroup": (THREADS, 1, 1)}
    of_pass = {
        "output_shapes": [(rows, parts, 16), (rows, _STATE)],
        "output_dtypes": [mx.float32, mx.uint32],
        "template": [("MASS", by_mass)],
        **layout,
    }
    found = compiled(_BEGIN)(inputs=[x, wanted], **of_pass)  # type: ignore[arg-type]
    for _ in range(_PASSES[x.dtype] - 1):
        found = compiled(_CONTINUE)(inputs=[x, *found], **of_pass)  # type: ignore[arg-type]
    return compiled(_END)(
        inputs=[x, *found],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        template=[("T", x.dtype), ("MASS", by_mass)],
        **layout,  # type: ignore[arg-type]
    )[0]


def launch_top_k(compiled: Compile, x: mx.array, wanted: mx.array) -> mx.array:
    """Keep the largest elements of rows.

    Args:
        compiled: compiles a definition.
        x: (..., V) float32, float16 or bfloat16.
        wanted: (2,) float32: how many, from 1 to V, and what the others become.

    Returns:
        Like `x`.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `x` has no axes, or `wanted` is something else.
    """
    return _filtered(compiled, x, wanted, by_mass=False)


def launch_top_p(compiled: Compile, x: mx.array, wanted: mx.array) -> mx.array:
    """Keep the largest elements of rows, until they have a part of the mass.

    The arguments are those of `launch_top_k`, but that `wanted` begins with the part, 0 to 1.
    """
    return _filtered(compiled, x, wanted, by_mass=True)


def _top_k_reference(x: mx.array, wanted: mx.array) -> mx.array:
    ranks = mx.argsort(mx.argsort(-x, axis=-1), axis=-1)
    return mx.where(ranks < wanted[0], x, wanted[1].astype(x.dtype))


def _top_p_reference(x: mx.array, wanted: mx.array) -> mx.array:
    wide = x if x.dtype == mx.float64 else x.astype(mx.float32)
    ordered = mx.sort(wide, axis=-1)
    mass = mx.exp(ordered)
    above = _sums_behind(mass)
    total = above[..., :1] + mass[..., :1]
    dropped = (above >= wanted[0] * total).sum(axis=-1, keepdims=True)
    least = mx.take_along_axis(ordered, mx.minimum(dropped, x.shape[-1] - 1), axis=-1)
    return mx.where(wide >= least, x, wanted[1].astype(x.dtype))


def _sums_behind(x: mx.array) -> mx.array:
    """Return for each element of a row the sum of those behind it.

    In parts: on CUDA MLX 0.32.4 scans rows of more than 4,096 elements in steps, and does not wait
    between them until all threads have read what the next step writes.
    """
    length, part = x.shape[-1], 1024
    parts = -(-length // part)
    unused = parts * part - length
    rows = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(unused, 0)])
    rows = rows.reshape(*x.shape[:-1], parts, part)
    whole = mx.cumsum(rows.sum(axis=-1), axis=-1, reverse=True, inclusive=False)
    sums = mx.cumsum(rows, axis=-1, reverse=True, inclusive=False) + whole[..., None]
    return sums.reshape(*x.shape[:-1], -1)[..., unused:]


def _logprobs(dtype: mx.Dtype) -> mx.array:
    x = 3 * mx.random.normal((2, 4501), key=mx.random.key(1))
    return (x - mx.logsumexp(x, axis=-1, keepdims=True)).astype(dtype)


def _top_k_sample(*, dtype: mx.Dtype) -> Sample:
    return Sample((_logprobs(dtype), mx.array([40, 0], mx.float32)))


def _top_p_sample(*, dtype: mx.Dtype) -> Sample:
    return Sample((_logprobs(dtype), mx.array([0.75, 0], mx.float32)))


_CONTRACT = {"metal": "tighter", "cuda": "tighter"}
_SHAPES = ("x (..., V) float32, float16 or bfloat16", "wanted (2,) float32: {}, others", "y like x")

TOP_K = register(
    KernelSpec(
        name="top_k",
        domain="sampling",
        formula="y[i] = x[i] for the k largest x[i], of equal ones the first; others elsewhere",
        shapes=(_SHAPES[0], _SHAPES[1].format("k"), _SHAPES[2]),
        reference=_top_k_reference,
        sample=_top_k_sample,
        contract=_CONTRACT,
        fused=launch_top_k,
    )
)

TOP_P = register(
    KernelSpec(
        name="top_p",
        domain="sampling",
        formula="y[i] = x[i] where sum_{x[j] > x[i]} exp(x[j]) < p sum_j exp(x[j]); else others",
        shapes=(_SHAPES[0], _SHAPES[1].format("p"), _SHAPES[2]),
        reference=_top_p_reference,
        sample=_top_p_sample,
        contract=_CONTRACT,
        fused=launch_top_p,
    )
)
