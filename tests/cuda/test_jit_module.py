"""The program, the module's name and the file of a launch are those that MLX has."""

from __future__ import annotations

import shutil
import subprocess

import mlx.core as mx
import pytest

from zmlx.backend.cuda import jit_module
from zmlx.backend.cuda.jit_module import KernelText, cache_folder, file_in, module_of, std_hash

#: What MLX 0.32.4 printed for this launch, and the file that it read.
TEXT = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_zz_float_3(
    const float* x,
    const __grid_constant__ Shape x_shape,
    float* out) {
  using T = float;
  constexpr int N = 3;

out[0]=T(7)+x_shape[0];
}

} // namespace mlx::core::cu
"""
SOURCE = "out[0]=T(7)+x_shape[0];"
#: Of libstdc++, on a machine of 64 bits.
HASHES = {
    "": "553e93901e462a6e",
    "a": "454ddee488c1ed6b",
    "zmlx_rms": "7363333158f98951",
    "a kernel of 27 characters..": "54df278ce3537a22",
}


def kernel(source: str = SOURCE, name: str = "zz", inputs=("x",), header: str = "") -> KernelText:
    return KernelText(name, tuple(inputs), ("out",), source, header)


def test_the_text_is_what_mlx_printed():
    found = module_of(kernel(), [(mx.float32, 2)], [mx.float32], [("T", mx.float32), ("N", 3)])
    assert found.text == TEXT
    assert found.kernel == "mlx::core::cu::custom_kernel_zz_float_3"
    assert found.name == f"custom_kernel_zz_float_3_{std_hash(TEXT.encode()):x}"


def test_a_number_has_no_shape_and_a_kernel_need_not_have_a_template():
    found = module_of(kernel(), [(mx.float32, 0)], [mx.float32], [])
    assert "x_shape," not in found.text
    assert "    float* out) {\nout[0]" in found.text
    assert found.kernel == "mlx::core::cu::custom_kernel_zz"


def test_everything_that_is_asked_of_an_input_comes_in_order():
    text = kernel("x_ndim x_strides[0] idx_shape", inputs=("x", "y"), header="// header\n")
    found = module_of(text, [(mx.uint8, 1), (mx.int64, 1)], [mx.bool_], [("B", True), ("C", False)])
    assert (
        "    const uint8_t* x,\n"
        "    const __grid_constant__ Shape x_shape,\n"  # MLX looks for the letters, not for words
        "    const __grid_constant__ Strides x_strides,\n"
        "    const __grid_constant__ int x_ndim,\n"
        "    const int64_t* y,\n"
        "    bool* out) {\n"
        "  constexpr bool B = true;\n  constexpr bool C = false;\n\n"
    ) in found.text
    assert "\n\n// header\nnamespace mlx::core::cu {\n" in found.text
    assert "custom_kernel_zz_t_f(" in found.text


@pytest.mark.parametrize(
    ("dtype", "named", "written"),
    [
        (mx.float16, "float16_t", "__half"),
        (mx.bfloat16, "bfloat16_t", "__nv_bfloat16"),
        (mx.float64, "double", "double"),
        (mx.complex64, "complex64_t", "mlx::core::cu::complex64_t"),
        (mx.bool_, "bool", "bool"),
        (mx.uint32, "uint32_t", "uint32_t"),
    ],
)
def test_types_have_a_name_and_another_in_the_text(dtype, named, written):
    found = module_of(kernel(), [(dtype, 1)], [dtype], [("T", dtype)])
    assert f"custom_kernel_zz_{named}(\n    const {written}* x" in found.text
    assert f"  using T = {written};\n" in found.text


@pytest.mark.parametrize(
    ("inputs", "outputs", "template", "error"),
    [
        ([], [mx.float32], [], ValueError),
        ([(mx.float32, 1)], [], [], ValueError),
        ([(mx.float32, 1)], [mx.float32], [("T", "float")], TypeError),
    ],
)
def test_what_mlx_refuses_has_no_module(inputs, outputs, template, error):
    with pytest.raises(error):
        module_of(kernel(), inputs, outputs, template)


@pytest.mark.parametrize(("text", "value"), HASHES.items())
def test_hashes_are_those_of_the_standard_library(text, value):
    assert f"{std_hash(text.encode()):x}" == value


def test_hashes_are_those_of_the_compiler_here(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++, whose library has the hash")
    program = tmp_path / "hash.cpp"
    texts = [TEXT * 3 + "x" * more for more in range(9)] + ["\u00e4\u00df"]
    literals = ", ".join(f'R"~({text})~"' for text in texts)
    program.write_text(
        "#include <cstdio>\n#include <functional>\n#include <string>\n"
        f"int main() {{ for (std::string s : {{{literals}}})"
        ' std::printf("%zx\\n", std::hash<std::string>{}(s)); }\n'
    )
    subprocess.run([compiler, "-std=c++17", program, "-o", tmp_path / "hash"], check=True)
    run = subprocess.run([tmp_path / "hash"], check=True, capture_output=True, text=True)
    assert [f"{std_hash(text.encode()):x}" for text in texts] == run.stdout.split()


def test_long_names_are_split_into_folders(tmp_path):
    assert file_in(tmp_path, "k" * 245) == tmp_path / f"{'k' * 245}.ptx"
    assert file_in(tmp_path, "k" * 246) == tmp_path / ("k" * 245) / "k.ptx"
    name = "a" * 245 + "b" * 245 + "c" * 10
    assert file_in(tmp_path, name) == tmp_path / ("a" * 245) / ("b" * 245) / f"{'c' * 10}.ptx"
    assert file_in(tmp_path, "k.1") == tmp_path / "k.1.ptx"


def test_the_folder_is_where_mlx_looks(monkeypatch, tmp_path):
    for name in ("MLX_PTX_CACHE_DIR", "TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    version = jit_module.VERSION
    assert str(cache_folder()) == f"/tmp/mlx/{version}/ptx"
    monkeypatch.setenv("TEMP", "/var/other")
    assert str(cache_folder()) == f"/var/other/mlx/{version}/ptx"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert cache_folder() == tmp_path / "mlx" / version / "ptx"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")
    assert cache_folder() is None
