// Adds the emulator to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace zmlx {

// Adds `load_kernel`, `threadgroup_bytes`, `emulate` and `set_fault_exception`.
void bind_emulator(nanobind::module_& m);

} // namespace zmlx
