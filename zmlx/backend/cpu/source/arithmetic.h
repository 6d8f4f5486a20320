// Stock operations that compute, for programs: results are rounded once, sums are float32.
#pragma once

#include <span>

#include "operations.h"

namespace zmlx {

std::span<const Operation> arithmetic();

} // namespace zmlx
