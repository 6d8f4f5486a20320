// One unit, because both read nanobind's headers and MLX's.
#include "binding.cpp"
#include "emulator_binding.cpp"
