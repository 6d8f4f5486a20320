// The functions that a compiled kernel calls, each a jump to the emulator's. Compiled once and linked
// to every kernel; compiled with optimization, the jumps leave the return address as it is: it tells
// the emulator where in the kernel it was called from.
#include <emulator_interface.h>

using namespace zmlx::emulator;

namespace {
// Nobody looks while the library is loaded.
void ignore(const void*) {}
#define IGNORE {ignore, ignore, ignore, ignore, ignore}
Hooks hooks{IGNORE, IGNORE};
SharedVariable* variables = nullptr;
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ACCESS(bytes, index)                           \
  extern "C" void __tsan_read##bytes(void* address) {  \
    hooks.read[index](address);                        \
  }                                                    \
  extern "C" void __tsan_write##bytes(void* address) { \
    hooks.write[index](address);                       \
  }                                                    \
  extern "C" void __tsan_volatile_read##bytes(void* address) {  \
    hooks.read[index](address);                                 \
  }                                                             \
  extern "C" void __tsan_volatile_write##bytes(void* address) { \
    hooks.write[index](address);                                \
  }
#define UNALIGNED(bytes, index)                                  \
  extern "C" void __tsan_unaligned_read##bytes(void* address) {  \
    hooks.read[index](address);                        \
  }                                                              \
  extern "C" void __tsan_unaligned_write##bytes(void* address) { \
    hooks.write[index](address);                       \
  }
ACCESS(1, 0)
ACCESS(2, 1)
ACCESS(4, 2)
ACCESS(8, 3)
ACCESS(16, 4)
UNALIGNED(2, 1)
UNALIGNED(4, 2)
UNALIGNED(8, 3)
UNALIGNED(16, 4)
extern "C" {
void __tsan_read_range(void* address, size_t bytes) {
  hooks.read_range(address, bytes);
}
void __tsan_write_range(void* address, size_t bytes) {
  hooks.write_range(address, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void zmlx_barrier(uint32_t flags, uint32_t simdgroup, const Site* site) {
  hooks.barrier(flags, simdgroup, site);
}
const Exchange* zmlx_exchange(const void* value, size_t bytes, const Site* site) {
  return hooks.exchange(value, bytes, site);
}
void zmlx_atomic(const void* address, size_t bytes, uint32_t access) {
  hooks.atomic(address, bytes, access);
}
void* zmlx_shared(SharedVariable* variable) {
  return hooks.shared(variable);
}
void zmlx_register_shared(SharedVariable* variable) {
  variable->next = variables;
  variables = variable;
}

// What the compiler's own checks call (indices outside of constant bounds, alignment), with the
// layout of what they are given.
struct Type {
  uint16_t kind;
  uint16_t info; // of whole numbers: bit 0 is set for signed ones, above it the logarithm of the bits
  char name[];
};
struct OutOfBounds {
  Site site;
  const Type* array;
  const Type* index;
};
void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  const unsigned bits = 1u << (data->index->info >> 1);
  int64_t value = int64_t(index);
  if ((data->index->info & 1) != 0 && bits < 64) {
    value = int64_t(uint64_t(value) << (64 - bits)) >> (64 - bits);
  }
  hooks.index_outside(&data->site, value, data->array->name);
}
struct Mismatch {
  Site site;
  const Type* type;
  unsigned char alignment; // its logarithm
  unsigned char kind;
};
void __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
  hooks.misaligned(
      &data->site, reinterpret_cast<void*>(address), size_t(1) << data->alignment,
      data->type->name);
}
}

// The first call after loading: returns the threadgroup variables.
EXPORT SharedVariable* zmlx_bind(const Hooks* given) {
  hooks = *given;
  return variables;
}
