// Barriers, and what the lanes of a simdgroup do together. A function works on the lanes that call it
// together; sums and products go by halves: lane i with lane i ^ 16, then ^ 8, ^ 4, ^ 2, ^ 1.
#pragma once

#include <zmlx/math.h>
#include <zmlx/hooks.h>

namespace metal {

enum class mem_flags : uint32_t {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint32_t(a) | uint32_t(b));
}
constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return mem_flags(uint32_t(a) & uint32_t(b));
}

inline void threadgroup_barrier(mem_flags flags, ZMLX_SITE) {
  const zmlx::emulator::Site site{file, line, column};
  zmlx_barrier(uint32_t(flags), 0, &site);
}
inline void simdgroup_barrier(mem_flags flags, ZMLX_SITE) {
  const zmlx::emulator::Site site{file, line, column};
  zmlx_barrier(uint32_t(flags), 1, &site);
}

} // namespace metal

namespace zmlx {

// What the lanes that met hold.
template <class T>
struct Lanes {
  uint32_t active;
  uint32_t own;
  const unsigned char* slots;

  bool has(uint32_t lane) const {
    return lane < emulator::kLanes && (active >> lane & 1) != 0;
  }
  __attribute__((no_sanitize("thread"))) T operator[](uint32_t lane) const {
    T value;
    __builtin_memcpy(&value, slots + lane * emulator::kSlotBytes, sizeof(T));
    return value;
  }
  // What a lane gets from one that is not there: nothing that could pass for a result.
  T from(uint32_t lane) const {
    if (has(lane)) {
      return (*this)[lane];
    }
    T value;
    __builtin_memset(&value, 0xff, sizeof(T));
    return value;
  }
};

template <class T>
inline Lanes<T> meet(const T& value, const char* file, uint32_t line, uint32_t column) {
  static_assert(sizeof(T) <= emulator::kSlotBytes, "a value too wide for lanes to exchange");
  const emulator::Site site{file, line, column};
  const emulator::Exchange* met = zmlx_exchange(&value, sizeof(T), &site);
  return {met->active, met->lane, met->slots};
}

// Lanes that are not there have the operation's neutral value.
template <class T, class F>
inline T reduce(const Lanes<T>& lanes, T neutral, F f, uint32_t begin, uint32_t width) {
  T values[emulator::kLanes];
  for (uint32_t i = 0; i < width; ++i) {
    values[i] = lanes.has(begin + i) ? lanes[begin + i] : neutral;
  }
  for (uint32_t half = width / 2; half > 0; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) {
      values[i] = f(values[i], values[i + half]);
    }
  }
  return values[0];
}

template <class T, class F>
inline T scan(const Lanes<T>& lanes, T neutral, F f, bool inclusive) {
  T total = neutral;
  for (uint32_t i = 0; i < lanes.own + inclusive; ++i) {
    if (lanes.has(i)) {
      total = f(total, lanes[i]);
    }
  }
  return total;
}

template <class T>
inline T most() {
  if constexpr (metal::is_floating_point_v<T>) {
    return metal::numeric_limits<T>::infinity();
  } else {
    return metal::numeric_limits<T>::max();
  }
}
template <class T>
inline T least() {
  if constexpr (metal::is_floating_point_v<T>) {
    return -metal::numeric_limits<T>::infinity();
  } else {
    return metal::numeric_limits<T>::min();
  }
}

// A function of all lanes for vectors works on each component.
template <class A, class F>
inline auto by_component(const A& a, F f) {
  metal::vec<element_of<A>, count_of<A>> out = plain(a);
  for (int i = 0; i < count_of<A>; ++i) {
    out[i] = f(out[i]);
  }
  return out;
}

// bfloat is reduced in float and rounded once, as MLX's functions do; others in their own type.
template <class T>
using accumulator = std::conditional_t<std::is_same_v<T, bfloat>, float, T>;

// Metal reduces no numbers of 64 bits.
template <class T>
concept Reduced = metal::is_arithmetic_v<T> && sizeof(T) <= 4;

} // namespace zmlx

namespace metal {

#define ZMLX_REDUCTION(name, neutral, operation)                                  \
  template <zmlx::Reduced T>                                                      \
  T simd_##name(T x, ZMLX_SITE) {                                                 \
    using A = zmlx::accumulator<T>;                                               \
    return T(zmlx::reduce(                                                        \
        zmlx::meet<A>(A(x), file, line, column), A(neutral),                      \
        [](A a, A b) { return A(operation); }, 0, 32));                           \
  }                                                                               \
  template <zmlx::Reduced T>                                                      \
  T quad_##name(T x, ZMLX_SITE) {                                                 \
    using A = zmlx::accumulator<T>;                                               \
    const auto lanes = zmlx::meet<A>(A(x), file, line, column);                   \
    return T(zmlx::reduce(                                                        \
        lanes, A(neutral), [](A a, A b) { return A(operation); }, lanes.own & ~3u, 4)); \
  }                                                                               \
  template <zmlx::Vector V>                                                       \
  auto simd_##name(const V& v, ZMLX_SITE) {                                       \
    return zmlx::by_component(v, [&](auto x) { return simd_##name(x, file, line, column); }); \
  }
ZMLX_REDUCTION(sum, 0, a + b)
ZMLX_REDUCTION(product, 1, a * b)
ZMLX_REDUCTION(max, zmlx::least<A>(), max(a, b))
ZMLX_REDUCTION(min, zmlx::most<A>(), min(a, b))
#undef ZMLX_REDUCTION
#define ZMLX_BITS(name, neutral, operation)                                       \
  template <zmlx::Reduced T>                                                      \
    requires zmlx::Whole<T>                                                       \
  T simd_##name(T x, ZMLX_SITE) {                                                 \
    return zmlx::reduce(                                                          \
        zmlx::meet(x, file, line, column), T(neutral),                            \
        [](T a, T b) { return T(operation); }, 0, 32);                            \
  }                                                                               \
  template <zmlx::Reduced T>                                                      \
    requires zmlx::Whole<T>                                                       \
  T quad_##name(T x, ZMLX_SITE) {                                                 \
    const auto lanes = zmlx::meet(x, file, line, column);                         \
    return zmlx::reduce(                                                          \
        lanes, T(neutral), [](T a, T b) { return T(operation); }, lanes.own & ~3u, 4); \
  }
ZMLX_BITS(and, ~T(0), a & b)
ZMLX_BITS(or, 0, a | b)
ZMLX_BITS(xor, 0, a ^ b)
#undef ZMLX_BITS

#define ZMLX_SCAN(name, neutral, operation, inclusive)                            \
  template <zmlx::Reduced T>                                                      \
  T simd_prefix_##name(T x, ZMLX_SITE) {                                          \
    using A = zmlx::accumulator<T>;                                               \
    return T(zmlx::scan(                                                          \
        zmlx::meet<A>(A(x), file, line, column), A(neutral),                      \
        [](A a, A b) { return A(operation); }, inclusive));                       \
  }
ZMLX_SCAN(inclusive_sum, 0, a + b, true)
ZMLX_SCAN(exclusive_sum, 0, a + b, false)
ZMLX_SCAN(inclusive_product, 1, a * b, true)
ZMLX_SCAN(exclusive_product, 1, a * b, false)
#undef ZMLX_SCAN

template <class T>
T simd_broadcast(T x, ushort lane, ZMLX_SITE) {
  return zmlx::meet(x, file, line, column).from(lane);
}
template <class T>
T simd_broadcast_first(T x, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes[uint32_t(__builtin_ctz(lanes.active))];
}
template <class T>
T simd_shuffle(T x, ushort lane, ZMLX_SITE) {
  return zmlx::meet(x, file, line, column).from(lane);
}
template <class T>
T simd_shuffle_xor(T x, ushort mask, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.from(lanes.own ^ mask);
}
// Lanes that would get something from beyond the simdgroup keep what they have.
template <class T>
T simd_shuffle_down(T x, ushort delta, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.own + delta < 32 ? lanes.from(lanes.own + delta) : x;
}
template <class T>
T simd_shuffle_up(T x, ushort delta, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.own >= delta ? lanes.from(lanes.own - delta) : x;
}
template <class T>
T simd_shuffle_rotate_down(T x, ushort delta, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.from((lanes.own + delta) % 32);
}
template <class T>
T simd_shuffle_rotate_up(T x, ushort delta, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.from((lanes.own + 32 - delta % 32) % 32);
}
// Within groups of `modulo` lanes; what would come from beyond comes from the neighbour's filling.
template <class T>
T simd_shuffle_and_fill_down(T x, T filling, ushort delta, ushort modulo = 32, ZMLX_SITE) {
  struct Both {
    T value, filling;
  };
  const auto lanes = zmlx::meet(Both{x, filling}, file, line, column);
  const uint32_t group = lanes.own / modulo * modulo;
  const uint32_t to = lanes.own - group + delta;
  return to < modulo ? lanes.from(group + to).value : lanes.from(group + to % modulo).filling;
}
template <class T>
T simd_shuffle_and_fill_up(T x, T filling, ushort delta, ushort modulo = 32, ZMLX_SITE) {
  struct Both {
    T value, filling;
  };
  const auto lanes = zmlx::meet(Both{x, filling}, file, line, column);
  const uint32_t group = lanes.own / modulo * modulo;
  const uint32_t at = lanes.own - group;
  return at >= delta ? lanes.from(group + at - delta).value
                     : lanes.from(group + (at + modulo - delta) % modulo).filling;
}

template <class T>
T quad_broadcast(T x, ushort lane, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.from((lanes.own & ~3u) + lane % 4);
}
template <class T>
T quad_shuffle(T x, ushort lane, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.from((lanes.own & ~3u) + lane % 4);
}
template <class T>
T quad_shuffle_xor(T x, ushort mask, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return lanes.from(lanes.own ^ (mask & 3u));
}
template <class T>
T quad_shuffle_down(T x, ushort delta, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return (lanes.own & 3u) + delta < 4 ? lanes.from(lanes.own + delta) : x;
}
template <class T>
T quad_shuffle_up(T x, ushort delta, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  return (lanes.own & 3u) >= delta ? lanes.from(lanes.own - delta) : x;
}

// A bit for each lane.
class simd_vote {
 public:
  using vote_t = uint64_t;
  constexpr explicit simd_vote(vote_t bits = 0) : bits_(bits) {}
  explicit constexpr operator vote_t() const {
    return bits_;
  }
  constexpr bool all() const {
    return bits_ == 0xffffffffu;
  }
  constexpr bool any() const {
    return bits_ != 0;
  }

 private:
  vote_t bits_;
};

inline simd_vote simd_ballot(bool x, ZMLX_SITE) {
  const auto lanes = zmlx::meet(x, file, line, column);
  uint64_t bits = 0;
  for (uint32_t i = 0; i < 32; ++i) {
    bits |= uint64_t(lanes.has(i) && lanes[i]) << i;
  }
  return simd_vote(bits);
}
inline simd_vote simd_active_threads_mask(ZMLX_SITE) {
  return simd_vote(zmlx::meet(true, file, line, column).active);
}
inline bool simd_any(bool x, ZMLX_SITE) {
  return uint64_t(simd_ballot(x, file, line, column)) != 0;
}
inline bool simd_all(bool x, ZMLX_SITE) {
  return uint64_t(simd_ballot(!x, file, line, column)) == 0;
}
inline bool simd_is_first(ZMLX_SITE) {
  const auto lanes = zmlx::meet(true, file, line, column);
  return uint32_t(__builtin_ctz(lanes.active)) == lanes.own;
}
inline bool simd_is_helper_thread() {
  return false;
}

} // namespace metal
