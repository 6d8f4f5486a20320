"""The CUDA source of attention for one new token on tensor cores, for caches of 16 bits.

One block has up to 8 query heads of one kv head, and some of the tiles of `KEYS` positions. Every
warp works on tiles of its own, as flash attention does: scores are products of 16 rows, 8 of which
are queries, with keys; exponentials stand in the registers where the product with the values takes
them, split into two numbers of 16 bits each (what the first leaves is the second), which take the
place of the 8 rows that the queries leave free. So nothing of float32 is lost that could be seen.

Keys and values go from memory to registers, 16 bytes a lane, in the order of the products: which
positions or elements a product calls its first and second is free as long as both factors agree.
They are asked for before all else, as far as it is known where they lie, and so is what is new:
norms, rope and the state of the sequence are worked on while they come. The sums of warps meet
once, in shared memory; those of blocks in the shared memory of a cluster (`attention_clusters`), or
in device memory, where the last block adds them up.
"""

from __future__ import annotations

from zmlx.kernels import attention_clusters as clusters
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
// The same of what all warps read, maybe from shared memory, and a number of the state. Both are
// asked for where they stand: the compiler would do it where they are used.
inline Piece taken(const void* from) {
  Piece x;
  asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(from)
               : "memory");
  return x;
}
inline int taken_number(const int* from) {
  int x;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
// A row of an array: one instruction, of which the compiler would make several.
template <typename T>
inline T* placed(T* rows, int row, int stride) {
  T* found;
  asm("mad.wide.s32 %0, %1, %2, %3;"
      : "=l"(found) : "r"(row), "r"(stride * (int)sizeof(T)), "l"(rows));
  return found;
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
      pieces[i] = taken((const Piece*)from + i);
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

// Copies rows to shared memory, where they can be read 16 bytes at a time.
template <typename X>
inline const X* copied(void* copy, const X* from, int rows, int size, int64_t row_stride,
                       int64_t stride) {
  X* to = (X*)copy;
  for (int i = threadIdx.x; i < rows * size; i += blockDim.x) {
    to[i] = from[i / size * row_stride + i % size * stride];
  }
  return to;
}

// The new token's part of one head, or nothing.
template <int D, typename X, int J>
inline void load_head(Eight<X> (&to)[J], const X* from, int c) {
  UNROLL
  for (int j = 0; j < J; ++j) {
    if (D % 32 == 0 || 32 * j + 8 * c < D) {
      to[j].load(from + 32 * j + 8 * c);
    } else {
      to[j] = {};
    }
  }
}

// Keys of a tile: lane 4 g + c has 8 elements of position 8 n + g from 32 j + 8 c on.
template <int D, int TILES, int J, typename T>
inline void fetch_keys(Piece (&to)[TILES][J], const T* rows, int stride, int from, int last, int g,
                       int c) {
  UNROLL
  for (int n = 0; n < TILES; ++n) {
    const T* row = placed(rows + 8 * c, min(from + 8 * n + g, last), stride);
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
inline void fetch_values(Piece (&to)[ROWS][J], const T* rows, int stride, int from, int last,
                         int g, int c) {
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const T* row = placed(rows + 8 * g, min(from + value_row(r, c), last), stride);
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
// Rotates a head by the directions of all its angles; it is rounded when it is packed.
template <int DIMS, bool TRADITIONAL, int J>
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
// Parts of a softmax over all positions: each has its maximum and the sum of its weights.
struct Added {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float2 ends = make_float2(-INFINITY, 0.0f);
  // Adds the first `count` of some parts; others are ones of these once more. Blocks of a cluster
  // and the last of those that are none both go by this, so they find the same, bit for bit.
  template <int N>
  void add(const float4 (&some)[N], const float2 (&its_ends)[N], int count) {
    float top = ends.x;
    UNROLL
    for (int n = 0; n < N; ++n) {
      top = fmaxf(top, its_ends[n].x);
    }
    const float fade = power_of_two(ends.x - top);
    ends = make_float2(top, fade * ends.y);
    sum = plus(make_float4(0.0f, 0.0f, 0.0f, 0.0f), fade, sum);
    UNROLL
    for (int n = 0; n < N; ++n) {
      const float weight = n < count ? power_of_two(its_ends[n].x - top) : 0.0f;
      ends.y = fmaf(weight, its_ends[n].y, ends.y);
      sum = plus(sum, weight, some[n]);
    }
  }
};
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
${begin}constexpr int THREADS = WARPS * 32;
constexpr int K_PIECES = (D + 31) / 32, V_PIECES = (DV + 63) / 64;
constexpr int TILES = KEYS / 8, ROWS = KEYS / 4;
constexpr int LINE = DV / 4 + 2;  // so that rows of sums do not begin in the same bank
const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
const int g = lane / 4, c = lane % 4;
const int split = blockIdx.x, kv = blockIdx.y / GROUPS, part = blockIdx.y % GROUPS;
const int batch = BATCHED ? blockIdx.z : 0, row = batch * gridDim.y + blockIdx.y;
const int head = kv * SHARED + part * HEADS, heads = min(HEADS, SHARED - part * HEADS);
const int* const numbers = state + batch * STEP;
const int write = taken_number(numbers), length = taken_number(numbers + 1);
const int position = taken_number(numbers + 2);
const T* q_from = q + batch * q_strides[0] + head * q_strides[1];
const T* k_from = k + batch * k_strides[0] + kv * k_strides[1];
const T* v_from = v + batch * v_strides[0] + kv * v_strides[1];
int q_stride = q_strides[1];
$weights// What is new may lie anywhere.
__shared__ uint4 copies[$heads_room$weight_room];
if (q_strides[2] != 1 || k_strides[2] != 1 || v_strides[2] != 1 || q_stride % 8 != 0 ||
    ((size_t)q_from | (size_t)k_from | (size_t)v_from$addresses) % 16 != 0) {
  q_from = copied(copies, q_from, heads, D, q_stride, q_strides[2]);
  k_from = copied(copies + HEADS * D / 8, k_from, 1, D, 0, k_strides[2]);
  v_from = copied(copies + (HEADS + 1) * D / 8, v_from, 1, DV, 0, v_strides[2]);
  q_stride = D;
$copies  __syncthreads();
}
// Rows of the products without a query of their own take another's.
Eight<T> raw[K_PIECES];
load_head<D>(raw, placed(q_from, min(g, heads - 1), q_stride), c);
$weight_loads$frequencies
T* const key_rows = (T*)keys + batch * keys_strides[0] + kv * keys_strides[1];
T* const value_rows = (T*)values + batch * values_strides[0] + kv * values_strides[1];
const int key_stride = keys_strides[2], value_stride = values_strides[2];
const int last_row = keys_shape[2] - 1;
Piece k_tile[TILES][K_PIECES], v_tile[ROWS][V_PIECES];
int tile = warp * SPLITS + split;
if (AT_ONCE && tile * KEYS <= last_row) {
  fetch_keys<D>(k_tile, key_rows, key_stride, tile * KEYS, last_row, g, c);
  fetch_values<DV>(v_tile, value_rows, value_stride, tile * KEYS, last_row, g, c);
}
// Only one warp needs what is new, but it is not known yet which.
Eight<T> raw_key[K_PIECES], raw_value[V_PIECES];
load_head<D>(raw_key, k_from, c);
${key_weight_loads}UNROLL
for (int j = 0; j < V_PIECES; ++j) {
  if (DV % 64 == 0 || 64 * j + 8 * g < DV) {
    raw_value[j].load(v_from + 64 * j + 8 * g);
  }
}
const bool dense = keys_strides[3] == 1 && values_strides[3] == 1;
const float scale = dense ? from_bits(SCALE) * 1.44269504f : from_bits(0x7fc00000u);
const int first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
const int first_tile = first / KEYS, end_tile = (length + KEYS - 1) / KEYS;
const int tiles = end_tile - first_tile;
${leave}tile += first_tile;
__shared__ float4 meeting[WARPS * HEADS * LINE];
__shared__ float2 totals[WARPS * HEADS];
$directions"""
LEAVE = """if (split >= tiles) {
  return;
}
"""
HEADS_ROOM = "((HEADS + 1) * D + DV) / 8"
WEIGHTS = """const auto* ${x}_weights = ${x}_weight;
"""
WEIGHT_COPIES = """  ${x}_weights = copied(copies + $at, ${x}_weights, 1, D, 0, 1);
"""
# A norm of one of both works with weights of that one, and the other goes by it.
WEIGHT_LOADS = """decltype(eight_of(${x}_weight)) weights[K_PIECES];
load_head<D>(weights, ${x}_weights, c);
"""
DIRECTIONS = """// Of traditional ones some beyond those that there are are read, and not used.
constexpr int ANGLES = TRADITIONAL ? 16 * K_PIECES : DIMS / 2;
__shared__ float4 all_directions[WARPS * ANGLES / 2];
float2* const directions = (float2*)all_directions + warp * ANGLES;
"""

# All warps work on the queries, then the one to whose tiles the new key belongs works on that.
PREPARE = """
if (tile < end_tile) {
if (!AT_ONCE) {
  fetch_keys<D>(k_tile, key_rows, key_stride, tile * KEYS, last_row, g, c);
  fetch_values<DV>(v_tile, value_rows, value_stride, tile * KEYS, last_row, g, c);
}
const int its_tile = write / KEYS - tile;
const bool fresh = its_tile >= 0 && its_tile % (WARPS * SPLITS) == 0 && write < length;
$turn
Piece queries[K_PIECES];
_Pragma("unroll 1")
for (bool is_key = false;; is_key = true) {
  float x[K_PIECES][8];
  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    raw[j].widen(x[j]);
  }
$norm$rope  if (!is_key) {
    UNROLL
    for (int j = 0; j < K_PIECES; ++j) {
      queries[j] = packed_eight<T>(x[j]);
      raw[j] = raw_key[j];
$key_weight_moves    }
    if (fresh) {
      continue;
    }
    break;
  }
  // Later tiles are read from the cache, this one has been already.
  UNROLL
  for (int j = 0; j < K_PIECES; ++j) {
    Piece key = packed_eight<T>(x[j]);
    if (g == 0 && (D % 32 == 0 || 32 * j + 8 * c < D)) {
      *(Piece*)(placed(key_rows, write, key_stride) + 32 * j + 8 * c) = key;
    }
    UNROLL
    for (int n = 0; n < TILES; ++n) {
      if (tile * KEYS + 8 * n + g == write) {
        k_tile[n][j] = key;
      }
    }
  }
  UNROLL
  for (int j = 0; j < V_PIECES; ++j) {
    Piece value = raw_value[j].pieces[0];
    if (c == 0 && (DV % 64 == 0 || 64 * j + 8 * g < DV)) {
      *(Piece*)(placed(value_rows, write, value_stride) + 64 * j + 8 * g) = value;
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      if (tile * KEYS + value_row(r, c) == write) {
        v_tile[r][j] = value;
      }
    }
  }
  __syncwarp();
  break;
}
"""
KEY_WEIGHT_LOADS = """decltype(eight_of(k_weight)) key_weights[K_PIECES];
load_head<D>(key_weights, k_weights, c);
"""
KEY_WEIGHT_MOVES = """      weights[j] = key_weights[j];
"""
TURN = """{
  const float place = float(position);
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
    "freqs": "(1.0f / frequencies[from / 32])",
}
FREQUENCIES = """
float frequencies[(DIMS / 2 + 31) / 32];
UNROLL
for (int n = 0; n < (DIMS / 2 + 31) / 32; ++n) {
  const int i = min(32 * n + lane, DIMS / 2 - 1);
  frequencies[n] = float(freqs[i * freqs_strides[0]]);
}"""
NORM = """  if ($condition) {
    normed<D, T>(x, weights, from_bits(EPS));
  }
"""
ROPE = """$multiply  rotated<DIMS, TRADITIONAL != 0>(x, directions, c);
"""
# A number beside an array takes its dtype in MLX, so the number is rounded as well.
MULTIPLY = """  UNROLL
  for (int j = 0; j < sizeof(x) / 32; ++j) {
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
${shares}for (int i = thread; i < (active > 0 ? heads * (DV / 4) : 0); i += THREADS) {
  const int h = i / (DV / 4), f = i % (DV / 4);
  float2 ends[WARPS];
  float4 some[WARPS];
  float peak = -INFINITY, all = 0.0f;
  UNROLL
  for (int w = 0; w < WARPS; ++w) {
    ends[w] = make_float2(-INFINITY, 0.0f);
    some[w] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (w < active) {
      ends[w] = totals[w * HEADS + h];
      some[w] = meeting[(w * HEADS + h) * LINE + (f ^ (f / 8 & 1))];
    }
    peak = fmaxf(peak, ends[w].x);
  }
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  UNROLL
  for (int w = 0; w < WARPS; ++w) {
    float weight = power_of_two(ends[w].x - peak);
    all = fmaf(weight, ends[w].y, all);
    sum = plus(sum, weight, some[w]);
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
GIVE = """  give(h, f, sum, make_float2(peak, all));
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
  Added all;
  for (int s = 0; s < parts; s += TOGETHER) {
    float4 some[TOGETHER];
    float2 ends[TOGETHER];
    UNROLL
    for (int j = 0; j < TOGETHER; ++j) {
      const float* there = from + min(s + j, parts - 1) * HEADS * (DV + 4);
      some[j] = __ldcg((const float4*)(there + 4 * f));
      ends[j] = __ldcg((const float2*)(there + DV));
    }
    all.add(some, ends, parts - s);
  }
  write_four(out + (batch * KV_HEADS * SHARED + head + h) * DV + 4 * f, all.sum, all.ends.y);
}
"""


def header(variant: Variant) -> str:
    """Return what stands before the kernel."""
    return PRIMITIVES + (clusters.PRIMITIVES if variant.cluster > 1 else "") + HEADER


def leave(variant: Variant) -> str:
    """Return what blocks do that have no positions; those of a cluster stay."""
    return "" if variant.cluster > 1 else LEAVE


def frequencies(variant: Variant) -> str:
    """Return what asks for the frequencies of a rope that has them in an array."""
    return FREQUENCIES if variant.rope == "freqs" else ""


def turn(variant: Variant) -> str:
    """Return what computes the `directions` of the angles of a position."""
    return filled(TURN, inverse=INVERSE[variant.rope]) if variant.rope else ""


def rope(variant: Variant) -> str:
    """Return what rotates the head `x`."""
    return filled(ROPE, multiply=MULTIPLY if variant.multiplied else "") if variant.rope else ""


def attention(variant: Variant) -> str:
    """Return the body of the kernel, for the forms "whole" and "joined"."""
    norms = [x for x, there in (("q", variant.q_norm), ("k", variant.k_norm)) if there]
    rooms = [f" + D * sizeof(*{x}_weight) / 16" for x in norms]
    at = [HEADS_ROOM + "".join(rooms[:i]) for i in range(len(norms))]
    both = len(norms) == 2
    place = filled(
        PLACE,
        begin=clusters.BEGIN if variant.cluster > 1 else "",
        leave=leave(variant),
        frequencies=frequencies(variant),
        key_weight_loads=KEY_WEIGHT_LOADS if both else "",
        heads_room=HEADS_ROOM,
        weight_room="".join(rooms),
        weights="".join(filled(WEIGHTS, x=x) for x in norms),
        addresses="".join(f" | (size_t){x}_weights" for x in norms),
        copies="".join(filled(WEIGHT_COPIES, x=x, at=a) for x, a in zip(norms, at, strict=True)),
        weight_loads=filled(WEIGHT_LOADS, x=norms[0]) if norms else "",
        directions=DIRECTIONS if variant.rope else "",
    )
    conditions = {"qk": "true", "q": "!is_key", "k": "is_key"}
    prepare = filled(
        PREPARE,
        key_weight_moves=KEY_WEIGHT_MOVES if both else "",
        turn=turn(variant),
        norm=filled(NORM, condition=conditions["".join(norms)]) if norms else "",
        rope=rope(variant),
    )
    attend = filled(ATTEND, sinks=SINKS if variant.sinks else "")
    return place + prepare + attend + _ending(variant)


def _ending(variant: Variant) -> str:
    if variant.cluster > 1:
        shares = clusters.SHARES + clusters.MEET
        return filled(MEET, shares=shares, write=GIVE) + clusters.COLLECT
    if variant.form == "joined":
        return filled(MEET, shares="", write=WRITE_PART) + JOIN
    return filled(MEET, shares="", write=WRITE_WHOLE)
