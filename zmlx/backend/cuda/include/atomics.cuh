// Atomic values. The orders stronger than relaxed are given by fences around the operation.
#pragma once

#include "scalars.cuh"

namespace mlx::core::cu::metal {

template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_ulong = atomic<ulong>;
using atomic_float = atomic<float>;

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst,
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
};

inline void fence(memory_order order) {
  if (order != memory_order_relaxed) __threadfence();
}
template <class Flags>
void atomic_thread_fence(Flags, memory_order order = memory_order_seq_cst,
                         thread_scope = thread_scope_device) {
  fence(order);
}

// The word that CUDA's compare-and-swap takes for a value.
template <class T>
using word_t = conditional_t<sizeof(T) == 8, unsigned long long,
                             conditional_t<sizeof(T) == 4, uint, ushort>>;
template <class T>
auto* word(const volatile atomic<T>* a) {
  return reinterpret_cast<word_t<T>*>(const_cast<T*>(&a->value));
}
template <class T>
T* place(const volatile atomic<T>* a) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8,
                "atomic operations take values of 2, 4 or 8 bytes");
  return const_cast<T*>(&a->value);
}

template <class T>
T atomic_load_explicit(const volatile atomic<T>* a, memory_order order) {
  auto bits = *static_cast<const volatile word_t<T>*>(word(a));
  fence(order);
  return __builtin_bit_cast(T, bits);
}
template <class T, class U>
void atomic_store_explicit(volatile atomic<T>* a, U value, memory_order order) {
  fence(order);
  *static_cast<volatile word_t<T>*>(word(a)) = __builtin_bit_cast(word_t<T>, static_cast<T>(value));
}
template <class T, class U>
bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* a, T* expected, U value,
                                           memory_order success, memory_order failure) {
  fence(success);
  auto was = __builtin_bit_cast(word_t<T>, *expected);
  auto now = atomicCAS(word(a), was, __builtin_bit_cast(word_t<T>, static_cast<T>(value)));
  fence(now == was ? success : failure);
  *expected = __builtin_bit_cast(T, now);
  return now == was;
}

// Any operation, as a loop of compare and swap.
template <class T, class Op>
T retried(volatile atomic<T>* a, Op op) {
  auto seen = *static_cast<volatile word_t<T>*>(word(a));
  while (true) {
    const auto was = seen;
    const T value = op(__builtin_bit_cast(T, was));
    seen = atomicCAS(word(a), was, __builtin_bit_cast(word_t<T>, value));
    if (seen == was) return __builtin_bit_cast(T, was);
  }
}

template <class T, class Op>
T ordered(memory_order order, Op op) {
  fence(order);
  const T was = op();
  fence(order);
  return was;
}
template <class T>
constexpr bool is_int_v = is_same_v<T, int> || is_same_v<T, uint>;

template <class T, class U>
T atomic_exchange_explicit(volatile atomic<T>* a, U value, memory_order order) {
  const T v = static_cast<T>(value);
  return ordered<T>(order, [=] { return retried(a, [=](T) { return v; }); });
}
template <class T, class U>
T atomic_fetch_add_explicit(volatile atomic<T>* a, U value, memory_order order) {
  const T v = static_cast<T>(value);
  return ordered<T>(order, [=] {
    if constexpr (is_int_v<T> || is_same_v<T, float>) return atomicAdd(place(a), v);
    else if constexpr (is_small_v<T>) return T(atomicAdd(reinterpret_cast<decltype(v.native())*>(place(a)), v.native()));
    else if constexpr (is_integral_v<T> && sizeof(T) == 8) return T(atomicAdd(word(a), static_cast<word_t<T>>(v)));
    else return retried(a, [=](T was) { return T(was + v); });
  });
}
template <class T, class U>
T atomic_fetch_sub_explicit(volatile atomic<T>* a, U value, memory_order order) {
  return atomic_fetch_add_explicit(a, T(-static_cast<T>(value)), order);
}
#define ZMLX_FETCH(NAME, CUDA, EXPRESSION)                                                         \
  template <class T, class U>                                                                      \
  T atomic_fetch_##NAME##_explicit(volatile atomic<T>* a, U value, memory_order order) {           \
    const T v = static_cast<T>(value);                                                             \
    return ordered<T>(order, [=] {                                                                 \
      if constexpr (is_int_v<T>) return CUDA(place(a), v);                                         \
      else return retried(a, [=](T was) { return T(EXPRESSION); });                                \
    });                                                                                            \
  }                                                                                                \
  template <class T, class U>                                                                      \
  void atomic_##NAME##_explicit(volatile atomic<T>* a, U value, memory_order order) {              \
    atomic_fetch_##NAME##_explicit(a, value, order);                                               \
  }
ZMLX_FETCH(min, atomicMin, v < was ? v : was)
ZMLX_FETCH(max, atomicMax, was < v ? v : was)
ZMLX_FETCH(and, atomicAnd, was & v)
ZMLX_FETCH(or, atomicOr, was | v)
ZMLX_FETCH(xor, atomicXor, was ^ v)
#undef ZMLX_FETCH

}  // namespace mlx::core::cu::metal
