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
//   TERMS experts whose products are summed, 0 for none
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
      TERMS = Q::TERMS ? Q::TERMS : 1,
      ALL_UNITS = TERMS * CHUNKS,
      MINE = Q::DEPTH * Q::TURNS,  // chunks of a warp
      UNITS = Q::SPLIT * MINE,  // chunks of a tile, with those past the end
      TILES = Q::WARPS / Q::SPLIT,
      THREADS = 32 * Q::WARPS,
      RESULTS = 16 * Q::TOKENS,
      MIDDLE = 1 << (Q::BITS == 16 ? 0 : Q::BITS - 1);
  static constexpr bool
      SCALED = MODE != DENSE, BIASED = MODE == AFFINE,
      LOCAL = TILES == 1,  // a warp stages what it multiplies
      WIDE = SLOTS <= 2 && HALVES == 1 && GROUP <= CHUNK && !Q::TERMS,
      WHOLE = ALL_UNITS == UNITS && Q::K % CHUNK == 0,
      ONCE = Q::ROUNDS * Q::TURNS == 1;
  // Scales of a lane: for a chunk, and for each load.
  static constexpr int HAS = (SLOTS == 1 ? 1 : 2) * HALVES, RUNS = WIDE ? 1 : Q::DEPTH,
                       RUN = WIDE ? Q::DEPTH * HAS : HAS;

  static constexpr int rows(int matrix) {
    return matrix == 0 ? Q::ROWS0 : matrix == 1 ? Q::ROWS1 : matrix == 2 ? Q::ROWS2 : Q::ROWS3;
  }
  static constexpr int start(int matrix) {  // its first tile
    return matrix == 0 ? 0 : start(matrix - 1) + (rows(matrix - 1) + 15) / 16;
  }
};

// N neighbours of a row of LENGTH scales, in loads as wide as all rows allow.
template <typename S, int N, int LENGTH>
struct Run {
  static constexpr int BYTES = N * int(sizeof(S)),
                       WIDTH = common(common(16, BYTES), LENGTH * int(sizeof(S)));
  unsigned words[(BYTES + 3) / 4];

  __device__ __forceinline__ void load(const S* row, unsigned at) {
#pragma unroll
    for (int i = 0; i < BYTES / WIDTH; ++i) {
      // What is past the end meets activations of zero.
      unsigned from = min(at + i * WIDTH / unsigned(sizeof(S)), LENGTH - WIDTH / unsigned(sizeof(S)));
      if constexpr (WIDTH == 16) {
        uint4 v = __ldg(reinterpret_cast<const uint4*>(row + from));
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      } else if constexpr (WIDTH == 8) {
        uint2 v = __ldg(reinterpret_cast<const uint2*>(row + from));
        words[2 * i] = v.x, words[2 * i + 1] = v.y;
      } else if constexpr (WIDTH == 4) {
        words[i] = __ldg(reinterpret_cast<const unsigned*>(row + from));
      } else if constexpr (WIDTH == 2) {
        unsigned v = __ldg(reinterpret_cast<const unsigned short*>(row + from));
        words[i / 2] = i % 2 ? words[i / 2] | v << 16 : v;
      } else {
        unsigned v = __ldg(reinterpret_cast<const unsigned char*>(row + from));
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
  using Scales = Run<S, Z::RUN, Z::SCALED ? Z::GROUPS : 16>;
  uint4 words[Q::DEPTH][Q::MATRICES][2];
  Scales scales[Z::SCALED ? Z::RUNS : 1][Q::MATRICES][2];
  Scales biases[Z::BIASED ? Z::RUNS : 1][Q::MATRICES][2];
};

// Where a warp reads: the matrices of its tile, and in each the rows of a lane.
template <typename Q, typename S, typename I>
struct Place {
  using Z = Sizes<Q>;
  const uint4* w[Q::MATRICES];
  const S* scales[Q::MATRICES];
  const S* biases[Q::MATRICES];
  const I* experts;
  unsigned row[2];

  __device__ __forceinline__ size_t expert(int unit) const {
    if constexpr (Q::TERMS > 0) return size_t(experts[min(unit, Z::ALL_UNITS - 1) / Z::CHUNKS]);
    return 0;
  }
  __device__ __forceinline__ static int chunk(int unit) {
    if constexpr (Q::TERMS > 0) return min(unit, Z::ALL_UNITS - 1) % Z::CHUNKS;
    return unit;
  }
  __device__ __forceinline__ void words(Held<Q, S>& held, int d, int unit, int quad) const {
    unsigned piece = chunk(unit) * 4 + quad;
    if constexpr (!Z::WHOLE) piece = min(piece, unsigned(Z::ROW - 1));
    size_t first = expert(unit) * (size_t(Q::ROWS0) * Z::ROW) + piece;
#pragma unroll
    for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        held.words[d][m][r] = read_once(w[m] + (first + row[r] * unsigned(Z::ROW)));
      }
    }
  }
  // The scales of all chunks of a turn from `unit` on.
  __device__ __forceinline__ void shares(Held<Q, S>& held, int unit, int quad) const {
    if constexpr (Z::SCALED) {
#pragma unroll
      for (int d = 0; d < Z::RUNS; ++d) {
        unsigned at = chunk(unit + d) * Z::CHUNK / Z::GROUP;
        if (Z::SLOTS == 4) at += quad % 2 * Z::HAS;
        size_t first = expert(unit + d) * (size_t(Q::ROWS0) * Z::GROUPS);
#pragma unroll
        for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            size_t from = first + row[r] * unsigned(Z::GROUPS);
            held.scales[d][m][r].load(scales[m] + from, at);
            if constexpr (Z::BIASED) held.biases[d][m][r].load(biases[m] + from, at);
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
                                    const Vectors<Q>& vectors, const float* totals, float factor,
                                    int quad, Sums<Q>& sums) {
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
            sums[m][set][2 * r] += factor * value[0];
            sums[m][set][2 * r + 1] += factor * value[1];
          } else {
            sums[m][set][2 * r] += factor * (value[0] + value[1]);
          }
        }
      }
    }
  }
}

// Lay activations out in threadgroup memory, normalised if that is asked for, with the sums of
// groups. They are asked for when this is made, before the weights, and used afterwards.
template <typename Q, typename X>
struct Stage {
  using Z = Sizes<Q>;
  static constexpr int OF_CHUNK = Z::CHUNK / 8, COUNT = (Z::LOCAL ? Z::MINE : Z::UNITS) * OF_CHUNK,
                       WORKERS = Z::LOCAL ? 32 : Z::THREADS, EACH = (COUNT + WORKERS - 1) / WORKERS,
                       TOGETHER = least(Z::CHUNK, Z::GROUP) / 8;  // threads that share a group
  uint4 raw[Q::TOKENS][EACH];
  uint4 norms[EACH];
  int begin, worker;

  __device__ __forceinline__ static uint4 read8(const X* x) {
    if (reinterpret_cast<size_t>(x) % 16 == 0) return __ldg(reinterpret_cast<const uint4*>(x));
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(x);
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = bits[2 * i] | unsigned(bits[2 * i + 1]) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  // The piece of 8 columns that is the i-th of this thread: its unit, its column, whether it is one.
  __device__ __forceinline__ bool at(int i, int& unit, int& column) const {
    int piece = begin + worker + i * WORKERS;
    unit = piece / OF_CHUNK;
    column = (Q::TERMS ? unit % Z::CHUNKS : unit) * Z::CHUNK + piece % OF_CHUNK * 8;
    return worker + i * WORKERS < COUNT && unit < Z::ALL_UNITS && column < Q::K;
  }
  __device__ __forceinline__ Stage(const X* x, const X* norm, int first, int last, int part) {
    begin = Z::LOCAL ? part * Z::MINE * OF_CHUNK : 0;
    worker = Z::LOCAL ? threadIdx.x % 32 : threadIdx.x;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int unit, column;
      bool any = at(i, unit, column);
      norms[i] = make_uint4(0, 0, 0, 0);
      if (Q::NORM && any) norms[i] = read8(norm + column);
#pragma unroll
      for (int t = 0; t < Q::TOKENS; ++t) {
        raw[t][i] = make_uint4(0, 0, 0, 0);
        size_t row = Q::TERMS ? first + unit / Z::CHUNKS : min(first + t, last);
        if (any) raw[t][i] = read8(x + row * Q::K + column);
      }
    }
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
      float sum = 0.0f, v[8], w[8];
      for (int i = 0; i < Q::WARPS; ++i) sum += squares[t * Q::WARPS + i];
      float factor = rsqrtf(sum / float(Q::K) + eps);
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        widen(raw[t][i], v);
        widen(norms[i], w);
        unsigned bits[8];
        // Rounded as stock's norm is: the normalised value, and its product with the weight.
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          bits[j] = narrowed(widened(narrowed(v[j] * factor, X()), X()) * w[j], X());
        }
        raw[t][i] = make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16,
                               bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
      }
    }
  }
  __device__ __forceinline__ void finish(float eps, uint4* staged, float* totals, float* squares) {
    if constexpr (bool(Q::NORM)) normalise(eps, squares);
#pragma unroll
    for (int t = 0; t < Q::TOKENS; ++t) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        int unit, column, within = (worker + i * WORKERS) % OF_CHUNK;
        at(i, unit, column);
        bool inside = worker + i * WORKERS < COUNT;
        int to = ((t * Z::UNITS + unit) * Z::STEPS + within % Z::STEPS) * 4 + within / Z::STEPS;
        if (inside) staged[to] = ordered<Q::BITS>(raw[t][i]);
        if constexpr (Z::BIASED) {
          float sum = 0.0f, v[8];
          widen(raw[t][i], v);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum += v[j];
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

// The launch. P, M, C, D, O: dtypes of a product, of a weighted sum, of what it is cast to, of that
// with the shared expert's output, and of the outputs.
template <typename Q, typename P, typename M, typename C, typename D, typename O, typename X,
          typename S, typename B, typename R, typename H, typename I, typename G>
__device__ __forceinline__ void products(const X* x, const X* norm, float eps, Four<const void> w,
                                         Four<const S> scales, Four<const S> biases,
                                         Four<const B> bias, const R* residual, const H* shared,
                                         const I* indices, const G* scores, Four<O> y) {
  using Z = Sizes<Q>;
  constexpr bool ALIKE = !Q::CHOSEN && !Q::TERMS;  // all vectors meet the same matrices
  constexpr int BUFFERS = Q::ROUNDS > 1 ? 2 : 1,
                OWN_RESULTS = (Z::RESULTS + 32 * Q::SPLIT - 1) / (32 * Q::SPLIT),
                ZEROS = (Z::STEPS - 1) * 4 + 1;
  __shared__ uint4 staged[Q::TOKENS * Z::UNITS * Z::STEPS * 4 + Q::WARPS * ZEROS];
  __shared__ float totals[Z::BIASED ? Z::SETS * Z::UNITS * 8 : 1];
  __shared__ float squares[Q::NORM ? Q::TOKENS * Q::WARPS : 1];
  __shared__ float partial[BUFFERS][Z::TILES][Q::SPLIT][Q::MATRICES][Z::RESULTS];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  const int set = warp / Q::SPLIT, part = warp % Q::SPLIT, launch = blockIdx.y;
  const int mine = part * Z::MINE;  // the first of this warp's chunks
  uint4* zeros = staged + Q::TOKENS * Z::UNITS * Z::STEPS * 4 + warp * ZEROS;
  int first = launch * Q::TOKENS, last = Q::ALL - 1;
  size_t expert = 0;
  if constexpr (Q::CHOSEN > 0) {
    expert = size_t(indices[launch]);
    first = last = Q::OWN ? launch : launch / Q::CHOSEN;
  }
  if constexpr (Q::TERMS > 0) first = launch * Q::TERMS;

  Stage<Q, X> stage(x, norm, first, last, part);
  if (lane < ZEROS) zeros[lane] = make_uint4(0, 0, 0, 0);

  Place<Q, S, I> place;
  if constexpr (Q::TERMS > 0) place.experts = indices + launch * Q::TERMS;
  int matrix = 0, rows = Q::ROWS0, row = 0;
  auto locate = [&](int round) {
    int tile = (blockIdx.x + round * Q::BLOCKS) * Z::TILES + set;
#pragma unroll
    for (int m = 0; m < Q::MATRICES; ++m) {
      place.w[m] = reinterpret_cast<const uint4*>(w.at[m]) + expert * (size_t(Q::ROWS0) * Z::ROW);
      place.scales[m] = scales.at[m] + expert * (size_t(Q::ROWS0) * Z::GROUPS);
      place.biases[m] = biases.at[m] + expert * (size_t(Q::ROWS0) * Z::GROUPS);
    }
    matrix = 0, rows = Q::ROWS0;
    int start = 0;
#pragma unroll
    for (int n = 1; n < Q::OUTPUTS; ++n) {
      if (tile < Z::start(n)) continue;
      matrix = n, rows = Z::rows(n), start = Z::start(n);
      place.w[0] = reinterpret_cast<const uint4*>(w.at[n]);
      place.scales[0] = scales.at[n];
      place.biases[0] = biases.at[n];
    }
    row = (tile - start) * 16;
    place.row[0] = min(row + lane / 4, rows - 1);
    place.row[1] = min(row + lane / 4 + 8, rows - 1);
  };
  Held<Q, S> held;
  locate(0);
#pragma unroll
  for (int d = 0; d < Q::DEPTH; ++d) place.words(held, d, mine + d, quad);
  place.shares(held, mine, quad);
  stage.finish(eps, staged, totals, squares);
  const Vectors<Q> vectors(staged, zeros, lane);

#pragma unroll 1
  for (int round = 0; round < Q::ROUNDS; ++round) {
    const int own = part * 32 + lane, to_row = row, to_rows = rows, to_matrix = matrix;
    float added[OWN_RESULTS], more[OWN_RESULTS], offset[OWN_RESULTS][2];
#pragma unroll
    for (int j = 0; j < OWN_RESULTS; ++j) {  // asked for now, added at the end
      int at = own + j * 32 * Q::SPLIT, n = min(to_row + at % 16, to_rows - 1);
      size_t token = ALIKE ? min(first + at / 16, last) : launch;
      if (at >= Z::RESULTS) continue;
      if constexpr (bool(Q::RESIDUAL)) added[j] = float(residual[token * to_rows + n]);
      if constexpr (bool(Q::SHARED)) more[j] = float(shared[token * to_rows + n]);
      if constexpr (Q::TERMS > 0 && Q::BIAS) {
        offset[j][0] = 0.0f;
        for (int term = 0; term < Q::TERMS; ++term) {
          size_t from = size_t(indices[first + term]) * Q::ROWS0 + n;
          offset[j][0] = fmaf(float(scores[first + term]), float(bias.at[0][from]), offset[j][0]);
        }
      } else if constexpr (Q::BIAS > 0) {
        const B* from = bias.at[0];
#pragma unroll
        for (int i = 1; i < Q::OUTPUTS; ++i) from = to_matrix == i ? bias.at[i] : from;
        if (Q::BIAS & 1) offset[j][0] = float(from[expert * Q::ROWS0 + n]);
        if (Q::BIAS & 2) offset[j][1] = float(bias.at[1][expert * Q::ROWS0 + n]);
      }
    }
    Sums<Q> sums = {};
#pragma unroll 1
    for (int turn = 0; turn < Q::TURNS; ++turn) {
      const int unit = mine + turn * Q::DEPTH;
      const bool ends = turn + 1 == Q::TURNS;
      const bool again = !Z::ONCE && !(ends && round + 1 == Q::ROUNDS);
      const int next = ends ? mine : unit + Q::DEPTH;
      if (again && ends) locate(round + 1);
#pragma unroll
      for (int d = 0; d < Q::DEPTH; ++d) {
        float factor = 1.0f;
        if constexpr (Q::TERMS > 0) {
          factor = float(scores[first + min(unit + d, Z::ALL_UNITS - 1) / Z::CHUNKS]);
        }
        use<Q, X, S>(held, d, unit + d, vectors, totals, factor, quad, sums);
        if (again) place.words(held, d, next + d, quad);
      }
      if (again) place.shares(held, next, quad);
    }

    float(&mine_of)[Q::MATRICES][Z::RESULTS] = partial[round % BUFFERS][set][part];
#pragma unroll
    for (int m = 0; m < Q::MATRICES; ++m) {
#pragma unroll
      for (int s = 0; s < Z::SETS; ++s) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int to = lane / 4 + 8 * r, token = s * Z::EACH + quad;
          if (Z::SLOTS == 1) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              token = 2 * quad + i;
              if (token < Q::TOKENS) mine_of[m][token * 16 + to] = sums[m][s][2 * r + i];
            }
            continue;
          }
          float sum = sums[m][s][2 * r];
          if (Z::SLOTS == 4) {
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            token = s * Z::EACH + quad / 2;
          }
          if (token < Q::TOKENS && (Z::SLOTS == 2 || quad % 2 == 0)) {
            mine_of[m][token * 16 + to] = sum;
          }
        }
      }
    }
    if (Q::SPLIT == 1) {
      __syncwarp();
    } else if (Z::LOCAL) {
      __syncthreads();
    } else {
      wait_for(1 + set, 32 * Q::SPLIT);
    }
#pragma unroll
    for (int j = 0; j < OWN_RESULTS; ++j) {
      int at = own + j * 32 * Q::SPLIT, n = to_row + at % 16, token = first + at / 16;
      if (at >= Z::RESULTS || n >= to_rows || (ALIKE && token > last)) continue;
      float value[2] = {};
#pragma unroll
      for (int m = 0; m < Q::MATRICES; ++m) {
        for (int i = 0; i < Q::SPLIT; ++i) value[m] += partial[round % BUFFERS][set][i][m][at];
        if (Q::BIAS & 1 << m) value[m] += offset[j][m];
      }
      size_t to = size_t(ALIKE ? token : launch) * to_rows + n;
      O* out = y.at[0];
#pragma unroll
      for (int i = 1; i < Q::OUTPUTS; ++i) out = to_matrix == i ? y.at[i] : out;
      float a = activated<Q>(value[0], value[1]);
      if constexpr (Q::TERMS > 0) a = float(C(float(M(a))));
      if constexpr (bool(Q::SHARED)) a = float(D(a + more[j]));
      if constexpr (bool(Q::RESIDUAL)) a = (Q::TERMS ? a : float(P(a))) + added[j];
      out[to] = O(a);
    }
  }
}

}  // namespace vectors
}  // namespace zmlx
