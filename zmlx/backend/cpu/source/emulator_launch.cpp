#include "emulator_launch.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace zmlx::emulator {
namespace {

// One for all launches of an operating system thread: they follow each other.
Stacks& stacks_here() {
  static thread_local Stacks stacks;
  return stacks;
}

thread_local Launch* launch_here = nullptr;

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && a.column == b.column && std::strcmp(a.file, b.file) == 0;
}

std::string text_of(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string text_of(const Triple& triple) {
  return "(" + std::to_string(triple[0]) + ", " + std::to_string(triple[1]) + ", " +
      std::to_string(triple[2]) + ")";
}

size_t product(const Triple& triple) {
  return size_t(triple[0]) * triple[1] * triple[2];
}

Triple place_of(uint32_t index, const Triple& size) {
  return {index % size[0], index / size[0] % size[1], index / (size[0] * size[1])};
}

} // namespace

Library::Library(const std::string& file) : file_(file) {
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw std::runtime_error("[emulator] a compiled kernel does not load: " + std::string(dlerror()));
  }
  using Bind = SharedVariable* (*)(const Hooks*);
  const auto bind = reinterpret_cast<Bind>(dlsym(handle, "zmlx_bind"));
  entry_ = reinterpret_cast<Entry>(dlsym(handle, "zmlx_entry"));
  if (bind == nullptr || entry_ == nullptr) {
    throw std::runtime_error("[emulator] " + file + " is no compiled kernel");
  }
  shared_ = SharedLayout(bind(&hooks()));
  Dl_info info;
  dladdr(reinterpret_cast<void*>(entry_), &info);
  begin_ = reinterpret_cast<uintptr_t>(info.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* data) {
        auto* library = static_cast<Library*>(data);
        if (module->dlpi_addr != library->begin_) {
          return 0;
        }
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& header = module->dlpi_phdr[i];
          if (header.p_type == PT_LOAD) {
            library->bytes_ = std::max(library->bytes_, size_t(header.p_vaddr + header.p_memsz));
          }
        }
        return 1;
      },
      this);
}

Launch* current_launch() {
  return launch_here;
}

Launch::Launch(
    const Library& library, std::string name, std::vector<Buffer>& buffers, Memory& memory,
    std::vector<void*> arguments, Triple grid, Triple threadgroup)
    : library_(library),
      name_(std::move(name)),
      buffers_(buffers),
      memory_(memory),
      shared_(library.shared()),
      arguments_(std::move(arguments)),
      grid_(grid),
      threadgroup_(threadgroup),
      stacks_(stacks_here()) {}

void Launch::run() {
  for (int axis = 0; axis < 3; ++axis) {
    groups_[axis] = threadgroup_[axis] == 0
        ? 0
        : uint32_t((uint64_t(grid_[axis]) + threadgroup_[axis] - 1) / threadgroup_[axis]);
  }
  const uint32_t most = uint32_t(product(threadgroup_));
  threads_.resize(most);
  simdgroups_.resize((most + kLanes - 1) / kLanes);
  struct Here {
    Launch* before;
    Stacks& stacks;
    ~Here() {
      launch_here = before;
      stacks.reset();
    }
  } here{launch_here, stacks_};
  launch_here = this;
  for (uint32_t z = 0; z < groups_[2]; ++z) {
    for (uint32_t y = 0; y < groups_[1]; ++y) {
      for (uint32_t x = 0; x < groups_[0]; ++x) {
        const Triple group{x, y, z};
        Triple size;
        for (int axis = 0; axis < 3; ++axis) {
          size[axis] =
              std::min(threadgroup_[axis], grid_[axis] - group[axis] * threadgroup_[axis]);
        }
        run_threadgroup(group, size);
      }
    }
  }
  check_written();
}

void Launch::run_threadgroup(const Triple& group, const Triple& size) {
  group_ = group;
  size_ = size;
  ++group_number_;
  count_ = uint32_t(product(size));
  for (uint32_t i = 0; i < count_; ++i) {
    threads_[i].state = Thread::fresh;
  }
  const uint32_t simdgroups = (count_ + kLanes - 1) / kLanes;
  for (bool more = true; more;) {
    for (uint32_t i = 0; i < simdgroups; ++i) {
      run_simdgroup(i);
    }
    raise_deferred();
    more = std::any_of(threads_.begin(), threads_.begin() + count_, [](const Thread& thread) {
      return thread.state == Thread::at_barrier;
    });
    if (more) {
      release_barrier();
    }
  }
}

void Launch::raise_deferred() {
  if (deferred_) {
    throw *deferred_;
  }
}

// Runs the lanes of a simdgroup until each is done or waits at a barrier of the threadgroup.
void Launch::run_simdgroup(uint32_t index) {
  const uint32_t end = std::min(count_, (index + 1) * kLanes);
  do {
    for (uint32_t i = index * kLanes; i < end; ++i) {
      if (threads_[i].state <= Thread::ready) {
        run_thread(i);
      }
    }
  } while (meet(index));
}

// Lets lanes that wait at the same call go on together; returns whether there were any. Where lanes
// wait at different calls, those whose call comes first in the program go on: so do they meet the
// others again, as the lanes of a device do after a branch.
bool Launch::meet(uint32_t index) {
  const uint32_t begin = index * kLanes;
  const uint32_t end = std::min(count_, begin + kLanes);
  const Thread* first = nullptr;
  const Thread* barrier = nullptr;
  for (uint32_t i = begin; i < end; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == Thread::at_simd_barrier && barrier == nullptr) {
      barrier = &thread;
    }
    if (thread.state == Thread::at_exchange &&
        (first == nullptr || thread.callers < first->callers)) {
      first = &thread;
    }
  }
  if (first == nullptr && barrier == nullptr) {
    return false;
  }
  Simdgroup& group = simdgroups_[index];
  if (first == nullptr) {
    for (uint32_t i = begin; i < end; ++i) {
      Thread& thread = threads_[i];
      if (thread.state != Thread::at_simd_barrier || !same_site(thread.site, barrier->site)) {
        diverge(
            barrier->site,
            "a simdgroup_barrier that not all lanes reach: " +
                describe_thread(uint32_t(barrier - threads_.data())) + " waits there, while " +
                describe_thread(i) +
                (thread.state == Thread::done
                     ? " has returned"
                     : thread.state == Thread::at_barrier
                     ? " waits at the threadgroup_barrier in " + text_of(thread.site)
                     : " waits at the one in " + text_of(thread.site)));
      }
      thread.state = Thread::ready;
    }
    ++group.epoch;
    return true;
  }
  const Site site = first->site;
  uint32_t active = 0;
  for (uint32_t i = begin; i < end; ++i) {
    Thread& thread = threads_[i];
    if (thread.state == Thread::at_exchange && same_site(thread.site, site)) {
      active |= 1u << (i - begin);
      thread.state = Thread::ready;
      thread.exchange = {0, i - begin, group.met};
    }
  }
  std::memcpy(group.met, group.arriving, sizeof group.met);
  for (uint32_t i = begin; i < end; ++i) {
    if (active >> (i - begin) & 1) {
      threads_[i].exchange.active = active;
    }
  }
  return true;
}

void Launch::release_barrier() {
  uint32_t first = 0;
  while (threads_[first].state != Thread::at_barrier) {
    ++first;
  }
  const Site site = threads_[first].site;
  for (uint32_t i = 0; i < count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == Thread::at_barrier && same_site(thread.site, site)) {
      continue;
    }
    diverge(
        site,
        "a threadgroup_barrier that not all threads reach: " + describe_thread(first) +
            " waits there, while " + describe_thread(i) +
            (thread.state == Thread::done ? " has returned"
                                          : " waits at the one in " + text_of(thread.site)));
  }
  const uint32_t flags = threads_[first].flags;
  epoch_ += (flags & kMemoryThreadgroup) != 0;
  device_epoch_ += (flags & kMemoryDevice) != 0;
  for (uint32_t i = 0; i < count_; ++i) {
    threads_[i].state = Thread::ready;
  }
}

void Launch::diverge(const Site& site, std::string text) const {
  Fault fault = fault_of(Kind::divergence, std::move(text));
  fault.place = text_of(site);
  throw fault;
}

void Launch::run_thread(uint32_t index) {
  current_ = index;
  Thread& thread = threads_[index];
  if (thread.state == Thread::fresh) {
    start(index);
  }
  stack_ = reinterpret_cast<uintptr_t>(thread.stack);
  thread.state = Thread::ready;
  in_thread_ = true;
  zmlx_switch_context(&scheduler_, thread.context);
  in_thread_ = false;
  if (fault_) {
    throw *fault_;
  }
  settle();
  if (thread.state == Thread::done) {
    stacks_.give_back(thread.stack);
  }
}

void Launch::start(uint32_t index) {
  Thread& thread = threads_[index];
  thread.stack = stacks_.take();
  thread.context = start_context(thread.stack, sizeof(Position), &Launch::body, this);
  auto* position =
      reinterpret_cast<Position*>(thread.stack + kStackBytes - sizeof(Position));
  const Triple in_group = place_of(index, size_);
  for (int axis = 0; axis < 3; ++axis) {
    position->thread_position_in_grid[axis] =
        group_[axis] * threadgroup_[axis] + in_group[axis];
    position->thread_position_in_threadgroup[axis] = in_group[axis];
    position->threadgroup_position_in_grid[axis] = group_[axis];
    position->threads_per_threadgroup[axis] = size_[axis];
    position->dispatch_threads_per_threadgroup[axis] = threadgroup_[axis];
    position->threadgroups_per_grid[axis] = groups_[axis];
    position->threads_per_grid[axis] = grid_[axis];
  }
  position->thread_index_in_threadgroup = index;
  position->thread_index_in_simdgroup = index % kLanes;
  position->simdgroup_index_in_threadgroup = index / kLanes;
  position->simdgroups_per_threadgroup = (count_ + kLanes - 1) / kLanes;
  position->dispatch_simdgroups_per_threadgroup =
      uint32_t((product(threadgroup_) + kLanes - 1) / kLanes);
}

void Launch::body(void* argument) {
  auto* launch = static_cast<Launch*>(argument);
  Thread& thread = launch->threads_[launch->current_];
  const auto* position =
      reinterpret_cast<const Position*>(thread.stack + kStackBytes - sizeof(Position));
  launch->library_.entry()(launch->arguments_.data(), position);
  thread.state = Thread::done;
  launch->back_to_scheduler();
}

void Launch::back_to_scheduler() {
  zmlx_switch_context(&threads_[current_].context, scheduler_);
}

void Launch::trace(void** frame) {
  Thread& thread = threads_[current_];
  thread.callers.fill(0);
  size_t depth = 0;
  while (depth < thread.callers.size() && on_own_stack(reinterpret_cast<uintptr_t>(frame))) {
    const auto address = reinterpret_cast<uintptr_t>(frame[1]);
    if (!library_.holds(address)) {
      break;
    }
    thread.callers[depth++] = address;
    frame = static_cast<void**>(frame[0]);
  }
  std::reverse(thread.callers.begin(), thread.callers.begin() + int64_t(depth));
}

void Launch::wait(Thread::State state, const Site& site) {
  threads_[current_].state = state;
  threads_[current_].site = site;
  back_to_scheduler();
}

void Launch::barrier(uint32_t flags, bool simdgroup, const Site& site) {
  threads_[current_].flags = flags;
  wait(simdgroup ? Thread::at_simd_barrier : Thread::at_barrier, site);
}

const Exchange* Launch::exchange(const void* value, size_t bytes, const Site& site) {
  Simdgroup& group = simdgroups_[current_ / kLanes];
  std::memcpy(group.arriving + current_ % kLanes * kSlotBytes, value, bytes);
  wait(Thread::at_exchange, site);
  return &threads_[current_].exchange;
}

void* Launch::shared(const SharedVariable& variable) {
  return shared_.bytes.begin() + variable.offset;
}

Fault Launch::fault_of(Kind kind, std::string text) const {
  return Fault(kind, std::move(text), name_, library_.file());
}

void Launch::fail(Kind kind, std::string text, uintptr_t pc) {
  Fault fault = fault_of(kind, std::move(text));
  fault.thread = describe_thread(current_);
  fault.offset = pc - library_.begin();
  fail(std::move(fault));
}

void Launch::fail_at(Kind kind, std::string text, const Site& site) {
  Fault fault = fault_of(kind, std::move(text));
  fault.thread = describe_thread(current_);
  fault.place = text_of(site);
  fail(std::move(fault));
}

// A thread's stack cannot be unwound: the scheduler throws, and the thread never goes on.
void Launch::fail(Fault fault) {
  if (deferred_ && fault.kind != Kind::race) {
    fault = *deferred_; // what came first
  }
  if (!in_thread_) {
    throw fault;
  }
  fault_ = std::make_unique<Fault>(std::move(fault));
  back_to_scheduler();
  __builtin_unreachable();
}

std::string Launch::describe_thread(uint32_t index) const {
  const Triple in_group = place_of(index, size_);
  Triple in_grid;
  for (int axis = 0; axis < 3; ++axis) {
    in_grid[axis] = group_[axis] * threadgroup_[axis] + in_group[axis];
  }
  return "thread " + text_of(in_grid) + " of the grid (thread " + std::to_string(index) +
      " of threadgroup " + text_of(group_) + ")";
}

void Launch::check_written() const {
  for (const Buffer& buffer : buffers_) {
    if (!buffer.writable || buffer.initialized || buffer.may_stay_unwritten) {
      continue;
    }
    const auto begin = buffer.written.begin();
    const auto gap = std::find(begin, buffer.written.end(), 0);
    if (gap == buffer.written.end()) {
      continue;
    }
    size_t missing = 0;
    const size_t elements = buffer.bytes / buffer.item;
    for (size_t i = 0; i < elements; ++i) {
      const auto element = begin + int64_t(i * buffer.item);
      missing += std::find(element, element + int64_t(buffer.item), 0) !=
          element + int64_t(buffer.item);
    }
    throw fault_of(
        Kind::unwritten,
        std::to_string(missing) + " of the " + std::to_string(elements) + " elements of output '" +
            buffer.name + "' were never written, the first is element " +
            std::to_string(size_t(gap - begin) / buffer.item));
  }
}

} // namespace zmlx::emulator
