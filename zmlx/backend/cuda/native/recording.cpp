#include <cassert>

#include "recording.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "driver.h"
#include "mlx/backend/cuda/utils.h"

namespace zmlx {
namespace {

uint64_t address_of(const mx::array& array) {
  return reinterpret_cast<uint64_t>(mx::gpu_ptr<void>(array));
}

// Edges of a graph say more than which node comes first from version 12.3 of CUDA on.
#if CUDA_VERSION >= 12030
auto edges_with_data() {
  return ZMLX_DRIVER_IF_ANY(cuGraphAddDependencies_v2);
}
#endif

bool can_overlap() {
#if CUDA_VERSION >= 12030
  CUdevice device = 0;
  int major = 0;
  ZMLX_CALL(cuCtxGetDevice, &device);
  ZMLX_CALL(
      cuDeviceGetAttribute, &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  return major >= 9 && edges_with_data() != nullptr;
#else
  return false;
#endif
}

} // namespace

// A kernel of the graph with its arguments, which have to be where they are while it is there.
struct Recording::Node {
  CUgraphNode node = nullptr;
  size_t function = 0;
  std::array<unsigned, 3> grid{1, 1, 1};
  std::array<unsigned, 3> block{1, 1, 1};
  std::vector<std::vector<uint64_t>> values;

  // Valid until `pointers` goes or the values are others.
  CUDA_KERNEL_NODE_PARAMS parameters(CUfunction kernel, std::vector<void*>& pointers) {
    pointers.clear();
    for (auto& value : values) {
      pointers.push_back(value.data());
    }
    CUDA_KERNEL_NODE_PARAMS given{};
    given.func = kernel;
    given.gridDimX = grid[0];
    given.gridDimY = grid[1];
    given.gridDimZ = grid[2];
    given.blockDimX = block[0];
    given.blockDimY = block[1];
    given.blockDimZ = block[2];
    given.kernelParams = pointers.data();
    return given;
  }
};

Recording::Recording(Plan plan, mx::array arena, std::vector<mx::array> fixed)
    : plan_(std::move(plan)), arena_(std::move(arena)), fixed_(std::move(fixed)) {
  if (std::max(plan_.inputs.size(), plan_.results.size()) > kMostMoves) {
    throw std::invalid_argument("[zmlx] too many arrays to copy");
  }
  try {
    ZMLX_CALL(cuCtxGetCurrent, &context_);
    overlapped_ = plan_.overlapped && can_overlap();
    blocks_ = std::make_shared<Blocks>();
    for (const auto& [binary, name] : plan_.functions) {
      modules_.push_back(nullptr);
      ZMLX_CALL(cuModuleLoadData, &modules_.back(), binary.data());
      functions_.push_back(nullptr);
      ZMLX_CALL(cuModuleGetFunction, &functions_.back(), modules_.back(), name.c_str());
    }
    ZMLX_CALL(cuEventCreate, &done_, CU_EVENT_DISABLE_TIMING);
    at_.assign(plan_.buffers, 0);
    users_.resize(plan_.buffers);
    users_of_fixed_.resize(fixed_.count());
    ZMLX_CALL(cuGraphCreate, &graph_, 0);
    add_all();
    ZMLX_CALL(cuGraphInstantiate, &executable_, graph_, 0);
  } catch (...) {
    release();
    throw;
  }
}

Recording::~Recording() {
  release();
}

// Nothing can be done about a failure: at the end of a process there is no driver any more.
void Recording::release() {
  if (context_ == nullptr) {
    return;
  }
  CUcontext before = nullptr;
  ZMLX_DRIVER(cuCtxPushCurrent)(context_);
  if (launched_) {
    ZMLX_DRIVER(cuEventSynchronize)(done_);
  }
  if (executable_ != nullptr) {
    ZMLX_DRIVER(cuGraphExecDestroy)(executable_);
  }
  if (graph_ != nullptr) {
    ZMLX_DRIVER(cuGraphDestroy)(graph_);
  }
  if (done_ != nullptr) {
    ZMLX_DRIVER(cuEventDestroy)(done_);
  }
  for (CUmodule module : modules_) {
    if (module != nullptr) {
      ZMLX_DRIVER(cuModuleUnload)(module);
    }
  }
  ZMLX_DRIVER(cuCtxPopCurrent)(&before);
}

void Recording::add_all() {
  Node copies;
  copies.function = plan_.mover;
  copies.block = {256, 1, 1};
  move(copies, Moves{}, 0);
  add(copies);
  for (const Launch& launch : plan_.launches) {
    Node node;
    node.function = launch.function;
    node.grid = launch.grid;
    node.block = launch.block;
    fill(node, launch);
    for (const Argument& argument : launch.arguments) {
      if (argument.base == Base::buffer) {
        users_.at(argument.index).push_back(nodes_.size());
      } else if (argument.base == Base::fixed) {
        users_of_fixed_.at(argument.index).push_back(nodes_.size());
      }
    }
    add(std::move(node));
  }
  add(std::move(copies));
}

// One after another: each kernel waits for the one before, or begins with the wait itself.
void Recording::add(Node node) {
  std::vector<void*> pointers;
  const auto given = node.parameters(functions_.at(node.function), pointers);
  const CUgraphNode* before = nodes_.empty() ? nullptr : &nodes_.back().node;
  const size_t waits = before != nullptr && !overlapped_;
  ZMLX_CALL(cuGraphAddKernelNode, &node.node, graph_, before, waits, &given);
  if (before != nullptr && overlapped_) {
    let_overlap(*before, node.node);
  }
  nodes_.push_back(std::move(node));
}

// `after` may start when all blocks of `before` have let it (`overlapped.cuh`).
void Recording::let_overlap(CUgraphNode before, CUgraphNode after) {
#if CUDA_VERSION >= 12030
  CUgraphEdgeData edge{};
  edge.from_port = CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC;
  edge.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
  check(edges_with_data()(graph_, &before, &after, &edge, 1), "cuGraphAddDependencies_v2");
#endif
}

void Recording::fill(Node& node, const Launch& launch) {
  node.values.clear();
  for (const Argument& argument : launch.arguments) {
    if (argument.base != Base::bytes) {
      node.values.push_back({address(argument)});
      continue;
    }
    std::vector<uint64_t> value((argument.bytes.size() + 7) / 8);
    std::memcpy(value.data(), argument.bytes.data(), argument.bytes.size());
    node.values.push_back(std::move(value));
  }
}

uint64_t Recording::address(const Argument& argument) const {
  switch (argument.base) {
    case Base::arena:
      return address_of(arena_) + argument.offset;
    case Base::fixed:
      return fixed_.at(argument.index) + argument.offset;
    default:
      return at_.at(argument.index) + argument.offset;
  }
}

void Recording::move(Node& node, const Moves& moves, size_t count) {
  // A row of blocks for each array; each block moves some 16 KB, unless an array is a large one.
  const uint32_t longest = *std::max_element(moves.bytes, moves.bytes + kMostMoves);
  node.grid = {std::clamp(longest >> 14, 1u, 64u), unsigned(std::max<size_t>(count, 1)), 1};
  std::vector<uint64_t> value((sizeof(Moves) + 7) / 8);
  std::memcpy(value.data(), &moves, sizeof(Moves));
  node.values.assign(1, std::move(value));
}

// Tell the nodes of arrays that are elsewhere than at the last launch.
void Recording::point_at(const std::vector<mx::array>& inputs) {
  std::vector<size_t> changed;
  fixed_.each_moved([&](size_t i) {
    changed.insert(changed.end(), users_of_fixed_[i].begin(), users_of_fixed_[i].end());
  });
  for (size_t i = 0; i < plan_.buffers; ++i) {
    const uint64_t now = address_of(inputs[plan_.inputs.size() + i]);
    if (now != at_[i]) {
      at_[i] = now;
      changed.insert(changed.end(), users_[i].begin(), users_[i].end());
    }
  }
  std::sort(changed.begin(), changed.end());
  changed.erase(std::unique(changed.begin(), changed.end()), changed.end());
  for (size_t at : changed) {
    // The first node copies.
    fill(nodes_[at], plan_.launches[at - 1]);
    tell(nodes_[at]);
  }
}

// Only launches to come are given this, not those that run.
void Recording::tell(Node& node) {
  std::vector<void*> pointers;
  const auto given = node.parameters(functions_[node.function], pointers);
  ZMLX_CALL(cuGraphExecKernelNodeSetParams, executable_, node.node, &given);
}

void Recording::launch(
    CUstream stream, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  if (inputs.size() != plan_.inputs.size() + plan_.buffers ||
      outputs.size() != plan_.results.size()) {
    throw std::invalid_argument("[zmlx] a recording got other arrays than it was made for");
  }
  std::lock_guard lock(mutex_);
  if (launched_ && stream != last_) {
    ZMLX_CALL(cuStreamWaitEvent, stream, done_, 0);
  }
  try {
    point_at(inputs);
  } catch (...) {
    at_.assign(plan_.buffers, 0); // all are told anew
    fixed_.forget();
    throw;
  }
  const uint64_t arena = address_of(arena_);
  Moves into{}, out{};
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    const Part& part = plan_.inputs[i];
    if (inputs[i].nbytes() != part.bytes) {
      throw std::invalid_argument("[zmlx] a recording got an array of another size");
    }
    into.from[i] = address_of(inputs[i]);
    into.to[i] = arena + part.offset;
    into.bytes[i] = uint32_t(part.bytes);
  }
  move(nodes_.front(), into, plan_.inputs.size());
  tell(nodes_.front());
  for (size_t i = 0; i < plan_.results.size(); ++i) {
    const Part& part = plan_.results[i];
    if (outputs[i].nbytes() != part.bytes) {
      throw std::invalid_argument("[zmlx] a recording makes an array of another size");
    }
    out.from[i] = arena + part.offset;
    out.to[i] = blocks_->give(outputs[i], stream);
    out.bytes[i] = uint32_t(part.bytes);
  }
  move(nodes_.back(), out, plan_.results.size());
  tell(nodes_.back());
  ZMLX_CALL(cuGraphLaunch, executable_, stream);
  last_ = stream;
  launched_ = true;
  ZMLX_CALL(cuEventRecord, done_, stream);
}

} // namespace zmlx
