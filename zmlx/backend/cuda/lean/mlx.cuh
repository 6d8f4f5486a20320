// What kernels use of MLX's own header: how shapes and strides are passed, and where an element lies.
// A kernel that uses more of it does not compile with this one, and is left to MLX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "zmlx/standard.cuh"

#define MAX_NDIM 10
#define WARP_SIZE 32

namespace mlx::core::cu {

using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;

template <typename Index = int64_t>
Index elem_to_loc(Index element, const int* shape, const int64_t* strides, int ndim) {
  Index at = 0;
  for (int axis = ndim - 1; axis >= 0 && element > 0; --axis) {
    at += element % shape[axis] * Index(strides[axis]);
    element /= shape[axis];
  }
  return at;
}

}  // namespace mlx::core::cu
