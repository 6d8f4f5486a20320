// Rewriting a graph that has not run yet: what programs can hold becomes programs.
#pragma once

#include "fused.h"

namespace zmlx {

// Return arrays with the values of `wanted`, computed by programs as far as their operations are
// known. Operations that are not known stay, between programs. The given arrays stay as they are.
Arrays fuse(const Arrays& wanted);

} // namespace zmlx
