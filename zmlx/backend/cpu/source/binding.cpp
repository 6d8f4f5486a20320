// The Python module.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "emulator_binding.h"
#include "fuse.h"
#include "lookup.h"
#include "pool.h"
#include "primitives.h"
#include "products.h"
#include "step_primitives.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx::core::array;
using Optional = std::optional<array>;

// Names of the kernels that this processor runs, best first.
static nb::list available_kernels() {
  nb::list names;
  for (const char* name : {"avx512_vnni", "avx512", "avx2", "neon_dotprod", "portable"}) {
    if (zmlx::kernels_named(name) != nullptr) {
      names.append(name);
    }
  }
  return names;
}

// A weight from what Python gives; what its mode has not is None.
template <bool Short = false>
static zmlx::WeightArray weight_of(
    const array& w, const Optional& scales, const Optional& biases, int group_size, int bits,
    const std::string& name) {
  const zmlx::Mode mode = zmlx::mode_of(name);
  if (scales.has_value() != (mode != zmlx::Mode::dense) ||
      biases.has_value() != (mode == zmlx::Mode::affine)) {
    throw std::invalid_argument(
        "[zmlx] weights of mode '" + name +
        "': affine ones have scales and biases, dense ones neither, others scales");
  }
  return {w, scales, biases, {mode, group_size, bits, Short}};
}

// The products; with `Short` activations may be rounded to 8 bits, where that is faster.
template <bool Short>
static void bind_products(nb::module_& m, const std::string& suffix) {
  m.def(
      ("quantized_matmul" + suffix).c_str(),
      [](const array& x, const array& w, const Optional& scales, const Optional& biases,
         const Optional& bias, int group_size, int bits, const std::string& mode) {
        return zmlx::quantized_matmul(
            x, weight_of<Short>(w, scales, biases, group_size, bits, mode), bias);
      },
      "x"_a, "w"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "bias"_a = nb::none(),
      nb::kw_only(), "group_size"_a, "bits"_a, "mode"_a = "affine");

  m.def(
      ("quantized_glu" + suffix).c_str(),
      [](const array& x, const array& gate_w, const Optional& gate_scales,
         const Optional& gate_biases, const array& up_w, const Optional& up_scales,
         const Optional& up_biases, const Optional& gate_bias, const Optional& up_bias,
         const std::string& activation, int gate_group_size, int gate_bits, int up_group_size,
         int up_bits, const std::string& gate_mode, const std::string& up_mode) {
        return zmlx::quantized_glu(
            x,
            weight_of<Short>(gate_w, gate_scales, gate_biases, gate_group_size, gate_bits, gate_mode),
            weight_of<Short>(up_w, up_scales, up_biases, up_group_size, up_bits, up_mode),
            gate_bias,
            up_bias,
            activation);
      },
      "x"_a, "gate_w"_a, "gate_scales"_a.none(), "gate_biases"_a.none(), "up_w"_a,
      "up_scales"_a.none(), "up_biases"_a.none(), "gate_bias"_a = nb::none(),
      "up_bias"_a = nb::none(), nb::kw_only(), "activation"_a, "gate_group_size"_a, "gate_bits"_a,
      "up_group_size"_a, "up_bits"_a, "gate_mode"_a = "affine", "up_mode"_a = "affine");

  m.def(
      ("gather_quantized_matmul" + suffix).c_str(),
      [](const array& x, const array& w, const Optional& scales, const Optional& biases,
         const array& indices, int group_size, int bits, const std::string& mode) {
        return zmlx::gather_quantized_matmul(
            x, weight_of<Short>(w, scales, biases, group_size, bits, mode), indices);
      },
      "x"_a, "w"_a, "scales"_a.none(), "biases"_a.none(), "indices"_a, nb::kw_only(),
      "group_size"_a, "bits"_a, "mode"_a = "affine");

  m.def(
      ("gather_quantized_glu" + suffix).c_str(),
      [](const array& x, const array& indices, const array& gate_w, const Optional& gate_scales,
         const Optional& gate_biases, const array& up_w, const Optional& up_scales,
         const Optional& up_biases, const std::string& activation, int gate_group_size,
         int gate_bits, int up_group_size, int up_bits, const std::string& gate_mode,
         const std::string& up_mode) {
        return zmlx::gather_quantized_glu(
            x,
            indices,
            weight_of<Short>(gate_w, gate_scales, gate_biases, gate_group_size, gate_bits, gate_mode),
            weight_of<Short>(up_w, up_scales, up_biases, up_group_size, up_bits, up_mode),
            activation);
      },
      "x"_a, "indices"_a, "gate_w"_a, "gate_scales"_a.none(), "gate_biases"_a.none(), "up_w"_a,
      "up_scales"_a.none(), "up_biases"_a.none(), nb::kw_only(), "activation"_a,
      "gate_group_size"_a, "gate_bits"_a, "up_group_size"_a, "up_bits"_a, "gate_mode"_a = "affine",
      "up_mode"_a = "affine");

  m.def(
      ("gather_quantized_combine" + suffix).c_str(),
      [](const array& h, const array& indices, const array& weights, const array& w,
         const Optional& scales, const Optional& biases, int group_size, int bits,
         const std::string& mode) {
        return zmlx::gather_quantized_combine(
            h, indices, weights, weight_of<Short>(w, scales, biases, group_size, bits, mode));
      },
      "h"_a, "indices"_a, "weights"_a, "w"_a, "scales"_a.none(), "biases"_a.none(), nb::kw_only(),
      "group_size"_a, "bits"_a, "mode"_a = "affine");
}

NB_MODULE(_zmlx_cpu, m) {
  nb::module_::import_("mlx.core");
  zmlx::set_kernels(zmlx::kernels_best());
  zmlx::bind_emulator(m);

  m.def(
      "rms_norm", &zmlx::rms_norm, "x"_a, "weight"_a.none(), "eps"_a);

  m.def("log_sum_exp", &zmlx::log_sum_exp, "x"_a);

  m.def(
      "rope", &zmlx::rope, "a"_a, "dims"_a, nb::kw_only(), "traditional"_a, "base"_a.none(),
      "scale"_a, "offset"_a, "freqs"_a = nb::none());

  m.def(
      "scaled_dot_product_attention", &zmlx::attention, "q"_a, "k"_a, "v"_a, nb::kw_only(),
      "scale"_a, "mask"_a = nb::none(), "sinks"_a = nb::none());

  m.def(
      "lookup",
      [](const array& indices, const array& w, const Optional& scales, const Optional& biases,
         int group_size, int bits, const std::string& mode) {
        return zmlx::lookup(indices, weight_of(w, scales, biases, group_size, bits, mode));
      },
      "indices"_a, "w"_a, "scales"_a.none(), "biases"_a.none(), nb::kw_only(), "group_size"_a,
      "bits"_a, "mode"_a = "affine");

  bind_products<false>(m, "");
  bind_products<true>(m, "_a8");

  m.def("fuse", &zmlx::fuse, "wanted"_a);

  // The arrays themselves become the fused ones, for whoever holds them.
  m.def(
      "fuse_in_place",
      [](nb::list wanted) {
        std::vector<array> arrays;
        for (nb::handle one : wanted) {
          arrays.push_back(nb::cast<array>(one));
        }
        const std::vector<array> fused = zmlx::fuse(arrays);
        for (size_t i = 0; i < fused.size(); ++i) {
          nb::cast<array&>(wanted[i]).overwrite_descriptor(fused[i]);
        }
        return wanted;
      },
      "wanted"_a);

  m.def("set_num_threads", &zmlx::set_num_threads, "count"_a);
  m.def("num_threads", &zmlx::num_threads);
  m.def("kernels", [] { return std::string(zmlx::kernels().name); });
  m.def(
      "set_kernels",
      [](const std::string& name) {
        const zmlx::Kernels* chosen = zmlx::kernels_named(name.c_str());
        if (chosen == nullptr) {
          throw std::invalid_argument("this processor has no kernels named '" + name + "'");
        }
        zmlx::set_kernels(chosen);
      },
      "name"_a);
  m.def("available_kernels", &available_kernels);
  m.def("info", [] {
    nb::dict facts;
    facts["kernels"] = zmlx::kernels().name;
    facts["available"] = available_kernels();
    facts["threads"] = zmlx::num_threads();
    return facts;
  });
}
