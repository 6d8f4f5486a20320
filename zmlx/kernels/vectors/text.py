"""The Metal text of products with few vectors.

    y[t, n] = sum_k x[t, k] w[n, k]

A simdgroup has ROWS rows of one matrix, or of two (gate and up). It asks for its first weights,
then for the activations, which a threadgroup normalises and lays out in threadgroup memory so that
lanes read them without conflicts, and multiplies when both are there. Where a row is long, SPLIT
simdgroups share it. Sums are float32.
"""

from __future__ import annotations

import mlx.core as mx

#: Metal's names of dtypes, and how many 16 bytes hold 8 values of each.
KINDS = {mx.bfloat16: "bfloat", mx.float16: "half", mx.float32: "float"}
PARTS = {mx.bfloat16: 1, mx.float16: 1, mx.float32: 2}

_UNPACK = {
    mx.bfloat16: """
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = as_type<float>(words[i] << 16);
    to[2 * i + 1] = as_type<float>(words[i] & 0xffff0000u);
  }""",
    mx.float16: """
  for (int i = 0; i < 4; ++i) {
    half2 two = as_type<half2>(words[i]);
    to[2 * i] = float(two.x);
    to[2 * i + 1] = float(two.y);
  }""",
    mx.float32: """
  for (int i = 0; i < 8; ++i) to[i] = as_type<float>(words[i]);""",
}
_PACK_SMALL = """
  for (int i = 0; i < 4; ++i) {{
    uint first = as_type<ushort>({kind}(from[2 * i]));
    words[i] = first | uint(as_type<ushort>({kind}(from[2 * i + 1]))) << 16;
  }}"""
_PACK_FLOAT = """
  for (int i = 0; i < 8; ++i) words[i] = as_type<uint>(from[i]);"""
_BITS = {2: "uint(as_type<ushort>(x[at + i])) << 16 * (i % 2)", 4: "as_type<uint>(x[at + i])"}


def reading(dtype: mx.Dtype, columns: int) -> str:
    """Return functions that read 8 activations, unpack and pack them.

    They are read as words if K is a multiple of 8 and the address one of 16 bytes.
    """
    pack = _PACK_FLOAT if dtype == mx.float32 else _PACK_SMALL.format(kind=KINDS[dtype])
    whole = f"""
  if (ulong(x + at) % 16 == 0) {{
    const device uint4* from = (const device uint4*)(x + at);
    for (int i = 0; i < {PARTS[dtype]}; ++i) {{
      uint4 v = from[i];
      words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
    }}
    return;
  }}"""
    return f"""
inline void unpack(const thread uint* words, thread float* to) {{
#pragma unroll{_UNPACK[dtype]}
}}
inline void pack(const thread float* from, thread uint* words) {{
#pragma unroll{pack}
}}
template <typename X>
inline void read8(const device X* x, size_t row, uint column, thread uint* words) {{
  for (int i = 0; i < {4 * PARTS[dtype]}; ++i) words[i] = 0;
  if (column >= {columns}) return;
  size_t at = row * {columns} + column;{whole if columns % 8 == 0 else ""}
  for (uint i = 0; i < 8 && column + i < {columns}; ++i) {{
    words[i / {8 // (4 * PARTS[dtype])}] |= {_BITS[dtype.size]};
  }}
}}
"""


#: What a lane has of rows, as it is stored, until it is multiplied.
HELD = """
template <typename S, int COUNT>
struct Held {
  uint words[COUNT * Q::WORDS];
  S scales[COUNT * Q::SHARES];
  S biases[COUNT * Q::SHARES];
};
template <int ROWS, typename S, int COUNT, typename W>
inline void load(thread Held<S, COUNT>& held, int from, const device W* w, const device S* scales,
    const device S* biases, uint row, uint rows, uint column) {
  if (Q::K % (32 * Q::RUN) && column >= Q::K) column = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    uint at = metal::min(row + r, rows - 1);
    Q::read(w, at, column, held.words + (from + r) * Q::WORDS);
@SHARES@  }
}
"""
_SHARES = """\
#pragma unroll
    for (int s = 0; s < Q::SHARES; ++s) {{
      uint share = at * (Q::K / Q::GROUP) + column / Q::GROUP + s;
      held.scales[(from + r) * Q::SHARES + s] = scales[share];
{biases}    }}
"""
_BIASES = "      held.biases[(from + r) * Q::SHARES + s] = biases[share];\n"


def held(*, scaled: bool, biased: bool) -> str:
    """Return what loads weights, with the scales and biases that there are."""
    shares = _SHARES.format(biases=_BIASES if biased else "") if scaled else ""
    return HELD.replace("@SHARES@", shares)


#: Multiply what a lane holds with the activations of its columns.
USE = """
template <int COUNT, int TOKENS, typename S, typename X>
inline void use(const thread Held<S, COUNT>& held, X x, size_t row, size_t last, uint step,
    uint lane, float factor, thread float* sums) {
#pragma unroll
  for (int s = 0; s < Q::SHARES; ++s) {
    float parts[COUNT * TOKENS];
    float all[TOKENS];
    for (int i = 0; i < COUNT * TOKENS; ++i) parts[i] = 0.0f;
    for (int t = 0; t < TOKENS; ++t) all[t] = 0.0f;
#pragma unroll
    for (int p = s * Q::SHARE; p < (s + 1) * Q::SHARE; p += 8) {
      float xs[TOKENS * 8];
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        values8(x, metal::min(row + t, last), t, step, p, lane, xs + 8 * t);
        for (int i = 0; i < 8 * Q::BIASED; ++i) all[t] += xs[8 * t + i];
      }
#pragma unroll
      for (int r = 0; r < COUNT; ++r) {
        float q[8];
        Q::values(held.words + r * Q::WORDS, p, q);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) parts[r * TOKENS + t] += q[i] * xs[8 * t + i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT * TOKENS; ++i) {
      int at = i / TOKENS * Q::SHARES + s;
      sums[i] += factor * Q::scaled(held.scales[at], held.biases[at], parts[i], all[i % TOKENS]);
    }
  }
}
template <int COUNT>
inline float chosen(const thread float* sums, uint lane) {
  float value = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) value = lane == uint(i) ? sums[i] : value;
  return value;
}
"""


def activations(dtype: mx.Dtype, *, staged: bool) -> str:
    """Return how a lane reads 8 of its activations: as they were staged, or from their array."""
    parts = PARTS[dtype]
    if not staged:
        return """
template <typename X>
inline void values8(
    X x, size_t row, int token, uint step, int piece, uint lane, thread float* to) {
  uint words[8];
  read8(x, row, (step * 32 + lane) * Q::RUN + piece, words);
  unpack(words, to);
}
"""
    return f"""
inline void values8(const threadgroup uint4* x, size_t row, int token, uint step, int piece,
    uint lane, thread float* to) {{
  uint at = ((token * Q::STEPS + step) * (Q::RUN / 8) + piece / 8) * {32 * parts} + lane;
  uint words[{4 * parts}];
#pragma unroll
  for (int i = 0; i < {parts}; ++i) {{
    uint4 v = x[at + 32 * i];
    words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
  }}
  unpack(words, to);
}}
"""


_SQUARES = """
  for (int t = 0; t < TOKENS; ++t) {
    float squares = 0.0f;
    for (uint i = thread_index; i < PIECES; i += THREADS) {
      uint words[8];
      float v[8];
      read8(x, metal::min(row + t, last), i * 8, words);
      unpack(words, v);
      for (int j = 0; j < 8; ++j) squares += v[j] * v[j];
    }
    simdgroup_barrier(mem_flags::mem_none);
    squares = simd_sum(squares);
    if (thread_index % 32 == 0) partial[t * (THREADS / 32) + thread_index / 32] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
"""
_FACTOR = """
    float factor = 0.0f;
    for (int g = 0; g < THREADS / 32; ++g) factor += partial[t * (THREADS / 32) + g];
    factor = metal::precise::rsqrt(factor / float(Q::K) + {eps!r}f);"""
# Rounded as stock's norm is: the normalised value, and its product with the weight.
_NORMALISE = """
      uint norms[8];
      float v[8], w[8];
      unpack(words, v);
      read8(norm, 0, i * 8, norms);
      unpack(norms, w);
      for (int j = 0; j < 8; ++j) v[j] = float({kind}(v[j] * factor)) * w[j];
      pack(v, words);"""


def staging(dtype: mx.Dtype, eps: float | None) -> str:
    """Return what lays activations out in threadgroup memory, normalised if `eps` is given."""
    parts = PARTS[dtype]
    norm = eps is not None
    factor = _FACTOR.format(eps=float(eps)) if eps is not None else ""
    return f"""
template <int TOKENS, int THREADS, typename X>
inline void stage(const device X* x, {"const device X* norm, " if norm else ""}size_t row,
    size_t last, threadgroup uint4* staged, threadgroup float* partial, uint thread_index) {{
  enum {{ PIECES = Q::STEPS * 32 * Q::RUN / 8, EACH = Q::RUN / 8 }};{_SQUARES if norm else ""}
  for (int t = 0; t < TOKENS; ++t) {{{factor}
    for (uint i = thread_index; i < PIECES; i += THREADS) {{
      uint words[8];
      read8(x, metal::min(row + t, last), i * 8, words);\
{_NORMALISE.format(kind=KINDS[dtype]) if norm else ""}
      uint run = i / EACH;
      uint at = ((t * Q::STEPS + run / 32) * EACH + i % EACH) * {32 * parts} + run % 32;
      for (int j = 0; j < {parts}; ++j) {{
        staged[at + 32 * j] =
            uint4(words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]);
      }}
    }}
  }}
  threadgroup_barrier(mem_flags::mem_threadgroup);
}}
"""


#: name -> gate made of `a`; those that have it multiply it with `b`, the other product.
ACTIVATIONS = {
    "silu": "a / (1.0f + metal::exp(-a))",
    "gelu": "0.5f * a * (1.0f + erf_of(a * 0.70710678f))",
    "gelu_tanh": "0.5f * a * (1.0f + metal::precise::tanh("
    "0.7978845608f * (a + 0.044715f * a * a * a)))",
    "relu2": "metal::max(a, 0.0f) * metal::max(a, 0.0f)",
    "clipped_swiglu": "metal::min(a, 7.0f) / (1.0f + metal::exp(-1.702f * metal::min(a, 7.0f)))",
}
#: Polynomials fitted to erf(x) / x below 1 and to erfc(x) exp(x^2) above: 2e-7 of the value.
ERF = """
inline float erf_of(float x) {
  float a = metal::min(metal::abs(x), 4.2f), z = a * a;
  if (a < 1.0f) {
    float p = 7.882497448e-05f;
    p = p * z - 0.00080188555f;
    p = p * z + 0.00518931216f;
    p = p * z - 0.02685432881f;
    p = p * z + 0.1128359735f;
    p = p * z - 0.37612625957f;
    return x * (p * z + 1.12837910652f);
  }
  float t = 1.0f / (1.0f + 0.5f * a), p = 0.11925904453f;
  p = p * t - 0.47088178992f;
  p = p * t + 0.56277310848f;
  p = p * t - 0.10317263007f;
  p = p * t + 0.34756502509f;
  p = p * t + 0.2597658038f;
  p = p * t + 0.28489822149f;
  p = p * t - 0.00015306480f;
  float result = 1.0f - metal::exp(-z) * p;
  return x < 0.0f ? -result : result;
}
"""
