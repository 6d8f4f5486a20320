#include <cassert>

#include "blocks.h"

#include <algorithm>
#include <stdexcept>

#include "driver.h"

namespace zmlx {
namespace {

// MLX moves memory that the host asks for, and then it is of one of two other kinds.
void free_moved(void* data) {
  unsigned managed = 0;
  const auto address = reinterpret_cast<CUdeviceptr>(data);
  ZMLX_DRIVER(cuPointerGetAttribute)(&managed, CU_POINTER_ATTRIBUTE_IS_MANAGED, address);
  if (managed != 0) {
    ZMLX_DRIVER(cuMemFree)(address);
  } else {
    ZMLX_DRIVER(cuMemFreeHost)(data);
  }
}

} // namespace

Blocks::Blocks() {
  ZMLX_CALL(cuCtxGetCurrent, &context_);
  ZMLX_CALL(cuCtxGetDevice, &device_);
  int pools = 0;
  ZMLX_CALL(cuDeviceGetAttribute, &pools, CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, device_);
  if (pools == 0) {
    throw std::runtime_error("[zmlx] this device has no memory pools");
  }
}

Blocks::~Blocks() {
  // Nothing can be done about a failure: at the end of a process there is no driver any more.
  CUcontext before = nullptr;
  ZMLX_DRIVER(cuCtxPushCurrent)(context_);
  for (auto& [key, blocks] : free_) {
    for (mx::cu::CudaBuffer* block : blocks) {
      ZMLX_DRIVER(cuMemFree)(reinterpret_cast<CUdeviceptr>(block->data));
      delete block;
    }
  }
  ZMLX_DRIVER(cuCtxPopCurrent)(&before);
}

CUdeviceptr Blocks::give(mx::array& array, CUstream stream) {
  const size_t size = std::max<size_t>(array.nbytes(), 16);
  mx::cu::CudaBuffer* block = nullptr;
  {
    std::lock_guard lock(mutex_);
    auto& blocks = free_[{stream, size}];
    if (!blocks.empty()) {
      block = blocks.back();
      blocks.pop_back();
    }
  }
  if (block == nullptr) {
    CUdeviceptr data = 0;
    ZMLX_CALL(cuMemAllocAsync, &data, size, stream);
    block = new mx::cu::CudaBuffer{reinterpret_cast<void*>(data), size, int(device_)};
  }
  const auto address = reinterpret_cast<CUdeviceptr>(block->data);
  array.set_data(mx::allocator::Data(
      mx::allocator::Buffer(block),
      [owner = shared_from_this(), stream](mx::allocator::Buffer buffer) {
        owner->take_back(static_cast<mx::cu::CudaBuffer*>(buffer.ptr()), stream);
      }));
  return address;
}

void Blocks::take_back(mx::cu::CudaBuffer* block, CUstream stream) {
  if (block->device == int(device_)) {
    std::lock_guard lock(mutex_);
    free_[{stream, block->size}].push_back(block);
    return;
  }
  CUcontext before = nullptr;
  ZMLX_DRIVER(cuCtxPushCurrent)(context_);
  free_moved(block->data);
  ZMLX_DRIVER(cuCtxPopCurrent)(&before);
  delete block;
}

} // namespace zmlx
