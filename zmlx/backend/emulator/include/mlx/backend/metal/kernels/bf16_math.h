// In place of MLX's file of this name: the functions of bfloat come with all others.
#pragma once

#include <zmlx/metal.h>
