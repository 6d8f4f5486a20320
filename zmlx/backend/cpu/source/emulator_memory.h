// The memory that a kernel may touch, and what is known of every byte of it.
//
// Arrays are copied into one reserved piece of the address space, each far from the next, so that
// the distance of an address from its array says how far outside it lies. Kernels are compiled with
// the instrumentation of ThreadSanitizer: each of their accesses comes here first, with its address.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator_interface.h"

namespace zmlx::emulator {

// The kinds of faults, in the order of faults.py.
enum class Kind : int {
  out_of_bounds,
  read_only,
  uninitialized,
  race,
  divergence,
  unwritten,
  misaligned,
};

// What a kernel did wrong. Becomes an exception of Python.
struct Fault : std::exception {
  Kind kind;
  std::string text; // without the kernel's name and the thread
  std::string kernel;
  std::string thread; // empty when no thread is to blame
  std::string library; // file of the compiled kernel, with `offset` the place in it
  uintptr_t offset = 0;
  std::string place; // file and line, where they are known already

  Fault(Kind kind, std::string text, std::string kernel, std::string library)
      : kind(kind),
        text(std::move(text)),
        kernel(std::move(kernel)),
        library(std::move(library)) {}

  const char* what() const noexcept override {
    return text.c_str();
  }
};

// Who did something, and when: two deeds of different threads are ordered when a barrier is between.
struct Moment {
  uint32_t group = 0; // which threadgroup, from 1; 0: nobody
  uint16_t thread = 0;
  uint16_t atomic = 0;
  uint32_t epoch = 0; // barriers of the threadgroup
  uint32_t simd_epoch = 0; // barriers of the simdgroup
};

// An array of a launch.
struct Buffer {
  std::string name;
  size_t item = 1;
  size_t bytes = 0;
  size_t misalignment = 0; // of the array's address, kept in the copy
  bool writable = false;
  bool initialized = true;
  bool may_stay_unwritten = false;
  char* data = nullptr;
  std::vector<uint8_t> written; // by byte, of outputs that are not initialized
  std::vector<Moment> writers; // by element, of outputs
};

// Pages of the address space that are taken back at the end.
class Reservation {
 public:
  Reservation() = default;
  explicit Reservation(size_t bytes);
  ~Reservation();
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;

  char* begin() const {
    return begin_;
  }
  size_t bytes() const {
    return bytes_;
  }

 private:
  char* begin_ = nullptr;
  size_t bytes_ = 0;
};

class Memory {
 public:
  // Gives each buffer its place; the copies are the caller's.
  explicit Memory(std::vector<Buffer>& buffers);

  bool holds(uintptr_t address) const {
    return address - base_ < reservation_.bytes();
  }
  // The buffer in whose part of the address space an address lies.
  Buffer& near(uintptr_t address) {
    return buffers_[(address - base_) >> shift_];
  }

 private:
  std::vector<Buffer>& buffers_;
  Reservation reservation_;
  uintptr_t base_ = 0;
  unsigned shift_ = 0;
};

// Where a kernel's threadgroup variables lie, each far enough from the next to see a step outside.
class SharedLayout {
 public:
  static constexpr size_t kLimit = 32 << 10;
  static constexpr size_t kGap = 512;

  SharedLayout() = default;
  explicit SharedLayout(SharedVariable* first);

  // What they take on a device.
  size_t device_bytes() const {
    return device_bytes_;
  }
  // What they take here; 0 when there are none.
  size_t bytes() const {
    return bytes_;
  }
  // The variable at an offset or nearest to it, and the distance from its start.
  const SharedVariable* near(size_t offset, int64_t* distance) const;

 private:
  std::vector<const SharedVariable*> variables_;
  size_t device_bytes_ = 0;
  size_t bytes_ = 0;
};

// Threadgroup memory with who touched each byte of it since the last barriers.
struct SharedMemory {
  struct Cell {
    Moment writer;
    Moment readers[2]; // of different threads
  };
  const SharedLayout& layout;
  Reservation bytes;
  std::vector<Cell> cells;

  explicit SharedMemory(const SharedLayout& layout)
      : layout(layout), bytes(layout.bytes()), cells(layout.bytes()) {}

  size_t offset_of(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(bytes.begin());
  }
  bool holds(uintptr_t address) const {
    return offset_of(address) < bytes.bytes();
  }
};

} // namespace zmlx::emulator
