"""Planted faults: each is refused at its line, and what is right beside it passes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from zmlx.backend import strict
from zmlx.backend.definition import Definition

LONG = (1000,)


def look(
    source: str,
    header: str = "",
    dtype: mx.Dtype = mx.float32,
    shapes: Any = (LONG, LONG),
    **definition: Any,
) -> list[strict.Diagnosis]:
    kernel = Definition("planted", ("x", "y"), ("out",), source, header=header, **definition)
    return strict.check(
        kernel,
        input_dtypes=[dtype, dtype],
        output_dtypes=[dtype],
        template=[("T", dtype)],
        input_shapes=shapes,
    )


def case(name: str, place: str, words: str, source: str, header: str = "", **more: Any) -> Any:
    return pytest.param(place, words, {"source": source, "header": header, **more}, id=name)


USE = "out[0] = 1;"
BFLOAT: dict[str, Any] = {"dtype": mx.bfloat16}
SMALL: dict[str, Any] = {"shapes": (LONG, (3,))}

ADDRESS_SPACES = [
    case(
        "pointer parameter",
        "header:2:14",
        "pointer without an address space",
        USE,
        "\nfloat f(float* p) { return p[0]; }",
    ),
    case(
        "pointer parameter of a template",
        "header:2:6",
        "pointer without an address space",
        USE,
        "template <typename T>\nT f(T* p) { return p[0]; }",
    ),
    case(
        "reference parameter",
        "header:1:11",
        "reference without an address space",
        USE,
        "void f(int& p) { p = 1; }",
    ),
    case(
        "reference to an array",
        "header:1:15",
        "reference without an address space",
        USE,
        "void f(float (&p)[4]) { p[0] = 1; }",
    ),
    case(
        "returned pointer",
        "header:1:6",
        "pointer without an address space",
        USE,
        "float* f(device float* p) { return p; }",
    ),
    case(
        "pointer variable",
        "source:2:6",
        "pointer without an address space",
        "\nfloat* p = out;\np[0] = 1;",
    ),
    case(
        "pointer to const variable",
        "source:1:9",
        "pointer without an address space",
        "const T * p = x; out[0] = p[0];",
    ),
    case(
        "reference variable",
        "source:1:2",
        "reference without an address space",
        "T& first = out[0]; first = 1;",
    ),
    case(
        "pointer in a loop",
        "source:1:13",
        "pointer without an address space",
        "for (const T* p = x; p < x + 2; ++p) out[0] = p[0];",
    ),
    case(
        "pointer member",
        "header:1:23",
        "pointer without an address space",
        USE,
        "struct P { const float* p; };",
    ),
    case(
        "pointer in a cast",
        "source:1:18",
        "pointer without an address space",
        "out[0] = *((float*)x);",
    ),
    case(
        "pointer in a reinterpret_cast",
        "source:1:39",
        "pointer without an address space",
        "out[0] = *reinterpret_cast<const float*>(x);",
    ),
    case(
        "device as thread",
        "source:2:17",
        "cannot initialize",
        "\nthread const T* p = x; out[0] = p[0];",
    ),
    case(
        "threadgroup as device",
        "source:2:11",
        "cannot initialize",
        "threadgroup T t[8];\ndevice T* p = t; out[0] = p[0];",
    ),
    case(
        "device as thread argument",
        "source:1:10",
        "no matching function",
        "out[0] = f(x);",
        "float f(thread const float* p) { return p[0]; }",
    ),
    case(
        "device as thread argument of a template",
        "source:1:10",
        "no matching function",
        "out[0] = f(x);",
        "template <typename T>\nT f(thread const T* p) { return p[0]; }",
    ),
    case(
        "device as thread reference",
        "source:1:1",
        "no matching function",
        "f(out[0]);",
        "void f(thread float& a) { a = 1; }",
    ),
    case(
        "method on a device object",
        "source:2:15",
        "deleted member function",
        "device S* s = (device S*)out;\nout[0] = s[0].get();",
        "struct S { float a; float get() { return a; } };",
    ),
    case(
        "constant as device",
        "source:1:17",
        "cannot initialize",
        "device const T* p = y; out[0] = p[0];",
        **SMALL,
    ),
    case(
        "constant as device argument",
        "source:1:10",
        "no matching function",
        "out[0] = f(y);",
        "template <typename T>\nT f(const device T* p) { return p[0]; }",
        **SMALL,
    ),
    case(
        "threadgroup in a helper",
        "header:2:3",
        "not a kernel",
        "f(); out[0] = 1;",
        "void f() {\n  threadgroup float t[4];\n  t[0] = 1;\n}",
    ),
    case(
        "threadgroup with a value",
        "source:1:17",
        "given a value",
        "threadgroup int n = 0;\nout[0] = n;",
    ),
    case("input written to", "source:1:6", "not assignable", "x[0] = 1;"),
    case(
        "constant written to",
        "source:2:10",
        "not assignable",
        "\ntable[0] = 1;",
        "constant float table[2] = {1, 2};",
    ),
    case(
        "global without constant",
        "header:1:7",
        "constant address space",
        "out[0] = table[1];",
        "float table[2] = {1, 2};",
    ),
]

CONVERSIONS = [
    case(
        "braces around a variable",
        "source:2:7",
        "narrowed",
        "uint n = thread_position_in_grid.x;\nint v{n}; out[0] = v;",
    ),
    case(
        "braces of an array",
        "source:2:13",
        "narrowed",
        "uint n = thread_position_in_grid.x;\nint v[2] = {n, 0}; out[0] = v[0];",
    ),
    case(
        "braces of a vector",
        "source:2:16",
        "narrowed",
        "uint n = thread_position_in_grid.x;\nfloat2 v = {0, n}; out[0] = v.x;",
    ),
    case(
        "float assigned to bfloat",
        "source:2:8",
        "no viable",
        "float f = x[0];\nout[0] = f;",
        **BFLOAT,
    ),
    case(
        "bfloat initialised with a float",
        "source:1:3",
        "no viable conversion",
        "T f = 1.0f; out[0] = f;",
        **BFLOAT,
    ),
    case(
        "float in one arm",
        "source:1:8",
        "no viable",
        "out[0] = x[0] > 1 ? x[0] : -INFINITY;",
        **BFLOAT,
    ),
    case(
        "float added to bfloat",
        "source:2:3",
        "no viable",
        "T s = x[0];\ns += 1.0f; out[0] = s;",
        **BFLOAT,
    ),
    case("bfloat times float", "source:1:8", "no viable", "out[0] = x[0] * 2.0f;", **BFLOAT),
    case(
        "float returned as bfloat",
        "header:2:19",
        "no viable conversion",
        "out[0] = f(x[0]);",
        "template <typename T>\nT f(T a) { return a * 0.5f; }",
        **BFLOAT,
    ),
    case(
        "bfloat to half",
        "source:1:6",
        "no viable conversion",
        "half h = x[0]; out[0] = T(float(h));",
        **BFLOAT,
    ),
    case(
        "vectors of two types",
        "source:1:8",
        "no viable conversion",
        "float4 v = int4(1); out[0] = v.x;",
    ),
    case(
        "integers times a float",
        "source:1:25",
        "invalid operands",
        "int4 v = int4(1); v = v * 2.5f; out[0] = v.x;",
    ),
    case(
        "position without a component",
        "source:1:6",
        "no viable conversion",
        "uint i = thread_position_in_grid; out[i] = 1;",
    ),
    case(
        "too few lanes",
        "source:1:12",
        "no matching constructor",
        "float4 v = float4(1, 2, 3); out[0] = v.x;",
    ),
    case(
        "no such lane",
        "source:1:37",
        "no member named 'z'",
        "float2 v = float2(1, 2); out[0] = v.z;",
    ),
    case(
        "no such lanes",
        "source:1:39",
        "no such lanes",
        "float2 v = float2(1, 2); float2 w = v.xz; out[0] = w.x;",
    ),
    case("ambiguous max", "source:1:10", "ambiguous", "out[0] = metal::max(x[0], 0);"),
]

LANGUAGE = [
    case(
        "recursion",
        "header:2:1",
        "'f' calls itself",
        "out[0] = f(3);",
        "\nfloat f(int n) {\n  return n ? f(n - 1) : 0;\n}",
    ),
    case(
        "recursion of two",
        "header:2:1",
        "'f' calls itself",
        "out[0] = f(3);",
        "float g(int);\nfloat f(int n) { return n ? g(n - 1) : 0; }\n"
        "float g(int n) { return f(n); }",
    ),
    case(
        "recursion of a template",
        "header:2:1",
        "calls itself",
        "out[0] = f(T(3));",
        "template <typename T>\nT f(T n) { return n > 0 ? f(n - 1) : n; }",
    ),
    case("double", "source:2:1", "double", "\ndouble d = 1; out[0] = d;"),
    case(
        "virtual function",
        "header:1:12",
        "virtual",
        USE,
        "struct S { virtual int f() { return 1; } };",
    ),
    case("throw", "source:1:15", "throw", "if (x[0] > 1) throw 1;"),
    case("try", "source:1:1", "try", "try { out[0] = 1; } catch (...) {}"),
    case("new", "source:1:10", "new", "auto p = new int[3];"),
    case("malloc", "source:1:10", "malloc", "auto p = malloc(3);"),
    case("goto", "source:2:1", "goto", "\ngoto end;\nend: out[0] = 1;"),
    case(
        "array of variable size",
        "source:2:9",
        "not a constant expression",
        "int n = thread_position_in_grid.x;\nfloat a[n]; a[0] = 1;",
    ),
    case(
        "threadgroup array of variable size",
        "source:2:21",
        "not a constant expression",
        "int n = thread_position_in_grid.x;\nthreadgroup float a[n]; a[0] = 1;",
    ),
    case("thread_local", "source:1:1", "thread_local", "thread_local int n = 1; out[0] = n;"),
    case("asm", "source:1:1", "asm", 'asm(""); out[0] = 1;'),
    case(
        "function pointer",
        "source:1:8",
        "pointers to functions",
        "float (*f)(float) = g; out[0] = f(1);",
        "float g(float a) { return a; }",
    ),
    case(
        "static variable", "source:1:12", "constant address space", "static int n = 0; out[0] = n;"
    ),
]

NAMES = [
    case("unknown function", "source:1:17", "'erf'", "out[0] = metal::erf(x[0]);"),
    case("std", "source:1:10", "'std'", "out[0] = std::exp(x[0]);"),
    case("unknown name", "source:2:1", "'foo'", "\nfoo = 1;"),
    case(
        "unknown attribute",
        "header:1:17",
        "thread_position_in_the_grid",
        USE,
        "void g(uint i [[thread_position_in_the_grid]]) {}",
    ),
    case("unknown include", "header:1:10", "'cmath' file not found", USE, "#include <cmath>"),
    case("syntax", "source:1:11", "expected ';'", "out[0] = 1\nout[1] = 2;"),
    case(
        "atomic half",
        "source:1:31",
        "atomic<half>",
        "atomic_fetch_add_explicit(&out[0], x[0], memory_order_relaxed);",
        dtype=mx.float16,
        atomic_outputs=True,
    ),
    case(
        "atomic used as a number", "source:1:8", "no viable", "out[0] += x[0];", atomic_outputs=True
    ),
]

MEMORY = [
    case(
        "one byte too many",
        "source:1:",
        "32,769 bytes",
        "threadgroup float a[8192]; threadgroup bool b; b = true; a[0] = 1; out[0] = a[0];",
    ),
    case(
        "in a block",
        "source:2:",
        "36,000 bytes",
        "for (int i = 0; i < 2; i++) {\n  threadgroup float a[9000]; a[0] = 1; out[0] = a[0];\n}",
    ),
    case(
        "of the type of a template",
        "source:1:",
        "40,000 bytes",
        "threadgroup T a[10000]; a[0] = 1; out[0] = a[0];",
    ),
]


@pytest.mark.parametrize(
    ("place", "words", "kernel"), ADDRESS_SPACES + CONVERSIONS + LANGUAGE + NAMES + MEMORY
)
def test_a_fault_is_refused_at_its_place(place, words, kernel):
    found = look(**kernel)
    assert any(str(d).startswith(place) and words in d.message for d in found), found


def test_what_to_do_is_said():
    advice = {d.message: d.advice for d in look("out[0] = f(x);", "float f(float* p);")}
    assert advice["a pointer without an address space"].startswith("name one of device")
    (bfloat,) = look("out[0] = 1.0f;", dtype=mx.bfloat16)
    assert "T(x)" in bfloat.advice


def test_all_faults_of_a_text_are_told_in_order():
    found = look("foo = 1;\nT* p = out;\nbar = 2;", "void f(int& a);")
    assert [(d.part, d.line) for d in found] == [
        ("header", 1),
        ("source", 1),
        ("source", 2),
        ("source", 3),
    ]


RIGHT = {
    "elements": "uint i = thread_position_in_grid.x; out[i] = x[i] * y[i] + T(2);",
    "pointers": """
        const device T* p = x + 1;
        threadgroup T tile[32], other[4][4];
        threadgroup float scalar;
        threadgroup T* q = tile;
        threadgroup T& r = other[1][2];
        r = q[0] = p[0];
        scalar = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (const device T* s = x; s < x + 4; ++s) out[0] = s[0] + T(scalar);
    """,
    "casts": """
        const device float4* p = reinterpret_cast<const device float4*>(x);
        const device uchar* q = (const device uchar*)x;
        out[0] = T(p[0].x + q[1]);
    """,
    "products that look like pointers": """
        int a = 2, b = 3;
        out[0] = T(a * b);
        out[1] = T((a & b) * (a) * (b));
    """,
    "swizzles": """
        float4 v = float4(1, float2(2), 3);
        float3 w = v.xyz * 2;
        v.xy = w.zx;
        v.rgb += 1;
        thread float& first = w.x;
        first = v[2] + dot(v, v);
        out[0] = T(w.y);
    """,
    "atomics in threadgroup memory": """
        threadgroup atomic_uint c;
        atomic_store_explicit(&c, 0u, memory_order_relaxed);
        atomic_fetch_or_explicit(&c, 1u, memory_order_relaxed);
        out[0] = T(atomic_load_explicit(&c, memory_order_relaxed));
    """,
    "simdgroups": """
        float v = float(x[0]);
        v = simd_sum(v) + simd_shuffle_xor(v, 1) + simd_prefix_exclusive_sum(v) + simd_max(v);
        out[0] = simd_sum(x[0]) + T(v) + T(simd_broadcast(v, 3) + quad_sum(v));
    """,
    "mathematics": """
        float v = float(x[0]);
        v = metal::exp(v) + fast::tanh(v) + precise::log(v) + metal::fma(v, v, v) + rsqrt(v);
        v += clamp(v, 0.0f, 1.0f) + select(v, 1.0f, v > 0) + pow(v, 2.0f) + popcount(3u) + sign(v);
        v += as_type<float>(as_type<uint>(v) ^ 1u) + INFINITY + M_PI_F + 1.0;
        out[0] = T(metal::max(v, 0.0f) + metal::numeric_limits<float>::max());
    """,
    "MLX's prelude": """
        auto at = elem_to_loc(thread_position_in_grid.x, x_shape, x_strides, x_ndim);
        out[0] = x[at];
        out[1] = Limits<T>::min;
    """,
    "half": "half h = 1.5h; h += 2; h *= 0.5f; out[0] = T(h);",
    "matrices of a simdgroup": """
        simdgroup_float8x8 a, b, c = simdgroup_float8x8(0);
        threadgroup float t[64];
        simdgroup_load(a, t, 8);
        simdgroup_load(b, t, 8);
        simdgroup_multiply_accumulate(c, a, b, c);
        simdgroup_store(c, t, 8);
        out[0] = T(t[0]);
    """,
    "words that only OpenCL reserves": """
        int local = 1, global = 2, pipe = 3, generic = 4;
        out[0] = T(local + global + pipe + generic);
    """,
    "pragmas": """
        #pragma unroll
        for (int i = 0; i < 4; i++) { out[i] = x[i]; }
        #pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) out[i] = y[i];
    """,
    "the last byte": "threadgroup char a[32768]; a[0] = 1; out[0] = T(a[0]);",
    "other types": """
        T b = x[0] * y[0] + x[0];
        b += x[1];
        b = -b;
        if (b > 0 && x[0]) b = T(float(b));
        b = x[0] > 2 ? static_cast<T>(float(b)) : x[1];
        out[0] = 1 / (1 + b);
        out[1] = 0;
        float sum = 0;
        sum += b;
        vec<T, 4> v = *(const device vec<T, 4>*)x;
        float4 w = float4(v);
        out[2] = v.x + v[1] + T(w.x);
    """,
}
HEADERS = {
    "struct in threadgroup memory": (
        "struct P { float v; uint i; };\nP best(P a, P b) { return a.v > b.v ? a : b; }",
        "threadgroup P t[32]; P p = {1, 1}; t[0] = p; P q = best(t[0], t[1]); t[1] = q;"
        "out[0] = T(q.v);",
    ),
    "struct in constant memory": (
        "struct P { float v; uint i; };\nconstant P table[2] = {{1, 2}, {3, 4}};",
        "P p = table[1]; p = table[0]; out[0] = T(p.v);",
    ),
    "methods": (
        "struct S {\n  float a;\n  S(float a) : a(a) {}\n  float get() const { return a; }\n"
        "  thread float& ref() { return a; }\n  void add(thread const S& o) { a += o.get(); }\n};",
        "S s(1); S t = S(2); s.add(t); s.ref() = S(3).get(); out[0] = T(s.get() + S(2).get());",
    ),
    "method for each address space": (
        "struct S { float a; float get() const device { return a; } "
        "float get() const thread { return a; } };",
        "S s = {1}; device S* d = (device S*)out; out[1] = T(s.get() + d[0].get());",
    ),
    "functors": (
        "struct Add { template <typename T> T operator()(T a, T b) { return a + b; } };\n"
        "template <typename Op, typename T>\nT apply(T a, T b) {\n"
        "  Op op;\n  return op(a, b) + Op()(a, b);\n}",
        "out[0] = apply<Add>(x[0], y[0]);",
    ),
    "arrays as parameters": (
        "template <int N>\nfloat f(thread float (&a)[N], const thread float* b) {\n"
        "  return a[0] + b[0];\n}",
        "float a[4] = {0}; out[0] = T(f(a, a));",
    ),
    "constants": (
        "constant constexpr int N = 8;\ntemplate <int M> constexpr int twice() { return M * 2; }",
        "T a[twice<N>()] = {0}; out[0] = a[0];",
    ),
    "macros": (
        "#define OUT device\n#define TILE(n) threadgroup float tile[n]\n"
        "#define SQ(a) ((a) * (a))\n",
        "TILE(32); tile[0] = 1; OUT T* p = out; p[0] = T(SQ(tile[0]));",
    ),
    "includes": ("#include <metal_stdlib>\n#include <metal_math>\nusing namespace metal;", USE),
    "members named as lanes": (
        "struct P { float xy; };",
        "P p; p.xy = 1; thread P* q = &p; out[0] = T(p.xy + q->xy);",
    ),
    "loop in place of recursion": (
        "float f(int n) { float s = 0; while (n) s += n--; return s; }\n"
        "float g(int n) { return f(n) + f(n + 1); }",
        "out[0] = T(g(3));",
    ),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_right_sources_pass(name, dtype):
    assert look(RIGHT[name], dtype=dtype) == []


@pytest.mark.parametrize("name", HEADERS)
def test_right_headers_pass(name):
    header, source = HEADERS[name]
    assert look(source, header) == []


@pytest.mark.parametrize("dtype", [mx.bool_, mx.uint8, mx.int32, mx.int64, mx.complex64], ids=str)
@pytest.mark.parametrize("length", [(), (1,), (7,), LONG], ids=str)
def test_every_dtype_in_every_address_space(dtype, length):
    second = "y" if length == () else "y[0]"
    found = look(
        f"out[0] = x[0] == {second} ? x[0] : {second};", dtype=dtype, shapes=(LONG, length)
    )
    assert found == []


def test_atomic_outputs():
    add = "atomic_fetch_add_explicit(&out[0], x[0], memory_order_relaxed);"
    assert look(add, atomic_outputs=True) == []
