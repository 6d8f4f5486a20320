// Functions across the 32 threads of a simdgroup.
//
// As on Metal they are about the threads that call them together: others, and those that returned or
// never existed, take no part. Where a kernel calls one outside of any branch or loop the translation
// puts __syncwarp() before it, so that all that exist are together there.
#pragma once

#include "vectors.cuh"

namespace mlx::core::cu::metal {

inline uint lane_index() {
  uint lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Moves values of any size in words of 32 bits.
template <class T, class Move>
T by_words(T value, Move move) {
  constexpr int n = (sizeof(T) + 3) / 4;
  uint words[n] = {};
  memcpy(words, &value, sizeof(T));
  for (int i = 0; i < n; ++i) words[i] = move(words[i]);
  memcpy(&value, words, sizeof(T));
  return value;
}

template <class T>
T from_lane(uint active, T value, int lane) {
  return by_words(value, [=](uint w) { return __shfl_sync(active, w, lane); });
}

template <class T>
T simd_shuffle(T value, uint lane) { return from_lane(__activemask(), value, lane); }
template <class T>
T simd_broadcast(T value, uint lane) { return from_lane(__activemask(), value, lane); }
template <class T>
T simd_broadcast_first(T value) {
  const uint active = __activemask();
  return from_lane(active, value, __ffs(active) - 1);
}
template <class T>
T simd_shuffle_xor(T value, uint mask) {
  const uint active = __activemask();
  return by_words(value, [=](uint w) { return __shfl_xor_sync(active, w, mask); });
}
template <class T>
T simd_shuffle_up(T value, uint delta) {
  const uint active = __activemask();
  return by_words(value, [=](uint w) { return __shfl_up_sync(active, w, delta); });
}
template <class T>
T simd_shuffle_down(T value, uint delta) {
  const uint active = __activemask();
  return by_words(value, [=](uint w) { return __shfl_down_sync(active, w, delta); });
}
template <class T>
T simd_shuffle_rotate_up(T value, uint delta) {
  return from_lane(__activemask(), value, (lane_index() - delta) & 31);
}
template <class T>
T simd_shuffle_rotate_down(T value, uint delta) {
  return from_lane(__activemask(), value, (lane_index() + delta) & 31);
}
template <class T>
T simd_shuffle_and_fill_up(T value, T filling, uint delta, uint modulo = 32) {
  const uint active = __activemask(), lane = lane_index(), at = lane % modulo;
  const T inside = from_lane(active, value, lane - delta);
  const T outside = from_lane(active, filling, lane - delta + modulo);
  return at >= delta ? inside : outside;
}
template <class T>
T simd_shuffle_and_fill_down(T value, T filling, uint delta, uint modulo = 32) {
  const uint active = __activemask(), lane = lane_index(), at = lane % modulo;
  const T inside = from_lane(active, value, lane + delta);
  const T outside = from_lane(active, filling, lane + delta - modulo);
  return at + delta < modulo ? inside : outside;
}

// 16-bit floats are added up as floats, truth values as integers.
template <class T>
using wide_t = conditional_t<is_small_v<T>, float, conditional_t<is_same_v<T, bool>, int, T>>;
template <class T>
struct widened {
  using type = wide_t<T>;
};
template <class T, int N>
struct widened<vec<T, N>> {
  using type = vec<wide_t<T>, N>;
};
template <class T>
using narrowed_t = conditional_t<is_same_v<T, bool>, int, T>;

template <class T, class Op>
T across(uint active, T value, Op op) {
  if (active == 0xffffffff) {
    for (int d = 16; d > 0; d /= 2)
      value = T(op(value, by_words(value, [=](uint w) { return __shfl_xor_sync(active, w, d); })));
    return value;
  }
  T total = from_lane(active, value, __ffs(active) - 1);
  for (uint rest = active & (active - 1); rest; rest &= rest - 1)
    total = T(op(total, from_lane(active, value, __ffs(rest) - 1)));
  return total;
}

// What is in lanes before this one, and with it when `own`.
template <class T, class Op>
T up_to(uint active, T value, T start, bool own, Op op) {
  const uint lane = lane_index();
  if (active & (active + 1)) {  // with holes
    T total = start;
    for (uint rest = active; rest; rest &= rest - 1) {
      const uint other = __ffs(rest) - 1;
      const T v = from_lane(active, value, other);
      if (other < lane || (own && other == lane)) total = T(op(total, v));
    }
    return total;
  }
  for (uint d = 1; d < 32; d *= 2) {
    const T below = by_words(value, [=](uint w) { return __shfl_up_sync(active, w, d); });
    if (lane >= d) value = T(op(below, value));
  }
  if (own) return value;
  const T before = by_words(value, [=](uint w) { return __shfl_up_sync(active, w, 1); });
  return lane ? before : start;
}

// Of floats the one that is a number.
template <class T>
T least(T a, T b) {
  return together([](auto x, auto y) {
    if constexpr (is_same_v<decltype(x), float>) return ::fminf(x, y);
    else return y < x ? y : x;
  }, a, b);
}
template <class T>
T greatest(T a, T b) {
  return together([](auto x, auto y) {
    if constexpr (is_same_v<decltype(x), float>) return ::fmaxf(x, y);
    else return x < y ? y : x;
  }, a, b);
}

#define ZMLX_ACROSS(NAME, EXPRESSION)                                                              \
  template <class T>                                                                               \
  narrowed_t<T> simd_##NAME(T value) {                                                             \
    using W = typename widened<T>::type;                                                           \
    return narrowed_t<T>(across(__activemask(), W(value), [](W a, W b) { return EXPRESSION; }));   \
  }                                                                                                \
  template <class T>                                                                               \
  narrowed_t<T> quad_##NAME(T value) {                                                             \
    using W = typename widened<T>::type;                                                           \
    const uint active = __activemask(), quad = 15u << (lane_index() & ~3u);                        \
    return narrowed_t<T>(in_quad(active, quad, W(value), [](W a, W b) { return EXPRESSION; }));    \
  }
template <class T, class Op>
T in_quad(uint active, uint quad, T value, Op op) {
  T total = value;
  for (int d = 1; d < 4; ++d) {
    const T other = by_words(value, [=](uint w) { return __shfl_xor_sync(active, w, d); });
    if (active & quad & (1u << (lane_index() ^ d))) total = T(op(total, other));
  }
  return total;
}
ZMLX_ACROSS(sum, a + b)
ZMLX_ACROSS(product, a * b)
ZMLX_ACROSS(and, a & b)
ZMLX_ACROSS(or, a | b)
ZMLX_ACROSS(xor, a ^ b)
ZMLX_ACROSS(min, least(a, b))
ZMLX_ACROSS(max, greatest(a, b))
#undef ZMLX_ACROSS

#define ZMLX_PREFIX(NAME, OWN, OP, START)                                                          \
  template <class T>                                                                               \
  narrowed_t<T> simd_prefix_##NAME(T value) {                                                      \
    using W = typename widened<T>::type;                                                           \
    return narrowed_t<T>(                                                                          \
        up_to(__activemask(), W(value), W(START), OWN, [](W a, W b) { return a OP b; }));          \
  }
ZMLX_PREFIX(inclusive_sum, true, +, 0)
ZMLX_PREFIX(exclusive_sum, false, +, 0)
ZMLX_PREFIX(inclusive_product, true, *, 1)
ZMLX_PREFIX(exclusive_product, false, *, 1)
#undef ZMLX_PREFIX

template <class T>
T quad_shuffle(T value, uint lane) {
  return from_lane(__activemask(), value, (lane_index() & ~3u) | lane);
}
template <class T>
T quad_broadcast(T value, uint lane) { return quad_shuffle(value, lane); }
template <class T>
T quad_broadcast_first(T value) {
  const uint active = __activemask(), base = lane_index() & ~3u;
  return from_lane(active, value, base + __ffs(active >> base & 15) - 1);
}
template <class T>
T quad_shuffle_xor(T value, uint mask) { return simd_shuffle_xor(value, mask); }
template <class T>
T quad_shuffle_up(T value, uint delta) {
  const uint lane = lane_index();
  return from_lane(__activemask(), value, (lane & 3) >= delta ? lane - delta : lane);
}
template <class T>
T quad_shuffle_down(T value, uint delta) {
  const uint lane = lane_index();
  return from_lane(__activemask(), value, (lane & 3) + delta < 4 ? lane + delta : lane);
}

struct simd_vote {
  using vote_t = ulong;
  vote_t bits;
  explicit constexpr simd_vote(vote_t v = 0) : bits(v) {}
  template <class T, enable_if_t<is_integral_v<T>, int> = 0>
  explicit constexpr operator T() const { return static_cast<T>(bits); }
  bool all() const { return bits == __activemask(); }
  bool any() const { return bits != 0; }
};
inline simd_vote simd_ballot(bool yes) { return simd_vote(__ballot_sync(__activemask(), yes)); }
inline simd_vote simd_active_threads_mask() { return simd_vote(__activemask()); }
inline bool simd_all(bool yes) { return __all_sync(__activemask(), yes); }
inline bool simd_any(bool yes) { return __any_sync(__activemask(), yes); }
inline bool simd_is_first() { return lane_index() == __ffs(__activemask()) - 1u; }

}  // namespace mlx::core::cu::metal
