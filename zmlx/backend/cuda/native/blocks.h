// Device memory for results: blocks that are used again when their arrays have gone.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include <cuda.h>

#include "mlx/array.h"
#include "mlx/backend/cuda/allocator.h"

namespace zmlx {

namespace mx = mlx::core;

// MLX does not let others allocate what its own operations do. A block that comes back is given out
// at once: whoever read it has finished, since MLX keeps what a kernel reads until then, and the
// writers, the launches of one recording, run one after another.
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
  void take_back(mx::cu::CudaBuffer* block);

  CUcontext context_ = nullptr;
  CUdevice device_ = 0;
  std::mutex mutex_;
  // size -> blocks that nobody holds
  std::map<size_t, std::vector<mx::cu::CudaBuffer*>> free_;
};

} // namespace zmlx
