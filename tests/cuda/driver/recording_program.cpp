// Recordings on a driver that stands for CUDA's: what they launch, on what, and in which order.
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fake_driver.h"
#include "recording.h"

namespace mx = mlx::core;
using zmlx::Argument;
using zmlx::Base;

namespace {

constexpr int kN = 8;

void expect(bool true_, const char* what, int line) {
  if (!true_) {
    std::printf("line %d: not so: %s\n", line, what);
    std::exit(1);
  }
}
#define EXPECT(what) expect(what, #what, __LINE__)

float* data(const mx::array& array) {
  const auto* buffer = static_cast<const mx::cu::CudaBuffer*>(array.buffer().ptr());
  return reinterpret_cast<float*>(static_cast<char*>(buffer->data) + array.offset());
}

mx::array empty(int count, mx::Dtype type = mx::float32) {
  return mx::array(mx::Shape{count}, type, nullptr, {});
}

mx::array made(int count, float value) {
  mx::array array = empty(count);
  auto* buffer = new mx::cu::CudaBuffer{std::malloc(size_t(count) * 4), size_t(count) * 4, 0};
  array.set_data(mx::allocator::Data(mx::allocator::Buffer(buffer), [](mx::allocator::Buffer b) {
    auto* gone = static_cast<mx::cu::CudaBuffer*>(b.ptr());
    std::free(gone->data);
    delete gone;
  }));
  for (int i = 0; i < count; ++i) {
    data(array)[i] = value + float(i);
  }
  return array;
}

Argument arena(uint64_t offset) {
  return {Base::arena, 0, offset, ""};
}

// out = scale(x, 3) + fixed; result = out + buffer, and buffer = out.
zmlx::Plan plan() {
  const int three = 3;
  const std::string number(reinterpret_cast<const char*>(&three), 4);
  zmlx::Plan plan;
  plan.functions = {{"", "add"}, {"", "zmlx_move"}, {"", "scale"}, {"", "append"}};
  plan.mover = 1;
  plan.inputs = {{0, kN * 4}};
  plan.results = {{512, kN * 4}, {256, kN * 4}};
  plan.buffers = 1;
  plan.launches = {
      {2, {2, 1, 1}, {4, 1, 1}, {arena(0), {Base::bytes, 0, 0, number}, arena(256)}},
      {0, {1, 1, 1}, {kN, 1, 1}, {arena(256), {Base::fixed, 0, 0, ""}, arena(256)}},
      {3, {1, 1, 1}, {kN, 1, 1}, {arena(256), {Base::buffer, 0, 16, ""}, arena(512)}},
  };
  return plan;
}

std::vector<mx::array> outputs() {
  return {empty(kN), empty(kN)};
}

CUstream stream(size_t number) {
  return reinterpret_cast<CUstream>(number);
}

void launches() {
  auto recording = std::make_unique<zmlx::Recording>(
      plan(), made(1024, 0), std::vector<mx::array>{made(kN, 100)});
  fake_events();
  const mx::array x = made(kN, 1);
  mx::array first = made(kN + 4, 0), second = made(kN + 4, 1000);
  auto out = outputs();
  recording->launch(stream(1), {x, first}, out);
  EXPECT(fake_events() == "tell:append tell:zmlx_move tell:zmlx_move launch1 record1 ");
  for (int i = 0; i < kN; ++i) {
    const float sum = 3 * float(1 + i) + float(100 + i);
    EXPECT(data(out[1])[i] == sum);
    EXPECT(data(out[0])[i] == sum + float(i + 4));
    EXPECT(data(first)[i + 4] == sum);
  }
  // The same buffer is not told again; the buffer of another cache is.
  auto again = outputs();
  recording->launch(stream(1), {x, first}, again);
  EXPECT(fake_events() == "tell:zmlx_move tell:zmlx_move launch1 record1 ");
  EXPECT(data(again[0])[0] == 2 * data(out[1])[0]);
  EXPECT(data(again[0]) != data(out[0]));
  auto other = outputs();
  recording->launch(stream(1), {x, second}, other);
  EXPECT(fake_events() == "tell:append tell:zmlx_move tell:zmlx_move launch1 record1 ");
  EXPECT(data(other[0])[0] == data(out[1])[0] + 1004);
  // Another stream waits for the launch before.
  recording->launch(stream(2), {x, second}, other);
  EXPECT(fake_events().rfind("wait2 ", 0) == 0);
  // Of a view the address is told.
  const mx::array both = made(2 * kN, 7);
  mx::array part = empty(kN);
  part.copy_shared_buffer(both, mx::Strides{1}, both.flags(), kN, kN);
  recording->launch(stream(2), {part, second}, other);
  EXPECT(data(other[1])[0] == 3 * float(7 + kN) + 100);
  recording.reset();
  EXPECT(fake_events().find("synchronize ") != std::string::npos);
}

template <typename F>
std::string failure(F run) {
  try {
    run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// What MLX does when the host reads an array: it lies elsewhere, and what was there is others'.
void moved(const mx::array& array) {
  auto* buffer = static_cast<mx::cu::CudaBuffer*>(array.buffer().ptr());
  void* const before = buffer->data;
  buffer->data = std::malloc(buffer->size);
  std::memcpy(buffer->data, before, buffer->size);
  std::memset(before, 0, buffer->size);
  std::free(before);
}

void arrays_that_do_not_change_may_move() {
  const mx::array whole = made(2 * kN, 100);
  mx::array half = empty(kN);
  half.copy_shared_buffer(whole, mx::Strides{1}, whole.flags(), kN, kN);
  zmlx::Recording recording(plan(), made(1024, 0), {half});
  const mx::array x = made(kN, 1), buffer = made(kN + 4, 0);
  auto out = outputs();
  recording.launch(stream(1), {x, buffer}, out);
  EXPECT(data(out[1])[0] == 3 + 100 + kN);
  moved(whole);
  fake_events();
  recording.launch(stream(1), {x, buffer}, out);
  EXPECT(fake_events() == "tell:add tell:zmlx_move tell:zmlx_move launch1 record1 ");
  EXPECT(data(out[1])[0] == 3 + 100 + kN);
  recording.launch(stream(1), {x, buffer}, out);
  EXPECT(fake_events() == "tell:zmlx_move tell:zmlx_move launch1 record1 ");
  // One launch could not tell it; the next one does.
  moved(whole);
  fake_failure();
  EXPECT(failure([&] { recording.launch(stream(1), {x, buffer}, out); }).find("as asked") !=
         std::string::npos);
  fake_events();
  recording.launch(stream(1), {x, buffer}, out);
  EXPECT(fake_events() == "tell:add tell:append tell:zmlx_move tell:zmlx_move launch1 record1 ");
  EXPECT(data(out[1])[0] == 3 + 100 + kN);
}

void places() {
  const mx::array one = made(kN, 1), two = made(kN, 2);
  zmlx::Places places({one, two});
  std::string found;
  const auto ask = [&] {
    found.clear();
    places.each_moved([&](size_t i) { found += std::to_string(i); });
    return found;
  };
  EXPECT(!places.moved() && ask() == "");
  moved(two);
  EXPECT(places.moved() && places.moved() && ask() == "1");
  EXPECT(!places.moved() && ask() == "");
  EXPECT(places.at(1) == reinterpret_cast<uint64_t>(data(two)));
  places.forget();
  EXPECT(ask() == "01");
}

void blocks_are_used_again() {
  zmlx::Recording recording(plan(), made(1024, 0), {made(kN, 100)});
  const mx::array x = made(kN, 1), buffer = made(kN + 4, 0);
  const int before = fake_living();
  for (int i = 0; i < 5; ++i) {
    auto out = outputs();
    recording.launch(stream(1), {x, buffer}, out);
    // What MLX does when the host reads an array.
    if (i == 3) {
      auto* block = static_cast<mx::cu::CudaBuffer*>(out[0].buffer().ptr());
      block->device = -1;
    }
  }
  // Two blocks: one was given back to the driver, and made anew.
  EXPECT(fake_living() == before + 2);
  // What another stream does with a block is not known to be over.
  auto out = outputs();
  recording.launch(stream(2), {x, buffer}, out);
  EXPECT(fake_living() == before + 4);
}

void arrays_outlive_their_recording() {
  auto out = outputs();
  {
    zmlx::Recording recording(plan(), made(1024, 0), {made(kN, 100)});
    recording.launch(stream(1), {made(kN, 1), made(kN + 4, 0)}, out);
  }
  EXPECT(data(out[1])[0] == 103);
}

// How the five nodes of the plan wait for each other.
std::string edges(int capability, bool overlapped) {
  fake_capability(capability);
  zmlx::Plan wanted = plan();
  wanted.overlapped = overlapped;
  zmlx::Recording recording(wanted, made(1024, 0), {made(kN, 100)});
  auto out = outputs();
  recording.launch(stream(1), {made(kN, 1), made(kN + 4, 0)}, out);
  EXPECT(data(out[1])[0] == 103);
  fake_capability(9);
  EXPECT(recording.overlapped() == (fake_edges() == "pppp"));
  return fake_edges();
}

void kernels_overlap(bool old_driver) {
  EXPECT(edges(9, true) == (old_driver ? "----" : "pppp"));
  EXPECT(edges(12, true) == (old_driver ? "----" : "pppp"));
  EXPECT(edges(8, true) == "----");
  EXPECT(edges(9, false) == "----");
}

void failures() {
  const auto make = [](zmlx::Plan plan) {
    zmlx::Recording recording(std::move(plan), made(1024, 0), {made(kN, 100)});
  };
  fake_failure();
  EXPECT(failure([&] { make(plan()); }) == "[zmlx] cuGraphInstantiateWithFlags failed: as asked");
  zmlx::Plan unknown = plan();
  unknown.functions[0].second = "nothing";
  EXPECT(failure([&] { make(unknown); }).find("cuModuleGetFunction") != std::string::npos);
  zmlx::Plan many = plan();
  many.results.resize(zmlx::kMostMoves + 1);
  EXPECT(failure([&] { make(many); }) == "[zmlx] too many arrays to copy");
  zmlx::Recording recording(plan(), made(1024, 0), {made(kN, 100)});
  auto out = outputs();
  EXPECT(failure([&] { recording.launch(stream(1), {made(kN, 1)}, out); }).find("other arrays") !=
         std::string::npos);
  EXPECT(failure([&] { recording.launch(stream(1), {made(2, 1), made(kN + 4, 0)}, out); })
             .find("another size") != std::string::npos);
}

} // namespace

int main(int count, char** arguments) {
  kernels_overlap(count > 1 && std::strcmp(arguments[1], "old") == 0);
  launches();
  arrays_that_do_not_change_may_move();
  places();
  blocks_are_used_again();
  arrays_outlive_their_recording();
  failures();
  EXPECT(fake_living() == 0);
  std::printf("ok\n");
}
