"""The CUDA source of latent attention on tensor cores; see `attention_tensor_source`.

A latent is too long for the registers of a warp. So each warp of a block has 64 elements of all
positions of a tile, and one more warp has the rotated parts of the keys: products of scores are
parts of sums, which meet in shared memory, and of the result each warp has its own elements. What
a warp reads as keys it reads again as values, in the order of that product, from its L1 cache.
"""

from __future__ import annotations

from zmlx.kernels import attention_clusters as clusters
from zmlx.kernels import attention_tensor_source as plain
from zmlx.kernels.attention_source import Variant, filled

#: Elements of a warp.
SLICE = 64
#: Threads of a block for the longest latents: eight warps of elements, and one of rotated parts.
MOST_THREADS = 9 * 32

HEADER = """
namespace attention {
// As `fetch_keys` and `fetch_values`, of the first `size` of 64 elements.
template <int TILES, typename T>
inline void fetch_slice(Piece (&to)[TILES][2], const T* rows, int stride, int from, int last, int g,
                        int c, int size) {
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    const T* row = placed(rows + 8 * c, min(from + 8 * n + g, last), stride);
    UNROLL
    for (int j = 0; j < 2; ++j) {
      to[n][j] = {};
      if (32 * j + 8 * c < size) {
        to[n][j] = taken(row + 32 * j);
      }
    }
  }
}
template <int ROWS, typename T>
inline void fetch_value_slice(Piece (&to)[ROWS], const T* rows, int stride, int from, int last,
                              int g, int c, int size) {
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    to[r] = {};
    if (8 * g < size) {
      to[r] = taken(placed(rows + 8 * g, min(from + value_row(r, c), last), stride));
    }
  }
}
template <typename T, typename X>
inline Piece scaled_eight(const Eight<T>& from, float by, const Eight<X>& weights) {
  float x[8], weight[8];
  from.widen(x);
  weights.widen(weight);
  UNROLL
  for (int e = 0; e < 8; ++e) {
    x[e] = x[e] * by * weight[e];
  }
  return packed_eight<T>(x);
}
// A row, of which each lane has some elements.
template <int D, int N, typename T>
inline void load_row(Eight<T> (&to)[N], const T* from, int lane) {
  UNROLL
  for (int n = 0; n < N; ++n) {
    to[n] = {};
    if (D % 256 == 0 || 256 * n + 8 * lane < D) {
      to[n].load(from + 256 * n + 8 * lane);
    }
  }
}
// What it is multiplied by for its mean square to become one, in all lanes.
template <int D, int N, typename T>
inline float reciprocal_norm(const Eight<T> (&row)[N], float eps) {
  float square = 0.0f;
  UNROLL
  for (int n = 0; n < N; ++n) {
    float x[8];
    row[n].widen(x);
    UNROLL
    for (int e = 0; e < 8; ++e) {
      square += x[e] * x[e];
    }
  }
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, mask);
  }
  return rsqrtf(square / D + eps);
}
inline Piece of_lane(Piece x, int lane) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    x.word[i] = __shfl_sync(0xffffffffu, x.word[i], lane);
  }
  return x;
}
inline float4 of_other(float4 x, int mask) {
  return make_float4(
      __shfl_xor_sync(0xffffffffu, x.x, mask), __shfl_xor_sync(0xffffffffu, x.y, mask),
      __shfl_xor_sync(0xffffffffu, x.z, mask), __shfl_xor_sync(0xffffffffu, x.w, mask));
}
// Four lanes have four of something each. Afterwards lane c has number c of each of them.
inline void exchanged(float4 (&x)[4], int c) {
  UNROLL
  for (int mask = 2; mask > 0; mask /= 2) {
    const bool upper = (c & mask) != 0;
    UNROLL
    for (int n = 0; n < 2; ++n) {
      const int one = mask == 2 ? n : 2 * n, two = one + mask;
      const float4 other = of_other(upper ? x[one] : x[two], mask);
      x[one] = upper ? other : x[one];
      x[two] = upper ? x[two] : other;
    }
  }
}
}
"""

_PLACE = """
${begin}constexpr int SLICES = (D + 63) / 64, WARPS = SLICES + 1, THREADS = WARPS * 32;
constexpr int TILES = KEYS / 8, ROWS = KEYS / 4;
constexpr int LINE = KEYS + 8;  // so that heads do not begin in the same bank
const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
const int g = lane / 4, c = lane % 4;
const int split = blockIdx.x, part = blockIdx.y;
const int batch = BATCHED ? blockIdx.z : 0, row = batch * gridDim.y + part;
const int head = part * HEADS, heads = min(HEADS, SHARED - part * HEADS);
const bool is_turned = warp == SLICES;
const int low = is_turned ? 0 : 64 * warp, size = min(64, (is_turned ? E : D) - low);
const int* const numbers = state + batch * STEP;
const int write = taken_number(numbers), length = taken_number(numbers + 1);
const int position = taken_number(numbers + 2);
const T* q_from = q + batch * q_strides[0] + head * q_strides[1];
const T* q_pe_from = q_pe + batch * q_pe_strides[0] + head * q_pe_strides[1];
const T* k_from = k + batch * k_strides[0];
const T* k_pe_from = k_pe + batch * k_pe_strides[0];
int q_stride = q_strides[1], q_pe_stride = q_pe_strides[1];
$weights// What is new may lie anywhere.
__shared__ uint4 copies[(HEADS + 1) * (D + E) / 8$weight_room];
if (q_strides[2] != 1 || q_pe_strides[2] != 1 || k_strides[1] != 1 || k_pe_strides[1] != 1 ||
    (q_stride | q_pe_stride) % 8 != 0 ||
    ((size_t)q_from | (size_t)q_pe_from | (size_t)k_from | (size_t)k_pe_from$addresses) % 16 != 0) {
  q_from = copied(copies, q_from, heads, D, q_stride, q_strides[2]);
  k_from = copied(copies + HEADS * D / 8, k_from, 1, D, 0, k_strides[1]);
  uint4* const rest = copies + (HEADS + 1) * D / 8;
  q_pe_from = copied(rest, q_pe_from, heads, E, q_pe_stride, q_pe_strides[2]);
  k_pe_from = copied(rest + HEADS * E / 8, k_pe_from, 1, E, 0, k_pe_strides[1]);
  q_stride = D;
  q_pe_stride = E;
$copies  __syncthreads();
}
// Rows of the products without a query of their own take another's.
Eight<T> raw[2];
const int its_head = min(g, heads - 1);
const T* const its_query = is_turned ? placed(q_pe_from, its_head, q_pe_stride)
                                     : placed(q_from + low, its_head, q_stride);
UNROLL
for (int j = 0; j < 2; ++j) {
  raw[j] = {};
  if (32 * j + 8 * c < size) {
    raw[j].load(its_query + 32 * j + 8 * c);
  }
}
// What is new: of the latent lane 4 g + c has 8 elements from 8 g on.
Eight<T> raw_key[2];
UNROLL
for (int j = 0; j < 2; ++j) {
  raw_key[j] = {};
  if (is_turned && 32 * j + 8 * c < size) {
    raw_key[j].load(k_pe_from + 32 * j + 8 * c);
  } else if (!is_turned && j == 0 && 8 * g < size) {
    raw_key[j].load(k_from + low + 8 * g);
  }
}
$weight_loads$frequencies
T* const rows = is_turned ? (T*)rope_keys + batch * rope_keys_strides[0]
                          : (T*)keys + batch * keys_strides[0] + low;
const int stride = is_turned ? rope_keys_strides[2] : keys_strides[2];
const int last_row = keys_shape[2] - 1, value_size = is_turned ? 0 : size;
Piece k_tile[TILES][2], v_tile[ROWS];
int tile = split;
if (AT_ONCE && tile * KEYS <= last_row) {
  fetch_slice(k_tile, rows, stride, tile * KEYS, last_row, g, c, size);
  fetch_value_slice(v_tile, rows, stride, tile * KEYS, last_row, g, c, value_size);
}
const bool dense = keys_strides[3] == 1 && rope_keys_strides[3] == 1;
const float scale = dense ? from_bits(SCALE) * 1.44269504f : from_bits(0x7fc00000u);
const int tiles = (length + KEYS - 1) / KEYS;
${leave}__shared__ float partial[WARPS * 8 * LINE];
__shared__ float all_scores[8 * LINE];
$directions"""
_WEIGHTS = """const auto* k_weights = k_weight;
"""
# Rows of latents are shared by all warps.
_WEIGHT_LOADS = """Eight<T> new_latent[(D + 255) / 256];
decltype(eight_of(k_weight)) weights = {};
if (!is_turned) {
  load_row<D>(new_latent, k_from, lane);
  if (8 * g < size) {
    weights.load(k_weights + low + 8 * g);
  }
}
"""
_WEIGHT_COPIES = """  k_weights = copied(copies + (HEADS + 1) * (D + E) / 8, k_weights, 1, D, 0, 1);
"""
_DIRECTIONS = """__shared__ float4 all_directions[TRADITIONAL ? 16 : DIMS / 4];
float2* const directions = (float2*)all_directions;
"""

# Each warp prepares and writes its own elements of what is new.
_PREPARE = """
if (split < tiles) {
if (!AT_ONCE) {
  fetch_slice(k_tile, rows, stride, tile * KEYS, last_row, g, c, size);
  fetch_value_slice(v_tile, rows, stride, tile * KEYS, last_row, g, c, value_size);
}
const bool fresh = write / KEYS % SPLITS == split && write < length;
Piece queries[2];
if (!is_turned) {
  UNROLL
  for (int j = 0; j < 2; ++j) {
    queries[j] = raw[j].pieces[0];
  }
  if (fresh) {
    const Piece whole = $new;
    if (c == 0 && 8 * g < size) {
      *(Piece*)(placed(rows, write, stride) + 8 * g) = whole;
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      if (split * KEYS + value_row(r, c) == write) {
        v_tile[r] = whole;
      }
    }
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const Piece some = of_lane(whole, 16 * j + 4 * c);
      UNROLL
      for (int n = 0; n < TILES; ++n) {
        if (split * KEYS + 8 * n + g == write) {
          k_tile[n][j] = some;
        }
      }
    }
  }
} else {
$turn
  _Pragma("unroll 1")
  for (bool is_key = false;; is_key = true) {
    float x[2][8];
    UNROLL
    for (int j = 0; j < 2; ++j) {
      raw[j].widen(x[j]);
    }
$rope    if (!is_key) {
      UNROLL
      for (int j = 0; j < 2; ++j) {
        queries[j] = packed_eight<T>(x[j]);
        raw[j] = raw_key[j];
      }
      if (fresh) {
        continue;
      }
      break;
    }
    UNROLL
    for (int j = 0; j < 2; ++j) {
      Piece key = packed_eight<T>(x[j]);
      if (g == 0 && 32 * j + 8 * c < size) {
        *(Piece*)(placed(rows, write, stride) + 32 * j + 8 * c) = key;
      }
      UNROLL
      for (int n = 0; n < TILES; ++n) {
        if (split * KEYS + 8 * n + g == write) {
          k_tile[n][j] = key;
        }
      }
    }
    break;
  }
}
__syncwarp();
"""
_NORMED = "scaled_eight(raw_key[0], reciprocal_norm<D>(new_latent, from_bits(EPS)), weights)"

_ATTEND = """
float largest = -INFINITY, total = 0.0f;
float out_sums[8][4];
UNROLL
for (int i = 0; i < 32; ++i) {
  out_sums[i / 4][i % 4] = 0.0f;
}
for (bool begun = false;; begun = true) {
  const int at = tile * KEYS, next = tile + SPLITS;
  const bool more = next < tiles, whole = at + KEYS <= length;
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    float dots[2][4] = {};
    UNROLL
    for (int j = 0; j < 2; ++j) {
      UNROLL
      for (int i = 0; i < 2; ++i) {
        mma(dots[i], queries[j].word[2 * i], 0, queries[j].word[2 * i + 1], 0,
            k_tile[n][j].word[2 * i], k_tile[n][j].word[2 * i + 1], T());
      }
    }
    *(float2*)(partial + (warp * 8 + g) * LINE + 8 * n + 2 * c) =
        make_float2(dots[0][0] + dots[1][0], dots[0][1] + dots[1][1]);
  }
  if (more) {
    fetch_slice(k_tile, rows, stride, next * KEYS, last_row, g, c, size);
  }
  __syncthreads();
  for (int i = thread; i < 8 * KEYS; i += THREADS) {
    const int place = i / KEYS * LINE + i % KEYS;
    float score = 0.0f;
    UNROLL
    for (int w = 0; w < WARPS; ++w) {
      score += partial[w * 8 * LINE + place];
    }
    all_scores[place] = at + i % KEYS < length ? score * scale : -INFINITY;
  }
  __syncthreads();
  float2 weights[TILES];
  float top = largest;
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    weights[n] = *(const float2*)(all_scores + g * LINE + 8 * n + 2 * c);
    top = fmaxf(top, fmaxf(weights[n].x, weights[n].y));
  }
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  if (begun) {
    float fade = power_of_two(largest - top);
    total *= fade;
    UNROLL
    for (int i = 0; i < 32; ++i) {
      out_sums[i / 4][i % 4] *= fade;
    }
  }
  largest = top;
  if (!whole) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      if (at + value_row(r, c) >= length) {
        v_tile[r] = {};
      }
    }
  }
  UNROLL
  for (int u = 0; u < KEYS / 16; ++u) {
    unsigned high[2], low_bits[2];
    UNROLL
    for (int n = 0; n < 2; ++n) {
      float one = power_of_two(weights[2 * u + n].x - top);
      float two = power_of_two(weights[2 * u + n].y - top);
      total += one + two;
      high[n] = packed(one, two, T());
      float2 rough = unpacked(high[n], T());
      low_bits[n] = packed(one - rough.x, two - rough.y, T());
    }
    UNROLL
    for (int i = 0; i < 8; ++i) {
      unsigned order = i % 2 ? 0x7632 : 0x5410;
      unsigned one = __byte_perm(v_tile[4 * u].word[i / 2], v_tile[4 * u + 1].word[i / 2], order);
      unsigned two =
          __byte_perm(v_tile[4 * u + 2].word[i / 2], v_tile[4 * u + 3].word[i / 2], order);
      mma(out_sums[i], high[0], low_bits[0], high[1], low_bits[1], one, two, T());
    }
  }
  if (!more) {
    break;
  }
  fetch_value_slice(v_tile, rows, stride, next * KEYS, last_row, g, c, value_size);
  tile = next;
}
total += __shfl_xor_sync(0xffffffffu, total, 1);
total += __shfl_xor_sync(0xffffffffu, total, 2);
float4 fours[4];
UNROLL
for (int i = 0; i < 4; ++i) {
  float four[4];
  UNROLL
  for (int e = 0; e < 4; ++e) {
    const float* sum = out_sums[4 * (i % 2) + e];
    four[e] = sum[i / 2] + sum[i / 2 + 2];
  }
  fours[i] = make_float4(four[0], four[1], four[2], four[3]);
}
exchanged(fours, c);  // so that lanes write to neighbours
${meet}if (g < heads) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int d = 16 * i + 4 * c;
    if (d < value_size) {
$write    }
  }
$ends}
}
"""
# Threads of a block without positions meet the others all the same.
_MEET_ANYWAY = """else {
  meet();
}
"""
_WRITE_WHOLE = """      const int of_head = batch * SHARED + head + g;
      write_four(out + of_head * D + low + d, fours[i], total);
"""
_WRITE_PART = """      float* to = sums + ((row * SPLITS + split) * HEADS + g) * (D + 4) + low + d;
      *(float4*)to = fours[i];
"""
_GIVE = """      give(g, (low + d) / 4, fours[i], make_float2(largest, total));
"""
_WRITE_ENDS = """  if (warp == 0 && c == 0) {
    float* to = sums + ((row * SPLITS + split) * HEADS + g) * (D + 4) + D;
    *(float2*)to = make_float2(largest, total);
  }
"""
# With many parts the last block of each few adds those up into the place of the first, and the last
# of these the rest; their maxima and totals go to places of their own, for others read the first.
_JOIN = """
constexpr int TOGETHER = SPLITS < 8 ? SPLITS : 8;
const int parts = min(SPLITS, tiles);
const int fan = parts <= 16 ? parts : (int)ceilf(sqrtf((float)parts));
int begin = split / fan * fan, apart = 1, count = min(fan, parts - begin);
__shared__ bool is_last;
for (int level = 0; level < 2; ++level) {
  const bool all_parts = level == 1 || parts <= fan;
  __syncthreads();
  if (thread == 0) {
    int* counter = (int*)counters + row * COUNTERS + (level == 0 ? 1 + split / fan : 0);
    is_last = counted(counter) == count - 1;
    if (is_last) {
      *counter = 0;
    }
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  for (int i = thread; i < heads * (D / 4); i += THREADS) {
    const int h = i / (D / 4), f = i % (D / 4);
    float* const from = sums + ((row * SPLITS + begin) * HEADS + h) * (D + 4);
    Added all;
    for (int s = 0; s < count; s += TOGETHER) {
      float4 some[TOGETHER];
      float2 ends[TOGETHER];
      UNROLL
      for (int j = 0; j < TOGETHER; ++j) {
        const float* there = from + min(s + j, count - 1) * apart * HEADS * (D + 4);
        some[j] = __ldcg((const float4*)(there + 4 * f));
        ends[j] = __ldcg((const float2*)(there + D + 2 * level));
      }
      all.add(some, ends, count - s);
    }
    if (all_parts) {
      write_four(out + (batch * SHARED + head + h) * D + 4 * f, all.sum, all.ends.y);
    } else {
      *(float4*)(from + 4 * f) = all.sum;
      if (f == 0) {
        *(float2*)(from + D + 2) = all.ends;
      }
    }
  }
  if (all_parts) {
    return;
  }
  begin = 0;
  apart = fan;
  count = (parts + fan - 1) / fan;
}
"""


def header(variant: Variant) -> str:
    """Return what stands before the kernel."""
    return plain.header(variant) + HEADER


def attention(variant: Variant) -> str:
    """Return the body of the kernel, for the forms "whole" and "joined"."""
    place = filled(
        _PLACE,
        begin=clusters.BEGIN if variant.cluster > 1 else "",
        leave=plain.leave(variant),
        weight_loads=_WEIGHT_LOADS if variant.k_norm else "",
        frequencies=plain.frequencies(variant),
        weights=_WEIGHTS if variant.k_norm else "",
        weight_room=" + D * sizeof(*k_weight) / 16" if variant.k_norm else "",
        addresses=" | (size_t)k_weights" if variant.k_norm else "",
        copies=_WEIGHT_COPIES if variant.k_norm else "",
        directions=_DIRECTIONS if variant.rope else "",
    )
    prepare = filled(
        _PREPARE,
        new=_NORMED if variant.k_norm else "raw_key[0].pieces[0]",
        turn=plain.turn(variant),
        rope=plain.rope(variant),
    )
    if variant.cluster > 1:
        attend = filled(_ATTEND, meet=clusters.MEET, write=_GIVE, ends="") + _MEET_ANYWAY
        return place + clusters.SHARES + prepare + attend + clusters.COLLECT
    joined = variant.form == "joined"
    attend = filled(
        _ATTEND,
        meet="",
        write=_WRITE_PART if joined else _WRITE_WHOLE,
        ends=_WRITE_ENDS if joined else "",
    )
    return place + prepare + attend + (_JOIN if joined else "")
