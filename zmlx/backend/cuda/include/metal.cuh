// What the Metal Shading Language has and CUDA has not, by Metal's names.
#pragma once

#include "atomics.cuh"
#include "grid.cuh"
#include "math.cuh"
#include "simd.cuh"
