// The stock operations that a program (program.h) runs itself, in the same arithmetic.
#pragma once

#include <memory>

#include "fused.h"

namespace zmlx {

// One kind of operation. A view is another look at its input's memory; what is no view computes.
struct Operation {
  const char* name; // of the class in mlx::core

  // Whether the operation that made this array is one that is known in full.
  bool (*takes)(const mx::array& out);

  // For views, else null: set where the outputs lie, given where the input lies. False if that
  // needs a copy, which only an operation of one output may say; shape and dtype are set already.
  bool (*view)(mx::Primitive& primitive, const View& input, View* outputs, int count);

  // For what computes, else null.
  void (*run)(mx::Primitive& primitive, Operands inputs, const View& output);
};

// The operation that made an array, or null if it is not known.
const Operation* operation_of(const mx::array& array);

// Whether an operation replaces a part of its first input and leaves the rest.
bool updates_first(const Operation& operation);

// Write the update into memory that already holds the first input.
void run_update(mx::Primitive& primitive, Operands inputs, const View& output);

} // namespace zmlx
