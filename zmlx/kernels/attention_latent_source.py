"""The Metal source of latent attention for one new token; see `attention_source`.

Each position has one latent of D elements, which is key and value of all heads, and a rotated part
of its key of E elements in a cache of its own. There are too many elements for registers: queries
lie in threadgroup memory, and each is used for several positions. What a lane reads of them at once
lies apart by as much as the lanes read together, so that no two lanes meet in a bank.
"""

from __future__ import annotations

from zmlx.kernels.attention_source import (
    ATTEND,
    PLACE,
    STORE,
    Variant,
    ending,
    filled,
    indented,
    norms,
    rope,
)

# A query takes PLAIN elements of scratch and E behind them; the new key takes D and E.
_CACHES = """
constexpr int NEW_VALUE = 0;
constexpr int PLAIN = K_VECTORS * K_LANES * N, QUERY = PLAIN + E;
bool dense = keys_strides[3] == 1 && rope_keys_strides[3] == 1;
float scale = dense ? as_type<float>(SCALE) : NAN;
const device T* key_rows = keys + batch * keys_strides[0];
const device T* rope_rows = rope_keys + batch * rope_keys_strides[0];
const device T* value_rows = key_rows;
int64_t value_stride = keys_strides[2];
uint4 rope_bits[AHEAD * P_VECTORS];
uint4 rope_next[AHEAD * P_VECTORS];
int k_from = start + group * K_ROWS + k_sub, k_to = end;
"""
_KEYS_AHEAD = """fetch<AHEAD, K_VECTORS, K_LANES, D / N>(
    next, key_rows, keys_strides[2], k_from, K_STEP, k_to, write, k_lane);
fetch<AHEAD, P_VECTORS, K_LANES, E / N>(
    rope_next, rope_rows, rope_keys_strides[2], k_from, K_STEP, k_to, write, k_lane);
"""
_STAGE = """
for (int r = group; r < HEADS + (fresh ? 1 : 0); r += W) {
  bool is_key = r == HEADS;
  threadgroup float* plain = scratch + r * QUERY;
  threadgroup float* staged = plain + (is_key ? D : PLAIN);
  float x[(D + 31) / 32];
  UNROLL
  for (int e = 0; e < (D + 31) / 32; ++e) {
    int d = lane + 32 * e;
    x[e] = 0.0f;
    if (d < D && is_key) {
      x[e] = float(k[batch * k_strides[0] + d * k_strides[1]]);
    } else if (d < D && r < heads) {
      x[e] = float(q[batch * q_strides[0] + (head + r) * q_strides[1] + d * q_strides[2]]);
    }
  }
$norm  for (int e = 0; e < (D + 31) / 32; ++e) {
    int d = lane + 32 * e;
    int column = d / N, within = d % N;
    int at = ((column / K_LANES * (N / 4) + within / 4) * K_LANES + column % K_LANES) * 4;
    if (d < D) {
      plain[is_key ? d : at + within % 4] = x[e];
    }
  }
  for (int d = lane; d < E; d += 32) {
    float y = 0.0f;
    if (is_key) {
      y = float(k_pe[batch * k_pe_strides[0] + d * k_pe_strides[1]]);
    } else if (r < heads) {
      y = float(q_pe[batch * q_pe_strides[0] + (head + r) * q_pe_strides[1] + d * q_pe_strides[2]]);
    }
    staged[d] = y;
  }
$rope  if (is_key) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = lane; d < D + E; d += 32) {
      T value = T(plain[d]);
      new_rows[d] = value;
      if (part == 0 && d < D) {
        ((device T*)key_rows)[write * keys_strides[2] + d] = value;
      } else if (part == 0) {
        ((device T*)rope_rows)[write * rope_keys_strides[2] + d - D] = value;
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
"""
_SCORES = """    for (int base = from + group * K_ROWS; base < to; base += AHEAD * K_STEP) {
      UNROLL
      for (int i = 0; i < AHEAD * K_VECTORS; ++i) {
        bits[i] = next[i];
      }
      UNROLL
      for (int i = 0; i < AHEAD * P_VECTORS; ++i) {
        rope_bits[i] = rope_next[i];
      }
      k_from = base + AHEAD * K_STEP + k_sub;
      k_to = to;
$ahead      float all_dots[AHEAD * PADDED];
      UNROLL
      for (int i = 0; i < AHEAD * PADDED; ++i) {
        all_dots[i] = 0.0f;
      }
      UNROLL
      for (int j = 0; j < K_VECTORS + P_VECTORS; ++j) {
        bool turned = j >= K_VECTORS;
        int column = (turned ? j - K_VECTORS : j) * K_LANES + k_lane;
        bool there = column < (turned ? E / N : D / N);
        float x[AHEAD * N];
        UNROLL
        for (int r = 0; r < AHEAD; ++r) {
          bool is_new = base + r * K_STEP + k_sub == write && there;
          uint4 old = turned ? rope_bits[r * P_VECTORS + j - K_VECTORS] : bits[r * K_VECTORS + j];
          unpack(is_new ? new_memory[(turned ? D / N : 0) + column] : old, x + r * N, T());
        }
        UNROLL
        for (int h = 0; h < HEADS; ++h) {
          UNROLL
          for (int f = 0; f < N / 4; ++f) {
            float y[4];
            threadgroup float* query = scratch + h * QUERY;
            int place_of = turned ? PLAIN + column * N + f * 4
                                  : ((j * (N / 4) + f) * K_LANES + k_lane) * 4;
            taken<4>(y, query + (there ? place_of : 0));
            UNROLL
            for (int r = 0; r < AHEAD; ++r) {
              UNROLL
              for (int i = 0; i < 4; ++i) {
                all_dots[r * PADDED + h] += x[r * N + f * 4 + i] * y[i];
              }
            }
          }
        }
      }
      UNROLL
      for (int r = 0; r < AHEAD; ++r) {
        int at = base + r * K_STEP + k_sub;
        if (base + r * K_STEP < to) {
          thread float* dots = all_dots + r * PADDED;
$store        }
      }
    }
"""


def attention(variant: Variant) -> str:
    """Return the body of the kernel."""
    stage = filled(_STAGE, norm=norms(variant), rope=rope(variant))
    attend = filled(
        ATTEND,
        sinks="",
        scores=filled(_SCORES, ahead=indented(_KEYS_AHEAD, 6), store=indented(STORE, 10)),
        ahead=_KEYS_AHEAD,
    )
    return filled(PLACE, other="E") + _CACHES + _KEYS_AHEAD + stage + attend + ending(variant.form)
