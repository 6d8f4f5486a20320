"""What is rewritten in a source, and what is left as it is."""

from __future__ import annotations

import pytest

from zmlx.backend.emulator import rewriting


@pytest.mark.parametrize(
    "kept",
    [
        "threadgroup float* p = s;",
        "threadgroup const float& r = s[0];",
        "f((threadgroup float*)p);",
        "void f(threadgroup float* s, threadgroup T (&a)[4]) {}",
        "// threadgroup float s[4];\n",
        '"threadgroup float s[4];"',
        "/* ;threadgroup float s[4]; */",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "for (threadgroup T* p = s; p < e; ++p) {}",
    ],
)
def test_what_declares_no_threadgroup_memory_is_kept(kept):
    assert rewriting.threadgroup_variables(kept) == kept


@pytest.mark.parametrize(
    ("source", "declared"),
    [
        ("threadgroup float s[32];", [("float [32]", "s")]),
        ("threadgroup T a[N][M + 1], b;", [("T [N][M + 1]", "a"), ("T", "b")]),
        ("threadgroup vec<float, 4> v[2];", [("vec<float, 4> [2]", "v")]),
        ("threadgroup atomic<int> n;", [("atomic<int>", "n")]),
        ("{ threadgroup\n  U s[BN * BD]; }", [("U [BN * BD]", "s")]),
        ("alignas(4); threadgroup alignas(16) half h[8];", [("alignas(16) half [8]", "h")]),
        ("if (x) { } threadgroup uint c; // count\n", [("uint", "c")]),
    ],
)
def test_threadgroup_variables(source, declared):
    out = rewriting.threadgroup_variables(source)
    assert out.count("\n") == source.count("\n")
    for kind, name in declared:
        assert f" = {kind}" in out.replace(" ;", ";")
        assert f"& {name} = ::zmlx::shared<" in out
        assert f'("{name}");' in out


def test_function_constants():
    source = (
        "constant bool masked [[function_constant(3)]];\n"
        "constant int n\n[[ function_constant(4) ]];\n"
    )
    out = rewriting.function_constants(source, {3: True, 4: 12})
    assert "static const bool masked = bool(true);" in out
    assert "static const int n = int(12);" in out
    assert out.count("\n") == source.count("\n")
    assert "masked = bool(0)" in rewriting.function_constants(source, {})
