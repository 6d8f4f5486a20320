#include "emulator_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <system_error>
#include <utility>

namespace zmlx::emulator {

Reservation::Reservation(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) {
    return;
  }
  void* memory = mmap(
      nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "[emulator] no memory for arrays");
  }
  begin_ = static_cast<char*>(memory);
}

Reservation::~Reservation() {
  if (begin_ != nullptr) {
    munmap(begin_, bytes_);
  }
}

Reservation::Reservation(Reservation&& other) noexcept
    : begin_(std::exchange(other.begin_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  std::swap(begin_, other.begin_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Memory::Memory(std::vector<Buffer>& buffers) : buffers_(buffers) {
  size_t largest = 1 << 24;
  for (const Buffer& buffer : buffers) {
    largest = std::max(largest, buffer.bytes);
  }
  // A part of the address space is four times the largest array, which lies in its middle.
  const size_t part = std::bit_ceil(largest) * 4;
  shift_ = unsigned(std::countr_zero(part));
  reservation_ = Reservation(part * buffers.size());
  base_ = reinterpret_cast<uintptr_t>(reservation_.begin());
  for (size_t i = 0; i < buffers.size(); ++i) {
    buffers[i].data = reservation_.begin() + i * part + part / 4 + buffers[i].misalignment;
  }
}

SharedLayout::SharedLayout(SharedVariable* first) {
  size_t offset = kGap;
  for (SharedVariable* variable = first; variable != nullptr; variable = variable->next) {
    const size_t alignment = std::max<size_t>(variable->alignment, 1);
    device_bytes_ = (device_bytes_ + alignment - 1) / alignment * alignment + variable->bytes;
    variable->offset = offset;
    offset += (variable->bytes + kGap + 63) / 64 * 64;
    variables_.push_back(variable);
  }
  // Metal counts in pieces of 16 bytes.
  device_bytes_ = (device_bytes_ + 15) / 16 * 16;
  bytes_ = variables_.empty() ? 0 : offset;
}

const SharedVariable* SharedLayout::near(size_t offset, int64_t* distance) const {
  const SharedVariable* best = nullptr;
  int64_t least = 0;
  for (const SharedVariable* variable : variables_) {
    const int64_t from_start = int64_t(offset) - int64_t(variable->offset);
    const int64_t gap = from_start < 0
        ? -from_start
        : std::max<int64_t>(0, from_start - int64_t(variable->bytes) + 1);
    if (best == nullptr || gap < least) {
      best = variable;
      least = gap;
      *distance = from_start;
    }
  }
  return best;
}

} // namespace zmlx::emulator
