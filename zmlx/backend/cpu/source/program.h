// Many operations as one: a part of a graph, run in one go on the CPU.
//
// MLX makes an array, a task and a lock for every operation; in a decode step of a small model they
// take longer than the arithmetic. A program holds a list of operations with their shapes, and
// when it runs, it only follows pointers.
#pragma once

#include <memory>
#include <vector>

#include "fused.h"
#include "operations.h"

namespace zmlx {

// One operation of a program. Values are counted: first the inputs, then the constants, then the
// outputs of each step.
struct ProgramStep {
  const Operation* operation;
  std::shared_ptr<mx::Primitive> primitive;
  std::vector<int> inputs;
  int first_output;
  int outputs;
};

struct ProgramValue {
  mx::Shape shape;
  mx::Dtype dtype;
  int result = -1; // its number among the program's outputs
  int uses = 0; // steps that read it
  int last_use = -1; // the last step that reads it, or a view of it
};

class Program : public mx::Primitive {
 public:
  Program(
      mx::Stream stream,
      std::vector<ProgramStep> steps,
      std::vector<ProgramValue> values,
      Arrays constants);

  const char* name() const override {
    return "ZmlxProgram";
  }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;

 private:
  friend class Layout;

  std::vector<ProgramStep> steps_;
  std::vector<ProgramValue> values_;
  Arrays constants_; // computed already; weights above all
};

} // namespace zmlx
