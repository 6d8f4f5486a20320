// The words of the Metal Shading Language that C++ has not. Address spaces say nothing here: what a
// pointer may point at is checked when the kernel runs.
#pragma once

#define device
#define threadgroup
#define threadgroup_imageblock
#define constant
#define thread
#define kernel
#define ray_data
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST const
#define METAL_PURE
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1
#define MLX_METAL_JIT 1
