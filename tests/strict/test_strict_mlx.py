"""MLX's own kernels pass: the strict look is no stricter than Apple's compiler on real text."""

from __future__ import annotations

import itertools

import pytest

from zmlx.backend import strict

FOLDER = "mlx/backend/metal/kernels/"
FLOATS = ("float", "float16_t", "bfloat16_t")

#: file -> files that MLX puts before it, and kernels of it as MLX instantiates them
KERNELS = {
    "softmax.h": (
        [],
        [
            f"softmax_{loop}<{types}>"
            for loop in ("single_row", "looped")
            for types in (*FLOATS, "float16_t, float", "bfloat16_t, float")
        ],
    ),
    "sdpa_vector.h": (
        [],
        [
            *(f"sdpa_vector<{t}, {d}, {d}>" for t in FLOATS for d in (64, 96, 128, 256)),
            *(f"sdpa_vector_2pass_1<{t}, 128, 128>" for t in FLOATS),
            *(f"sdpa_vector_2pass_2<{t}, 128>" for t in FLOATS),
        ],
    ),
    "quantized.h": (
        ["steel/gemm/gemm.h", "quantized_utils.h"],
        [
            *(f"affine_qmv_fast<{t}, 64, {b}, 0>" for t in FLOATS for b in (2, 3, 4, 5, 6, 8)),
            *(f"affine_gather_qmv_fast<{t}, 32, {b}>" for t in FLOATS for b in (2, 3, 4, 5, 6, 8)),
            *(f"affine_qmm_t<{t}, 64, 4, true, true>" for t in FLOATS),
            "affine_quantize<bfloat16_t, 64, 4>",
            "affine_dequantize<float16_t, 32, 3>",
        ],
    ),
    "unary.h": (
        ["unary_ops.h"],
        [
            f"unary_v<{t}, {t}, {operation}>"
            for t, operation in itertools.product(
                FLOATS, ("Exp", "Erf", "Sigmoid", "Sign", "Round")
            )
        ]
        + ["unary_v<complex64_t, complex64_t, Exp>"],
    ),
    "binary.h": (
        ["binary_ops.h"],
        [
            f"binary_vv<{t}, {t}, {operation}>"
            for t in (*FLOATS, "int64_t", "complex64_t")
            for operation in ("Add", "Divide", "Maximum", "Power")
        ],
    ),
    "reduce.h": (
        ["reduce_utils.h"],
        [f"all_reduce<{t}, {t}, Sum<{t}>>" for t in (*FLOATS, "int", "complex64_t")],
    ),
    "sort.h": ([], [f"block_sort<{t}, {t}, true, 128, 4>" for t in (*FLOATS, "int")]),
    "scan.h": ([], [f"contiguous_scan<{t}, {t}, CumSum<{t}>, 4, true, false>" for t in FLOATS]),
}


def text(file: str) -> str:
    before, kernels = KERNELS[file]
    parts = [strict.flattened(FOLDER + name) for name in (*before, file)]
    for number, kernel in enumerate(kernels):
        name = f'[[host_name("kernel_{number}")]] [[kernel]]'
        parts.append(f"template {name} decltype({kernel}) {kernel};\n")
    return "".join(parts)


@pytest.mark.parametrize("file", KERNELS)
def test_kernels_of_mlx_pass(file):
    assert strict.check_text(text(file), name=file) == []


def test_a_fault_in_a_kernel_of_mlx_is_found():
    right = text("softmax.h")
    wrong = right.replace("threadgroup AccT local_max[SIMD_SIZE]", "AccT* local_max = out", 1)
    assert wrong != right
    (first, *_) = strict.check_text(wrong, name="softmax.h")
    line = wrong.splitlines()[first.line - 1]
    assert "AccT* local_max" in line
    assert first.message == "a pointer without an address space"


def test_a_file_that_mlx_has_not():
    with pytest.raises(FileNotFoundError, match="no_such"):
        strict.flattened(FOLDER + "no_such.h")
