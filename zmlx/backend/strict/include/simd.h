// Barriers, simdgroups and quadgroups.
#pragma once

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) & static_cast<uint>(b));
}
enum memory_order {
  memory_order_relaxed = 0,
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5
};
enum thread_scope {
  thread_scope_thread = 0,
  thread_scope_threadgroup = 1,
  thread_scope_device = 2,
  thread_scope_simdgroup = 3
};

void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

class simd_vote {
 public:
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t value = 0) : value(value) {}
  explicit constexpr operator vote_t() const { return value; }
  bool all() const;
  bool any() const;

 private:
  vote_t value;
};

// What simdgroups exchange: scalars of at most 32 bits and vectors of them; bfloat is MLX's own.
template <typename T>
struct zmlx_exchanged : bool_constant<__is_arithmetic(T) && sizeof(T) <= 4 && !__is_same(T, bool)> {};
template <typename T, int N>
struct zmlx_exchanged<vec<T, N>> : zmlx_exchanged<T> {};
template <typename T>
struct zmlx_whole : bool_constant<zmlx_exchanged<T>::value && is_integral_v<T>> {};
template <typename T, int N>
struct zmlx_whole<vec<T, N>> : zmlx_whole<T> {};

#define ZMLX_EXCHANGE template <typename T, enable_if_t<zmlx_exchanged<T>::value, int> = 0>
#define ZMLX_WHOLE template <typename T, enable_if_t<zmlx_whole<T>::value, int> = 0>

#define ZMLX_GROUP(PREFIX)                                                       \
  ZMLX_EXCHANGE T PREFIX##_broadcast(T, ushort);                                 \
  ZMLX_EXCHANGE T PREFIX##_broadcast_first(T);                                   \
  ZMLX_EXCHANGE T PREFIX##_shuffle(T, ushort);                                   \
  ZMLX_EXCHANGE T PREFIX##_shuffle_xor(T, ushort);                               \
  ZMLX_EXCHANGE T PREFIX##_shuffle_up(T, ushort);                                \
  ZMLX_EXCHANGE T PREFIX##_shuffle_down(T, ushort);                              \
  ZMLX_EXCHANGE T PREFIX##_shuffle_rotate_up(T, ushort);                         \
  ZMLX_EXCHANGE T PREFIX##_shuffle_rotate_down(T, ushort);                       \
  ZMLX_EXCHANGE T PREFIX##_shuffle_and_fill_up(T, T, ushort);                    \
  ZMLX_EXCHANGE T PREFIX##_shuffle_and_fill_up(T, T, ushort, ushort);            \
  ZMLX_EXCHANGE T PREFIX##_shuffle_and_fill_down(T, T, ushort);                  \
  ZMLX_EXCHANGE T PREFIX##_shuffle_and_fill_down(T, T, ushort, ushort);          \
  ZMLX_EXCHANGE T PREFIX##_sum(T);                                               \
  ZMLX_EXCHANGE T PREFIX##_product(T);                                           \
  ZMLX_EXCHANGE T PREFIX##_max(T);                                               \
  ZMLX_EXCHANGE T PREFIX##_min(T);                                               \
  ZMLX_EXCHANGE T PREFIX##_prefix_inclusive_sum(T);                              \
  ZMLX_EXCHANGE T PREFIX##_prefix_exclusive_sum(T);                              \
  ZMLX_EXCHANGE T PREFIX##_prefix_inclusive_product(T);                          \
  ZMLX_EXCHANGE T PREFIX##_prefix_exclusive_product(T);                          \
  ZMLX_WHOLE T PREFIX##_and(T);                                                  \
  ZMLX_WHOLE T PREFIX##_or(T);                                                   \
  ZMLX_WHOLE T PREFIX##_xor(T);                                                  \
  bool PREFIX##_all(bool);                                                       \
  bool PREFIX##_any(bool);                                                       \
  bool PREFIX##_is_first();                                                      \
  bool PREFIX##_is_helper_thread();
ZMLX_GROUP(simd)
ZMLX_GROUP(quad)
#undef ZMLX_GROUP
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();

} // namespace metal

// Builtins of Apple's compiler that MLX calls.
#define ZMLX_BUILTIN(NAME) \
  template <typename T>    \
  T __metal_simd_##NAME(T);
ZMLX_BUILTIN(sum)
ZMLX_BUILTIN(product)
ZMLX_BUILTIN(max)
ZMLX_BUILTIN(min)
ZMLX_BUILTIN(xor)
ZMLX_BUILTIN(prefix_inclusive_sum)
ZMLX_BUILTIN(prefix_exclusive_sum)
ZMLX_BUILTIN(prefix_inclusive_product)
ZMLX_BUILTIN(prefix_exclusive_product)
#undef ZMLX_BUILTIN
#define ZMLX_BUILTIN(NAME) \
  template <typename T>    \
  T __metal_simd_##NAME(T, ushort);
ZMLX_BUILTIN(broadcast)
ZMLX_BUILTIN(shuffle)
ZMLX_BUILTIN(shuffle_xor)
ZMLX_BUILTIN(shuffle_up)
ZMLX_BUILTIN(shuffle_down)
ZMLX_BUILTIN(shuffle_rotate_up)
ZMLX_BUILTIN(shuffle_rotate_down)
#undef ZMLX_BUILTIN
template <typename T>
T __metal_simd_shuffle_and_fill_up(T, T, ushort, ushort);
template <typename T>
T __metal_simd_shuffle_and_fill_down(T, T, ushort, ushort);
ushort __metal_get_simdgroup_size(ushort);
ushort __metal_get_thread_index_in_simdgroup(ushort);
uint __metal_get_thread_index_in_simdgroup(uint);
