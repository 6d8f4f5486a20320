// The emulator's functions as a kernel's library calls them (defined in hooks.cpp).
#pragma once

#include <emulator_interface.h>

#include <source_location>

extern "C" {
void zmlx_barrier(uint32_t flags, uint32_t simdgroup, const zmlx::emulator::Site* site);
const zmlx::emulator::Exchange* zmlx_exchange(
    const void* value, size_t bytes, const zmlx::emulator::Site* site);
void zmlx_atomic(const void* address, size_t bytes, uint32_t access);
void* zmlx_shared(zmlx::emulator::SharedVariable* variable);
void zmlx_register_shared(zmlx::emulator::SharedVariable* variable);
}

// A last parameter that holds where a function is called from.
#define ZMLX_SITE                                        \
  const char *file = __builtin_FILE(), uint32_t line = __builtin_LINE(), \
             uint32_t column = ZMLX_COLUMN
#define ZMLX_COLUMN std::source_location::current().column()

namespace zmlx {

// One per variable and instantiation of its function: `Tag` is a type of that function.
template <class T, class Tag>
struct Shared {
  static inline emulator::SharedVariable variable{
      sizeof(T), alignof(T), sizeof(std::remove_all_extents_t<T>), "", 0, nullptr};
  struct Registered {
    Registered() {
      zmlx_register_shared(&variable);
    }
  };
  static inline Registered registered;
};

template <class T, class Tag>
__attribute__((no_sanitize("thread"))) T& shared(const char* name) {
  using One = Shared<T, Tag>;
  (void)&One::registered; // so that it is registered when the library is loaded
  One::variable.name = name;
  return *static_cast<T*>(zmlx_shared(&One::variable));
}

// What a kernel is given for its parameters, whatever their types.
struct Pointer {
  void* address;
  template <class T>
  operator T*() const {
    return static_cast<T*>(address);
  }
};
struct Reference {
  void* address;
  template <class T>
  operator T&() const {
    return *static_cast<std::remove_const_t<T>*>(address);
  }
};
struct Coordinates {
  const uint32_t* xyz;
  operator uint() const {
    return xyz[0];
  }
  operator ushort() const {
    return ushort(xyz[0]);
  }
  template <class T>
  operator metal::vec<T, 2>() const {
    return metal::vec<T, 2>(T(xyz[0]), T(xyz[1]));
  }
  template <class T>
  operator metal::vec<T, 3>() const {
    return metal::vec<T, 3>(T(xyz[0]), T(xyz[1]), T(xyz[2]));
  }
};

} // namespace zmlx
