"""The Metal source of attention for one new token: what its kernels are put together from.

One threadgroup has some query heads of one kv head, and a part of the positions. Positions are
worked through in chunks: scores into threadgroup memory, their maximum and exponentials there,
then the weighted sum of values in registers. A simdgroup reads rows of 16 bytes a lane, several
rows at once where they are short, and the next ones before it computes with these. What lanes hold
of each head is summed up so that in the end each lane has other heads (`Fold`).

The text is kept short: MLX hashes it at every evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template
from textwrap import indent

#: Threads of a threadgroup, and simdgroups.
THREADS = 256
#: Positions whose scores are held at once.
CHUNK = 256
#: Loads that a lane has under way at once, next to as many that it computes with.
AHEAD = 4

HEADER = """
#define UNROLL MLX_MTL_PRAGMA_UNROLL
inline void unpack(uint4 bits, thread float* x, float) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = as_type<float>(bits[i]);
  }
}
inline void unpack(uint4 bits, thread float* x, bfloat16_t) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = as_type<float>(bits[i] << 16);
    x[2 * i + 1] = as_type<float>(bits[i] & 0xffff0000u);
  }
}
inline void unpack(uint4 bits, thread float* x, float16_t) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    half2 pair = as_type<half2>(bits[i]);
    x[2 * i] = float(pair.x);
    x[2 * i + 1] = float(pair.y);
  }
}

// Rows of a cache, VECTORS times 16 bytes a lane; zeros for `skip` and from `end` on.
template <int ROWS, int VECTORS, int LANES, int LENGTH, typename T>
inline void fetch(
    thread uint4* to, const device T* from, int64_t stride, int row, int step, int end, int skip,
    int lane) {
  UNROLL
  for (int r = 0; r < ROWS; ++r, row += step) {
    UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      int at = j * LANES + lane;
      bool there = row < end && row != skip && at < LENGTH;
      to[r * VECTORS + j] = there ? ((const device uint4*)(from + row * stride))[at] : uint4(0);
    }
  }
}

// Adds up what lanes that differ in the bits MASK down to LAST hold of HEADS times WIDTH values.
// While there are several heads each of two lanes keeps one half of them.
template <int HEADS, int WIDTH, int MASK, int LAST, bool MORE = (MASK >= LAST)>
struct Fold {
  static void run(thread float* x, uint lane) {
    constexpr int kept = HEADS > 1 ? HEADS / 2 * WIDTH : WIDTH;
    constexpr int other = HEADS > 1 ? kept : 0;
    bool upper = HEADS > 1 && (lane & MASK) != 0;
    UNROLL
    for (int i = 0; i < kept; ++i) {
      float one = x[i], two = x[other + i];
      x[i] = (upper ? two : one) + simd_shuffle_xor(upper ? one : two, MASK);
    }
    Fold<(HEADS > 1 ? HEADS / 2 : 1), WIDTH, MASK / 2, LAST>::run(x, lane);
  }
};
template <int HEADS, int WIDTH, int MASK, int LAST>
struct Fold<HEADS, WIDTH, MASK, LAST, false> {
  static void run(thread float*, uint) {}
};

template <int COUNT>
inline void taken(thread float* to, const threadgroup float* from) {
  if (COUNT % 4 == 0) {
    UNROLL
    for (int i = 0; i < COUNT / 4; ++i) {
      float4 four = ((const threadgroup float4*)from)[i];
      UNROLL
      for (int j = 0; j < 4; ++j) {
        to[4 * i + j] = four[j];
      }
    }
  } else {
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
      to[i] = from[i];
    }
  }
}
"""


@dataclass(frozen=True)
class Variant:
    """What of a call changes the text, besides its template.

    Attributes:
        q_norm: queries are normalised with a weight.
        k_norm: the new key is.
        rope: "" for none, "base" or "freqs".
        multiplied: what is rotated is multiplied by a number first.
        sinks: heads have sinks.
        after: there is an input that only orders.
        form: "whole" when a threadgroup has all positions and writes the result, "parts" when it
            writes sums over a part, "joined" when the last threadgroup of a row adds them up too.
            What is said of a threadgroup holds of a cluster, where there are clusters.
        latent: values are the keys, and a part of queries and keys that is rotated lies apart.
        tensor: the text for CUDA's tensor cores runs (`attention_tensor_source`).
        cluster: threadgroups along the positions that are a cluster (`attention_clusters`), 1 where
            there are none; in the form "whole" for tensor cores.
    """

    q_norm: bool
    k_norm: bool
    rope: str
    multiplied: bool
    sinks: bool
    after: bool
    form: str
    latent: bool = False
    tensor: bool = False
    cluster: int = 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in their order."""
        optional = {
            "q_weight": self.q_norm,
            "k_weight": self.k_norm,
            "freqs": self.rope == "freqs",
            "sinks": self.sinks,
            "counters": self.form == "joined",
            "after": self.after,
        }
        caches = ("rope_keys",) if self.latent else ("values",)
        new = ("q_pe", "k", "k_pe") if self.latent else ("k", "v")
        return ("q", *new, "keys", *caches, "state", *(n for n, on in optional.items() if on))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""
        return {"whole": ("out",), "parts": ("sums",), "joined": ("out", "sums")}[self.form]

    @property
    def updated(self) -> tuple[str, ...]:
        """Names of the inputs that are written into."""
        caches = ("keys", "rope_keys") if self.latent else ("keys", "values")
        return (*caches, *(("counters",) if self.form == "joined" else ()))


PLACE = """
constexpr int N = 16 / sizeof(T);
constexpr int W = THREADS / 32;
constexpr int K_ROWS = 32 / K_LANES, V_ROWS = 32 / V_LANES;
constexpr int K_STEP = W * K_ROWS, V_STEP = W * V_ROWS;
constexpr int K_ROOM = AHEAD * K_VECTORS, V_ROOM = V_AHEAD * V_VECTORS;
constexpr int ROOM = K_ROOM > V_ROOM ? K_ROOM : V_ROOM;
threadgroup float4 score_memory[CHUNK * PADDED / 4];
threadgroup float4 scratch_memory[SCRATCH / 4];
threadgroup uint4 new_memory[(D + $other) / N];
threadgroup float most[W * PADDED];
threadgroup float fading[PADDED];
threadgroup float* scores = (threadgroup float*)score_memory;
threadgroup float* scratch = (threadgroup float*)scratch_memory;
threadgroup T* new_rows = (threadgroup T*)new_memory;
int thread_index = thread_position_in_threadgroup.x;
uint lane = thread_index_in_simdgroup;
int group = simdgroup_index_in_threadgroup;
int split = threadgroup_position_in_grid.x;
int kv = threadgroup_position_in_grid.y / GROUPS;
int part = threadgroup_position_in_grid.y % GROUPS;
int batch = threadgroup_position_in_grid.z;
int row = batch * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
int head = kv * SHARED + part * HEADS;
int heads = min(HEADS, SHARED - part * HEADS);
int write = state[batch * STEP];
int length = state[batch * STEP + 1];
float place = float(state[batch * STEP + 2]);
int first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
int share = max(LEAST, ((length - first + SPLITS - 1) / SPLITS + 15) / 16 * 16);
int start = first + split * share;
int end = min(start + share, length);
if (start >= end) {
  return;
}
bool fresh = write >= start && write < end;
write = fresh ? write : -1;
int k_sub = lane / K_LANES, k_lane = lane % K_LANES;
int v_sub = lane / V_LANES, v_lane = lane % V_LANES;
uint4 bits[ROOM];
uint4 next[ROOM];
"""
CACHES = """
constexpr int NEW_VALUE = D / N;
bool dense = keys_strides[3] == 1 && values_strides[3] == 1;
float scale = dense ? as_type<float>(SCALE) : NAN;
const device T* key_rows = keys + batch * keys_strides[0] + kv * keys_strides[1];
const device T* value_rows = values + batch * values_strides[0] + kv * values_strides[1];
int64_t value_stride = values_strides[2];
int k_from = start + group * K_ROWS + k_sub, k_to = end;
"""
# The first rows of the keys from `k_from` up to `k_to`, while nobody waits for them yet.
KEYS_AHEAD = """fetch<AHEAD, K_VECTORS, K_LANES, D / N>(
    next, key_rows, keys_strides[2], k_from, K_STEP, k_to, write, k_lane);
"""

# Queries, and behind them the new key where it belongs to this part, as floats in `scratch`.
# What is new goes to the cache and, for this threadgroup itself, to `new_rows`.
STAGE = """
for (int r = group; r < HEADS + (fresh ? 1 : 0); r += W) {
  float x[(D + 31) / 32];
  bool is_key = r == HEADS;
  threadgroup float* staged = scratch + r * D;
  UNROLL
  for (int e = 0; e < (D + 31) / 32; ++e) {
    int d = lane + 32 * e;
    x[e] = 0.0f;
    if (d < D && is_key) {
      x[e] = float(k[batch * k_strides[0] + kv * k_strides[1] + d * k_strides[2]]);
    } else if (d < D && r < heads) {
      x[e] = float(q[batch * q_strides[0] + (head + r) * q_strides[1] + d * q_strides[2]]);
    }
  }
$norm  for (int e = 0; e < (D + 31) / 32; ++e) {
    if (int(lane) + 32 * e < D) {
      staged[lane + 32 * e] = x[e];
    }
  }
$rope  if (is_key) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    device T* to = (device T*)key_rows + write * keys_strides[2];
    for (int d = lane; d < D; d += 32) {
      new_rows[d] = T(staged[d]);
      if (part == 0) {
        to[d] = T(staged[d]);
      }
    }
  }
}
if (fresh) {
  device T* to = (device T*)value_rows + write * values_strides[2];
  for (int d = thread_index; d < DV; d += THREADS) {
    T value = v[batch * v_strides[0] + kv * v_strides[1] + d * v_strides[2]];
    new_rows[D + d] = value;
    if (part == 0) {
      to[d] = value;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
"""

NORM = """  if ($condition) {
    float square = 0.0f;
    UNROLL
    for (int e = 0; e < (D + 31) / 32; ++e) {
      square += x[e] * x[e];
    }
    float scaled = metal::precise::rsqrt(simd_sum(square) / D + as_type<float>(EPS));
    UNROLL
    for (int e = 0; e < (D + 31) / 32; ++e) {
      int d = lane + 32 * e;
      x[e] = d < D ? float($kind(x[e] * scaled * float($weight[d]))) : 0.0f;
    }
  }
"""
ROPE = """  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = lane; i < DIMS / 2; i += 32) {
    float angle = as_type<float>(ROPE_SCALE) * place * $inverse;
    float c = metal::precise::cos(angle), s = metal::precise::sin(angle);
    int one = TRADITIONAL ? 2 * i : i, two = TRADITIONAL ? one + 1 : i + DIMS / 2;
    float a = staged[one], b = staged[two];
$multiply    float u = a * c - b * s, w = a * s + b * c;
    staged[one] = is_key ? float(T(u)) : float(Q(u));
    staged[two] = is_key ? float(T(w)) : float(Q(w));
  }
"""
INVERSE = {
    "base": "metal::exp2(-(float(i) / float(DIMS / 2)) * as_type<float>(BASE))",
    "freqs": "(1.0f / float(freqs[i * freqs_strides[0]]))",
}
# A number beside an array takes its dtype in MLX, so the number is rounded as well.
MULTIPLY = """    float m = as_type<float>(MULTIPLIER);
    m = is_key ? float(T(m)) : float(Q(m));
    a = is_key ? float(T(m * a)) : float(Q(m * a));
    b = is_key ? float(T(m * b)) : float(Q(m * b));
"""

# What follows a row's products `dots` of all heads, at position `at`.
STORE = """Fold<PADDED, 1, K_LANES / 2, 1>::run(dots, lane);
UNROLL
for (int o = 0; o < OWN; ++o) {
  float score = dots[o] * scale * M_LOG2E_F;
  if (at < to) {
    top[o] = max(top[o], score);
    if (k_lane % SAME == 0) {
      scores[(at - from) * PADDED + mine + o] = score;
    }
  }
}
"""
SCORES = """    float queries[HEADS * K_VECTORS * N];
    UNROLL
    for (int h = 0; h < HEADS; ++h) {
      UNROLL
      for (int j = 0; j < K_VECTORS; ++j) {
        UNROLL
        for (int i = 0; i < N; ++i) {
          int d = (j * K_LANES + k_lane) * N + i;
          queries[(h * K_VECTORS + j) * N + i] = d < D ? scratch[h * D + d] : 0.0f;
        }
      }
    }
    for (int base = from + group * K_ROWS; base < to; base += AHEAD * K_STEP) {
      UNROLL
      for (int i = 0; i < AHEAD * K_VECTORS; ++i) {
        bits[i] = next[i];
      }
      fetch<AHEAD, K_VECTORS, K_LANES, D / N>(
          next, key_rows, keys_strides[2], base + AHEAD * K_STEP + k_sub, K_STEP, to, write,
          k_lane);
      UNROLL
      for (int r = 0; r < AHEAD; ++r) {
        int at = base + r * K_STEP + k_sub;
        if (base + r * K_STEP < to) {
          float dots[PADDED];
          UNROLL
          for (int h = 0; h < PADDED; ++h) {
            dots[h] = 0.0f;
          }
          UNROLL
          for (int j = 0; j < K_VECTORS; ++j) {
            float x[N];
            int column = j * K_LANES + k_lane;
            bool is_new = at == write && column < D / N;
            unpack(is_new ? new_memory[column] : bits[r * K_VECTORS + j], x, T());
            UNROLL
            for (int h = 0; h < HEADS; ++h) {
              UNROLL
              for (int i = 0; i < N; ++i) {
                dots[h] += x[i] * queries[(h * K_VECTORS + j) * N + i];
              }
            }
          }
$store        }
      }
    }
"""

ATTEND = """
float out_sums[PADDED * V_VECTORS * N];
UNROLL
for (int i = 0; i < PADDED * V_VECTORS * N; ++i) {
  out_sums[i] = 0.0f;
}
// Thread i has a share in the sum of head i % PADDED.
int own = thread_index % PADDED;
float largest = -INFINITY, total = 0.0f;
// A lane has the scores of these heads, and others may have the same.
constexpr int OWN = PADDED > K_LANES ? PADDED / K_LANES : 1;
constexpr int SAME = K_LANES > PADDED ? K_LANES / PADDED : 1;
int mine = k_lane / SAME * OWN;
${sinks}for (int from = start; from < end; from += CHUNK) {
  int to = min(from + CHUNK, end);
  float top[OWN];
  UNROLL
  for (int o = 0; o < OWN; ++o) {
    top[o] = -INFINITY;
  }
  {
$scores  }
  UNROLL
  for (int o = 0; o < OWN; ++o) {
    for (int mask = K_LANES; mask < 32; mask *= 2) {
      top[o] = max(top[o], simd_shuffle_xor(top[o], mask));
    }
    if (k_sub == 0 && k_lane % SAME == 0) {
      most[group * PADDED + mine + o] = top[o];
    }
  }
  fetch<V_AHEAD, V_VECTORS, V_LANES, DV / N>(
      next, value_rows, value_stride, from + group * V_ROWS + v_sub, V_STEP, to, write,
      v_lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float before = largest;
  UNROLL
  for (int g = 0; g < W; ++g) {
    largest = max(largest, most[g * PADDED + own]);
  }
  float kept = metal::exp2(before - largest);
  total *= kept;
  if (thread_index < PADDED) {
    fading[thread_index] = kept;
  }
  for (int i = thread_index; i < (to - from) * PADDED; i += THREADS) {
    float p = metal::exp2(scores[i] - largest);
    scores[i] = p;
    total += p;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (from > start) {
    UNROLL
    for (int h = 0; h < PADDED; ++h) {
      UNROLL
      for (int i = 0; i < V_VECTORS * N; ++i) {
        out_sums[h * V_VECTORS * N + i] *= fading[h];
      }
    }
  }
  for (int base = from + group * V_ROWS; base < to; base += V_AHEAD * V_STEP) {
    UNROLL
    for (int i = 0; i < V_ROOM; ++i) {
      bits[i] = next[i];
    }
    fetch<V_AHEAD, V_VECTORS, V_LANES, DV / N>(
        next, value_rows, value_stride, base + V_AHEAD * V_STEP + v_sub, V_STEP, to, write,
        v_lane);
    UNROLL
    for (int r = 0; r < V_AHEAD; ++r) {
      int at = base + r * V_STEP + v_sub;
      if (at < to) {
        float p[PADDED];
        taken<PADDED>(p, scores + (at - from) * PADDED);
        UNROLL
        for (int j = 0; j < V_VECTORS; ++j) {
          float x[N];
          int column = j * V_LANES + v_lane;
          bool is_new = at == write && column < DV / N;
          unpack(is_new ? new_memory[NEW_VALUE + column] : bits[r * V_VECTORS + j], x, T());
          UNROLL
          for (int h = 0; h < HEADS; ++h) {
            UNROLL
            for (int i = 0; i < N; ++i) {
              out_sums[(h * V_VECTORS + j) * N + i] += p[h] * x[i];
            }
          }
        }
      }
    }
  }
  if (to < end) {
    k_from = to + group * K_ROWS + k_sub;
    k_to = min(to + CHUNK, end);
    $ahead    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
"""

# The maximum is that of a whole row of threads, so only the first threadgroup counts the sink.
SINKS = """if (start == first && own < heads) {
  largest = float(sinks[head + own]) * M_LOG2E_F;
  total = thread_index < PADDED ? 1.0f : 0.0f;
}
"""

FINISH = """
Fold<PADDED, V_VECTORS * N, 16, V_LANES>::run(out_sums, lane);
for (int mask = PADDED; mask < 32; mask *= 2) {
  total += simd_shuffle_xor(total, mask);
}
// The maxima were read before the last barrier.
if (lane < PADDED) {
  most[group * PADDED + lane] = total;
}
constexpr int V_OWN = PADDED > V_ROWS ? PADDED / V_ROWS : 1;
constexpr int V_SAME = V_ROWS > PADDED ? V_ROWS / PADDED : 1;
int own_heads = v_sub / V_SAME * V_OWN;
for (int pass = 0; pass < PADDED / PASS; ++pass) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (v_sub % V_SAME == 0) {
    UNROLL
    for (int o = 0; o < V_OWN; ++o) {
      if ((own_heads + o) / PASS == pass) {
        UNROLL
        for (int j = 0; j < V_VECTORS; ++j) {
          UNROLL
          for (int i = 0; i < N; ++i) {
            int d = (j * V_LANES + v_lane) * N + i;
            if (d < DV) {
              scratch[(group * PASS + (own_heads + o) % PASS) * DV + d] =
                  out_sums[(o * V_VECTORS + j) * N + i];
            }
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < PASS * DV; i += THREADS) {
    int h = pass * PASS + i / DV;
    if (h < heads) {
      float sum = 0.0f;
      UNROLL
      for (int g = 0; g < W; ++g) {
        sum += scratch[g * PASS * DV + i];
      }
$write    }
  }
}
"""
WRITE_WHOLE = """      float all = 0.0f;
      UNROLL
      for (int g = 0; g < W; ++g) {
        all += most[g * PADDED + h];
      }
      out[(batch * KV_HEADS * SHARED + head + h) * DV + i % DV] = Q(sum / all);
"""
WRITE_PART = """      sums[((row * SPLITS + split) * HEADS + h) * (DV + 4) + i % DV] = sum;
"""
WRITE_TOTALS = """
if (thread_index < heads) {
  float all = 0.0f;
  UNROLL
  for (int g = 0; g < W; ++g) {
    all += most[g * PADDED + thread_index];
  }
  int at = ((row * SPLITS + split) * HEADS + thread_index) * (DV + 4) + DV;
  sums[at] = largest;
  sums[at + 1] = all;
}
"""
# The last threadgroup that arrives adds up. With many parts that is done in two steps, so that no
# threadgroup reads too much: the last of each few adds those up into the place of their first, and
# the last of these adds up the rest.
JOIN = """
int parts = (length - first + share - 1) / share;
int fan = parts <= FLAT ? parts : int(metal::ceil(metal::sqrt(float(parts))));
int begin = split / fan * fan, stride = 1, count = min(fan, parts - begin);
threadgroup int* last = (threadgroup int*)fading;
int low = 0, high = heads;
for (int level = 0; level < 2; ++level) {
  bool all_parts = level == 1 || parts <= fan;
  atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
  threadgroup_barrier(mem_flags::mem_device);
  if (thread_index == 0) {
    int at = row * COUNTERS + (level == 0 ? 1 + split / fan : 0);
    device atomic_int* counter = (device atomic_int*)counters + at;
    bool is_last = atomic_fetch_add_explicit(counter, 1, memory_order_relaxed) == count - 1;
    last[0] = is_last ? 1 : 0;
    if (is_last) {
      atomic_store_explicit(counter, 0, memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (last[0] == 0) {
    return;
  }
  atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
$combine  if (all_parts) {
    return;
  }
  begin = 0;
  stride = fan;
  count = (parts + fan - 1) / fan;
}
"""
# Parts are weighted by what their maxima are below the largest one.
COMBINE = """
int slots = row * SPLITS + begin;
for (int h = low + group; h < high; h += THREADS / 32) {
  float peak = -INFINITY, all = 0.0f;
  for (int s = lane; s < count; s += 32) {
    peak = max(peak, sums[((slots + s * stride) * HEADS + h) * (DV + 4) + DV]);
  }
  peak = simd_max(peak);
  for (int s = lane; s < count; s += 32) {
    int at = ((slots + s * stride) * HEADS + h) * (DV + 4) + DV;
    float weight = metal::exp2(sums[at] - peak);
    scores[s * HEADS + h] = weight;
    all += weight * sums[at + 1];
  }
  all = simd_sum(all);
  if (lane == 0) {
    scores[SPLITS * HEADS + h] = all;
$peak  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = low * (DV / 4) + thread_index; i < high * (DV / 4); i += THREADS) {
  int h = i / (DV / 4), d = i % (DV / 4) * 4;
  int at = (slots * HEADS + h) * (DV + 4) + d;
  float4 sum = float4(0.0f);
  _Pragma("clang loop unroll_count(8)")
  for (int s = 0; s < count; ++s) {
    int there = at + s * stride * HEADS * (DV + 4);
    sum += scores[s * HEADS + h] * *(const device float4*)(sums + there);
  }
  if (all_parts) {
    for (int j = 0; j < 4; ++j) {
      out[(batch * KV_HEADS * SHARED + head + h) * DV + d + j] =
          Q(sum[j] / scores[SPLITS * HEADS + h]);
    }
  }$keep
}
"""
PEAK = """    scores[(SPLITS + 1) * HEADS + h] = peak;
"""
KEEP = """ else {
    *(device float4*)(sums + at) = sum;
    if (d == 0) {
      sums[at + DV] = scores[(SPLITS + 1) * HEADS + h];
      sums[at + DV + 1] = scores[SPLITS * HEADS + h];
    }
  }"""
# One threadgroup for each head.
COMBINE_PLACE = """
threadgroup float scores[(SPLITS + 1) * HEADS];
int thread_index = thread_position_in_threadgroup.x;
uint lane = thread_index_in_simdgroup;
int group = simdgroup_index_in_threadgroup;
int kv = threadgroup_position_in_grid.y / GROUPS;
int part = threadgroup_position_in_grid.y % GROUPS;
int batch = threadgroup_position_in_grid.z;
int row = batch * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
int head = kv * SHARED + part * HEADS;
int low = threadgroup_position_in_grid.x, high = low + 1;
if (low >= SHARED - part * HEADS) {
  return;
}
int length = state[batch * STEP + 1];
int first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
int share = max(LEAST, ((length - first + SPLITS - 1) / SPLITS + 15) / 16 * 16);
int begin = 0, stride = 1, count = (length - first + share - 1) / share;
bool all_parts = true;
"""


def attention(variant: Variant) -> str:
    """Return the body of the kernel."""
    stage = filled(STAGE, norm=norms(variant), rope=rope(variant))
    attend = filled(
        ATTEND,
        sinks=SINKS if variant.sinks else "",
        scores=filled(SCORES, store=indented(STORE, 10)),
        ahead=KEYS_AHEAD,
    )
    return filled(PLACE, other="DV") + CACHES + KEYS_AHEAD + stage + attend + ending(variant.form)


def combination() -> str:
    """Return the body of the kernel that adds up what the form "parts" leaves."""
    return COMBINE_PLACE + filled(COMBINE, peak="", keep="")


def norms(variant: Variant) -> str:
    """Return what normalises the elements `x` of a head."""
    found = ""
    if variant.q_norm:
        found += filled(NORM, condition="!is_key", kind="Q", weight="q_weight")
    if variant.k_norm:
        found += filled(NORM, condition="is_key", kind="T", weight="k_weight")
    return found


def rope(variant: Variant) -> str:
    """Return what rotates the head that is `staged`."""
    if not variant.rope:
        return ""
    multiply = MULTIPLY if variant.multiplied else ""
    return filled(ROPE, inverse=INVERSE[variant.rope], multiply=multiply)


def ending(form: str) -> str:
    """Return what becomes of the sums that threads hold."""
    if form == "whole":
        return filled(FINISH, write=WRITE_WHOLE)
    found = filled(FINISH, write=WRITE_PART) + WRITE_TOTALS
    if form == "joined":
        found += filled(JOIN, combine=indented(filled(COMBINE, peak=PEAK, keep=KEEP), 2))
    return found


def filled(text: str, **pieces: str) -> str:
    """Put pieces into a text."""
    return Template(text).substitute(pieces)


def indented(text: str, spaces: int) -> str:
    """Indent a piece."""
    return indent(text, " " * spaces)
