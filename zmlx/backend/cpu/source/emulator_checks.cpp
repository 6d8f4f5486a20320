// What is checked at each access of a kernel to memory, and the functions that kernels call.
#include <algorithm>
#include <cstring>

#include "emulator_launch.h"

namespace zmlx::emulator {
namespace {

const char* verb(Access access) {
  switch (access) {
    case kRead:
    case kAtomicRead:
      return "reads";
    case kAtomicUpdate:
      return "updates";
    default:
      return "writes";
  }
}

bool writes(Access access) {
  return access != kRead && access != kAtomicRead;
}

// Whether what was there before matters.
bool reads(Access access) {
  return access != kWrite && access != kAtomicStore;
}

bool atomic(Access access) {
  return access >= kAtomicRead;
}

// Of an address that is `distance` bytes from the start of an array.
std::string where(const std::string& name, int64_t distance, size_t item, size_t bytes) {
  const auto size = int64_t(item);
  const int64_t index = distance >= 0 ? distance / size : -((-distance + size - 1) / size);
  return "element " + std::to_string(index) + " of '" + name + "', which has " +
      std::to_string(bytes / item);
}

} // namespace

Moment Launch::now(Access access) const {
  return {
      group_number_, uint16_t(current_), uint16_t(atomic(access)), epoch_,
      simdgroups_[current_ / kLanes].epoch};
}

// Whether what another thread of this threadgroup did comes before what the current one does.
bool Launch::ordered(const Moment& earlier) const {
  return earlier.group != group_number_ || earlier.thread == current_ ||
      earlier.epoch < epoch_ ||
      (earlier.thread / kLanes == current_ / kLanes &&
       earlier.simd_epoch < simdgroups_[current_ / kLanes].epoch);
}

void Launch::access(
    uintptr_t address, size_t bytes, Access access, bool aligned, uintptr_t pc) {
  settle();
  if (memory_.holds(address)) {
    if (aligned && address % std::min<size_t>(bytes, 16) != 0) {
      const Buffer& buffer = memory_.near(address);
      fail(
          Kind::misaligned,
          std::string(verb(access)) + " " + std::to_string(bytes) + " bytes at byte " +
              std::to_string(int64_t(address) - int64_t(buffer.data)) + " of '" + buffer.name +
              "', which is no multiple of their alignment",
          pc);
    }
    check_buffer(memory_.near(address), address, bytes, access, pc);
  } else if (shared_.holds(address)) {
    check_shared(address, bytes, access, pc);
  } else if (library_.holds(address) && !writes(access)) {
    return; // a constant of the program scope
  } else {
    const auto slots = reinterpret_cast<uintptr_t>(simdgroups_.data());
    const auto threads = reinterpret_cast<uintptr_t>(threads_.data());
    const bool ours = address - slots < simdgroups_.size() * sizeof(Simdgroup) ||
        address - threads < threads_.size() * sizeof(Thread);
    if (!ours) {
      stray(address, access, pc);
    }
  }
}

void Launch::stray(uintptr_t address, Access access, uintptr_t pc) {
  const auto stacks = reinterpret_cast<uintptr_t>(stacks_.begin());
  if (address - stacks < kStackBytes * kMostThreads) {
    const bool overflow = address < stack_ && stack_ - address < kStackBytes;
    fail(
        Kind::stack,
        overflow ? "local variables need more than " + std::to_string(kStackBytes >> 10) + " KB"
                 : std::string(verb(access)) + " a local variable of another thread",
        pc);
  }
  fail(
      Kind::out_of_bounds,
      std::string(verb(access)) +
          (library_.holds(address) ? " a constant of the program scope"
                                   : " an address that is in no array"),
      pc);
}

void Launch::check_buffer(
    Buffer& buffer, uintptr_t address, size_t bytes, Access access, uintptr_t pc) {
  const auto distance = int64_t(address - reinterpret_cast<uintptr_t>(buffer.data));
  if (distance < 0 || uint64_t(distance) + bytes > buffer.bytes) {
    fail(
        Kind::out_of_bounds,
        std::string(verb(access)) + " " +
            where(
                buffer.name, distance >= 0 ? std::max(distance, int64_t(buffer.bytes)) : distance,
                buffer.item, buffer.bytes),
        pc);
  }
  if (!buffer.writable) {
    if (writes(access)) {
      fail(
          Kind::read_only,
          std::string(verb(access)) + " element " +
              std::to_string(size_t(distance) / buffer.item) + " of input '" + buffer.name + "'",
          pc);
    }
    return;
  }
  const auto start = size_t(distance);
  if (!buffer.initialized && reads(access)) {
    for (size_t i = start; i < start + bytes; ++i) {
      if (buffer.written[i] == 0) {
        fail(
            Kind::uninitialized,
            std::string(verb(access)) + " element " + std::to_string(i / buffer.item) +
                " of output '" + buffer.name + "', which nothing was written to before",
            pc);
      }
    }
  }
  for (size_t i = start / buffer.item; i <= (start + bytes - 1) / buffer.item; ++i) {
    check_element(buffer, i, access, address, bytes, pc);
    if (writes(access)) {
      Moment moment = now(access);
      moment.epoch = device_epoch_;
      buffer.writers[i] = moment;
    }
  }
  if (!buffer.initialized && writes(access)) {
    std::memset(buffer.written.data() + start, 1, bytes);
  }
}

// What another thread wrote to an output may be used after a barrier for device memory, and only in
// its threadgroup: threadgroups run in any order.
void Launch::check_element(
    const Buffer& buffer, size_t element, Access access, uintptr_t address, size_t bytes,
    uintptr_t pc) {
  const Moment& writer = buffer.writers[element];
  if (writer.group == 0 || (writer.atomic != 0 && atomic(access))) {
    return;
  }
  const bool here = writer.group == group_number_;
  if (here &&
      (writer.thread == current_ || writer.epoch < device_epoch_ ||
       (writer.thread / kLanes == current_ / kLanes &&
        writer.simd_epoch < simdgroups_[current_ / kLanes].epoch))) {
    return;
  }
  const std::string what = "element " + std::to_string(element) + " of output '" + buffer.name +
      "', which " +
      (here ? describe_thread(writer.thread) + " wrote, without a barrier for device memory between"
            : std::string("a thread of another threadgroup wrote"));
  if (access == kWrite) {
    expect_same(address, bytes, pc, "writes another value to " + what);
  } else {
    fail(Kind::race, std::string(verb(access)) + " " + what, pc);
  }
}

void Launch::check_shared(uintptr_t address, size_t bytes, Access access, uintptr_t pc) {
  const size_t offset = shared_.offset_of(address);
  int64_t distance = 0;
  const SharedVariable* variable = shared_.layout.near(offset, &distance);
  if (distance < 0 || uint64_t(distance) + bytes > variable->bytes) {
    fail(
        Kind::out_of_bounds,
        std::string(verb(access)) + " byte " + std::to_string(distance) +
            " of threadgroup variable '" + variable->name + "', which has " +
            std::to_string(variable->bytes),
        pc);
  }
  const auto name = [&] {
    return "byte " + std::to_string(distance) + " of threadgroup variable '" + variable->name + "'";
  };
  const auto race = [&](const Moment& other, const char* deed, const char* what) {
    return std::string(what) + " " + name() + ", which " + describe_thread(other.thread) + " " +
        deed + ", without a barrier for threadgroup memory between";
  };
  const Moment moment = now(access);
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedMemory::Cell& cell = shared_.cells[i];
    if (cell.writer.group != group_number_) {
      if (reads(access)) {
        fail(
            Kind::uninitialized,
            std::string(verb(access)) + " " + name() +
                ", which this threadgroup wrote nothing to before",
            pc);
      }
    } else if (!ordered(cell.writer) && !(cell.writer.atomic != 0 && atomic(access))) {
      if (access != kWrite) {
        fail(Kind::race, race(cell.writer, "wrote", verb(access)), pc);
      }
      expect_same(
          address, bytes, pc, race(cell.writer, "wrote", "writes another value to"));
    }
    if (writes(access)) {
      for (const Moment& reader : cell.readers) {
        if (reader.group == group_number_ && !ordered(reader) &&
            !(reader.atomic != 0 && atomic(access))) {
          if (access == kWrite) {
            expect_same(
                address, bytes, pc, race(reader, "read", "writes another value to"));
          } else {
            fail(Kind::race, race(reader, "read", verb(access)), pc);
          }
          break;
        }
      }
      cell.writer = moment;
    } else {
      if (cell.readers[0].group == group_number_ && cell.readers[0].thread != moment.thread) {
        cell.readers[1] = cell.readers[0];
      }
      cell.readers[0] = moment;
    }
  }
}

// The write has not happened yet: it is looked at before the next access.
void Launch::expect_same(
    uintptr_t address, size_t bytes, uintptr_t pc, std::string what) {
  if (pending_.bytes != 0 || bytes > sizeof pending_.before) {
    return; // another byte of the same write
  }
  pending_.address = address;
  pending_.bytes = bytes;
  std::memcpy(pending_.before, reinterpret_cast<void*>(address), bytes);
  pending_.pc = pc;
  pending_.text = std::move(what);
}

void Launch::settle() {
  if (pending_.bytes == 0) {
    return;
  }
  const bool same =
      std::memcmp(pending_.before, reinterpret_cast<void*>(pending_.address), pending_.bytes) == 0;
  pending_.bytes = 0;
  if (!same) {
    fail(Kind::race, std::move(pending_.text), pending_.pc);
  }
}

namespace {

template <Access kind, size_t bytes, bool aligned>
void one(const void* address) {
  Launch* launch = current_launch();
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!launch->on_own_stack(at)) {
    launch->access(
        at, bytes, kind, aligned, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
}

template <Access kind>
void range(const void* address, size_t bytes) {
  Launch* launch = current_launch();
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (bytes != 0 && !launch->on_own_stack(at)) {
    launch->access(
        at, bytes, kind, false, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
}

void update(const void* address, size_t bytes, uint32_t kind) {
  current_launch()->access(
      reinterpret_cast<uintptr_t>(address), bytes, Access(kind), true,
      reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

void barrier(uint32_t flags, uint32_t simdgroup, const Site* site) {
  current_launch()->barrier(
      flags, simdgroup != 0, *site, static_cast<void**>(__builtin_frame_address(0)));
}

const Exchange* exchange(const void* value, size_t bytes, const Site* site) {
  return current_launch()->exchange(
      value, bytes, *site, static_cast<void**>(__builtin_frame_address(0)));
}

void* shared(SharedVariable* variable) {
  return current_launch()->shared(*variable);
}

void index_outside(const char* file, uint32_t line, int64_t index, const char* type) {
  current_launch()->fail_at(
      Kind::out_of_bounds, "takes element " + std::to_string(index) + " of " + type,
      Site{file, line, 0});
}

} // namespace

const Hooks& hooks() {
  static const Hooks functions{
      {one<kRead, 1, true>, one<kRead, 2, true>, one<kRead, 4, true>, one<kRead, 8, true>,
       one<kRead, 16, true>},
      {one<kWrite, 1, true>, one<kWrite, 2, true>, one<kWrite, 4, true>, one<kWrite, 8, true>,
       one<kWrite, 16, true>},
      {one<kRead, 1, false>, one<kRead, 2, false>, one<kRead, 4, false>, one<kRead, 8, false>,
       one<kRead, 16, false>},
      {one<kWrite, 1, false>, one<kWrite, 2, false>, one<kWrite, 4, false>,
       one<kWrite, 8, false>, one<kWrite, 16, false>},
      range<kRead>,
      range<kWrite>,
      update,
      barrier,
      exchange,
      shared,
      index_outside,
  };
  return functions;
}

} // namespace zmlx::emulator
