"""Metal's words in, CUDA's words out; no compiler and no GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend.cuda import TranslationError, Variant, compiled, translated
from zmlx.backend.cuda.tokens import text_of, tokenize
from zmlx.backend.cuda.translate import always_indexed, translate_body, translate_header
from zmlx.backend.definition import CudaBody, Definition


def squeezed(text: str) -> str:
    return " ".join(text.split())


def define(source: str = "out[0] = 1;", **settings: object) -> Definition:
    settings = {"input_names": ("x",), "output_names": ("out",), **settings}
    return Definition(name="under_test", source=source, **settings)


@pytest.mark.parametrize(
    ("metal", "cuda"),
    [
        ("threadgroup float x[32];", "__shared__ float x[32];"),
        ("threadgroup float4 t[N * 2][8], u;", "__shared__ float4 t[N * 2][8], u;"),
        ("threadgroup vec<T, 4> t[4];", "__shared__ vec<T, 4> t[4];"),
        ("threadgroup atomic_uint n;", "__shared__ atomic_uint n;"),
        ("threadgroup decltype(a * b) t[4];", "__shared__ decltype(a * b) t[4];"),
        ("volatile threadgroup int flag;", "volatile __shared__ int flag;"),
        ("threadgroup float* p = x;", "float* p = x;"),
        ("threadgroup float& r = x[1];", "float& r = x[1];"),
        ("threadgroup float (*p)[8] = t;", "float (*p)[8] = t;"),
        ("auto p = (threadgroup uint*)x;", "auto p = (uint*)x;"),
        ("f<threadgroup float*>(x);", "f<float*>(x);"),
        ("const device T* p = x + 1;", "const T* p = x + 1;"),
        ("thread float acc[4] = {0};", "float acc[4] = {0};"),
        ("constant float* p = x;", "const float* p = x;"),
        ("const constant float* p = x;", "const float* p = x;"),
        ("constant const float* p = x;", "const float* p = x;"),
        ("static constant constexpr int n = 4;", "static constexpr int n = 4;"),
    ],
)
def test_address_spaces_in_a_body(metal, cuda):
    assert squeezed(translate_body(metal)) == cuda


@pytest.mark.parametrize(
    ("metal", "cuda"),
    [
        ("constant float t[2] = {1.0f, 2.0f};", "static constexpr float t[2] = {1.0f, 2.0f};"),
        ("constant constexpr int n = 4;", "static constexpr int n = 4;"),
        ("constexpr constant int n = 4;", "constexpr static int n = 4;"),
        ("static constant int n = 4;", "static constexpr int n = 4;"),
        ("T f(constant int& n, constant T s[2]) {}", "T f(const int& n, const T s[2]) {}"),
        ("T f(const constant int* n) {}", "T f(const int* n) {}"),
        ("T f(threadgroup T* p, device T& q) {}", "T f(T* p, T& q) {}"),
        ("struct S { float f() const thread { return 1; } };",
         "struct S { float f() const { return 1; } };"),
        ("struct S { void f() constant { } };", "struct S { void f() const { } };"),
        ("#include <metal_stdlib>\nusing namespace metal;", "using namespace metal;"),
        ("[[clang::always_inline]] float f();", "float f();"),
    ],
)  # fmt: skip
def test_address_spaces_in_a_header(metal, cuda):
    assert squeezed(translate_header(metal)) == cuda


@pytest.mark.parametrize(
    ("metal", "cuda"),
    [
        ("1.0", "1.0f"), ("1e-5", "1e-5f"), (".5", ".5f"), ("1.", "1.f"), ("2.5f", "2.5f"),
        ("3", "3"), ("3u", "3u"), ("0x1F", "0x1F"), ("0xEul", "0xEul"), ("0x1.8p3", "0x1.8p3f"),
        ("1'000", "1'000"), ("1.5h", "metal::half(1.5f)"), ("2h", "metal::half(2.0f)"),
        ("1.0bf", "metal::bfloat(1.0f)"), ("7F", "7F"),
    ],
)  # fmt: skip
def test_numbers_have_no_double(metal, cuda):
    assert translate_body(f"x = {metal};") == f"x = {cuda};"


def test_shifts_and_templates_keep_their_marks():
    text = "a = b >> 2 << 3; vec<vec<T,2>> c; d>>=1; e->f; g<=h;"
    assert translate_body(text) == text


def test_swizzles_become_calls_unless_declared():
    assert translate_body("v.xy;") == "v.get(metal::swizzle<0, 1>());"
    assert translate_body("v.bgr = w.zzzz;") == (
        "v.put(metal::swizzle<2, 1, 0>()) = w.get(metal::swizzle<2, 2, 2, 2>());"
    )
    assert translate_body("v.xy == w;").startswith("v.get(")
    for plain in ("v.x = v.w;", "struct S { int xy; }; s.xy;", "v.xyzwx;", "o.rgb();"):
        assert translate_body(plain) == plain


def test_arms_of_a_conditional_get_one_type():
    assert translate_body("a = c ? h : 0.0f;") == (
        "a = c ? metal::arm<decltype(0.0f)>(h) : metal::arm<decltype(h)>(0.0f);"
    )
    assert translate_body("f(c ? 1 : 2, d);") == "f(c ? 1 : 2, d);"
    nested = translate_body("x = a ? b : c ? d[i, j] : e;")
    assert nested.count("?") == 3  # one is a copy, inside decltype
    assert nested.endswith("metal::arm<decltype(d[i, j])>(e));")


def test_threads_come_together_before_calls_across_lanes():
    text = translate_body("float a = x[i];\nfloat s = simd_sum(a);\nout[i] = s;")
    assert text == "float a = x[i];\n__syncwarp(); float s = simd_sum(a);\nout[i] = s;"
    inside = "if (a) { s = simd_sum(a); }"
    assert translate_body(inside) == f"__syncwarp(); {inside}"
    kept = "if (a) { b; } else { s = 1; }"
    assert translate_body(kept) == kept
    assert "__syncwarp" not in translate_header("float f(float a) { return simd_sum(a); }")


def test_lines_stay_where_they_are():
    metal = "int a; // one\n/* two\n three */ int b;\n#define M(x) \\\n  (x)\nint c = M(1);"
    assert [line.strip() for line in translate_body(metal).splitlines()] == [
        "int a;", "", "int b;", "#define M(x) (x)", "", "int c = M(1);",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metal", "cuda"),
    [
        ("#pragma clang loop unroll(full)", "#pragma unroll"),
        ("#pragma clang loop unroll_count(4)", "#pragma unroll 4"),
        ("#pragma unroll", "#pragma unroll"),
        ("#pragma METAL fp math_mode(safe)", ""),
        ('_Pragma("clang loop unroll(full)")', '_Pragma("unroll")'),
        ("#define CAT(a, b) a##b", "#define CAT(a, b) a##b"),
        ("#define ONE device float", "#define ONE float"),
        ("#define HALF 0.5 // half", "#define HALF 0.5f"),
        ("#ifdef X", "#ifdef X"),
    ],
)
def test_directives(metal, cuda):
    assert squeezed(translate_header(metal)) == cuda


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int a;\ntexture2d<float> t;", r"line 2: 'texture2d' has no counterpart on CUDA"),
        ("simdgroup_float8x8 m;", "'simdgroup_float8x8' has no counterpart"),
        ("float4x4 m;", "'float4x4'"),
        ("#include <foo.h>", "line 1: #include <foo.h> is not there"),
        ("#pragma clang fp contract(off)", "__fmul_rn"),
        ("out[0 = 1;", "'\\[' is never closed"),
        ("if (a)) {}", "'\\)' closes nothing"),
        ("a ? b;", r"\? without its colon"),
        ("a ? : b;", r"an arm of \?: is empty"),
        ("x = 'a;", "starts no token"),
    ],
)
def test_what_cannot_be_translated_is_named(source, message):
    with pytest.raises(TranslationError, match=message):
        translate_body(source)


def test_errors_name_the_kernel_and_the_part():
    with pytest.raises(ValueError, match=r"kernel 'under_test', header, line 1: 'sampler'"):
        translated(define(header="sampler s;"))
    with pytest.raises(
        ValueError, match=r"'under_test', header, .* belongs into the kernel's body"
    ):
        translated(define(header="threadgroup float x[4];"))


def test_only_names_that_are_used_are_declared():
    body = translated(define("out[thread_position_in_grid.x] = 1;")).body
    assert body.startswith(
        "const metal::whole_grid zmlx_at; "
        "const uint3 thread_position_in_grid = zmlx_at.thread_position_in_grid(); {"
    )
    assert "zmlx" not in translated(define()).body


def test_a_cut_grid_has_its_size_as_an_input():
    source = translated(define(), Variant(cut=True))
    assert source.input_names == ("x", "zmlx_grid")
    assert "if (zmlx_at.outside()) return;" in source.body


def test_scalars_are_values():
    source = translated(define("out[0] = x;"), Variant(scalars=(0,)))
    assert source.input_names == ("zmlx_x",)
    assert "const auto& x = *zmlx_x;" in source.body
    with pytest.raises(TranslationError, match="no dimensions"):
        translated(define("out[0] = x_ndim;"), Variant(scalars=(0,)))


def test_arrays_that_are_always_indexed_are_never_scalars():
    assert always_indexed("x", "out[0] = x[1] + x [2];")
    assert not always_indexed("x", "out[0] = x[1] + x;")
    assert not always_indexed("x", "#define X x\n")


def test_the_text_is_short():
    """MLX hashes it at every call; what comes to a kernel's own text is under 500 characters."""
    text = "uint i = thread_position_in_grid.x; out[i] = metal::exp(x[i]);"
    source = translated(define(text))
    assert len(source.header) + len(source.body) - len(text) < 500


def test_a_body_for_cuda_is_not_touched():
    source = translated(define("no Metal `", cuda=CudaBody("out[0] = 1.0;", "// mine\n")))
    assert (source.header, source.body) == ("// mine\n", "out[0] = 1.0;")


ARCHITECTURE = "zmlx.backend.cuda.handwritten.architecture"


def test_a_body_for_cuda_is_for_devices_that_take_it(monkeypatch):
    kernel = define("out[0] = 1.0;", cuda=CudaBody("out[0] = 2.0;", architecture=80))
    found = []
    for device in (75, 80, 90):
        monkeypatch.setattr(
            "zmlx.backend.cuda.handwritten.architecture", lambda device=device: device
        )
        found.append("2.0" in translated(kernel).body)
    assert found == [False, True, True]


def test_a_body_for_cuda_has_a_launch_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mx.fast, "cuda_kernel", lambda **given: lambda **call: calls.append(call) or []
    )
    given = {"inputs": [], "grid": (1, 1, 1), "threadgroup": (1, 1, 1), "template": None}
    given["output_dtypes"] = [mx.float32]
    for body in (CudaBody("x;"), CudaBody("x;", launch=((64, 3, 1), (32, 1, 1)))):
        compiled(define("x;", cuda=body))(**given)
    assert calls == [given, {**given, "grid": (64, 3, 1), "threadgroup": (32, 1, 1)}]


def test_tokens_give_their_text_back():
    text = "a+++b; x = y->z ? *p : -1.5e-3; s = \"a // b\"; c = '\\'';\n"
    assert text_of(tokenize(text)) == text
