// Atomics. The emulator runs one thread at a time; it is told of each access, so that it can check
// the address and whether others go without atomics.
#pragma once

#include <zmlx/hooks.h>
#include <zmlx/math.h>

namespace metal {

enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release,
                    memory_order_acq_rel, memory_order_seq_cst };
enum class thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup,
                          thread_scope_device };
using enum thread_scope;

template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<uint64_t> atomic_ulong;

} // namespace metal

namespace zmlx {

#define ZMLX_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
template <class T>
ZMLX_UNCHECKED T load(const T* from) {
  return *from;
}
template <class T>
ZMLX_UNCHECKED void store(T* to, T value) {
  *to = value;
}
#undef ZMLX_UNCHECKED

template <class T, class F>
inline T update(volatile metal::atomic<T>* object, F f) {
  T* at = const_cast<T*>(&object->value);
  zmlx_atomic(at, sizeof(T), emulator::kAtomicUpdate);
  const T before = load(at);
  store(at, T(f(before)));
  return before;
}

} // namespace zmlx

namespace metal {

template <class T>
T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  T* at = const_cast<T*>(&object->value);
  zmlx_atomic(at, sizeof(T), zmlx::emulator::kAtomicRead);
  return zmlx::load(at);
}
template <class T>
void atomic_store_explicit(volatile atomic<T>* object, std::type_identity_t<T> value, memory_order) {
  T* at = const_cast<T*>(&object->value);
  zmlx_atomic(at, sizeof(T), zmlx::emulator::kAtomicStore);
  zmlx::store(at, value);
}
template <class T>
T atomic_exchange_explicit(
    volatile atomic<T>* object, std::type_identity_t<T> value, memory_order) {
  return zmlx::update(object, [=](T) { return value; });
}
#define ZMLX_ATOMIC(name, operation)                                          \
  template <class T>                                                          \
  T atomic_fetch_##name##_explicit(                                           \
      volatile atomic<T>* object, std::type_identity_t<T> value, memory_order) { \
    return zmlx::update(object, [=](T before) { return T(operation); });      \
  }
ZMLX_ATOMIC(add, before + value)
ZMLX_ATOMIC(sub, before - value)
ZMLX_ATOMIC(and, before& value)
ZMLX_ATOMIC(or, before | value)
ZMLX_ATOMIC(xor, before ^ value)
ZMLX_ATOMIC(min, min(before, value))
ZMLX_ATOMIC(max, max(before, value))
#undef ZMLX_ATOMIC
#define ZMLX_ATOMIC_ONLY(name)                                                \
  template <class T>                                                          \
  void atomic_##name##_explicit(                                              \
      volatile atomic<T>* object, std::type_identity_t<T> value, memory_order order) { \
    atomic_fetch_##name##_explicit(object, value, order);                     \
  }
ZMLX_ATOMIC_ONLY(min)
ZMLX_ATOMIC_ONLY(max)
#undef ZMLX_ATOMIC_ONLY

// Succeeds when the bits are the same, as on a device; a NaN does not stop it.
template <class T>
bool atomic_compare_exchange_weak_explicit(
    volatile atomic<T>* object, T* expected, std::type_identity_t<T> desired, memory_order,
    memory_order) {
  T* at = const_cast<T*>(&object->value);
  zmlx_atomic(at, sizeof(T), zmlx::emulator::kAtomicUpdate);
  const T before = zmlx::load(at);
  if (__builtin_memcmp(&before, expected, sizeof(T)) == 0) {
    zmlx::store(at, T(desired));
    return true;
  }
  *expected = before;
  return false;
}

inline void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

} // namespace metal
