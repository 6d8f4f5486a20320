// Rows of a weight as floats: what an embedding looks up.
#pragma once

#include "primitives.h"

namespace zmlx {

// indices (...) int -> (..., K), as mx.dequantize of the chosen rows, or the rows of a dense weight.
// Negative indices count from the end; one outside of the rows reads the nearest.
mx::array lookup(const mx::array& indices, const WeightArray& weight);

} // namespace zmlx
