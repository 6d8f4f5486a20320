"""The text that is looked at: as MLX writes it, and told of at the places of its author."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest

from zmlx.backend import metal, strict
from zmlx.backend.definition import Definition
from zmlx.backend.strict import compiler, signature
from zmlx.backend.strict.outline import outline
from zmlx.backend.strict.rewrite import edits
from zmlx.backend.strict.tokens import Parts, tokens

KERNEL = Definition(
    "sum_of",
    ("x", "y", "z"),
    ("out", "count"),
    "uint i = thread_position_in_grid.x + threads_per_threadgroup.x + thread_index_in_simdgroup;\n"
    "out[i] = T(x[i * x_strides[0]] + y[x_ndim] + z); count[0] = x_shape[0] + N;",
    header="constant int K = 3;",
)
INPUTS = (mx.zeros((4, 4), mx.float16), mx.zeros((3,), mx.uint8), mx.array(1.5))
TEMPLATE = (("T", mx.bfloat16), ("N", 7), ("FLAG", True))


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("template", [(), TEMPLATE], ids=["plain", "template"])
def test_the_signature_is_the_one_that_mlx_writes(atomic, template):
    source = KERNEL.source if template else "out[0] = x[0]; count[0] = 1;"
    kernel = Definition(
        KERNEL.name,
        KERNEL.input_names,
        KERNEL.output_names,
        source,
        KERNEL.header,
        atomic_outputs=atomic,
    )
    launch = {
        "inputs": list(INPUTS),
        "output_shapes": [(16,), (1,)],
        "output_dtypes": [mx.float32, mx.int32],
        "grid": (16, 1, 1),
        "threadgroup": (16, 1, 1),
    }
    written = metal.text(kernel, template=list(template), **launch)
    arguments = signature.Arguments(
        [array.dtype for array in INPUTS],
        launch["output_dtypes"],
        template,
        [array.shape for array in INPUTS],
    )
    ours = "\n".join(text.strip() for _, text in signature.parts(kernel, arguments))

    def bare(text: str) -> str:
        # MLX puts the types of the arguments into the kernel's name, and no line break before it.
        return "".join(re.sub(r"custom_kernel_sum_of\w*", "NAME", text).split())

    assert bare(ours) == bare(written)


@pytest.mark.parametrize("line", ["#define K 3", "// the end"])
def test_a_header_whose_last_line_would_take_in_the_signature(line):
    def look(header: str) -> list[strict.Diagnosis]:
        kernel = Definition("k", (), ("out",), "out[0] = 1;", header=header)
        return strict.check(kernel, input_dtypes=[], output_dtypes=[mx.float32])

    (found,) = look(f"constant int N = 1;\n{line}")
    assert str(found).startswith("header:2:1: MLX writes the kernel behind the header's last line")
    assert look(f"constant int N = 1;\n{line}\n") == []
    assert look(f"{line}\nconstant int N = 1;") == []


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"input_dtypes: 1 given for 3 names \(x, y, z\)"):
        strict.check(KERNEL, input_dtypes=[mx.float32], output_dtypes=[mx.float32] * 2)
    with pytest.raises(ValueError, match=r"template 'N': 1\.5 is no dtype"):
        strict.check(
            KERNEL,
            input_dtypes=[mx.float32] * 3,
            output_dtypes=[mx.float32] * 2,
            template=[("N", 1.5)],
        )


def test_without_clang_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("ZMLX_CLANG", "no-such-clang")
    with pytest.raises(strict.ClangUnavailable, match=r"ZMLX_CLANG=no-such-clang.*install clang"):
        strict.find()


def test_a_compiler_that_is_no_clang_is_not_taken(monkeypatch, tmp_path):
    program = tmp_path / "clang"
    program.write_text("#!/bin/sh\necho 'cc version 99'\n")
    program.chmod(0o755)
    monkeypatch.setenv("ZMLX_CLANG", str(program))
    with pytest.raises(strict.ClangUnavailable, match="install clang"):
        strict.find()


def test_the_prelude_is_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path))
    compiler._prelude.cache_clear()
    first = compiler._prelude(strict.find())
    made = first.stat().st_mtime_ns
    compiler._prelude.cache_clear()
    assert compiler._prelude(strict.find()) == first
    assert first.stat().st_mtime_ns == made
    assert list((tmp_path / "strict").iterdir()) == [first]
    compiler._prelude.cache_clear()


def rewritten(text: str) -> str:
    found = tokens(text)
    seen = outline([token for token in found if not token.directive])
    return Parts([("text", text)]).marked(edits(found, seen)).partition("\n")[2].strip()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a.xy;", "a.template zmlx_lanes<0, 1>()/*xy*/;"),
        ("a->bgra *= 2;", "a->template zmlx_set<2, 1, 0, 3>()/*bgra*/ *= 2;"),
        ('// a.xy\n"a.xy";', '// a.xy\n"a.xy";'),
        ("1.5bf;", "bfloat(1.5f)/*bf*/;"),
        ("0x1bf;", "0x1bf;"),
        (
            "kernel void f() { threadgroup float a[2][3], b; }",
            "kernel void f() { threadgroup float (&a)[2][3] = zmlx_threadgroup_storage(), (&b) "
            "= zmlx_threadgroup_storage(); }",
        ),
        (
            "kernel void f() { threadgroup float* a = b; }",
            "kernel void f() { threadgroup float* a = b; }",
        ),
        ("void f(threadgroup float* a);", "void f(threadgroup float* a);"),
        (
            "constant int n [[function_constant(3)]];",
            "constant int n [[function_constant(3)]] = {};",
        ),
    ],
)
def test_what_clang_reads(written, read):
    assert rewritten(written) == read


def test_places_are_those_of_the_author():
    """Columns are counted as if nothing had been put in before them on the line."""
    kernel = Definition(
        "k", (), ("out",), "threadgroup float a[2], b[2]; float4 v = 1; v.xy = v.zw; undefined = 1;"
    )
    (found,) = strict.check(kernel, input_dtypes=[], output_dtypes=[mx.float32])
    assert (found.part, found.line) == ("source", 1)
    assert kernel.source[found.column - 1 :].startswith("undefined")


def test_looks_may_run_at_once():
    from concurrent.futures import ThreadPoolExecutor

    def look(number: int) -> list[strict.Diagnosis]:
        source = f"out[{number}] = {'x' if number % 2 else '1'};"
        kernel = Definition(f"k{number}", (), ("out",), source)
        return strict.check(kernel, input_dtypes=[], output_dtypes=[mx.float32])

    with ThreadPoolExecutor(4) as threads:
        assert [bool(found) for found in threads.map(look, range(8))] == [False, True] * 4


def test_the_page_shows_what_is_printed(capsys):
    page = (Path(__file__).parents[2] / "docs" / "STRICT.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out == printed
