// Device memory for results: blocks that are used again when their arrays have gone.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <cuda.h>

#include "mlx/array.h"
#include "mlx/backend/cuda/allocator.h"

namespace zmlx {

namespace mx = mlx::core;

// MLX does not let others allocate what its own operations do. A block that comes back is given out
// at once, on the stream that it was made for: whoever read it has finished, since MLX keeps what a
// kernel reads until then, and what wrote to it was put on the stream before.
class Blocks : public std::enable_shared_from_this<Blocks> {
 public:
  // Of the current context.
  Blocks();
  ~Blocks();
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;

  // Give an array memory; what runs on the stream afterwards may write it. Returns its address.
  CUdeviceptr give(mx::array& array, CUstream stream);

 private:
  // A stream and a size.
  using Key = std::pair<CUstream, size_t>;

  void take_back(mx::cu::CudaBuffer* block, CUstream stream);

  CUcontext context_ = nullptr;
  CUdevice device_ = 0;
  std::mutex mutex_;
  // Blocks that nobody holds.
  std::map<Key, std::vector<mx::cu::CudaBuffer*>> free_;
};

} // namespace zmlx
