// Every product with every set of kernels, on memory of exactly the size that it needs, for the
// sanitizers and for emulated processors. Prints the names of the sets, the best first, and exits
// with 0 when all results agree with a plain loop.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "floats.h"
#include "pool.h"
#include "products.h"

using namespace zmlx;

namespace {

// Memory without a byte to spare, at an address that only suits the item.
#if defined(__x86_64__)
class Exact {
 public:
  explicit Exact(size_t bytes, size_t item) : memory_(new char[bytes + item]), item_(item) {
    std::memset(memory_.get(), 0, bytes + item);
  }

  char* data() const {
    return memory_.get() + item_;
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t item_;
};
#else
// An emulated processor has no address sanitizer: a page that may not be touched lies behind.
class Exact {
 public:
  explicit Exact(size_t bytes, size_t) : offset_((kPage - bytes % kPage) % kPage) {
    const size_t used = offset_ + bytes;
    void* pages = mmap(
        nullptr, used + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + used, kPage, PROT_NONE) != 0) {
      std::abort();
    }
    memory_ = {static_cast<char*>(pages), [used](char* p) { munmap(p, used + kPage); }};
  }

  char* data() const {
    return memory_.get() + offset_;
  }

 private:
  static constexpr size_t kPage = 65536; // the largest of that architecture
  size_t offset_;
  std::shared_ptr<char> memory_;
};
#endif

uint32_t state = 1;

uint32_t random_word() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

float random_float() {
  return float(random_word() % 2001) / 1000.0f - 1.0f;
}

// Of every `apart` of them one is larger than the others by `outlier`.
Exact floats(int64_t count, Float type, float outlier = 1.0f, int64_t apart = 1) {
  Exact made(count * size_of(type), size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    store_float(made.data(), type, i, random_float() * (i % apart == apart / 3 ? outlier : 1.0f));
  }
  return made;
}

// Scales are floats, powers of two about 1, or small floats about 1.
Scale scale_of(Code code, int64_t group, Float type) {
  return affine(code) ? scale_of(type) : group == 16 ? Scale::e4m3 : Scale::e8m0;
}

Exact scales_of(int64_t count, Scale scale) {
  if (scale < Scale::e8m0) {
    return floats(count, Float(scale));
  }
  Exact made(count, 1);
  for (int64_t i = 0; i < count; ++i) {
    made.data()[i] = char((scale == Scale::e8m0 ? 125 : 0x30) + random_word() % 5);
  }
  return made;
}

// The largest product of a value with its scale, or about that.
double largest_of(Code code) {
  return affine(code) ? double(1 << bits_of(code))
                      : dense(code) ? 1.0 : code == Code::e2m1 ? 24.0 : 1920.0;
}

struct Stored {
  Exact q, scales, biases;
  Experts experts;
  std::vector<double> values;

  Stored(int64_t count, int64_t rows, int64_t inputs, Code code, int64_t group, Float type)
      : q(count * rows * inputs * bits_of(code) / 8, dense(code) ? bits_of(code) / 8 : 4),
        scales(scales_of(count * rows * (inputs / group), scale_of(code, group, type))),
        biases(floats(affine(code) ? count * rows * (inputs / group) : 0, type)),
        experts{
            {reinterpret_cast<uint8_t*>(q.data()), dense(code) ? nullptr : scales.data(),
             affine(code) ? biases.data() : nullptr, rows, inputs, code,
             dense(code) ? inputs : group, scale_of(code, group, type)},
            count} {
    const int64_t bytes = count * rows * inputs * bits_of(code) / 8;
    for (int64_t i = 0; i < bytes && !dense(code); ++i) {
      q.data()[i] = char(random_word());
    }
    for (int64_t i = 0; i < count * rows * inputs && dense(code); ++i) {
      store_float(q.data(), float_of(code), i, random_float());
    }
    for (int64_t row = 0; row < count * rows; ++row) {
      for (int64_t k = 0; k < inputs; ++k) {
        values.push_back(value(experts.expert(row / rows), row % rows, k));
      }
    }
  }

  static double value(const Weight& w, int64_t n, int64_t k) {
    const uint8_t* row = w.q + n * w.row_bytes();
    if (dense(w.code)) {
      return load_float(row, float_of(w.code), k);
    }
    uint32_t stored = 0;
    for (int bit = 0; bit < w.bits(); ++bit) {
      const int64_t at = k * w.bits() + bit;
      stored |= uint32_t(row[at / 8] >> (at % 8) & 1) << bit;
    }
    const int64_t g = n * w.groups() + k / w.group;
    if (affine(w.code)) {
      return double(stored) * load_scale(w, g) + load_bias(w, g);
    }
    const double small = w.code == Code::e2m1 ? 0.5 * kTwiceE2m1[stored] : from_e4m3(uint8_t(stored));
    return small * load_scale(w, g);
  }

  double product(int64_t expert, int64_t n, const Rows& x, int64_t row) const {
    const double* of_row = &values[(expert * experts.weight.rows + n) * x.width];
    double sum = 0;
    for (int64_t k = 0; k < x.width; ++k) {
      sum += of_row[k] * load_float(x.data, x.type, row * x.width + k);
    }
    return sum;
  }
};

int wrong = 0;

// The share of a value that is lost when it is rounded to a type.
double rounding(Float type) {
  return type == Float::f32 ? 0x1p-24 : type == Float::f16 ? 0x1p-11 : 0x1p-8;
}

// For results of 16 bits, activations may have lost what lies below 14 bits.
void compare(const char* what, const Rows& out, int64_t index, double truth, double size) {
  if (out.type == Float::f16 && std::abs(truth) > 60000) {
    return; // more than the type holds
  }
  const double value = load_float(out.data, out.type, index);
  const double loss = (out.type == Float::f32 ? 1e-5 : 0x1p-14) * size;
  if (!(std::abs(value - truth) <= loss + rounding(out.type) * std::abs(truth))) {
    std::printf("%s %s: %g instead of %g\n", kernels().name, what, value, truth);
    ++wrong;
  }
}

// Results are float32, and also of the type of the activations.
std::vector<Float> results_of(Float type) {
  return type == Float::f32 ? std::vector{type} : std::vector{Float::f32, type};
}

void check(
    Code code, int64_t group, int64_t inputs, int64_t rows, int64_t count, Float type,
    float outlier = 1.0f) {
  const Stored w(1, rows, inputs, code, group, type), v(1, rows, inputs, code, group, type);
  const Exact xs = floats(count * inputs, type, outlier, group), bias = floats(rows, type);
  const Rows x{xs.data(), type, count, inputs};
  std::vector<double> first, second;
  for (int64_t i = 0; i < count * rows; ++i) {
    first.push_back(w.product(0, i % rows, x, i / rows));
    second.push_back(v.product(0, i % rows, x, i / rows));
  }
  const double size = std::sqrt(double(x.width)) * largest_of(code) * outlier;
  for (const Float results : results_of(type)) {
    const size_t item = size_of(results);
    const Exact ys(count * rows * item, item), zs(count * rows * item, item);
    const Rows y{ys.data(), results, count, rows}, z{zs.data(), results, count, rows};
    product(w.experts.weight, {bias.data(), type}, x, y);
    gated_product(
        w.experts.weight, {}, v.experts.weight, {bias.data(), type}, Activation::silu, x, z);
    for (int64_t i = 0; i < count * rows; ++i) {
      const double b = load_float(bias.data(), type, i % rows);
      const double gate = first[i] / (1 + std::exp(-first[i]));
      compare("product", y, i, first[i] + b, size);
      compare("gated", z, i, gate * (second[i] + b), size * size);
    }
  }
}

void check_experts(Code code, int64_t rows, int64_t tokens, Float type, Float results) {
  const int64_t experts = 4, top_k = 2, inputs = dense(code) ? 77 : 96;
  const Stored w(experts, rows, inputs, code, 32, type);
  const Exact xs = floats(tokens * top_k * inputs, type);
  const Exact weights = floats(tokens * top_k, type);
  const size_t item = size_of(results);
  const Exact ys(tokens * rows * item, item), zs(tokens * top_k * rows * item, item);
  const Rows x{xs.data(), type, tokens * top_k, inputs};
  const Rows first{xs.data(), type, tokens, inputs};
  const Rows y{ys.data(), results, tokens, rows}, z{zs.data(), results, tokens * top_k, rows};
  std::vector<uint32_t> indices(tokens * top_k);
  for (uint32_t& index : indices) {
    index = random_word() % 6; // some outside
  }
  const auto expert = [&](int64_t p) { return std::min<int64_t>(indices[p], experts - 1); };
  const Routing each{indices.data(), tokens * top_k, 1}, per_token{
      indices.data(), tokens * top_k, top_k};
  const double size = 2 * std::sqrt(double(x.width)) * largest_of(code);
  gather_combine(w.experts, each, {weights.data(), type, tokens, top_k}, top_k, x, y);
  gather_product(w.experts, per_token, first, z);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0;
      for (int64_t p = t * top_k; p < (t + 1) * top_k; ++p) {
        sum += load_float(weights.data(), type, p) * w.product(expert(p), n, x, p);
        compare("gathered", z, p * rows + n, w.product(expert(p), n, first, t), size);
      }
      compare("combined", y, t * rows + n, sum, size);
    }
  }
  gather_gated_product(w.experts, w.experts, Activation::gelu, per_token, first, z);
}

std::vector<int64_t> groups_of(Code code) {
  if (affine(code)) {
    return {32, 64, 128};
  }
  return code == Code::e2m1 ? std::vector<int64_t>{16, 32} : std::vector<int64_t>{32};
}

void check_code(Code code, Float type) {
  for (const int64_t group : groups_of(code)) {
    const int64_t odd = dense(code) ? 5 : 0; // rows of a size that is no multiple of anything
    check(code, group, group + odd, 5, 1, type);
    check(code, group, 5 * group + odd, 37, 3, type);
    check(code, group, 17 * group + odd, 3, 2, type);
    check(code, group, 3 * group + odd, 35, 7, type);
    check(code, group, 3 * group + odd, 35, 31, type);
    check(code, group, 5 * group + odd, 11, 3, type, 64.0f);
  }
  for (const Float results : results_of(type)) {
    check_experts(code, 33, 1, type, results);
    check_experts(code, 33, 30, type, results);
  }
}

void check_all() {
  for (int code = 0; code <= int(Code::f32); ++code) {
    for (const Float type : {Float::f32, Float::f16, Float::bf16}) {
      check_code(Code(code), type);
    }
  }
}

} // namespace

int main() {
  set_num_threads(3);
  std::printf("best: %s\n", kernels_best()->name);
  for (const char* name : {"avx512_vnni", "avx512", "avx2", "neon_dotprod", "portable"}) {
    if (const Kernels* chosen = kernels_named(name)) {
      std::puts(name);
      set_kernels(chosen);
      check_all();
    }
  }
  // Two streams at once: one has the pool, the other works alone.
  std::thread other([] { check_experts(Code::u4, 33, 30, Float::bf16, Float::bf16); });
  set_num_threads(4);
  std::thread third([] { std::this_thread::yield(); });
  other.join();
  third.join();
  return wrong == 0 ? 0 : 1;
}
