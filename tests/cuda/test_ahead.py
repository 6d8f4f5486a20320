"""Kernels are compiled ahead of MLX once, put where it looks, and left to it where that fails."""

from __future__ import annotations

import os
import re
import struct
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from nvrtc_program import FULL, compile_program, is_missing, library
from places import stand_still

from zmlx.backend.cuda import ahead, compiled, jit_module
from zmlx.backend.cuda.addresses import Addresses
from zmlx.backend.cuda.ahead import is_settled, keep, lean_for
from zmlx.backend.cuda.headers import headers
from zmlx.backend.cuda.jit_module import KernelText, module_of
from zmlx.backend.cuda.launching import InForce, in_force
from zmlx.backend.cuda.nvrtc import CompileError, Compiler
from zmlx.backend.cuda.side_by_side import side_by_side
from zmlx.backend.cuda.source import PRELUDE, CudaSource
from zmlx.backend.definition import CudaBody, Definition

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)

SOURCE = "uint i = thread_position_in_grid.x;\nout[i] = T(simd_sum(float(x[i]))) * x_shape[0];\n"


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    found = library()
    assert found is not None
    return Compiler(found[0], tuple(Path(option.partition("=")[2]) for option in found[1]))


@pytest.fixture
def here(compiler, monkeypatch, tmp_path):
    """A process that compiles ahead into an empty folder; launches give zeros."""
    found = lean_for(compiler, 90, tmp_path / "ptx")
    monkeypatch.setattr(ahead, "lean", lambda: found)
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path / "zmlx"))

    def cuda_kernel(**_):
        def launch(*, output_shapes, output_dtypes, **_):
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    return found


def kernel(source: str = SOURCE, **more):
    given = {"input_names": ("x",), "output_names": ("out",), **more}
    return compiled(Definition(name="ahead_of_mlx", source=source, **given))


def call(launch, x=None, dtype=mx.float32, **changed):
    arguments = {
        "inputs": [mx.zeros(64, dtype) if x is None else x],
        "output_shapes": [(64,)],
        "output_dtypes": [mx.float32],
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
        "template": [("T", dtype)],
    }
    return launch(**(arguments | changed))


def files(here) -> list[str]:
    return sorted(file.name for file in here.folder.rglob("*") if file.is_file())


def module(source: str = "out[0] = x[0];", **more) -> jit_module.Module:
    text = KernelText("plain", ("x",), ("out",), source, more.pop("header", ""))
    return module_of(text, [(mx.float32, 1)], [mx.float32], [])


def test_each_form_is_there_before_it_is_evaluated(here):
    launch = kernel()
    for _ in range(3):
        call(launch)
        call(launch, dtype=mx.bfloat16)
    names = files(here)
    assert len(names) == 4
    assert [name[:34] for name in names if name.endswith(".ptx")] == [
        "custom_kernel_ahead_of_mlx_bfloat1",
        "custom_kernel_ahead_of_mlx_float_" + names[2][33],
    ]
    for name in names:
        data = (here.folder / name).read_bytes()
        if name.endswith(".ptx"):
            assert data.startswith(b"\x7fELF")
        else:
            line = rb"mlx::core::cu::(\w+)\t_ZN3mlx4core2cu\d+(custom_\w+?)E\w+\n"
            found = re.fullmatch(line, data)
            assert found is not None
            assert found[1] == found[2]
            assert name.startswith(found[1].decode())


def test_forms_are_compiled_beside_each_other(here, monkeypatch):
    binary, threads = Compiler.binary, []

    def noted(*args, **kwargs):
        threads.append(threading.current_thread().name)
        return binary(*args, **kwargs)

    monkeypatch.setattr(Compiler, "binary", noted)
    launch = kernel()
    with side_by_side():
        call(launch)
        call(launch, dtype=mx.bfloat16)
    assert len(files(here)) == 4
    assert all(name.startswith("zmlx-compiler") for name in threads)
    assert len(threads) == 2


def test_files_are_written_once(here, compiler, monkeypatch):
    call(kernel())
    before = {name: (here.folder / name).stat().st_mtime_ns for name in files(here)}

    def not_again(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr(Compiler, "binary", not_again)
    call(kernel())  # as another process would
    assert {name: (here.folder / name).stat().st_mtime_ns for name in files(here)} == before


def test_what_is_there_stays(here):
    file = here.folder / f"{module().name}.ptx"
    file.parent.mkdir(parents=True)
    for each in (file, file.with_suffix(".txt")):
        each.write_bytes(b"MLX's own")
    assert keep(module(), here) == file
    assert file.read_bytes() == file.with_suffix(".txt").read_bytes() == b"MLX's own"


@pytest.mark.parametrize("gone", [".ptx", ".txt"])
def test_half_of_it_is_not_enough(here, gone):
    file = keep(module(), here)
    assert file is not None
    file.with_suffix(gone).unlink()
    assert keep(module(), here) == file
    assert files(here) == [f"{module().name}.ptx", f"{module().name}.txt"]


def test_names_come_before_the_binary(here, monkeypatch):
    def fails(source, target):
        if str(target).endswith(".ptx"):
            raise OSError("the disk is full")
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        keep(module(), here)
    assert files(here) == [f"{module().name}.txt"]  # which MLX reads after the binary only


def test_a_folder_that_nobody_may_write_to_costs_nothing(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Compiler, "binary", lambda *_, **__: pytest.fail("compiled in vain"))
    call(kernel())
    assert files(here) == []


def test_a_folder_that_cannot_be_is_left_alone(here):
    here.folder.write_text("a file")
    call(kernel())
    assert here.folder.read_text() == "a file"


def test_a_long_name_is_in_folders(here):
    long = {"template": [(f"N{number}", 1000000 + number) for number in range(40)]}
    call(kernel("out[0] = x[0];"), **long)
    [binary] = here.folder.rglob("*.ptx")
    assert binary.parent.parent == here.folder
    assert len(binary.parent.name) == 245
    assert binary.with_suffix(".txt").is_file()


@pytest.mark.parametrize(
    "body",
    [
        "out[0] = undeclared;",
        "out[0] = cg::this_grid().thread_rank();",
        "out[0] = Limits<float>::max();",
        "out[0] = cuda::std::numeric_limits<__half>::max();",
        "out[0] = cuda::std::get<0>(cuda::std::make_tuple(1.0f));",
    ],
)
def test_what_does_not_compile_is_left_to_mlx(here, body, monkeypatch, capfd):
    definition = {"cuda": CudaBody(body)}
    assert call(kernel(**definition))[0].shape == (64,)
    assert files(here) == []
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("ZMLX_LOG", "debug")
    call(kernel(**definition))
    assert "zmlx: kernel ahead_of_mlx is left to MLX: " in capfd.readouterr().err


def test_a_launch_that_mlx_refuses_reaches_it(here):
    with pytest.raises(ValueError):  # of the stand-in for MLX
        call(kernel(cuda=CudaBody("out[0] = x[0];")), output_dtypes=[mx.float32] * 2)
    call(kernel(cuda=CudaBody("out[0] = x[0];")), template=[["T", "float"]])
    assert files(here) == []


def test_kernels_with_addresses_are_compiled_as_well(here, monkeypatch):
    stand_still(monkeypatch)
    names = {"input_names": ("x", "a", "b")}
    arrays = [mx.ones(64), mx.ones(64), mx.ones(64, mx.uint32)]
    launch = kernel("uint i = thread_position_in_grid.x; out[i] = x[i] + a[i] * b[i];", **names)
    with in_force(InForce(Addresses(arrays[1:]))):
        call(launch, inputs=arrays)
    assert len(files(here)) == 2
    call(launch, inputs=arrays)
    assert len(files(here)) == 4


def test_a_changed_include_is_another_text(compiler, monkeypatch, tmp_path):
    """The package's headers are included by path, and MLX hashes the path alone."""
    before = lean_for(compiler, 90, tmp_path).digest
    assert lean_for(compiler, 90, tmp_path / "elsewhere").digest == before
    assert lean_for(compiler, 80, tmp_path).digest != before
    copy = tmp_path / PRELUDE.name
    for file in PRELUDE.parent.glob("*.cuh"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(ahead, "PRELUDE", copy)
    assert lean_for(compiler, 90, tmp_path).digest == before
    (tmp_path / "math.cuh").write_text("// another one\n")
    changed = lean_for(compiler, 90, tmp_path).digest
    monkeypatch.setattr(ahead, "headers", lambda: {**headers(), "more.cuh": ""})
    assert len({before, changed, lean_for(compiler, 90, tmp_path).digest}) == 3


def test_the_digest_is_in_the_text(here, monkeypatch):
    made = []
    launch = mx.fast.cuda_kernel
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **given: made.append(given) or launch())
    kernel()
    kernel(cuda=CudaBody("out[0] = 1;", header="int n;"))
    assert [given["header"].splitlines()[0] for given in made] == [f"// {here.digest}"] * 2


def test_an_include_without_a_hash_is_left_to_mlx(here, tmp_path):
    (tmp_path / "mine.cuh").write_text("constexpr float mine = 1;\n")
    include = f'#include "{tmp_path / "mine.cuh"}"'
    for header, kept in ((include, 0), (f"{include} // 0123456789ab", 2)):
        call(kernel(cuda=CudaBody("out[0] = mine;", header=f"{header}\n")))
        assert len(files(here)) == kept


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("int n;", True),
        ("#include <cuda_bf16.h>\n", True),
        (f'#include "{PRELUDE}"\n', True),
        ('#include "/elsewhere/metal.cuh"\n', False),
        ('int n;\n  #  include "one.cuh"  // 89abcdef0123\n', True),
        ('#include "one.cuh"  // what it is for\n', False),
        ('#include "one.cuh" // 89abcdef\n#include "two.cuh"\n', False),
    ],
)
def test_texts_that_say_all(text, settled):
    assert is_settled(CudaSource(text, "", ())) == settled
    assert is_settled(CudaSource("", text, ())) == settled


def test_without_cuda_or_with_another_mlx_nothing_is_compiled(monkeypatch):
    ahead.lean.cache_clear()
    try:
        assert mx.cuda.is_available() or ahead.lean() is None
        ahead.lean.cache_clear()
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
        monkeypatch.setattr(ahead, "VERSION", "0.33.0")
        monkeypatch.setattr(
            "zmlx.backend.cuda.nvrtc.loaded", lambda: pytest.fail("looked for the compiler")
        )
        assert ahead.lean() is None
    finally:
        ahead.lean.cache_clear()


def test_messages_of_the_compiler_are_passed_on(here):
    with pytest.raises(CompileError, match="undeclared"):
        keep(module("out[0] = undeclared;"), here)


# ---- what stands for CUDA's library says the same ------------------------------------------------

#: True with CUDA's own library, too.
FACTS = """
is_same_v<decay_t<const int&>, int>
is_same_v<decay_t<float (&)[3]>, float*>
is_same_v<decay_t<const int[]>, const int*>
is_same_v<decay_t<void(int)>, void (*)(int)>
is_same_v<remove_cv_t<const volatile char>, char> && is_same_v<remove_cv_t<const int&>, const int&>
is_same_v<remove_reference_t<int&&>, int>
is_same_v<remove_pointer_t<const float* const>, const float>
is_same_v<remove_pointer_t<int>, int>
is_same_v<make_unsigned_t<const long>, const unsigned long>
is_same_v<make_unsigned_t<char>, unsigned char>
is_same_v<make_integer_sequence<int, 3>, integer_sequence<int, 0, 1, 2>>
is_same_v<conditional_t<true, int, float>, int>
is_same_v<conditional_t<false, int, float>, float>
is_same_v<enable_if_t<true, int>, int> && is_same<int, int>::value && !is_same_v<int, unsigned>
is_integral_v<const bool> && is_integral_v<unsigned long long> && is_integral_v<char>
!is_integral_v<float> && !is_integral_v<int*> && !is_integral_v<int&> && is_integral<short>::value
is_floating_point_v<const float> && is_floating_point_v<double> && !is_floating_point_v<int>
is_arithmetic_v<float> && is_arithmetic_v<long> && !is_arithmetic_v<int*>
is_signed_v<int> && is_signed_v<float> && !is_signed_v<unsigned> && !is_signed_v<int*>
is_unsigned_v<bool> && is_unsigned_v<unsigned char> && !is_unsigned_v<float>
is_pointer_v<int* const> && !is_pointer_v<int[3]> && !is_pointer_v<int>
is_lvalue_reference_v<int&> && !is_lvalue_reference_v<int&&>
true_type::value && !false_type::value && integral_constant<int, 3>::value == 3
is_same_v<int64_t, long long> && is_same_v<uint8_t, unsigned char> && is_same_v<uint32_t, unsigned>
numeric_limits<int>::max() == 2147483647 && numeric_limits<int>::min() == -2147483647 - 1
numeric_limits<const unsigned>::max() == 4294967295u && numeric_limits<unsigned>::lowest() == 0
numeric_limits<signed char>::min() == -128 && numeric_limits<bool>::max()
numeric_limits<long>::max() == INT64_MAX && numeric_limits<unsigned long long>::max() == UINT64_MAX
numeric_limits<int>::digits == 31 && numeric_limits<int>::digits10 == 9
numeric_limits<bool>::digits == 1 && numeric_limits<unsigned short>::digits == 16
numeric_limits<int>::is_integer
!numeric_limits<int>::has_infinity
numeric_limits<int>::is_exact
numeric_limits<unsigned>::is_modulo && !numeric_limits<bool>::is_modulo
numeric_limits<float>::max() == 0x1.fffffep+127f && numeric_limits<float>::min() == 0x1p-126f
numeric_limits<float>::lowest() == -0x1.fffffep+127f && numeric_limits<float>::epsilon() == 0x1p-23f
numeric_limits<double>::max() == 0x1.fffffffffffffp+1023
numeric_limits<double>::min() == 0x1p-1022
numeric_limits<float>::infinity() > numeric_limits<float>::max()
numeric_limits<float>::digits == 24
__builtin_bit_cast(unsigned, numeric_limits<float>::quiet_NaN()) == 0x7fc00000
__builtin_bit_cast(unsigned, numeric_limits<float>::signaling_NaN()) == 0x7fa00000
numeric_limits<float>::denorm_min() == 0x1p-149f
numeric_limits<double>::denorm_min() == 0x1p-1074
numeric_limits<float>::digits10 == 6 && numeric_limits<double>::digits10 == 15
numeric_limits<float>::max_digits10 == 9 && numeric_limits<double>::max_digits10 == 17
numeric_limits<float>::max_exponent == 128 && numeric_limits<double>::min_exponent == -1021
sizeof(mlx::core::cu::Shape) == 40 && sizeof(mlx::core::cu::Strides) == 80
alignof(mlx::core::cu::Strides) == 8 && MAX_NDIM == 10 && WARP_SIZE == 32
is_same_v<decltype(mlx::core::cu::Shape().data()), int*> && mlx::core::cu::Strides().size() == 10
"""


def test_the_stand_in_says_what_the_library_says():
    lines = "".join(f"static_assert({fact});\n" for fact in FACTS.strip().splitlines())
    names = ("limits", "type_traits", "utility", "cstdint")
    includes = "".join(f"#include <cuda/std/{name}>\n" for name in names)
    log = compile_program(f"{includes}using namespace cuda::std;\n{lines}")
    assert log is None, log


def test_a_false_fact_does_not_compile():
    assert "static assertion" in (compile_program("static_assert(sizeof(int64_t) == 4);") or "")


def test_the_same_code_comes_out(compiler):
    """What is compiled ahead is no slower: instruction for instruction what MLX would have."""
    text = f'#include "{PRELUDE}"\n'
    body = "const metal::whole_grid at; const uint i = at.thread_position_in_grid().x;\n"
    body += "out[i] = metal::simd_sum(metal::exp(x[i])) * x_shape[0] + x_strides[1];"
    whole = module(body, header=text)
    codes = []
    for given in (headers(), FULL):
        ptx = compiler.binary(
            whole.text,
            whole.kernel,
            file="one.cu",
            headers=given,
            options=("--device-as-default-execution-space", "--gpu-architecture=sm_90a"),
        )[0]
        codes.append(sections(ptx))
    assert codes[0] == codes[1]
    assert len(codes[0]) == 1


def sections(binary: bytes) -> list[bytes]:
    """Return the instructions of a binary's kernels."""
    start, count = *struct.unpack_from("<Q", binary, 40), struct.unpack_from("<H", binary, 60)[0]
    headers = [struct.unpack_from("<IIQQQQ", binary, start + 64 * n) for n in range(count)]
    names = headers[struct.unpack_from("<H", binary, 62)[0]][4]
    return [
        binary[offset : offset + size]
        for name, _, _, _, offset, size in headers
        if binary[names + name :].startswith(b".text.")
    ]
