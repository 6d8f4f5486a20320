"""How weights are read: for each packing the Metal text that turns words into floats.

A lane reads a run of weights of a row, as wide a load as their alignment allows. A quantized weight
becomes a float without a conversion from integers, which is slow on GPUs: its bits are put into the
fraction of a float that is 2^23 (affine), or into that of a half (small floats), exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from zmlx.kernels.vectors.weights import Weight

#: What precedes the functions of a packing: its sizes. K columns; a run of RUN weights in WORDS
#: words, under SHARES scales for SHARE weights each; ROW words a row; GROUP columns a scale.
_SIZES = """
struct Q {{
  enum {{ K = {k}, RUN = {run}, WORDS = {words}, SHARES = {shares}, SHARE = {share}, ROW = {row},
    GROUP = {group}, BIASED = {biased}, STEPS = (K + 32 * RUN - 1) / (32 * RUN) }};
"""
_READ = {
    4: """
  static void read(const device uint* w, uint row, uint column, thread uint* to) {{
    const device uint4* from = (const device uint4*)(w + row * ROW + column / RUN * WORDS);
    for (int i = 0; i < WORDS / 4; ++i) {{
      uint4 v = from[i];
      to[4 * i] = v.x; to[4 * i + 1] = v.y; to[4 * i + 2] = v.z; to[4 * i + 3] = v.w;
    }}
  }}""",
    2: """
  static void read(const device uint* w, uint row, uint column, thread uint* to) {{
    const device uint2* from = (const device uint2*)(w + row * ROW + column / RUN * WORDS);
    for (int i = 0; i < WORDS / 2; ++i) {{
      uint2 v = from[i];
      to[2 * i] = v.x; to[2 * i + 1] = v.y;
    }}
  }}""",
    1: """
  static void read(const device uint* w, uint row, uint column, thread uint* to) {{
    const device uint* from = w + row * ROW + column / RUN * WORDS;
    for (int i = 0; i < WORDS; ++i) to[i] = from[i];
  }}""",
}
# Rows that do not end with a run.
_READ_DENSE = """
  static void read(const device {type}* w, uint row, uint column, thread uint* to) {{
    for (int i = 0; i < RUN; ++i) {{
      uint bits = column + i < K ? uint(as_type<{bits}>(w[row * K + column + i])) : 0u;
      {put}
    }}
  }}"""
_PUT = {
    16: "to[i / 2] = i % 2 ? to[i / 2] | bits << 16 : bits;",
    32: "to[i] = bits;",
}
# A value whose bits end below the 23rd needs no shift: it becomes 2^23 + q * 2^low, from which its
# middle is taken with the rest, exactly.
_AFFINE = """
  static void values(const thread uint* words, int first, thread float* q) {{
#pragma unroll
    for (int i = 0; i < 8; ++i) {{
      int at = (first + i) * {bits}, low = at % 32;
      uint v = words[at / 32];
      if (low + {bits} > 32) {{
        v = v >> low | words[at / 32 + 1] << (32 - low);
        low = 0;
      }} else if (low + {bits} > 23) {{
        v >>= 16;
        low -= 16;
      }}
      float unit = 1.0f / float(1 << low);
      v = (v & {mask}u << low) | 0x4b000000u;
      q[i] = metal::fma(as_type<float>(v), unit, -8388608.0f * unit - {middle}.0f);
    }}
  }}"""
_FP4 = """
  static void values(const thread uint* words, int first, thread float* q) {{
#pragma unroll
    for (int i = 0; i < 4; ++i) {{
      uint v = words[first / 8] >> (4 * i);
      half2 pair = as_type<half2>((v & 0x00070007u) << 9 | (v & 0x00080008u) << 12);
      q[i] = float(pair.x);
      q[i + 4] = float(pair.y);
    }}
  }}"""
_FP8 = """
  static void values(const thread uint* words, int first, thread float* q) {{
#pragma unroll
    for (int i = 0; i < 8; i += 4) {{
      uint v = words[(first + i) / 4];
      half2 even = as_type<half2>((v & 0x007f007fu) << 7 | (v & 0x00800080u) << 8);
      half2 odd = as_type<half2>((v & 0x7f007f00u) >> 1 | (v & 0x80008000u));
      q[i] = float(even.x); q[i + 1] = float(odd.x);
      q[i + 2] = float(even.y); q[i + 3] = float(odd.y);
    }}
  }}"""
_DENSE = {
    "bfloat": "q[i] = as_type<float>(i % 2 ? v & 0xffff0000u : v << 16);",
    "half": "half2 two = as_type<half2>(v); q[i] = float(i % 2 ? two.y : two.x);",
    "float": "q[i] = as_type<float>(v);",
}
_FLOATS = """
  static void values(const thread uint* words, int first, thread float* q) {{
#pragma unroll
    for (int i = 0; i < 8; ++i) {{
      uint v = words[(first + i) / {each}];
      {value}
    }}
  }}"""
# Small floats come out too small by a power of two: halves have another bias of the exponent.
_E8M0 = "as_type<float>(s ? uint(s) << 23 : 0x00400000u) * {unit}"
_E4M3 = "float(as_type<half>(ushort((s & 128) << 8 | (s & 127) << 7))) * {unit}"
_SCALED = {
    # Of values less their middle, with a bias for it: nothing large cancels.
    "affine": "return metal::fma(float(scale), sum, metal::fma(float(scale), {middle}.0f, "
    "float(bias)) * all);",
    "mxfp4": f"S s = scale; return {_E8M0.format(unit='16384.0f')} * sum;",
    "nvfp4": f"S s = scale; return {_E4M3.format(unit='4194304.0f')} * sum;",
    "mxfp8": f"S s = scale; return {_E8M0.format(unit='256.0f')} * sum;",
    "dense": "return sum;",
}
_RESULT = """
  template <typename S>
  static float scaled(S scale, S bias, float sum, float all) {{
    {text}
  }}
}};
"""


@dataclass(frozen=True)
class Format:
    """How the rows of a weight are read.

    Attributes:
        text: a struct `Q` with sizes and the functions read, values and scaled.
        run: weights that a lane reads at once.
        words: 32-bit words of a run.
        steps: passes of 32 lanes over a row.
        scaled: whether there are scales.
        biased: whether there are biases.
    """

    text: str
    run: int
    words: int
    steps: int
    scaled: bool
    biased: bool


def format_of(weight: Weight) -> Format:
    """Return how a weight is read."""
    mode, group_size, bits = weight.packing
    k = weight.columns
    bits = bits or weight.w.dtype.size * 8
    run = _run(mode, bits)
    words = run * bits // 32
    share = min(run, group_size or run)
    sizes = _SIZES.format(
        k=k,
        run=run,
        words=words,
        shares=run // share,
        share=share,
        row=k * bits // 32,
        group=group_size or k,
        biased=int(mode == "affine"),
    )
    text = sizes + _reading(weight, k, bits, words) + _values(weight, bits)
    text += _RESULT.format(text=_SCALED[mode].format(middle=1 << bits - 1))
    steps = -(-k // (32 * run))
    return Format(text, run, words, steps, mode != "dense", mode == "affine")


def _run(mode: str, bits: int) -> int:
    """Return the weights of 16 bytes, or as many as the smallest groups have."""
    if mode == "dense" or bits == 8:
        return max(8, 128 // bits)
    return 32


def _reading(weight: Weight, k: int, bits: int, words: int) -> str:
    if weight.mode == "dense" and k % 8:
        bits_type = {16: "ushort", 32: "uint"}[bits]
        return _READ_DENSE.format(type="W", bits=bits_type, put=_PUT[bits]).replace(
            "static", "template <typename W>\n  static"
        )
    width = next(n for n in (4, 2, 1) if words % n == 0)
    return _READ[width].format()


def _values(weight: Weight, bits: int) -> str:
    if weight.mode == "affine":
        return _AFFINE.format(bits=bits, mask=(1 << bits) - 1, middle=1 << bits - 1)
    if weight.mode == "dense":
        kind = {"bfloat16": "bfloat", "float16": "half", "float32": "float"}
        name = kind[str(weight.w.dtype).removeprefix("mlx.core.")]
        return _FLOATS.format(each=32 // bits, value=_DENSE[name])
    return (_FP8 if bits == 8 else _FP4).format()
