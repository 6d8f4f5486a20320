"""The CUDA source of attention for one new token on tensor cores, for caches of 16 bits.

One block has up to 8 query heads of one kv head, and some of the tiles of `KEYS` positions. Every
warp works on tiles of its own, as flash attention does: scores are products of 16 rows, 8 of which
are queries, with keys; exponentials stand in the registers where the product with the values takes
them, split into two numbers of 16 bits each (what the first leaves is the second), which take the
place of the 8 rows that the queries leave free. So nothing of float32 is lost that could be seen.

Keys and values go from memory to registers, 16 bytes a lane, in the order of the products: which
positions or elements a product calls its first and second is free as long as both factors agree.
They are asked for before all else, as far as it is known where they lie: norms, rope and the state
of the sequence are worked on while they come. The sums of warps meet once, in shared memory; those
of blocks in device memory, where the last block adds them up.
"""

from __future__ import annotations

from zmlx.kernels.attention_source import Variant, filled

#: Warps of a block: with 255 registers a thread they fill a multiprocessor.
WARPS = 8

# What a compiler for another machine would have to be told (tests do).
PRIMITIVES = """
#define UNROLL _Pragma("unroll")
namespace attention {
struct alignas(16) Piece {
  unsigned word[4];
};
// Sixteen bytes that no other warp reads.
inline Piece streamed(const void* from) {
  Piece x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(from)
               : "memory");
  return x;
}
// Adds a product of 16 x 16 and 16 x 8 elements, spread over a warp, to `c`.
#define ATTENTION_MMA(KIND)                                                        \\
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 "      \\
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \\
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                    \\
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
inline void mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1, __nv_bfloat16) {
  ATTENTION_MMA("bf16");
}
inline void mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1, __half) {
  ATTENTION_MMA("f16");
}
inline unsigned packed(float low, float high, __nv_bfloat16) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
inline unsigned packed(float low, float high, __half) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
inline float2 unpacked(unsigned pair, __half) {
  float low, high;
  asm("{.reg .f16 l, h;\\n mov.b32 {l, h}, %2;\\n cvt.f32.f16 %0, l;\\n cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high) : "r"(pair));
  return make_float2(low, high);
}
inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Counts one more; what this block wrote before is there for the blocks that count later.
inline int counted(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before) : "l"(counter) : "memory");
  return before;
}
inline float from_bits(unsigned x) { return __uint_as_float(x); }
}
"""

HEADER = """
namespace attention {
inline float2 unpacked(unsigned pair, __nv_bfloat16) {
  return make_float2(from_bits(pair << 16), from_bits(pair & 0xffff0000u));
}

// Eight neighbours of an array, as they lie there.
template <typename X>
struct Eight {
  Piece pieces[sizeof(X) / 2];
  void load(const X* from) {
    UNROLL
    for (int i = 0; i < sizeof(X) / 2; ++i) {
      uint4 x = ((const uint4*)from)[i];
      pieces[i] = {x.x, x.y, x.z, x.w};
    }
  }
  void widen(float* x) const {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(X) == 2) {
        float2 pair = unpacked(pieces[0].word[i], X());
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      } else {
        x[i] = from_bits(pieces[0].word[i]);
        x[4 + i] = from_bits(pieces[sizeof(X) / 2 - 1].word[i]);
      }
    }
  }
};

template <typename X>
Eight<X> eight_of(const X*);
template <typename X>
inline Eight<X> chosen(bool first, const Eight<X>& a, const Eight<X>& b) {
  Eight<X> x;
  UNROLL
  for (int i = 0; i < sizeof(X) / 2 * 4; ++i) {
    x.pieces[i / 4].word[i % 4] = first ? a.pieces[i / 4].word[i % 4] : b.pieces[i / 4].word[i % 4];
  }
  return x;
}

// Rows that can be read 16 bytes at a time.
template <typename X>
struct Rows {
  const X* at;
  int64_t stride;
};
// Rows where they lie or, where that is not on 16 bytes, copied to shared memory.
template <typename X>
inline Rows<X> settled(const X* from, int rows, int size, int64_t row_stride, int64_t stride,
                       void* copy, bool& copied) {
  if (stride == 1 && row_stride % 8 == 0 && (size_t)from % 16 == 0) {
    return {from, row_stride};
  }
  X* to = (X*)copy;
  for (int i = threadIdx.x; i < rows * size; i += blockDim.x) {
    to[i] = from[i / size * row_stride + i % size * stride];
  }
  copied = true;
  return {to, size};
}

// The new token's part of one head, or nothing.
template <int D, typename X>
inline void load_head(Eight<X>* to, const X* from, int c) {
  UNROLL
  for (int j = 0; j < (D + 31) / 32; ++j) {
    if (D % 32 == 0 || 32 * j + 8 * c < D) {
      to[j].load(from + 32 * j + 8 * c);
    } else {
      to[j] = {};
    }
  }
}

// Keys of a tile: lane 4 g + c has 8 elements of position 8 n + g from 32 j + 8 c on.
template <int D, int TILES, int J, typename T>
inline void fetch_keys(Piece (&to)[TILES][J], const T* rows, int64_t stride, int from, int last,
                       int g, int c) {
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    const T* row = rows + min(from + 8 * n + g, last) * stride + 8 * c;
    UNROLL
    for (int j = 0; j < J; ++j) {
      if (D % 32 == 0 || 32 * j + 8 * c < D) {
        to[n][j] = streamed(row + 32 * j);
      } else {
        to[n][j] = {};
      }
    }
  }
}
// The place in a tile of a lane's row of values.
inline int value_row(int r, int c) { return r / 4 * 16 + r % 4 / 2 * 8 + 2 * c + r % 2; }
// Values of a tile: lane 4 g + c has 8 elements of its rows from 64 j + 8 g on.
template <int DV, int ROWS, int J, typename T>
inline void fetch_values(Piece (&to)[ROWS][J], const T* rows, int64_t stride, int from, int last,
                         int g, int c) {
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const T* row = rows + min(from + value_row(r, c), last) * stride + 8 * g;
    UNROLL
    for (int j = 0; j < J; ++j) {
      if (DV % 64 == 0 || 64 * j + 8 * g < DV) {
        to[r][j] = streamed(row + 64 * j);
      } else {
        to[r][j] = {};
      }
    }
  }
}

template <typename T>
inline void rounded(float* x) {
  UNROLL
  for (int e = 0; e < 8; e += 2) {
    float2 pair = unpacked(packed(x[e], x[e + 1], T()), T());
    x[e] = pair.x;
    x[e + 1] = pair.y;
  }
}
// RMSNorm of a head, of which each lane of four has some elements.
template <int D, typename T, int J, typename X>
inline void normed(float (&x)[J][8], const Eight<X> (&weights)[J], float eps) {
  float square = 0.0f;
  UNROLL
  for (int j = 0; j < J; ++j) {
    UNROLL
    for (int e = 0; e < 8; ++e) {
      square += x[j][e] * x[j][e];
    }
  }
  square += __shfl_xor_sync(0xffffffffu, square, 1);
  square += __shfl_xor_sync(0xffffffffu, square, 2);
  float scaled = rsqrtf(square / D + eps);
  UNROLL
  for (int j = 0; j < J; ++j) {
    float weight[8];
    weights[j].widen(weight);
    UNROLL
    for (int e = 0; e < 8; ++e) {
      x[j][e] = x[j][e] * scaled * weight[e];
    }
    rounded<T>(x[j]);
  }
}

// Cosine and sine. The difference from the nearest multiple of pi / 2 is as exact as the angle up
// to 2^24, and the polynomials (Cephes, single precision) to one unit in the last place.
inline float2 direction(float angle) {
  float turns = rintf(angle * 0.636619772f);
  float r = fmaf(turns, -1.57079637f, angle);
  r = fmaf(turns, 4.37113883e-8f, r);
  r = fmaf(turns, 1.71512451e-15f, r);
  float z = r * r;
  float s = fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f);
  s = fmaf(s * z, r, r);
  float c = fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f);
  c = fmaf(c * z, z, fmaf(-0.5f, z, 1.0f));
  int quadrant = (int)turns;
  float x = quadrant & 1 ? s : c, y = quadrant & 1 ? c : s;
  return make_float2((quadrant + 1) & 2 ? -x : x, quadrant & 2 ? -y : y);
}
inline void turned(float& one, float& two, float c, float s, bool there) {
  float a = one, b = two;
  one = there ? a * c - b * s : a;
  two = there ? a * s + b * c : b;
}
// Rotates a head by the directions of all its angles.
template <int DIMS, bool TRADITIONAL, typename T, int J>
inline void rotated(float (&x)[J][8], const float2* directions, int c) {
  constexpr int half = DIMS / 64;  // pieces between the two elements of a pair
  UNROLL
  for (int j = 0; j < (TRADITIONAL ? J : half); ++j) {
    UNROLL
    for (int i = 0; i < (TRADITIONAL ? 2 : 4); ++i) {
      int d = 32 * j + 8 * c + (TRADITIONAL ? 4 : 2) * i;
      float4 to = *(const float4*)(directions + (TRADITIONAL ? d / 2 : d));
      if (TRADITIONAL) {
        turned(x[j][4 * i % 8], x[j][(4 * i + 1) % 8], to.x, to.y, d < DIMS);
        turned(x[j][(4 * i + 2) % 8], x[j][(4 * i + 3) % 8], to.z, to.w, d + 2 < DIMS);
      } else {
        turned(x[j][2 * i], x[(j + half) % J][2 * i], to.x, to.y, true);
        turned(x[j][2 * i + 1], x[(j + half) % J][2 * i + 1], to.z, to.w, true);
      }
    }
  }
  UNROLL
  for (int j = 0; j < J; ++j) {
    rounded<T>(x[j]);
  }
}
template <typename T>
inline Piece packed_eight(const float* x) {
  return {packed(x[0], x[1], T()), packed(x[2], x[3], T()), packed(x[4], x[5], T()),
          packed(x[6], x[7], T())};
}

inline float4 plus(float4 a, float weight, float4 b) {
  return make_float4(fmaf(weight, b.x, a.x), fmaf(weight, b.y, a.y), fmaf(weight, b.z, a.z),
                     fmaf(weight, b.w, a.w));
}
template <typename T>
inline void write_four(T* to, float4 sum, float all) {
  float by = 1.0f / all;
  unsigned low = packed(sum.x * by, sum.y * by, T()), high = packed(sum.z * by, sum.w * by, T());
  *(uint2*)to = make_uint2(low, high);
}
}
namespace mlx::core::cu {
using namespace attention;
}
"""

PLACE = """
constexpr int THREADS = WARPS * 32;
constexpr int K_PIECES = (D + 31) / 32, V_PIECES = (DV + 63) / 64;
constexpr int TILES = KEYS / 8, ROWS = KEYS / 4;
constexpr int LINE = DV / 4 + 2;  // so that rows of sums do not begin in the same bank
const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
const int g = lane / 4, c = lane % 4;
const int split = blockIdx.x, kv = blockIdx.y / GROUPS, part = blockIdx.y % GROUPS;
const int batch = blockIdx.z, row = batch * gridDim.y + blockIdx.y;
const int head = kv * SHARED + part * HEADS, heads = min(HEADS, SHARED - part * HEADS);
const int write = state[batch * STEP], length = state[batch * STEP + 1];
T* const key_rows = (T*)keys + batch * keys_strides[0] + kv * keys_strides[1];
T* const value_rows = (T*)values + batch * values_strides[0] + kv * values_strides[1];
const int64_t key_stride = keys_strides[2], value_stride = values_strides[2];
const int last_row = keys_shape[2] - 1;
Piece k_tile[TILES][K_PIECES], v_tile[ROWS][V_PIECES];
int tile = warp * SPLITS + split;
if (AT_ONCE) {
  fetch_keys<D>(k_tile, key_rows, key_stride, tile * KEYS, last_row, g, c);
  fetch_values<DV>(v_tile, value_rows, value_stride, tile * KEYS, last_row, g, c);
}
__shared__ uint4 copies[$heads_room$weight_room];
bool copied = false;
const auto q_rows = settled(q + batch * q_strides[0] + head * q_strides[1], heads, D, q_strides[1],
                            q_strides[2], copies, copied);
const auto new_key = settled(k + batch * k_strides[0] + kv * k_strides[1], 1, D, 0, k_strides[2],
                             copies + HEADS * D / 8, copied);
const auto new_value = settled(v + batch * v_strides[0] + kv * v_strides[1], 1, DV, 0, v_strides[2],
                               copies + (HEADS + 1) * D / 8, copied);
$weights
if (copied) {
  __syncthreads();
}
// Rows of the products without a query of their own take another's.
Eight<T> q_raw[K_PIECES], k_raw[K_PIECES];
load_head<D>(q_raw, q_rows.at + min(g, heads - 1) * q_rows.stride, c);
load_head<D>(k_raw, new_key.at, c);
$weight_loads
Eight<T> v_raw[V_PIECES];
UNROLL
for (int j = 0; j < V_PIECES; ++j) {
  if (DV % 64 == 0 || 64 * j + 8 * g < DV) {
    v_raw[j].load(new_value.at + 64 * j + 8 * g);
  }
}
const bool dense = keys_strides[3] == 1 && values_strides[3] == 1;
const float scale = dense ? from_bits(SCALE) * 1.44269504f : from_bits(0x7fc00000u);
const int first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
const int first_tile = first / KEYS, end_tile = (length + KEYS - 1) / KEYS;
const int tiles = end_tile - first_tile;
if (split >= tiles) {
  return;
}
tile += first_tile;
__shared__ float4 meeting[WARPS * HEADS * LINE];
__shared__ float2 totals[WARPS * HEADS];
$directions"""
HEADS_ROOM = "((HEADS + 1) * D + DV) / 8"
WEIGHTS = """const auto ${x}_weights = settled(${x}_weight, 1, D, 0, 1, copies + $at, copied);
"""
WEIGHT_LOADS = """decltype(eight_of(${x}_weight)) ${x}_weights_raw[K_PIECES];
load_head<D>(${x}_weights_raw, ${x}_weights.at, c);
"""
DIRECTIONS = """// Of traditional ones some beyond those that there are are read, and not used.
constexpr int ANGLES = TRADITIONAL ? 16 * K_PIECES : DIMS / 2;
__shared__ float4 all_directions[WARPS * ANGLES / 2];
float2* const directions = (float2*)all_directions + warp * ANGLES;
"""

# The new key is worked on by the warp to whose tiles it belongs, then the queries by all.
PREPARE = """
if (tile < end_tile) {
if (!AT_ONCE) {
  fetch_keys<D>(k_tile, key_rows, key_stride, tile * KEYS, last_row, g, c);
  fetch_values<DV>(v_tile, value_rows, value_stride, tile * KEYS, last_row, g, c);
}
$turn
Piece queries[K_PIECES];
const int its_tile = write / KEYS - tile;
const bool fresh = its_tile >= 0 && its_tile % (WARPS * SPLITS) == 0 && write < length;
_Pragma("unroll 1")
for (int turn = fresh ? 0 : 1; turn < 2; ++turn) {
  const bool is_key = turn == 0;
  float x[K_PIECES][8];
  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    chosen(is_key, k_raw[j], q_raw[j]).widen(x[j]);
  }
$norm$rope  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    queries[j] = packed_eight<T>(x[j]);
  }
  if (is_key) {
    // Later tiles are read from the cache, this one has been already.
    UNROLL
    for (int j = 0; j < K_PIECES; ++j) {
      if (g == 0 && (D % 32 == 0 || 32 * j + 8 * c < D)) {
        *(Piece*)(key_rows + write * key_stride + 32 * j + 8 * c) = queries[j];
      }
      UNROLL
      for (int n = 0; n < TILES; ++n) {
        if (tile * KEYS + 8 * n + g == write) {
          k_tile[n][j] = queries[j];
        }
      }
    }
    UNROLL
    for (int j = 0; j < V_PIECES; ++j) {
      if (c == 0 && (DV % 64 == 0 || 64 * j + 8 * g < DV)) {
        *(Piece*)(value_rows + write * value_stride + 64 * j + 8 * g) = v_raw[j].pieces[0];
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        if (tile * KEYS + value_row(r, c) == write) {
          v_tile[r][j] = v_raw[j].pieces[0];
        }
      }
    }
    __syncwarp();
  }
}
"""
TURN = """{
  const float place = float(state[batch * STEP + 2]);
  UNROLL
  for (int from = 0; from < DIMS / 2; from += 32) {
    int i = from + lane;
    if (i < DIMS / 2) {
      directions[i] = direction(from_bits(ROPE_SCALE) * place * $inverse);
    }
  }
  __syncwarp();
}"""
INVERSE = {
    "base": "exp2f(-(float(i) / float(DIMS / 2)) * from_bits(BASE))",
    "freqs": "(1.0f / float(freqs[i * freqs_strides[0]]))",
}
NORM_BOTH = """  decltype(eight_of(q_weight)) weights[K_PIECES];
  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    weights[j] = chosen(is_key, k_weights_raw[j], q_weights_raw[j]);
  }
  normed<D, T>(x, weights, from_bits(EPS));
"""
NORM_ONE = """  if ($condition) {
    normed<D, T>(x, ${x}_weights_raw, from_bits(EPS));
  }
"""
ROPE = """$multiply  rotated<DIMS, TRADITIONAL != 0, T>(x, directions, c);
"""
# A number beside an array takes its dtype in MLX, so the number is rounded as well.
MULTIPLY = """  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    float by = from_bits(MULTIPLIER);
    by = unpacked(packed(by, by, T()), T()).x;
    UNROLL
    for (int e = 0; e < 8; ++e) {
      x[j][e] *= 32 * j + 8 * c + e < DIMS ? by : 1.0f;
    }
    rounded<T>(x[j]);
  }
"""

ATTEND = """
float largest = -INFINITY, total = 0.0f;
${sinks}float out_sums[V_PIECES][8][4];
UNROLL
for (int i = 0; i < V_PIECES * 8 * 4; ++i) {
  out_sums[i / 32][i / 4 % 8][i % 4] = 0.0f;
}
for (bool begun = false;; begun = true) {
  float scores[TILES][2][4];
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    UNROLL
    for (int i = 0; i < 8; ++i) {
      scores[n][i / 4][i % 4] = 0.0f;
    }
  }
  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    UNROLL
    for (int n = 0; n < TILES; ++n) {
      UNROLL
      for (int i = 0; i < 2; ++i) {
        mma(scores[n][i], queries[j].word[2 * i], 0, queries[j].word[2 * i + 1], 0,
            k_tile[n][j].word[2 * i], k_tile[n][j].word[2 * i + 1], T());
      }
    }
  }
  const int at = tile * KEYS, next = tile + WARPS * SPLITS;
  const bool more = next < end_tile, whole = at >= first && at + KEYS <= length;
  if (more) {
    fetch_keys<D>(k_tile, key_rows, key_stride, next * KEYS, last_row, g, c);
  }
  float weights[TILES][2];
  float top = largest;
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      float score = (scores[n][0][i] + scores[n][1][i]) * scale;
      int key = at + 8 * n + 2 * c + i;
      weights[n][i] = whole || (key >= first && key < length) ? score : -INFINITY;
      top = fmaxf(top, weights[n][i]);
    }
  }
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  if (begun) {
    float fade = power_of_two(largest - top);
    total *= fade;
    UNROLL
    for (int i = 0; i < V_PIECES * 8 * 4; ++i) {
      out_sums[i / 32][i / 4 % 8][i % 4] *= fade;
    }
  } else {
    total *= power_of_two(largest - top);
  }
  largest = top;
  if (!whole) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      int key = at + value_row(r, c);
      if (key < first || key >= length) {
        UNROLL
        for (int j = 0; j < V_PIECES; ++j) {
          v_tile[r][j] = {};
        }
      }
    }
  }
  UNROLL
  for (int u = 0; u < KEYS / 16; ++u) {
    unsigned high[2], low[2];
    UNROLL
    for (int n = 0; n < 2; ++n) {
      float one = power_of_two(weights[2 * u + n][0] - top);
      float two = power_of_two(weights[2 * u + n][1] - top);
      total += one + two;
      high[n] = packed(one, two, T());
      float2 taken = unpacked(high[n], T());
      low[n] = packed(one - taken.x, two - taken.y, T());
    }
    UNROLL
    for (int j = 0; j < V_PIECES; ++j) {
      UNROLL
      for (int i = 0; i < 8; ++i) {
        unsigned order = i % 2 ? 0x7632 : 0x5410;
        unsigned one = __byte_perm(v_tile[4 * u][j].word[i / 2], v_tile[4 * u + 1][j].word[i / 2],
                                   order);
        unsigned two = __byte_perm(v_tile[4 * u + 2][j].word[i / 2],
                                   v_tile[4 * u + 3][j].word[i / 2], order);
        mma(out_sums[j][i], high[0], low[0], high[1], low[1], one, two, T());
      }
    }
  }
  if (!more) {
    break;
  }
  fetch_values<DV>(v_tile, value_rows, value_stride, next * KEYS, last_row, g, c);
  tile = next;
}
"""
# Only one warp counts a sink.
SINKS = """if (split == 0 && warp == 0) {
  largest = float(sinks[head + min(g, heads - 1)]) * 1.44269504f;
  total = c == 0 ? 1.0f : 0.0f;
}
"""

# Lane 4 g + c has 16 neighbours of head g in each 64. Where they go is turned by what keeps eight
# lanes out of each other's banks.
MEET = """
total += __shfl_xor_sync(0xffffffffu, total, 1);
total += __shfl_xor_sync(0xffffffffu, total, 2);
if (g < HEADS) {
  if (c == 0) {
    totals[warp * HEADS + g] = make_float2(largest, total);
  }
  UNROLL
  for (int j = 0; j < V_PIECES; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      float four[4];
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const float* sum = out_sums[j][4 * (i % 2) + e];
        four[e] = sum[i / 2] + sum[i / 2 + 2];
      }
      int f = 16 * j + 4 * c + i;
      if (DV % 64 == 0 || 4 * f < DV) {
        meeting[(warp * HEADS + g) * LINE + (f ^ (f / 8 & 1))] =
            make_float4(four[0], four[1], four[2], four[3]);
      }
    }
  }
}
}
__syncthreads();
const int active = min(WARPS, (tiles - split + SPLITS - 1) / SPLITS);
for (int i = thread; i < heads * (DV / 4); i += THREADS) {
  const int h = i / (DV / 4), f = i % (DV / 4);
  float peak = -INFINITY, all = 0.0f;
  UNROLL
  for (int w = 0; w < WARPS; ++w) {
    if (w < active) {
      peak = fmaxf(peak, totals[w * HEADS + h].x);
    }
  }
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  UNROLL
  for (int w = 0; w < WARPS; ++w) {
    if (w < active) {
      float weight = power_of_two(totals[w * HEADS + h].x - peak);
      all = fmaf(weight, totals[w * HEADS + h].y, all);
      sum = plus(sum, weight, meeting[(w * HEADS + h) * LINE + (f ^ (f / 8 & 1))]);
    }
  }
$write}
"""
WRITE_WHOLE = """  write_four(out + (batch * KV_HEADS * SHARED + head + h) * DV + 4 * f, sum, all);
"""
WRITE_PART = """  float* to = sums + ((row * SPLITS + split) * HEADS + h) * (DV + 4);
  *(float4*)(to + 4 * f) = sum;
  if (f == 0) {
    *(float2*)(to + DV) = make_float2(peak, all);
  }
"""
# As many parts at a time as there are registers for.
JOIN = """
const int parts = min(SPLITS, tiles);
__shared__ bool is_last;
__syncthreads();
if (thread == 0) {
  int* counter = (int*)counters + row * COUNTERS;
  is_last = counted(counter) == parts - 1;
  if (is_last) {
    *counter = 0;
  }
}
__syncthreads();
if (!is_last) {
  return;
}
constexpr int ROUNDS = (SPLITS + 11) / 12, TOGETHER = (SPLITS + ROUNDS - 1) / ROUNDS;
for (int i = thread; i < heads * (DV / 4); i += THREADS) {
  const int h = i / (DV / 4), f = i % (DV / 4);
  const float* from = sums + (row * SPLITS * HEADS + h) * (DV + 4);
  float peak = -INFINITY, all = 0.0f;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = 0; s < parts; s += TOGETHER) {
    float4 some[TOGETHER];
    float2 ends[TOGETHER];
    float top = peak;
    UNROLL
    for (int j = 0; j < TOGETHER; ++j) {
      const float* there = from + min(s + j, parts - 1) * HEADS * (DV + 4);
      some[j] = __ldcg((const float4*)(there + 4 * f));
      ends[j] = __ldcg((const float2*)(there + DV));
    }
    UNROLL
    for (int j = 0; j < TOGETHER; ++j) {
      top = fmaxf(top, ends[j].x);
    }
    float fade = power_of_two(peak - top);
    all *= fade;
    sum = plus(make_float4(0.0f, 0.0f, 0.0f, 0.0f), fade, sum);
    UNROLL
    for (int j = 0; j < TOGETHER; ++j) {
      float weight = s + j < parts ? power_of_two(ends[j].x - top) : 0.0f;
      all = fmaf(weight, ends[j].y, all);
      sum = plus(sum, weight, some[j]);
    }
    peak = top;
  }
  write_four(out + (batch * KV_HEADS * SHARED + head + h) * DV + 4 * f, sum, all);
}
"""


def header() -> str:
    """Return what stands before the kernel."""
    return PRIMITIVES + HEADER


def attention(variant: Variant) -> str:
    """Return the body of the kernel, for the forms "whole" and "joined"."""
    weights = [x for x, there in (("q", variant.q_norm), ("k", variant.k_norm)) if there]
    rooms = [(x, f" + D * sizeof(*{x}_weight) / 16") for x in weights]
    place = filled(
        PLACE,
        heads_room=HEADS_ROOM,
        weight_room="".join(room for _, room in rooms),
        weights="".join(
            filled(WEIGHTS, x=x, at=HEADS_ROOM + "".join(room for _, room in rooms[:i]))
            for i, (x, _) in enumerate(rooms)
        ),
        weight_loads="".join(filled(WEIGHT_LOADS, x=x) for x in weights),
        directions=DIRECTIONS if variant.rope else "",
    )
    prepare = filled(
        PREPARE,
        turn=filled(TURN, inverse=INVERSE[variant.rope]) if variant.rope else "",
        norm=_norm(weights),
        rope=filled(ROPE, multiply=MULTIPLY if variant.multiplied else "") if variant.rope else "",
    )
    attend = filled(ATTEND, sinks=SINKS if variant.sinks else "")
    joined = variant.form == "joined"
    meet = filled(MEET, write=WRITE_PART if joined else WRITE_WHOLE)
    return place + prepare + attend + meet + (JOIN if joined else "")


def _norm(weights: list[str]) -> str:
    if len(weights) == 2:
        return NORM_BOTH
    conditions = {"q": "!is_key", "k": "is_key"}
    return "".join(filled(NORM_ONE, condition=conditions[x], x=x) for x in weights)
