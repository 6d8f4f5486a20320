// Atomics, in device and in threadgroup memory. Other types than these have none.
#pragma once

namespace metal {

template <typename T>
struct atomic;
#define ZMLX_ATOMIC(T)                \
  template <>                         \
  struct atomic<T> {                  \
    T zmlx_value;                     \
    atomic() = default;               \
    atomic(const atomic&) = delete;   \
    void operator=(const atomic&) = delete; \
  };
ZMLX_ATOMIC(int)
ZMLX_ATOMIC(uint)
ZMLX_ATOMIC(bool)
ZMLX_ATOMIC(float)
ZMLX_ATOMIC(ulong)
#undef ZMLX_ATOMIC
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

template <typename T>
struct zmlx_same {
  using type = T;
};
// The value's type follows the atomic's.
template <typename T>
using zmlx_value = typename zmlx_same<T>::type;

#define ZMLX_EXCHANGES(SPACE)                                                                 \
  template <typename T>                                                                       \
  void atomic_store_explicit(volatile SPACE atomic<T>*, zmlx_value<T>, memory_order);         \
  template <typename T>                                                                       \
  T atomic_load_explicit(const volatile SPACE atomic<T>*, memory_order);                      \
  template <typename T>                                                                       \
  T atomic_exchange_explicit(volatile SPACE atomic<T>*, zmlx_value<T>, memory_order);         \
  template <typename T>                                                                       \
  bool atomic_compare_exchange_weak_explicit(                                                 \
      volatile SPACE atomic<T>*, thread zmlx_value<T>*, zmlx_value<T>, memory_order,          \
      memory_order);
ZMLX_EXCHANGES(device)
ZMLX_EXCHANGES(threadgroup)
#undef ZMLX_EXCHANGES

#define ZMLX_MODIFY(SPACE, T, NAME) \
  T atomic_fetch_##NAME##_explicit(volatile SPACE atomic<T>*, T, memory_order);
#define ZMLX_MODIFIES(SPACE, T) \
  ZMLX_MODIFY(SPACE, T, add)    \
  ZMLX_MODIFY(SPACE, T, sub)    \
  ZMLX_MODIFY(SPACE, T, and)    \
  ZMLX_MODIFY(SPACE, T, or)     \
  ZMLX_MODIFY(SPACE, T, xor)    \
  ZMLX_MODIFY(SPACE, T, max)    \
  ZMLX_MODIFY(SPACE, T, min)
ZMLX_MODIFIES(device, int)
ZMLX_MODIFIES(device, uint)
ZMLX_MODIFIES(threadgroup, int)
ZMLX_MODIFIES(threadgroup, uint)
ZMLX_MODIFY(device, float, add)
ZMLX_MODIFY(device, float, sub)
#undef ZMLX_MODIFIES
#undef ZMLX_MODIFY
void atomic_max_explicit(volatile device atomic<ulong>*, ulong, memory_order);
void atomic_min_explicit(volatile device atomic<ulong>*, ulong, memory_order);
void atomic_thread_fence(mem_flags, memory_order);
void atomic_thread_fence(mem_flags, memory_order, thread_scope);

} // namespace metal
