// Where a thread stands, and barriers.
//
// MLX launches ceil(grid / threadgroup) whole blocks. On Metal the last threadgroup of an axis is cut
// off at the grid's end: threads outside do not exist, and simdgroups are formed of those that do.
// So the threads of a cut block are dealt out anew, in order; what remains of the block returns.
#pragma once

#include "vectors.cuh"

namespace mlx::core::cu::metal {

constexpr uint product(uint3 v) { return v.x * v.y * v.z; }

template <class Self>
struct grid_names {
  uint3 block_size() const { return {blockDim.x, blockDim.y, blockDim.z}; }
  uint3 block() const { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  uint3 blocks() const { return {gridDim.x, gridDim.y, gridDim.z}; }
  uint position_in_block() const {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  }
  const Self& self() const { return static_cast<const Self&>(*this); }

  uint3 threadgroup_position_in_grid() const { return block(); }
  uint3 threadgroups_per_grid() const { return blocks(); }
  uint3 dispatch_threads_per_threadgroup() const { return block_size(); }
  uint3 threads_per_threadgroup() const { return self().size(); }
  uint3 thread_position_in_threadgroup() const { return self().thread(); }
  uint3 thread_position_in_grid() const { return block() * block_size() + self().thread(); }
  uint3 threads_per_grid() const { return self().grid(); }
  uint3 grid_size() const { return self().grid(); }
  uint3 grid_origin() const { return {0, 0, 0}; }
  uint thread_index_in_threadgroup() const { return position_in_block(); }
  uint thread_index_in_simdgroup() const { return position_in_block() % 32; }
  uint thread_index_in_quadgroup() const { return position_in_block() % 4; }
  uint simdgroup_index_in_threadgroup() const { return position_in_block() / 32; }
  uint quadgroup_index_in_threadgroup() const { return position_in_block() / 4; }
  uint threads_per_simdgroup() const { return 32; }
  uint thread_execution_width() const { return 32; }
  uint simdgroups_per_threadgroup() const { return (product(self().size()) + 31) / 32; }
  uint quadgroups_per_threadgroup() const { return (product(self().size()) + 3) / 4; }
  uint dispatch_simdgroups_per_threadgroup() const { return (product(block_size()) + 31) / 32; }
  uint dispatch_quadgroups_per_threadgroup() const { return (product(block_size()) + 3) / 4; }
};

// The grid is a multiple of the threadgroup.
struct whole_grid : grid_names<whole_grid> {
  uint3 size() const { return block_size(); }
  uint3 thread() const { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
  uint3 grid() const { return blocks() * block_size(); }
};

// It is not; `threads` holds the grid's size.
struct cut_grid : grid_names<cut_grid> {
  uint3 all, here;
  explicit cut_grid(const int* threads) : all(threads[0], threads[1], threads[2]) {
    const uint3 before = block() * block_size(), left = all - before;
    for (int i = 0; i < 3; ++i)
      here[i] = before[i] >= all[i] ? 0 : left[i] < block_size()[i] ? left[i] : block_size()[i];
  }
  bool outside() const { return position_in_block() >= product(here); }
  uint3 size() const { return here; }
  uint3 thread() const {
    const uint i = position_in_block(), row = here.x;
    if (blockDim.y * blockDim.z == 1) return {i, 0, 0};
    return {i % row, i / row % here.y, i / row / here.y};
  }
  uint3 grid() const { return all; }
};

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }

// Threads that have returned are not waited for.
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

}  // namespace mlx::core::cu::metal
