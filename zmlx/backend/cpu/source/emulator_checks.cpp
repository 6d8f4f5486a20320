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
std::string where(
    const std::string& what, const std::string& name, int64_t distance, size_t item,
    size_t bytes) {
  const auto size = int64_t(item);
  const int64_t index = distance >= 0 ? distance / size : -((-distance + size - 1) / size);
  return "element " + std::to_string(index) + " of " + what + " '" + name + "', which has " +
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

void Launch::access(uintptr_t address, size_t bytes, Access access, uintptr_t pc) {
  settle();
  if (memory_.holds(address)) {
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

void Launch::misaligned(
    const Site& site, uintptr_t address, size_t alignment, const char* type) {
  std::string where = "an address";
  if (memory_.holds(address)) {
    const Buffer& buffer = memory_.near(address);
    where = "byte " + std::to_string(int64_t(address) - int64_t(buffer.data)) + " of '" +
        buffer.name + "'";
  }
  fail_at(
      Kind::misaligned,
      std::string("takes a ") + type + " at " + where + ", which is no multiple of " +
          std::to_string(alignment),
      site);
}

void Launch::stray(uintptr_t address, Access access, uintptr_t pc) {
  const auto stacks = reinterpret_cast<uintptr_t>(stacks_.begin());
  const bool local = address - stacks < kStackBytes * kMostThreads;
  fail(
      Kind::out_of_bounds,
      std::string(verb(access)) +
          (local                     ? " a local variable of another thread"
               : library_.holds(address) ? " a constant of the program scope"
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
                buffer.writable ? "output" : "input", buffer.name,
                distance >= 0 ? std::max(distance, int64_t(buffer.bytes)) : distance,
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
    const int64_t outside = distance < 0 ? distance : std::max(distance, int64_t(variable->bytes));
    fail(
        Kind::out_of_bounds,
        std::string(verb(access)) + " " +
            where(
                "threadgroup variable", variable->name, outside, variable->item, variable->bytes),
        pc);
  }
  const auto name = [&] {
    return "element " + std::to_string(size_t(distance) / variable->item) +
        " of threadgroup variable '" + variable->name + "'";
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
        defer(
            Kind::uninitialized,
            std::string(verb(access)) + " " + name() + ", which this threadgroup never wrote", pc);
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

// Whether a thread that reads too early does so for lack of a barrier shows when another one writes:
// until the next barrier, or another fault, this one waits.
void Launch::defer(Kind kind, std::string text, uintptr_t pc) {
  if (!deferred_) {
    deferred_ = std::make_unique<Fault>(fault_of(kind, std::move(text)));
    deferred_->thread = describe_thread(current_);
    deferred_->offset = pc - library_.begin();
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

template <Access kind, size_t bytes>
void one(const void* address) {
  Launch* launch = current_launch();
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!launch->on_own_stack(at)) {
    launch->access(at, bytes, kind, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
}

template <Access kind>
void range(const void* address, size_t bytes) {
  Launch* launch = current_launch();
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (bytes != 0 && !launch->on_own_stack(at)) {
    launch->access(at, bytes, kind, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
}

void update(const void* address, size_t bytes, uint32_t kind) {
  current_launch()->access(
      reinterpret_cast<uintptr_t>(address), bytes, Access(kind),
      reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

// The frames are read before anything is called: a last call may take the place of ours.
void barrier(uint32_t flags, uint32_t simdgroup, const Site* site) {
  Launch* launch = current_launch();
  launch->trace(static_cast<void**>(__builtin_frame_address(0)));
  launch->barrier(flags, simdgroup != 0, *site);
}

const Exchange* exchange(const void* value, size_t bytes, const Site* site) {
  Launch* launch = current_launch();
  launch->trace(static_cast<void**>(__builtin_frame_address(0)));
  return launch->exchange(value, bytes, *site);
}

void* shared(SharedVariable* variable) {
  return current_launch()->shared(*variable);
}

void index_outside(const Site* site, int64_t index, const char* type) {
  current_launch()->fail_at(
      Kind::out_of_bounds, "takes element " + std::to_string(index) + " of " + type, *site);
}

void misaligned(const Site* site, const void* address, size_t alignment, const char* type) {
  current_launch()->misaligned(*site, reinterpret_cast<uintptr_t>(address), alignment, type);
}

} // namespace

const Hooks& hooks() {
  static const Hooks functions{
      {one<kRead, 1>, one<kRead, 2>, one<kRead, 4>, one<kRead, 8>, one<kRead, 16>},
      {one<kWrite, 1>, one<kWrite, 2>, one<kWrite, 4>, one<kWrite, 8>, one<kWrite, 16>},
      range<kRead>,
      range<kWrite>,
      update,
      barrier,
      exchange,
      shared,
      index_outside,
      misaligned,
  };
  return functions;
}

} // namespace zmlx::emulator
