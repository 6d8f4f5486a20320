// Products with few vectors on tensor cores.
//
// A tile is 16 rows of a matrix. A warp multiplies it with UNITS chunks of the vectors, a chunk of a
// row being 64 bytes: 16 bytes for each of four lanes, which are the columns of one product of the
// tensor core after another; eight such quads have rows r and r + 8. The eight columns of the other
// factor are vectors, or the vector for each group of a chunk with zeros in place of the others, so
// that the sums of groups that differ in their scale come out apart. SPLIT warps share a tile, each
// with chunks of its own, and add up what they have.
//
// Q has the numbers of a launch:
//   K columns; MODE, BITS, GROUP of the packing; ROWS0 to ROWS3 of the matrices
//   MATRICES that a warp multiplies side by side, gate and up; OUTPUTS matrices one after another
//   TOKENS vectors of a launch, of ALL; CHOSEN experts of a vector; OWN vectors of each expert
//   TERMS experts whose products are summed, 0 for none: SPLIT / TERMS warps have one of them
//   WARPS of a block, SPLIT warps of a tile; DEPTH chunks on their way; TURNS times DEPTH chunks a
//   warp; BLOCKS of a launch, which do ROUNDS tiles each
//   NORM, ACTIVATION, BIAS (1 of the first matrix, 2 of the second), RESIDUAL, SHARED
#pragma once

#include "machine.cuh"
#include "packed.cuh"

namespace zmlx {
namespace vectors {

enum Activation { NONE, SILU, GELU, GELU_TANH, RELU2, CLIPPED_SWIGLU };

template <typename T>
struct Four {
  T* at[4];

  __device__ __forceinline__ T* get(int i) const {
    return i == 0 ? at[0] : i == 1 ? at[1] : i == 2 ? at[2] : at[3];
  }
};

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int common(int a, int b) { return b ? common(b, a % b) : a; }

// What follows from a packing and a layout.
template <typename Q>
struct Sizes {
  static constexpr int
      MODE = Q::MODE, ACTIVATION = Q::ACTIVATION,
      PIECE = 128 / Q::BITS,  // columns of 16 bytes
      CHUNK = 4 * PIECE, CHUNKS = (Q::K + CHUNK - 1) / CHUNK,
      STEPS = PIECE / 8,  // pairs of products of the tensor core for a chunk
      ROW = Q::K / PIECE,  // 16 bytes of a row
      GROUP = Q::GROUP ? Q::GROUP : CHUNK,
      SLOTS = CHUNK / least(CHUNK, GROUP > PIECE ? GROUP : PIECE),  // groups side by side
      HALVES = GROUP < PIECE ? PIECE / GROUP : 1,  // groups of a lane, one after another
      EACH = 8 / SLOTS,  // vectors of a product of the tensor core
      SETS = (Q::TOKENS + EACH - 1) / EACH,
      GROUPS = Q::K / GROUP,  // scales of a row
      PER = Q::TERMS ? Q::SPLIT / Q::TERMS : Q::SPLIT,  // warps that share a row
      MINE = Q::DEPTH * Q::TURNS,  // chunks of a warp
      UNITS = Q::SPLIT * MINE,  // chunks of a tile, with those past the end
      TILES = Q::WARPS / Q::SPLIT,
      THREADS = 32 * Q::WARPS,
      RESULTS = 16 * Q::TOKENS,
      MIDDLE = 1 << (Q::BITS == 16 ? 0 : Q::BITS - 1);
  static constexpr bool
      SCALED = MODE != DENSE, BIASED = MODE == AFFINE,
      LOCAL = TILES == 1,  // a warp stages what it multiplies
      WIDE = SLOTS <= 2 && HALVES == 1 && GROUP <= CHUNK,
      ALIKE = !Q::CHOSEN && !Q::TERMS,  // all vectors meet the same matrices
      WHOLE = PER * MINE * CHUNK == Q::K,  // nothing is past the end of a row
      ONCE = Q::ROUNDS * Q::TURNS == 1;
  // Scales of a lane: for a chunk, and for each load.
  static constexpr int HAS = (SLOTS == 1 ? 1 : 2) * HALVES, RUNS = WIDE ? 1 : Q::DEPTH,
                       RUN = WIDE ? Q::DEPTH * HAS : HAS;

  // The first tiles of the outputs.
  static constexpr int START1 = (Q::ROWS0 + 15) / 16, START2 = START1 + (Q::ROWS1 + 15) / 16,
                       START3 = START2 + (Q::ROWS2 + 15) / 16;
  static constexpr bool EVEN =  // nothing is past the last row
      START3 * 16 + Q::ROWS3 == Q::BLOCKS * Q::ROUNDS * TILES * 16 && Q::ROWS0 % 16 == 0 &&
      Q::ROWS1 % 16 == 0 && Q::ROWS2 % 16 == 0 && Q::ROWS3 % 16 == 0;
};

// N neighbours of a row of LENGTH scales, in loads as wide as all rows allow.
template <typename S, int N, int LENGTH, bool WHOLE>
struct Run {
  static constexpr int BYTES = N * int(sizeof(S)),
                       WIDTH = common(common(16, BYTES), LENGTH * int(sizeof(S)));
  unsigned words[(BYTES + 3) / 4];

  __device__ __forceinline__ void load(const S* row, unsigned at) {
#pragma unroll
    for (int i = 0; i < BYTES / WIDTH; ++i) {
      unsigned from = at + i * (WIDTH / int(sizeof(S)));
      // What is past the end meets activations of zero.
      if constexpr (!WHOLE) from = min(from, LENGTH - WIDTH / unsigned(sizeof(S)));
      if constexpr (WIDTH == 16) {
        uint4 v = read(reinterpret_cast<const uint4*>(row + from));
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      } else if constexpr (WIDTH == 8) {
        uint2 v = read(reinterpret_cast<const uint2*>(row + from));
        words[2 * i] = v.x, words[2 * i + 1] = v.y;
      } else if constexpr (WIDTH == 4) {
        words[i] = read(reinterpret_cast<const unsigned*>(row + from));
      } else if constexpr (WIDTH == 2) {
        unsigned v = read(reinterpret_cast<const unsigned short*>(row + from));
        words[i / 2] = i % 2 ? words[i / 2] | v << 16 : v;
      } else {
        unsigned v = read(reinterpret_cast<const unsigned char*>(row + from));
        words[i / 4] = i % 4 ? words[i / 4] | v << 8 * (i % 4) : v;
      }
    }
  }
  template <int MODE>
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(S) == 4) return scale_of<MODE, S>(words[i]);
    constexpr int EACH = 4 / sizeof(S);
    unsigned bits = words[i / EACH] >> (i % EACH * 8 * sizeof(S)) % 32;
    return scale_of<MODE, S>(sizeof(S) == 2 ? bits & 0xffffu : bits & 0xffu);
  }
};

// What a warp has of one turn's weights, as they are stored, until it multiplies them.
template <typename Q, typename S>
struct Held {
  using Z = Sizes<Q>;
  using Scales = Run<S, Z::RUN, Z::SCALED ? Z::GROUPS : 16, Z::WHOLE>;
  uint4 words[Q::DEPTH][Q::MATRICES][2];
  Scales scales[Z::SCALED ? Z::RUNS : 1][Q::MATRICES][2];
  Scales biases[Z::BIASED ? Z::RUNS : 1][Q::MATRICES][2];
};

// Where a warp reads: the matrices of its tile, and in each the rows of a lane.
template <typename Q, typename S>
struct Place {
  using Z = Sizes<Q>;
  const uint4* w[Q::MATRICES];
  const S* scales[Q::MATRICES];
  const S* biases[Q::MATRICES];
  unsigned row[2];

  __device__ __forceinline__ void words(Held<Q, S>& held, int d, int chunk, int quad) const {
    unsigned piece = chunk * 4 + quad;
    if constexpr (!Z::WHOLE) piece = min(piece, unsigned(Z::ROW - 1));
#pragma unroll
    for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        held.words[d][m][r] = read_once(w[m] + size_t(row[r]) * Z::ROW + piece);
      }
    }
  }
  // The scales of all chunks of a turn.
  __device__ __forceinline__ void shares(Held<Q, S>& held, int chunk, int quad) const {
    if constexpr (Z::SCALED) {
#pragma unroll
      for (int d = 0; d < Z::RUNS; ++d) {
        unsigned at = (chunk + d) * Z::CHUNK / Z::GROUP;
        if (Z::SLOTS == 4) at += quad % 2 * Z::HAS;
#pragma unroll
        for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            held.scales[d][m][r].load(scales[m] + size_t(row[r]) * Z::GROUPS, at);
            if constexpr (Z::BIASED) {
              held.biases[d][m][r].load(biases[m] + size_t(row[r]) * Z::GROUPS, at);
            }
          }
        }
      }
    }
  }
};

// What a lane multiplies with: words of activations in threadgroup memory, or zeros.
template <typename Q>
struct Vectors {
  using Z = Sizes<Q>;
  const uint4* from[Z::SETS];
  int step[Z::SETS];

  __device__ __forceinline__ Vectors(const uint4* staged, const uint4* zeros, int lane) {
#pragma unroll
    for (int set = 0; set < Z::SETS; ++set) {
      int column = lane / 4, quad = lane % 4, token = set * Z::EACH + column / Z::SLOTS;
      bool any = token < Q::TOKENS && column % Z::SLOTS == quad * Z::SLOTS / 4;
      from[set] = any ? staged + token * (Z::UNITS * Z::STEPS * 4) + quad : zeros;
      step[set] = any ? Z::STEPS * 4 : 0;
    }
  }
  __device__ __forceinline__ uint4 get(int set, int unit, int s) const {
    return from[set][unit * step[set] + s * 4];
  }
};

template <typename Q>
using Sums = float[Q::MATRICES][Sizes<Q>::SETS][4];

// Multiply chunk d of what is held, and add it to the sums of a lane: of rows r and r + 8 two
// vectors each, or one (the first) where a chunk has several groups.
template <typename Q, typename X, typename S>
__device__ __forceinline__ void use(const Held<Q, S>& held, int d, int unit,
                                    const Vectors<Q>& vectors, const float* totals, int quad,
                                    Sums<Q>& sums) {
  using Z = Sizes<Q>;
  constexpr int CHAINS = Q::MATRICES * Z::SETS == 1 && Z::STEPS > 1 ? 2 : 1;
#pragma unroll
  for (int half = 0; half < Z::HALVES; ++half) {
    float c[CHAINS][Q::MATRICES][Z::SETS][4] = {};
#pragma unroll
    for (int s = half * Z::STEPS / Z::HALVES; s < (half + 1) * Z::STEPS / Z::HALVES; ++s) {
      uint4 b[Z::SETS];
#pragma unroll
      for (int set = 0; set < Z::SETS; ++set) b[set] = vectors.get(set, unit, s);
#pragma unroll
      for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          unsigned a[4];
          unpack<Z::MODE, Q::BITS, X>(held.words[d][m][0], 2 * s + i, a[0], a[2]);
          unpack<Z::MODE, Q::BITS, X>(held.words[d][m][1], 2 * s + i, a[1], a[3]);
#pragma unroll
          for (int set = 0; set < Z::SETS; ++set) {
            multiply_add(c[i % CHAINS][m][set], a, i ? b[set].z : b[set].x,
                         i ? b[set].w : b[set].y, X());
          }
        }
      }
    }
#pragma unroll
    for (int set = 0; set < Z::SETS; ++set) {
      float2 all = make_float2(0.0f, 0.0f);
      if constexpr (Z::BIASED) {
        all = reinterpret_cast<const float2*>(totals)[(set * Z::UNITS + unit) * 4 + quad];
      }
#pragma unroll
      for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float v[2], value[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = c[0][m][set][2 * r + i];
            if (CHAINS == 2) v[i] += c[CHAINS - 1][m][set][2 * r + i];
            value[i] = v[i];
            if constexpr (Z::SCALED) {
              int at = (Z::WIDE ? d * Z::HAS : 0) + (Z::SLOTS == 1 ? 0 : i * Z::HALVES) + half;
              float scale = held.scales[Z::WIDE ? 0 : d][m][r].template get<Z::MODE>(at);
              value[i] *= scale;
              if constexpr (Z::BIASED) {
                float bias = held.biases[Z::WIDE ? 0 : d][m][r].template get<Z::MODE>(at);
                // Of values less their middle: nothing large cancels.
                value[i] += fmaf(scale, float(Z::MIDDLE), bias) * (i ? all.y : all.x);
              }
            }
          }
          if (Z::SLOTS == 1) {
            sums[m][set][2 * r] += value[0];
            sums[m][set][2 * r + 1] += value[1];
          } else {
            sums[m][set][2 * r] += value[0] + value[1];
          }
        }
      }
    }
  }
}

// Lay activations out in threadgroup memory, normalised if that is asked for, with the sums of
// groups. They are asked for early, and used when the weights have been asked for.
template <typename Q, typename X>
struct Stage {
  using Z = Sizes<Q>;
  static constexpr int OF_CHUNK = Z::CHUNK / 8, COUNT = (Z::LOCAL ? Z::MINE : Z::UNITS) * OF_CHUNK,
                       WORKERS = Z::LOCAL ? 32 : Z::THREADS, EACH = (COUNT + WORKERS - 1) / WORKERS,
                       TOGETHER = least(Z::CHUNK, Z::GROUP) / 8;  // threads that share a group
  uint4 raw[Q::TOKENS][EACH];
  uint4 norms[1][EACH];
  const int first_chunk, first_unit, worker;

  __device__ __forceinline__ static uint4 read8(const X* x, bool aligned) {
    if (aligned) return read(reinterpret_cast<const uint4*>(x));
    uint4 v = make_uint4(0, 0, 0, 0);
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(x);
#pragma unroll 1
    for (int i = 7; i >= 0; --i) {  // rare, and not to be mixed with the rest
      v.w = v.w << 16 | v.z >> 16, v.z = v.z << 16 | v.y >> 16, v.y = v.y << 16 | v.x >> 16;
      v.x = v.x << 16 | bits[i];
    }
    return v;
  }
  // The column of the i-th piece of 8 of this thread, and whether there is one.
  __device__ __forceinline__ bool at(int i, int& column) const {
    column = (first_chunk * OF_CHUNK + worker + i * WORKERS) * 8;
    return (COUNT % WORKERS == 0 || worker + i * WORKERS < COUNT) && (Z::WHOLE || column < Q::K);
  }
  // A warp begins with chunk `chunk`, which is staged as `unit`.
  __device__ __forceinline__ Stage(int chunk, int unit)
      : first_chunk(Z::LOCAL ? chunk : 0), first_unit(Z::LOCAL ? unit : 0),
        worker(Z::LOCAL ? threadIdx.x % 32 : threadIdx.x) {}

  // Ask for vectors from `row` on.
  __device__ __forceinline__ void ask_vectors(const X* x, size_t row) {
    ask(x + row * Q::K, row, raw);
  }
  __device__ __forceinline__ void ask_norm(const X* norm) {
    if constexpr (Q::NORM > 0) ask(norm, 0, norms);
  }
  // Ask for the pieces of some vectors, the first of which is number `row`.
  template <int VECTORS>
  __device__ __forceinline__ void ask(const X* from, size_t row, uint4 (&to)[VECTORS][EACH]) {
    if (__builtin_expect(reinterpret_cast<size_t>(from) % 16 == 0, 1)) {
      ask(from, row, to, [](const X* at) { return read(reinterpret_cast<const uint4*>(at)); });
    } else {
      ask(from, row, to, slowly);
    }
  }
  template <int VECTORS, typename F>
  __device__ __forceinline__ void ask(const X* from, size_t row, uint4 (&to)[VECTORS][EACH],
                                      F read8) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int column;
      bool any = at(i, column);
#pragma unroll
      for (int t = 0; t < VECTORS; ++t) {
        bool there = any && (!t || Q::ALL % Q::TOKENS == 0 || row + t < Q::ALL);
        to[t][i] = there ? read8(from + t * Q::K + column) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  __device__ __forceinline__ static uint4 slowly(const X* x) {
    uint4 v = make_uint4(0, 0, 0, 0);
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(x);
#pragma unroll 1
    for (int i = 7; i >= 0; --i) {
      v.w = v.w << 16 | v.z >> 16, v.z = v.z << 16 | v.y >> 16, v.y = v.y << 16 | v.x >> 16;
      v.x = v.x << 16 | bits[i];
    }
    return v;
  }
  // Values of 8 activations.
  __device__ __forceinline__ static void widen(const uint4& from, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      unsigned word = part(from, i / 2);
      to[i] = widened(i % 2 ? word >> 16 : word & 0xffffu, X());
    }
  }
  __device__ __forceinline__ static float warp_sum(float value) {
#pragma unroll
    for (int i = 16; i; i /= 2) value += __shfl_xor_sync(0xffffffffu, value, i);
    return value;
  }
  __device__ __forceinline__ void normalise(float eps, float* squares) {
#pragma unroll
    for (int t = 0; t < Q::TOKENS; ++t) {
      float sum = 0.0f, v[8];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        widen(raw[t][i], v);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) squares[t * Q::WARPS + threadIdx.x / 32] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < Q::TOKENS; ++t) {
      float sum = 0.0f, v[8];
      for (int i = 0; i < Q::WARPS; ++i) sum += squares[t * Q::WARPS + i];
      float factor = rsqrtf(sum / float(Q::K) + eps);
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        widen(raw[t][i], v);
        unsigned to[4];
        // Rounded as stock's norm is: the normalised value, and its product with the weight.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          unsigned two = rounded2(v[2 * j] * factor, v[2 * j + 1] * factor, X());
          to[j] = fma2(two, part(norms[0][i], j), Constants<X>::MINUS_ZERO, X());
        }
        raw[t][i] = make_uint4(to[0], to[1], to[2], to[3]);
      }
    }
  }
  __device__ __forceinline__ void finish(float eps, uint4* staged, float* totals, float* squares) {
    if constexpr (bool(Q::NORM)) normalise(eps, squares);
#pragma unroll
    for (int t = 0; t < Q::TOKENS; ++t) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int piece = worker + i * WORKERS, within = piece % OF_CHUNK;
        const int unit = first_unit + piece / OF_CHUNK;
        const bool inside = COUNT % WORKERS == 0 || piece < COUNT;
        int to = ((t * Z::UNITS + unit) * Z::STEPS + within % Z::STEPS) * 4 + within / Z::STEPS;
        if (inside) staged[to] = ordered<Q::BITS>(raw[t][i]);
        if constexpr (Z::BIASED) {
          float v[8];
          widen(raw[t][i], v);
          float sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
#pragma unroll
          for (int j = 1; j < TOGETHER; j *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, j);
          if (inside && within % TOGETHER == 0) {
            int slot = t % Z::EACH * Z::SLOTS + within / TOGETHER;
            totals[(t / Z::EACH * Z::UNITS + unit) * 8 + slot] = sum;
          }
        }
      }
    }
    if (Z::LOCAL) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

template <typename Q>
__device__ __forceinline__ float activated(float a, float b) {
  if constexpr (Sizes<Q>::ACTIVATION == SILU) {
    a = a / (1.0f + expf(-a));
  } else if constexpr (Sizes<Q>::ACTIVATION == GELU) {
    a = 0.5f * a * (1.0f + erff(a * 0.70710678f));
  } else if constexpr (Sizes<Q>::ACTIVATION == GELU_TANH) {
    a = 0.5f * a * (1.0f + tanhf(0.7978845608f * (a + 0.044715f * a * a * a)));
  } else if constexpr (Sizes<Q>::ACTIVATION == RELU2) {
    a = fmaxf(a, 0.0f) * fmaxf(a, 0.0f);
  } else if constexpr (Sizes<Q>::ACTIVATION == CLIPPED_SWIGLU) {
    a = fminf(a, 7.0f);
    a = a / (1.0f + expf(-1.702f * a));
    b = fminf(fmaxf(b, -7.0f), 7.0f) + 1.0f;
  }
  return Q::MATRICES == 2 ? a * b : a;
}

// A tile: its matrix among the outputs, that one's rows, and the first row of the tile.
struct Tile {
  int matrix, rows, row;

  template <typename Q>
  __device__ __forceinline__ void choose(int tile) {
    using Z = Sizes<Q>;
    matrix = 0, rows = Q::ROWS0;
    int start = 0;
    if (Q::OUTPUTS > 1 && tile >= Z::START1) matrix = 1, rows = Q::ROWS1, start = Z::START1;
    if (Q::OUTPUTS > 2 && tile >= Z::START2) matrix = 2, rows = Q::ROWS2, start = Z::START2;
    if (Q::OUTPUTS > 3 && tile >= Z::START3) matrix = 3, rows = Q::ROWS3, start = Z::START3;
    row = (tile - start) * 16;
  }
};

// Leave a warp's sums, times a factor, for the threads that add them up.
template <typename Q>
__device__ __forceinline__ void put(const Sums<Q>& sums, float factor, int lane,
                                    float (&to)[Q::MATRICES][Sizes<Q>::RESULTS]) {
  using Z = Sizes<Q>;
  const int quad = lane % 4;
#pragma unroll
  for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
    for (int s = 0; s < Z::SETS; ++s) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + 8 * r;
        if constexpr (Z::SLOTS == 1) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int token = 2 * quad + i;
            if (token < Q::TOKENS) to[m][token * 16 + row] = factor * sums[m][s][2 * r + i];
          }
        } else {
          float sum = sums[m][s][2 * r];
          if (Z::SLOTS == 4) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          int token = s * Z::EACH + quad * 2 / Z::SLOTS;
          bool first = Z::SLOTS == 2 || quad % 2 == 0;
          if (first && token < Q::TOKENS) to[m][token * 16 + row] = factor * sum;
        }
      }
    }
  }
}

// What a thread does with results of a tile; what it adds to them is asked for early.
template <typename Q, typename P, typename M, typename C, typename D, typename O>
struct Epilogue {
  using Z = Sizes<Q>;
  static constexpr int WORKERS = 32 * Q::SPLIT, EACH = (Z::RESULTS + WORKERS - 1) / WORKERS;
  const Tile tile;
  const int worker, launch;
  const unsigned expert;
  float residuals[EACH], others[EACH], offsets[EACH][2];

  __device__ __forceinline__ Epilogue(Tile tile, int worker, int launch, unsigned expert)
      : tile(tile), worker(worker), launch(launch), expert(expert) {}

  // The row and the place of the j-th result of this thread, and whether there is one.
  __device__ __forceinline__ bool at(int j, int& n, size_t& to) const {
    const int result = worker + j * WORKERS, token = launch * Q::TOKENS + result / 16;
    n = tile.row + result % 16;
    to = size_t(Z::ALIKE ? token : launch) * tile.rows + n;
    return result < Z::RESULTS && n < tile.rows && (!Z::ALIKE || token < Q::ALL);
  }
  template <typename B, typename R, typename H, typename I, typename G>
  __device__ __forceinline__ void ask(const Four<const B>& bias, const R* residual,
                                      const H* shared, const I* indices, const G* scores) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      int n;
      size_t to;
      if (!at(j, n, to)) continue;
      if constexpr (Q::RESIDUAL > 0) residuals[j] = float(residual[to]);
      if constexpr (Q::SHARED > 0) others[j] = float(shared[to]);
      offsets[j][0] = offsets[j][1] = 0.0f;
      if constexpr (Q::BIAS > 0 && Q::TERMS > 0) {
        for (int term = launch * Q::TERMS; term < (launch + 1) * Q::TERMS; ++term) {
          float more = float(bias.at[0][size_t(indices[term]) * Q::ROWS0 + n]);
          offsets[j][0] = fmaf(float(scores[term]), more, offsets[j][0]);
        }
      } else {
        if (Q::BIAS & 1) offsets[j][0] = float(bias.get(tile.matrix)[expert * Q::ROWS0 + n]);
        if (Q::BIAS & 2) offsets[j][1] = float(bias.at[1][expert * Q::ROWS0 + n]);
      }
    }
  }
  __device__ __forceinline__ void write(
      const float (&parts)[Q::SPLIT][Q::MATRICES][Z::RESULTS], const Four<O>& y) const {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      int n;
      size_t to;
      if (!at(j, n, to)) continue;
      float value[2] = {};
#pragma unroll
      for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
        for (int i = 0; i < Q::SPLIT; ++i) value[m] += parts[i][m][worker + j * WORKERS];
        if (Q::BIAS & 1 << m) value[m] += offsets[j][m];
      }
      float a = activated<Q>(value[0], value[1]);
      if constexpr (Q::TERMS > 0) a = float(C(float(M(a))));
      if constexpr (Q::SHARED > 0) a = float(D(a + others[j]));
      if constexpr (Q::RESIDUAL > 0) a = (Q::TERMS ? a : float(P(a))) + residuals[j];
      y.get(tile.matrix)[to] = O(a);
    }
  }
};

// The launch. P, M, C, D, O: dtypes of a product, of a weighted sum, of what it is cast to, of that
// with the shared expert's output, and of the outputs.
template <typename Q, typename P, typename M, typename C, typename D, typename O, typename X,
          typename S, typename B, typename R, typename H, typename I, typename G>
__device__ __forceinline__ void products(const X* x, const X* norm, float eps, Four<const void> w,
                                         Four<const S> scales, Four<const S> biases,
                                         Four<const B> bias, const R* residual, const H* shared,
                                         const I* indices, const G* scores, Four<O> y) {
  using Z = Sizes<Q>;
  constexpr int BUFFERS = Q::ROUNDS > 1 ? 2 : 1, ZEROS = (Z::STEPS - 1) * 4 + 1;
  __shared__ uint4 staged[Q::TOKENS * Z::UNITS * Z::STEPS * 4 + Q::WARPS * ZEROS];
  __shared__ float totals[Z::BIASED ? Z::SETS * Z::UNITS * 8 : 1];
  __shared__ float squares[Q::NORM ? Q::TOKENS * Q::WARPS : 1];
  __shared__ float partial[BUFFERS][Z::TILES][Q::SPLIT][Q::MATRICES][Z::RESULTS];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  const int set = warp / Q::SPLIT, part = warp % Q::SPLIT, launch = blockIdx.y;
  const int chunk = part % Z::PER * Z::MINE, unit = part * Z::MINE;  // the first of this warp's
  const int term = launch * Q::TERMS + part / Z::PER;
  const unsigned expert = Z::ALIKE ? 0 : unsigned(indices[Q::TERMS ? term : launch]);
  const size_t row = Z::ALIKE   ? launch * Q::TOKENS
                     : Q::TERMS ? term
                     : Q::OWN   ? launch
                                : launch / (Q::CHOSEN ? Q::CHOSEN : 1);

  Stage<Q, X> stage(chunk, unit);
  // The vectors are asked for first, as they are needed first. But where the weights do not depend
  // on what earlier kernels write they are asked for while those still run.
  if constexpr (!Z::ALIKE) stage.ask_vectors(x, row);
  stage.ask_norm(norm);
  Place<Q, S> place;
  Tile tile;
  auto locate = [&](int round) {
    tile.template choose<Q>((blockIdx.x + round * Q::BLOCKS) * Z::TILES + set);
#pragma unroll
    for (int m = 0; m < Q::MATRICES; ++m) {
      int from = m + tile.matrix;
      place.w[m] = reinterpret_cast<const uint4*>(w.get(from));
      place.scales[m] = scales.get(from);
      place.biases[m] = biases.get(from);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int n = tile.row + lane / 4 + 8 * r;
      place.row[r] = expert * Q::ROWS0 + (Z::EVEN ? n : min(n, tile.rows - 1));
    }
  };
  Held<Q, S> held;
  locate(0);
#pragma unroll
  for (int d = 0; d < Q::DEPTH; ++d) place.words(held, d, chunk + d, quad);
  place.shares(held, chunk, quad);
  if constexpr (bool(Z::ALIKE)) {
    wait_for_earlier();
    stage.ask_vectors(x, row);
  }
  uint4* zeros = staged + Q::TOKENS * Z::UNITS * Z::STEPS * 4 + warp * ZEROS;
  // Always so, which the compiler does not know: it must not wait for the activations before it has
  // asked for the weights.
  if (y.at[0]) {
    if (lane < ZEROS) zeros[lane] = make_uint4(0, 0, 0, 0);
    stage.finish(eps, staged, totals, squares);
  }
  const Vectors<Q> vectors(staged, zeros, lane);

#pragma unroll 1
  for (int round = 0; round < Q::ROUNDS; ++round) {
    Epilogue<Q, P, M, C, D, O> epilogue(tile, part * 32 + lane, launch, expert);
    epilogue.ask(bias, residual, shared, indices, scores);
    Sums<Q> sums = {};
#pragma unroll 1
    for (int turn = 0; turn < Q::TURNS; ++turn) {
      const bool ends = turn + 1 == Q::TURNS;
      const bool again = !Z::ONCE && !(ends && round + 1 == Q::ROUNDS);
      const int at = turn * Q::DEPTH, next = chunk + (ends ? 0 : at + Q::DEPTH);
      if (again && ends) locate(round + 1);
#pragma unroll
      for (int d = 0; d < Q::DEPTH; ++d) {
        use<Q, X, S>(held, d, unit + at + d, vectors, totals, quad, sums);
        if (again) place.words(held, d, next + d, quad);
      }
      if (again) place.shares(held, next, quad);
    }
    float factor = 1.0f;
    if constexpr (Q::TERMS > 0) factor = float(scores[term]);
    auto& parts = partial[round % BUFFERS][set];
    put<Q>(sums, factor, lane, parts[part]);
    if (Q::SPLIT == 1) {
      __syncwarp();
    } else if (Z::LOCAL) {
      __syncthreads();
    } else {
      wait_for(1 + set, 32 * Q::SPLIT);
    }
    epilogue.write(parts, y);
  }
}

}  // namespace vectors
}  // namespace zmlx
