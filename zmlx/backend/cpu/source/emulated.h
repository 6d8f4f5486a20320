// Metal kernels, compiled for the CPU, as lazy MLX operations.
#pragma once

#include <nanobind/nanobind.h>

namespace zmlx {

// Adds `Kernel`, `emulate` and `set_fault_exception` to the module.
void bind_emulator(nanobind::module_& m);

} // namespace zmlx
