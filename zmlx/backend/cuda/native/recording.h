// Launches of kernels that are always the same, as one CUDA graph.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <cuda.h>

#include "blocks.h"
#include "mlx/array.h"
#include "places.h"

namespace zmlx {

// What a kernel is given: bytes by value, or an address in the arena (`index` 0), in a fixed array
// or in a buffer, which comes anew with each launch.
enum class Base { bytes, arena, fixed, buffer };

struct Argument {
  Base base;
  size_t index;
  uint64_t offset;
  std::string bytes;
};

struct Launch {
  size_t function;
  std::array<unsigned, 3> grid;
  std::array<unsigned, 3> block;
  std::vector<Argument> arguments;
};

// A part of the arena.
struct Part {
  uint64_t offset;
  uint64_t bytes;
};

struct Plan {
  // Binaries, and the name of the one kernel in each.
  std::vector<std::pair<std::string, std::string>> functions;
  // Which of them copies arrays; it is given a `Moves`.
  size_t mover;
  std::vector<Launch> launches;
  // Where copies of the inputs go, and where the results are when all launches have run.
  std::vector<Part> inputs;
  std::vector<Part> results;
  size_t buffers;
  // Let a kernel come to the device while the one before runs. All of them begin with a wait.
  bool overlapped = false;
};

// What the kernel that copies is given.
constexpr size_t kMostMoves = 128;
struct Moves {
  uint64_t from[kMostMoves];
  uint64_t to[kMostMoves];
  uint32_t bytes[kMostMoves];
};

class Recording {
 public:
  // `arena` and `fixed` have been computed; nothing else writes to the arena.
  Recording(Plan plan, mx::array arena, std::vector<mx::array> fixed);
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  // Put all launches on a stream. `inputs` are copied, then come the buffers; the outputs get
  // memory of their own. All lie in row order. From any thread.
  void launch(
      CUstream stream, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

  const Plan& plan() const {
    return plan_;
  }

  // Whether kernels overlap: as the plan says, where the device and the driver can do it.
  bool overlapped() const {
    return overlapped_;
  }

 private:
  struct Node;

  void add_all();
  void add(Node node);
  void let_overlap(CUgraphNode before, CUgraphNode after);
  void fill(Node& node, const Launch& launch);
  void move(Node& node, const Moves& moves, size_t count);
  void point_at(const std::vector<mx::array>& inputs);
  void tell(Node& node);
  uint64_t address(const Argument& argument) const;
  void release();

  Plan plan_;
  mx::array arena_;
  Places fixed_;
  std::shared_ptr<Blocks> blocks_;
  CUcontext context_ = nullptr;
  bool overlapped_ = false;
  std::vector<CUmodule> modules_;
  std::vector<CUfunction> functions_;
  // Copy in, the launches, copy out.
  std::vector<Node> nodes_;
  // For each fixed array and each buffer the nodes that are given it.
  std::vector<std::vector<size_t>> users_of_fixed_;
  std::vector<std::vector<size_t>> users_;
  // Where each buffer was at the last launch.
  std::vector<uint64_t> at_;
  // The nodes are those of the graph, and stand for their copies in what is launched.
  CUgraph graph_ = nullptr;
  CUgraphExec executable_ = nullptr;
  // When the last launch has run, and where that was.
  CUevent done_ = nullptr;
  CUstream last_ = nullptr;
  bool launched_ = false;
  std::mutex mutex_;
};

} // namespace zmlx
