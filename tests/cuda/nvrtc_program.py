"""Compiles kernels without a GPU: NVRTC and CUDA's headers from NVIDIA's wheels."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from zmlx.backend.cuda import CudaSource
from zmlx.backend.cuda.headers import headers as ours

#: What every program of MLX begins with.
START = '#include "mlx/backend/cuda/device/utils.cuh"\n#include <cooperative_groups.h>\n'
#: What stands for MLX's own header, which is inside its CUDA library: the names a kernel can meet.
UTILS = """
#pragma once
#define MAX_NDIM 10
#define WARP_SIZE 32
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/complex>
#include <cuda/std/limits>
#include <cuda/std/tuple>
namespace mlx::core::cu {
using complex64_t = cuda::std::complex<float>;
using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;
template <typename T, typename = void>
struct Limits { static constexpr T max() { return cuda::std::numeric_limits<T>::max(); } };
template <typename IdxT = int64_t>
IdxT elem_to_loc(IdxT i, const int* shape, const int64_t* strides, int ndim) {
  IdxT at = 0;
  for (int d = ndim - 1; d >= 0; --d) { at += (i % shape[d]) * IdxT(strides[d]); i /= shape[d]; }
  return at;
}
}
"""
#: The headers with which MLX compiles.
FULL = {"mlx/backend/cuda/device/utils.cuh": UTILS}
DTYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}


#: NVIDIA has wheels for this kind of machine; in CI they must be there.
EXPECTED = (sys.platform, platform.machine()) == ("linux", "x86_64") and "CI" in os.environ


@cache
def library() -> tuple[ctypes.CDLL, tuple[str, ...]] | None:
    """Return NVRTC and the include options, or None where NVIDIA's wheels are not installed."""
    found: dict[str, Path] = {}
    for wheel in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "mlx-cuda-13"):
        try:
            files = metadata.files(wheel) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name.startswith("libnvrtc.so") or file.as_posix().endswith(
                ("include/cuda_fp16.h", "cuda/std/array")
            ):
                found.setdefault(file.name.split(".so")[0], Path(str(file.locate())))
    if not {"libnvrtc", "cuda_fp16.h", "array"} <= found.keys():
        return None
    folders = (found["array"].parents[2], found["cuda_fp16.h"].parent)
    return ctypes.CDLL(str(found["libnvrtc"])), tuple(f"--include-path={f}" for f in folders)


def is_missing() -> bool:
    """Whether tests that compile are to be skipped; in CI they fail instead."""
    return library() is None and not EXPECTED


def assemble(
    name: str,
    source: CudaSource,
    inputs: Sequence[tuple[mx.Dtype, int]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[tuple[str, object]] = (),
    *,
    with_header: bool = True,
) -> str:
    """Return what MLX makes of a kernel with such inputs (dtype, dimensions), but for `START`."""
    parameters = []
    for n, (dtype, ndim) in zip(source.input_names, inputs, strict=True):
        parameters.append(f"const {DTYPES[dtype]}* {n}")
        if ndim:
            kinds = {"shape": "Shape", "strides": "Strides", "ndim": "int"}
            parameters += [
                f"const __grid_constant__ {kind} {n}_{what}"
                for what, kind in kinds.items()
                if f"{n}_{what}" in source.body
            ]
    parameters += [f"{DTYPES[dtype]}* {n}" for n, dtype in outputs]
    constants = []
    for n, value in template:
        if isinstance(value, mx.Dtype):
            constants.append(f"  using {n} = {DTYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            constants.append(f"  constexpr {kind} {n} = {str(value).lower()};")
    return "\n".join(
        (
            source.header if with_header else "",
            "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;",
            f"__global__ void custom_kernel_{name}({', '.join(parameters)}) {{",
            *constants,
            source.body,
            "}\n}",
        )
    )


def compile_program(*kernels: str, architecture: str = "sm_90a", fully: bool = True) -> str | None:
    """Return None when kernels compile in one program, else what the compiler says.

    Args:
        *kernels: texts, one after another.
        architecture: of the device, by default that of an H200.
        fully: whether they have to compile with MLX's own headers, too, which takes some seconds.
    """
    target = f"--gpu-architecture={architecture}"
    compiled, log, _ = _compiled(kernels, target)
    if compiled and fully:
        # No more than the front end: what it says is what can differ.
        target = target.replace("sm_", "compute_")
        compiled, log, _ = _compiled(kernels, target, headers=FULL)
    return None if compiled else log


def registers(*kernels: str) -> list[int]:
    """Return how many registers the threads of kernels of one program have on an H200."""
    compiled, log, _ = _compiled(kernels, "--gpu-architecture=sm_90a", "--ptxas-options=-v")
    assert compiled, log
    return [int(number) for number in re.findall(r"Used (\d+) registers", log)]


def ptx(*kernels: str, architecture: str) -> str:
    """Return kernels of one program in NVIDIA's intermediate language.

    Args:
        *kernels: texts, one after another.
        architecture: of a device, as `compute_90a`.
    """
    compiled, log, text = _compiled(kernels, f"--gpu-architecture={architecture}")
    assert compiled, log
    return text


def _compiled(
    kernels: Sequence[str], *extra: str, headers: Mapping[str, str] | None = None
) -> tuple[bool, str, str]:
    """Compile, and return whether that went well, what the compiler says, and the program's PTX.

    The headers are by default those with which zmlx compiles ahead of MLX.
    """
    headers = ours() if headers is None else headers
    found = library()
    assert found is not None
    nvrtc, includes = found
    handle = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    whole = (START + "\n".join(kernels)).encode()
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(handle), whole, b"kernel.cu", len(headers), texts, names
    )
    assert made == 0, f"nvrtcCreateProgram: {made}"
    options = [
        "--device-as-default-execution-space",
        *extra,
        *includes,
    ]
    given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    try:
        compiled = nvrtc.nvrtcCompileProgram(handle, len(options), given) == 0
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value + 1)
        nvrtc.nvrtcGetProgramLog(handle, log)
        text = ctypes.create_string_buffer(1)
        # For a device rather than a kind of devices there is none.
        if compiled and nvrtc.nvrtcGetPTXSize(handle, ctypes.byref(size)) == 0:
            text = ctypes.create_string_buffer(size.value + 1)
            nvrtc.nvrtcGetPTX(handle, text)
        return compiled, log.value.decode(), text.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))
