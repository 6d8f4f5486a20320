// What every kernel begins with; compiled once. MLX puts its utils.h before a custom kernel.
#pragma once

#include <zmlx/metal.h>
#include <zmlx/words.h>

using namespace metal;

#include "mlx/backend/metal/kernels/utils.h"
