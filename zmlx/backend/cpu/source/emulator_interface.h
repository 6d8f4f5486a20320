// What a compiled Metal kernel and the emulator that runs it know of each other. Plain C types: the
// two are compiled apart, with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zmlx::emulator {

// Where a thread is, as the attributes of Metal name it.
struct Position {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t dispatch_threads_per_threadgroup[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t dispatch_simdgroups_per_threadgroup;
};

// A place in the source.
struct Site {
  const char* file;
  uint32_t line;
  uint32_t column;
};

constexpr uint32_t kLanes = 32;
constexpr size_t kSlotBytes = 64; // widest value that lanes exchange

// What the lanes that met at a call hold: lane i's value at slots + i * kSlotBytes.
struct Exchange {
  uint32_t active; // bit i: lane i takes part
  uint32_t lane;
  const unsigned char* slots;
};

// A variable in threadgroup memory; registered when a kernel's library is loaded.
struct SharedVariable {
  size_t bytes;
  size_t alignment;
  size_t item; // bytes of an element
  const char* name;
  size_t offset;
  SharedVariable* next;
};

enum Access : uint32_t { kRead, kWrite, kAtomicRead, kAtomicUpdate, kAtomicStore };

// As mem_flags of Metal.
enum MemoryFlags : uint32_t { kMemoryDevice = 1, kMemoryThreadgroup = 2 };

// The emulator's functions, given to a library when it is loaded.
struct Hooks {
  void (*read[5])(const void*); // of 1, 2, 4, 8 and 16 bytes
  void (*write[5])(const void*);
  void (*read_range)(const void*, size_t);
  void (*write_range)(const void*, size_t);
  void (*atomic)(const void*, size_t, uint32_t access);
  void (*barrier)(uint32_t flags, uint32_t simdgroup, const Site*);
  const Exchange* (*exchange)(const void* value, size_t bytes, const Site*);
  void* (*shared)(SharedVariable*);
  void (*index_outside)(const Site*, int64_t index, const char* type);
  void (*misaligned)(const Site*, const void* address, size_t alignment, const char* type);
};

using Entry = void (*)(void* const* buffers, const Position* position);

} // namespace zmlx::emulator
