// A CUDA driver without a device: graphs of a few kernels that it knows run at once, on the host.
#include "fake_driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "recording.h"

namespace {

struct Kernel {
  std::string name;
  // Bytes of each argument.
  std::vector<size_t> arguments;
};

const std::map<std::string, std::vector<size_t>> kKnown = {
    {"zmlx_move", {sizeof(zmlx::Moves)}},
    {"add", {8, 8, 8}},
    {"scale", {8, 4, 8}},
    {"append", {8, 8, 8}},
};

struct Node {
  Kernel* kernel;
  unsigned threads, rows;
  std::vector<std::vector<char>> arguments;
};

// One after another: of each node but the last how the next waits for it, 0 if it does not.
struct Graph {
  std::vector<Node*> nodes;
  std::string edges;
};

struct Executable {
  std::vector<Node*> order;
  std::map<Node*, Node> nodes;
};

struct Module {
  std::vector<Kernel*> kernels;
};

std::string events;
int living = 0;
int failing = 0;
int capability = 9;
std::string edges;

Node filled(const CUDA_KERNEL_NODE_PARAMS& given) {
  Node node{reinterpret_cast<Kernel*>(given.func), given.gridDimX * given.blockDimX, given.gridDimY, {}};
  for (size_t i = 0; i < node.kernel->arguments.size(); ++i) {
    const char* from = static_cast<const char*>(given.kernelParams[i]);
    node.arguments.emplace_back(from, from + node.kernel->arguments[i]);
  }
  return node;
}

template <typename T>
T read(const Node& node, size_t i) {
  T value;
  std::memcpy(&value, node.arguments[i].data(), sizeof(T));
  return value;
}

void run(const Node& node) {
  if (node.kernel->name == "zmlx_move") {
    const auto moves = read<zmlx::Moves>(node, 0);
    for (unsigned i = 0; i < node.rows; ++i) {
      std::memcpy(
          reinterpret_cast<void*>(moves.to[i]), reinterpret_cast<void*>(moves.from[i]),
          moves.bytes[i]);
    }
    return;
  }
  float* const x = read<float*>(node, 0);
  float* const out = read<float*>(node, 2);
  for (unsigned i = 0; i < node.threads; ++i) {
    if (node.kernel->name == "scale") {
      out[i] = x[i] * float(read<int>(node, 1));
    } else {
      float* const y = read<float*>(node, 1);
      out[i] = x[i] + y[i];
      if (node.kernel->name == "append") {
        y[i] = x[i];
      }
    }
  }
}

} // namespace

std::string fake_events() {
  return std::exchange(events, "");
}

int fake_living() {
  return living;
}

std::string fake_edges() {
  return edges;
}

void fake_capability(int major) {
  capability = major;
}

void fake_failure() {
  failing = 1;
}

extern "C" {

CUresult cuGetErrorString(CUresult, const char** said) {
  *said = "as asked";
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext) {
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext*) {
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(1);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute asked, CUdevice) {
  *value = asked == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? capability : 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr) {
  *static_cast<unsigned*>(value) = 1;
  return CUDA_SUCCESS;
}
CUresult cuMemAllocAsync(CUdeviceptr* data, size_t size, CUstream) {
  ++living;
  *data = reinterpret_cast<CUdeviceptr>(std::malloc(size));
  return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr data) {
  --living;
  std::free(reinterpret_cast<void*>(data));
  return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void*) {
  return CUDA_ERROR_INVALID_VALUE;
}
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  ++living;
  *module = reinterpret_cast<CUmodule>(new Module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const auto known = kKnown.find(name);
  if (known == kKnown.end()) {
    return CUDA_ERROR_NOT_FOUND;
  }
  auto& kernels = reinterpret_cast<Module*>(module)->kernels;
  kernels.push_back(new Kernel{name, known->second});
  *function = reinterpret_cast<CUfunction>(kernels.back());
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  --living;
  auto* unloaded = reinterpret_cast<Module*>(module);
  for (Kernel* kernel : unloaded->kernels) {
    delete kernel;
  }
  delete unloaded;
  return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* event, unsigned) {
  ++living;
  *event = reinterpret_cast<CUevent>(1);
  return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent, CUstream stream) {
  events += "record" + std::to_string(reinterpret_cast<size_t>(stream)) + " ";
  return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent) {
  events += "synchronize ";
  return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent) {
  --living;
  return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent, unsigned) {
  events += "wait" + std::to_string(reinterpret_cast<size_t>(stream)) + " ";
  return CUDA_SUCCESS;
}
CUresult cuGraphCreate(CUgraph* graph, unsigned) {
  ++living;
  *graph = reinterpret_cast<CUgraph>(new Graph);
  return CUDA_SUCCESS;
}
CUresult cuGraphAddKernelNode(
    CUgraphNode* node, CUgraph graph, const CUgraphNode* before, size_t count,
    const CUDA_KERNEL_NODE_PARAMS* given) {
  auto* to = reinterpret_cast<Graph*>(graph);
  auto& nodes = to->nodes;
  if (count != 0) {
    if (nodes.empty() || count != 1 || *before != reinterpret_cast<CUgraphNode>(nodes.back())) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    to->edges.back() = '-';
  }
  nodes.push_back(new Node(filled(*given)));
  to->edges.push_back(0);
  *node = reinterpret_cast<CUgraphNode>(nodes.back());
  return CUDA_SUCCESS;
}
#ifndef OLD_DRIVER
CUresult cuGraphAddDependencies_v2(
    CUgraph graph, const CUgraphNode* from, const CUgraphNode* after, const CUgraphEdgeData* data,
    size_t count) {
  auto* to = reinterpret_cast<Graph*>(graph);
  const size_t nodes = to->nodes.size();
  const bool known = nodes > 1 && count == 1 &&
      *from == reinterpret_cast<CUgraphNode>(to->nodes[nodes - 2]) &&
      *after == reinterpret_cast<CUgraphNode>(to->nodes[nodes - 1]) && to->edges[nodes - 2] == 0;
  if (!known || capability < 9 || data->to_port != 0 ||
      data->from_port != CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC ||
      data->type != CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  to->edges[nodes - 2] = 'p';
  return CUDA_SUCCESS;
}
#endif
CUresult cuGraphInstantiate(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  if (std::exchange(failing, 0) != 0) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  edges = reinterpret_cast<Graph*>(graph)->edges;
  edges.pop_back();
  if (edges.find('\0') != std::string::npos) {
    return CUDA_ERROR_INVALID_VALUE; // such nodes would run side by side
  }
  ++living;
  auto* made = new Executable;
  for (Node* node : reinterpret_cast<Graph*>(graph)->nodes) {
    made->order.push_back(node);
    made->nodes.emplace(node, *node);
  }
  *executable = reinterpret_cast<CUgraphExec>(made);
  return CUDA_SUCCESS;
}
CUresult cuGraphExecKernelNodeSetParams(
    CUgraphExec executable, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS* given) {
  auto* of = reinterpret_cast<Executable*>(executable);
  if (std::exchange(failing, 0) != 0) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  const auto found = of->nodes.find(reinterpret_cast<Node*>(node));
  if (found == of->nodes.end()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  found->second = filled(*given);
  events += "tell:" + found->second.kernel->name + " ";
  return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  events += "launch" + std::to_string(reinterpret_cast<size_t>(stream)) + " ";
  auto* launched = reinterpret_cast<Executable*>(executable);
  for (Node* node : launched->order) {
    run(launched->nodes.at(node));
  }
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) {
  --living;
  delete reinterpret_cast<Executable*>(executable);
  return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
  --living;
  auto* destroyed = reinterpret_cast<Graph*>(graph);
  for (Node* node : destroyed->nodes) {
    delete node;
  }
  delete destroyed;
  return CUDA_SUCCESS;
}

} // extern "C"
