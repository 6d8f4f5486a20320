// What kernels use of MLX's own header: how shapes and strides are passed. A kernel that uses more of
// it does not compile with this one, and is left to MLX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "zmlx/standard.cuh"

#define MAX_NDIM 10
#define WARP_SIZE 32

namespace mlx::core::cu {

using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;

}  // namespace mlx::core::cu
