// Programs under the sanitizers: graphs with MLX's own library, run as they are and as programs.
// Prints nothing and exits with 0 when both agree with stock operations in float32.
#include <atomic>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "fuse.h"
#include "mlx/mlx.h"
#include "pool.h"
#include "primitives.h"
#include "products.h"
#include "step_primitives.h"

using namespace zmlx;

namespace {

std::atomic<int> wrong = 0;

void fail(const char* what, const char* how, double off) {
  std::printf("%s, %s, %s: off by %g\n", kernels().name, what, how, off);
  ++wrong;
}

// ---------------------------------------------------------------------------------------------
// Inputs, which end where their memory ends

// Numbers in [-1, 1], of the kind that looks random.
mx::array noise(const mx::Shape& shape, mx::Dtype type, uint32_t seed) {
  size_t size = 1;
  for (const int extent : shape) {
    size *= extent;
  }
  std::vector<float> values(size);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = float((seed >> 8) % 2001) / 1000.0f - 1.0f;
  }
  mx::array made = mx::astype(mx::array(values.data(), shape, mx::float32), type);
  mx::eval(made);
  return made;
}

// The same numbers one item further, at an address that only suits the item.
mx::array shifted(const mx::array& x) {
  const int size = int(x.size());
  const mx::array flat = mx::concatenate({mx::zeros({1}, x.dtype()), mx::reshape(x, {size})}, 0);
  mx::eval(flat);
  mx::array made = mx::reshape(mx::slice(flat, {1}, {size + 1}), x.shape());
  mx::eval(made);
  return made;
}

// The same numbers with others between the rows.
mx::array apart(const mx::array& x) {
  mx::Shape start(x.ndim(), 0), stop = x.shape();
  start.back() = 1;
  stop.back() += 1;
  std::vector<std::pair<int, int>> around(x.ndim(), {0, 0});
  around.back() = {1, 2};
  const mx::array wide = mx::pad(x, around, mx::array(99.0f, x.dtype()));
  mx::eval(wide);
  mx::array made = mx::slice(wide, start, stop);
  mx::eval(made);
  return made;
}

// The same numbers, the axes in memory in the opposite order.
mx::array turned(const mx::array& x) {
  const mx::array other = mx::contiguous(mx::transpose(x));
  mx::eval(other);
  mx::array made = mx::transpose(other);
  mx::eval(made);
  return made;
}

mx::array exact(const mx::array& x) {
  return mx::astype(x, mx::float32);
}

WeightArray quantized(const mx::Shape& shape, int group, int bits, mx::Dtype type, uint32_t seed) {
  const Arrays parts = mx::quantize(noise(shape, mx::float32, seed), group, bits);
  WeightArray made{
      shifted(parts[0]), shifted(mx::astype(parts[1], type)), shifted(mx::astype(parts[2], type)),
      {Mode::affine, group, bits}};
  return made;
}

WeightArray exact(const WeightArray& w) {
  return {w.w, exact(*w.scales), exact(*w.biases), w.format};
}

// ---------------------------------------------------------------------------------------------
// What a model computes, by this library or by stock operations

using Optional = std::optional<mx::array>;

mx::array matmul(bool ours, const mx::array& x, const WeightArray& w, const Optional& bias = {}) {
  if (ours) {
    return quantized_matmul(x, w, bias);
  }
  const mx::array y = mx::quantized_matmul(
      x, w.w, *w.scales, w.biases, true, w.format.group_size, w.format.bits);
  return bias ? y + *bias : y;
}

mx::array chosen_matmul(
    bool ours, const mx::array& x, const WeightArray& w, const mx::array& indices) {
  if (ours) {
    return gather_quantized_matmul(x, w, indices);
  }
  return mx::gather_qmm(
      x, w.w, *w.scales, w.biases, std::nullopt, indices, true, w.format.group_size, w.format.bits);
}

mx::array silu(const mx::array& x) {
  return x * mx::sigmoid(x);
}

mx::array glu(bool ours, const mx::array& x, const WeightArray& gate, const WeightArray& up) {
  return ours ? quantized_glu(x, gate, up, {}, {}, "silu")
              : silu(matmul(false, x, gate)) * matmul(false, x, up);
}

mx::array norm(bool ours, const mx::array& x, const mx::array& weight) {
  return ours ? rms_norm(x, weight, 1e-5f) : mx::fast::rms_norm(x, weight, 1e-5f);
}

mx::array turn(bool ours, const mx::array& x, int dims, bool traditional, const mx::array& offset) {
  return ours ? rope(x, dims, traditional, 1e4f, 1.0f, offset, {})
              : mx::fast::rope(x, dims, traditional, 1e4f, 1.0f, offset);
}

mx::array attend(
    bool ours, const mx::array& q, const mx::array& k, const mx::array& v, const Optional& mask) {
  const float scale = 0.2f;
  if (!ours) {
    return mx::fast::scaled_dot_product_attention(q, k, v, scale, mask ? "" : "causal", mask);
  }
  return mask ? attention(q, k, v, scale, *mask, {})
              : attention(q, k, v, scale, std::string("causal"), {});
}

// x (T, K), the experts of each row (T, k) and their weights (T, k) -> (T, K)
mx::array experts(
    bool ours, const mx::array& x, const mx::array& indices, const mx::array& weights,
    const WeightArray& gate, const WeightArray& up, const WeightArray& down) {
  if (ours) {
    const mx::array h = gather_quantized_glu(x, indices, gate, up, "silu");
    return gather_quantized_combine(h, indices, weights, down);
  }
  const mx::array wide = mx::expand_dims(x, {1, 2});
  const mx::array h = silu(chosen_matmul(false, wide, gate, indices)) *
      chosen_matmul(false, wide, up, indices);
  const mx::array y = mx::squeeze(chosen_matmul(false, h, down, indices), -2);
  return mx::sum(y * mx::expand_dims(weights, -1), 1);
}

// ---------------------------------------------------------------------------------------------
// One graph at a time

double rounding(mx::Dtype type) {
  return type == mx::float32 ? 2e-6 : type == mx::float16 ? 2e-3 : 2e-2;
}

void compare(const char* what, const char* how, const Arrays& found, const Arrays& truth, double limit) {
  for (size_t i = 0; i < truth.size(); ++i) {
    const mx::array size = mx::maximum(mx::max(mx::abs(exact(truth[i]))), mx::array(1.0f));
    mx::array off = mx::max(mx::abs(exact(found[i]) - exact(truth[i]))) / size;
    if (!(found[i].shape() == truth[i].shape() && off.item<float>() <= limit)) {
      fail(what, how, off.item<float>());
    }
  }
}

// A graph of x and y; `ours` where it may use this library.
using Graph = std::function<Arrays(bool ours, const mx::array& x, const mx::array& y)>;

void check(const char* what, const Graph& graph, const mx::array& x, const mx::array& y) {
  const Arrays truth = graph(false, exact(x), exact(y));
  mx::eval(truth);
  const double limit = 4 * rounding(x.dtype());
  const auto run = [&](const char* how, const mx::array& x, const mx::array& y) {
    Arrays plain = graph(true, x, y);
    mx::eval(plain);
    compare(what, how, plain, truth, limit);
    Arrays fused = fuse(graph(true, x, y));
    mx::eval(fused);
    compare(what, how, fused, truth, limit);
    for (size_t i = 0; i < truth.size(); ++i) { // with the others inside of the program
      Arrays one = fuse({graph(true, x, y)[i]});
      mx::eval(one);
      compare(what, how, one, {truth[i]}, limit);
    }
  };
  run("shifted", shifted(x), shifted(y));
  run("apart", apart(x), apart(y));
  run("turned", turned(x), turned(y));
  const mx::array computed = mx::negative(x);
  run("computed", mx::negative(computed), mx::multiply(y, mx::array(1.0f, y.dtype())));
}

// x (2, 3, 4, 10), y (3, 1, 10)
void check_operations(mx::Dtype type) {
  const mx::array x = noise({2, 3, 4, 10}, type, 1);
  const mx::array y = noise({3, 1, 10}, type, 2) + mx::array(3.0f, type);
  const auto number = [](float value, const mx::array& like) {
    return mx::array(value, like.dtype());
  };
  const auto both = [](const char* what, const mx::array& x, const mx::array& y, auto make) {
    check(what, [make](bool, const mx::array& x, const mx::array& y) {
      const mx::array z = make(x, y);
      return Arrays{z, z + z};
    }, x, y);
  };
  using A = const mx::array&;
  both("arithmetic", x, y, [](A x, A y) { return (x + y) * x - y / (y + y); });
  both("columns", x, y, [](A x, A y) { return mx::slice(x, {0, 0, 0, 0}, {2, 3, 4, 1}) * x; });
  both("transposed", x, y, [](A x, A y) {
    return mx::swapaxes(x, 1, 3) / mx::swapaxes(y, 0, 2);
  });
  both("thirds", x, y, [](A x, A y) {
    return mx::slice(x, {0, 0, 0, 0}, {2, 3, 4, 10}, {1, 1, 1, 3}) *
        mx::slice(y, {0, 0, 0}, {3, 1, 10}, {1, 1, 3});
  });
  both("backwards", x, y, [](A x, A y) {
    return mx::slice(x, {0, 0, 0, 9}, {2, 3, 4, -11}, {1, 1, 1, -1}) * y;
  });
  both("scalar", x, y, [number](A x, A y) { return x * number(3, x) - number(2, x) / y; });
  both("types", x, y, [](A x, A y) {
    return mx::astype(mx::astype(mx::swapaxes(x, 0, 2), mx::float32) * mx::array(2.0f), x.dtype());
  });
  both("reshaped", x, y, [](A x, A y) {
    return mx::reshape(mx::transpose(x, {0, 2, 1, 3}), {2, 4, 30}) + mx::array(1.0f, x.dtype());
  });
  both("unflattened", x, y, [](A x, A y) {
    return mx::unflatten(mx::flatten(x, 1, 2), 2, {5, 2}) * mx::array(2.0f, x.dtype());
  });
  both("squeezed", x, y, [](A x, A y) {
    return mx::squeeze(mx::expand_dims(mx::slice(x, {0, 0, 0, 0}, {1, 3, 4, 10}), 0), {0, 1}) + y;
  });
  both("one element", x, y, [](A x, A y) {
    return mx::squeeze(mx::slice(x, {0, 0, 0, 2}, {1, 1, 1, 3})) + mx::array(1.0f, x.dtype());
  });
  both("split", x, y, [](A x, A y) {
    const Arrays parts = mx::split(x, mx::Shape{3, 6, 9}, -1);
    return parts[0] * parts[2] + parts[1];
  });
  both("concatenated", x, y, [](A x, A y) {
    return mx::concatenate({x, y * x, mx::slice(x, {0, 1, 0, 0}, {2, 2, 4, 10})}, 1) * mx::array(2.0f, x.dtype());
  });
  both("updated", x, y, [](A x, A y) {
    return mx::slice_update(x, mx::slice(y * y, {0, 0, 1}, {3, 1, 5}), {0, 0, 3, 2}, {2, 3, 4, 10},
                            {1, 1, 1, 2}) * mx::array(1.0f, x.dtype());
  });
  both("softmax", x, y, [](A x, A y) { return mx::softmax(x * y, std::vector<int>{-1}, true); });
  both("sum", x, y, [](A x, A y) { return x / mx::sum(mx::sigmoid(x), -1, true); });
  both("partition", x, y, [](A x, A y) {
    const mx::array order = mx::argpartition(-x, -3, -1);
    return mx::take_along_axis(x, mx::slice(order, {0, 0, 0, 7}, {2, 3, 4, 10}), -1) + mx::slice(y, {0, 0, 4}, {3, 1, 7});
  });
  both("gathered", x, y, [](A x, A y) {
    return mx::take_along_axis(x, mx::reshape(mx::array({3, -1, 0}, mx::int32), {1, 1, 1, 3}), -1) *
        mx::array(2.0f, x.dtype());
  });
  both("view", x, y, [](A x, A y) {
    return mx::slice(mx::transpose(x + y), {1, 0, 0, 0}, {9, 3, 3, 1});
  });
  both("one axis", x, y, [](A x, A y) {
    const mx::array row = mx::reshape(mx::slice(y, {1, 0, 0}, {2, 1, 10}), {10});
    return mx::sum(mx::softmax(row + row, std::vector<int>{-1}, true) * row, -1);
  });
  both("empty parts", x, y, [](A x, A y) {
    const mx::array none = mx::slice(x, {0, 0, 2, 0}, {2, 3, 2, 10});
    const mx::array all = mx::concatenate({none, x + x, none * x.shape(0)}, 2);
    return mx::slice_update(all, none, mx::Shape{0, 0, 1, 0}, mx::Shape{2, 3, 1, 10}) +
        mx::sum(mx::slice(x, {0, 0, 0, 3}, {2, 3, 4, 3}), -1, true);
  });
  check("unknown operations", [](bool, A x, A y) {
    const mx::array a = mx::tanh((x + y) * x);
    const Arrays parts = mx::split(a * a + x, 2, -1);
    const Arrays quotients = mx::divmod(parts[0] * parts[0] + 1, parts[1] * parts[1] + 19);
    return Arrays{mx::cumsum(parts[1] * parts[1], 0) * parts[0], parts[0], parts[1], parts[1], a, x,
                  quotients[1] * parts[0] + parts[1]};
  }, x, y);
  const mx::array rows = noise({2, 7, 11}, type, 3), taps = noise({11, 3, 1}, type, 4);
  both("convolution", rows, taps, [](A x, A w) {
    return mx::conv1d(x, w, 1, 0, 1, 11) + mx::slice(x, {0, 2, 0}, {2, 7, 11});
  });
}

// The library's own operations, on x (2, 3, 5, 64) and y (64,)
void check_own(mx::Dtype type, int bits) {
  const mx::array x = noise({2, 3, 5, 64}, type, 5), y = noise({64}, type, 6);
  const WeightArray w = quantized({37, 64}, 32, bits, type, 7);
  const WeightArray v = quantized({37, 64}, 64, bits, type, 8);
  const WeightArray e = quantized({5, 37, 64}, 32, bits, type, 9);
  using A = const mx::array&;
  const auto of = [](bool ours, const WeightArray& w) { return ours ? w : exact(w); };
  check("matmul", [&](bool ours, A x, A y) {
    const mx::array bias = mx::slice(y, {3}, {40});
    const mx::array z = matmul(ours, x, of(ours, w), bias);
    return Arrays{z, matmul(ours, mx::slice(x, {0, 0, 0, 0}, {2, 3, 1, 64}), of(ours, v)) - z};
  }, x, y);
  check("glu", [&](bool ours, A x, A y) {
    return Arrays{glu(ours, mx::swapaxes(x, 0, 2) * y, of(ours, w), of(ours, v))};
  }, x, y);
  const mx::array indices = mx::array({0, 4, 1, 3, 2, 0}, {2, 3}, mx::uint32);
  check("gathered matmul", [&](bool ours, A x, A y) {
    const mx::array one = mx::slice(x, {0, 0, 1, 0}, {2, 3, 2, 64});
    return Arrays{chosen_matmul(ours, one * y, of(ours, e), indices)};
  }, x, y);
  check("norm", [&](bool ours, A x, A y) {
    const mx::array z = norm(ours, x, y);
    return Arrays{z, norm(ours, mx::swapaxes(z, 1, 2), y)};
  }, x, y);
  for (const bool traditional : {false, true}) {
    const mx::array offsets = mx::array({3, 1}, mx::int32);
    check("rope", [&](bool ours, A x, A y) {
      const mx::array z = turn(ours, x, traditional ? 64 : 22, traditional, offsets);
      return Arrays{z, turn(ours, mx::swapaxes(x, 1, 2) + y, 14, traditional, mx::array(7)) * y};
    }, x, y);
  }
  check("one row", [&](bool ours, A x, A y) {
    return Arrays{norm(ours, matmul(ours, y + y, of(ours, v)), mx::slice(y, {27}, {64}))};
  }, x, y);
  const mx::array wide = noise({5, 9}, mx::float32, 10) > mx::array(-0.5f);
  check("attention", [&](bool ours, A x, A y) {
    const mx::array k = mx::slice(x, {0, 1, 0, 0}, {2, 2, 5, 64});
    const mx::array v = mx::slice(mx::swapaxes(x, 1, 2) * y, {0, 2, 0, 5}, {2, 3, 3, 42});
    const mx::array values = mx::concatenate({v, v}, 2);
    const mx::array seen = mx::slice(values, {0, 0, 0, 0}, {2, 1, 5, 37});
    const mx::array mask = mx::slice(wide, {0, 0}, {5, 5});
    const auto odd = [](A a) { return mx::slice(a, {0, 0, 0, 2}, {2, a.shape(1), 5, 63}); };
    return Arrays{attend(ours, odd(x), odd(k), seen, {}), attend(ours, x, k, seen, mask),
                  attend(ours, x * y, k, seen, mx::slice(x, {0, 0, 0, 0}, {1, 1, 5, 5}))};
  }, x, y);
}

// ---------------------------------------------------------------------------------------------
// Steps of a model, which writes into its cache in place

constexpr int kHidden = 96, kHead = 32, kHeads = 3, kBatch = 2, kRows = 24, kExperts = 5;

struct Layer {
  mx::array first_norm, second_norm, router_bias;
  WeightArray qkv, o, router, gate, up, down;

  Layer(mx::Dtype type, int bits, uint32_t seed)
      : first_norm(noise({kHidden}, type, seed)),
        second_norm(noise({kHidden}, type, seed + 1)),
        // Far apart, so that rounding chooses no other experts.
        router_bias(mx::array({0.0f, 24.0f, -8.0f, 36.0f, 8.0f}, type)),
        qkv(quantized({(kHeads + 2) * kHead, kHidden}, 32, bits, type, seed + 2)),
        o(quantized({kHidden, kHeads * kHead}, 32, bits, type, seed + 3)),
        router(quantized({kExperts, kHidden}, 32, 8, type, seed + 4)),
        gate(quantized({kExperts, 64, kHidden}, 32, bits, type, seed + 5)),
        up(quantized({kExperts, 64, kHidden}, 32, bits, type, seed + 6)),
        down(quantized({kExperts, kHidden, 64}, 64, bits, type, seed + 7)) {
    mx::eval(router_bias);
  }

  explicit Layer(const Layer& other, mx::Dtype)
      : first_norm(exact(other.first_norm)),
        second_norm(exact(other.second_norm)),
        router_bias(exact(other.router_bias)),
        qkv(exact(other.qkv)),
        o(exact(other.o)),
        router(exact(other.router)),
        gate(exact(other.gate)),
        up(exact(other.up)),
        down(exact(other.down)) {}

  // x (B, L, hidden) after `at` positions; the cache holds keys and values.
  mx::array operator()(
      bool ours, const mx::array& x, mx::array& keys, mx::array& values, int at, bool masked) const {
    const int length = x.shape(1), end = at + length;
    const Arrays parts = mx::split(
        matmul(ours, norm(ours, x, first_norm), qkv),
        mx::Shape{kHeads * kHead, (kHeads + 1) * kHead}, -1);
    const auto heads = [&](const mx::array& part) {
      return mx::swapaxes(mx::reshape(part, {kBatch, length, -1, kHead}), 1, 2);
    };
    const mx::array offset = masked ? mx::array({at, at}, mx::int32) : mx::array(at, mx::int32);
    const int dims = masked ? 20 : kHead;
    const mx::array q = turn(ours, heads(parts[0]), dims, masked, offset);
    const mx::array k = turn(ours, heads(parts[1]), dims, masked, offset);
    const auto grown = [&](mx::array& rows, const mx::array& more) {
      rows = mx::slice_update(rows, more, mx::Shape{0, 0, at, 0}, mx::Shape{kBatch, 1, end, kHead});
      return mx::slice(rows, {0, 0, 0, 0}, {kBatch, 1, end, kHead});
    };
    const mx::array all_keys = grown(keys, k), all_values = grown(values, heads(parts[2]));
    Optional mask;
    if (masked) {
      mask = mx::slice(mx::tri(kRows, kRows, 0, mx::bool_), {at, 0}, {end, end});
    }
    const mx::array seen = attend(ours, q, all_keys, all_values, mask);
    const mx::array h =
        x + matmul(ours, mx::reshape(mx::swapaxes(seen, 1, 2), {kBatch, length, -1}), o);
    const mx::array flat = mx::reshape(norm(ours, h, second_norm), {kBatch * length, kHidden});
    const mx::array gates =
        mx::softmax(matmul(ours, flat, router, router_bias), std::vector<int>{-1}, true);
    const mx::array order = mx::argpartition(-gates, 1, -1);
    const mx::array chosen = mx::slice(order, {0, 0}, {kBatch * length, 2});
    mx::array weights = mx::take_along_axis(gates, chosen, -1);
    weights = weights / mx::sum(weights, -1, true);
    return h + mx::reshape(experts(ours, flat, chosen, weights, gate, up, down), h.shape());
  }
};

struct Model {
  std::vector<Layer> layers;

  Model(mx::Dtype type, int bits) : layers{Layer(type, bits, 20), Layer(type, bits, 30)} {}
  explicit Model(const Model& other)
      : layers{Layer(other.layers[0], mx::float32), Layer(other.layers[1], mx::float32)} {}

  static Arrays cache(mx::Dtype type) {
    Arrays rows;
    for (int i = 0; i < 4; ++i) {
      rows.push_back(mx::zeros({kBatch, 1, kRows, kHead}, type));
    }
    mx::eval(rows);
    return rows;
  }

  // The result, then what the cache has become.
  Arrays step(bool ours, mx::array x, const Arrays& cache, int at) const {
    Arrays rows = cache;
    for (size_t i = 0; i < layers.size(); ++i) {
      x = layers[i](ours, x, rows[2 * i], rows[2 * i + 1], at, i == 1);
    }
    rows.insert(rows.begin(), x);
    return rows;
  }
};

enum class Way { one_by_one, all_at_once, held };

void check_steps(mx::Dtype type, int bits, Way way) {
  const Model model(type, bits), truth(model);
  Arrays cache = Model::cache(type), exact_cache = Model::cache(mx::float32);
  Arrays found, expected, held, copies;
  int in_place = 0;
  for (int at = 0; at < 12;) {
    const mx::array x = noise({kBatch, at == 0 ? 5 : 1, kHidden}, type, 40 + at);
    Arrays stock = truth.step(false, exact(x), exact_cache, at);
    mx::eval(stock);
    expected.push_back(stock[0]);
    exact_cache.assign(stock.begin() + 1, stock.end());

    const void* before = cache[3].data<char>();
    if (way == Way::held && at == 7) {
      held = cache;
      copies = {mx::array(cache[0]) + mx::array(0.0f, type), mx::slice(cache[3], {0, 0, 1, 3}, {2, 1, 6, 9})};
      held.push_back(copies[1]); // a view
      mx::eval(copies);
      copies[1] = mx::contiguous(copies[1] * mx::array(1.0f, type));
      mx::eval(copies);
    }
    Arrays fused = fuse(model.step(true, x, cache, at));
    found.push_back(fused[0]);
    cache.assign(fused.begin() + 1, fused.end());
    fused.clear();
    if (way == Way::all_at_once) {
      mx::async_eval(cache);
    } else {
      mx::eval(found.back(), cache[0], cache[1], cache[2], cache[3]);
      in_place += cache[3].data<char>() == before;
    }
    at += x.shape(1);
  }
  mx::eval(found);
  compare("steps", "results", found, expected, 20 * rounding(type));
  compare("steps", "cache", cache, exact_cache, 20 * rounding(type));
  if (way == Way::one_by_one && in_place < 6) {
    fail("steps", "copied instead of written in place", in_place);
  }
  if (way == Way::held) {
    compare("steps", "memory that is held", {held[0], held[4]}, copies, 0);
  }
}

// ---------------------------------------------------------------------------------------------

void check_all(mx::Dtype type, int bits) {
  check_operations(type);
  check_own(type, bits);
  for (const Way way : {Way::one_by_one, Way::all_at_once, Way::held}) {
    check_steps(type, bits, way);
  }
}

void in_two_threads() {
  std::vector<std::thread> threads;
  for (const mx::Dtype type : {mx::float32, mx::bfloat16}) {
    threads.emplace_back([type] {
      mx::set_default_stream(mx::new_stream(mx::Device::cpu));
      for (const Way way : {Way::one_by_one, Way::all_at_once}) {
        check_steps(type, 4, way);
      }
      mx::synchronize();
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

} // namespace

int main() {
  mx::set_default_device(mx::Device::cpu);
  set_num_threads(3);
  mx::eval(mx::zeros({1}) + mx::ones({1})); // what MLX makes on first use is its own affair
  for (const Kernels* chosen : {kernels_named("portable"), kernels_named("avx2"), kernels_best()}) {
    if (chosen != nullptr) {
      set_kernels(chosen);
      in_two_threads(); // before all else, so that both meet what we make on first use
      check_all(mx::float32, 3);
      check_all(mx::float16, 4);
      check_all(mx::bfloat16, 8);
    }
  }
  return wrong == 0 ? 0 : 1;
}
