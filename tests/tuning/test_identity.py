"""Keys are made of contents: equal ones for equal kernels in any process, never addresses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from zmlx.backend.definition import Definition
from zmlx.tuning.identity import NoContent, content_of, digest, inputs_text, machine, text_of

KERNEL = Definition("k", ("x",), ("y",), "y[0] = x[0];")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"source": "y[0] = x[1];"},
        {"header": "constant int a = 1;"},
        {"input_names": ("a",)},
        {"ensure_row_contiguous": False},
        {"cuda": "y[0] = 1;"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_kernel_has_another_content(change):
    assert content_of(replace(KERNEL)) == content_of(KERNEL)
    assert content_of(replace(KERNEL, **change)) != content_of(KERNEL)


def test_inputs_are_shapes_and_dtypes():
    assert inputs_text([mx.zeros((8, 3)), mx.zeros((), mx.bfloat16), 2.5]) == (
        "(8, 3) float32, () bfloat16, float"
    )


def factory(source, scale=2):
    kernel = replace(KERNEL, source=source)

    def inner(x, factor=1.5):
        return (kernel, list(x), scale, factor, {"a", "b", "c"})

    return inner


def test_functions_are_told_apart_by_what_they_refer_to():
    assert digest(factory("a;")) == digest(factory("a;"))
    assert digest(factory("a;")) != digest(factory("b;"))
    assert digest(factory("a;")) != digest(factory("a;", scale=3))
    assert digest(lambda x: x + 1) != digest(lambda x: x + 2)
    assert digest(lambda x=1: x) != digest(lambda x=2: x)


def test_functions_that_call_each_other_end():
    assert digest(one) == digest(one)
    assert digest(one) != digest(other)


def one(x):
    return other(x - 1)


def other(x):
    return one(x - 1)


SCRIPT = """
from zmlx.backend.definition import Definition
from zmlx.tuning.identity import digest
K = Definition("k", ("x",), ("y",), "s")
def f(x, y={"p": 1}):
    return [K, x in {"a", "b", "c", "d"}, print, len(x)]
print(digest(f, "text", 1, 2.5, None, {"b": 1, "a": (True,)}, {"x", "y", "z"}))
"""


def test_a_digest_is_the_same_in_every_process():
    seen = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len(seen.pop().strip()) == 24


def test_texts_differ_where_values_do():
    values = [
        1,
        1.0,
        True,
        "1",
        (1,),
        ((1,),),
        None,
        mx.float32,
        "float32",
        {"a": 1},
        ("a", 1),
        b"1",
    ]
    assert len({text_of(value) for value in values}) == len(values)
    assert text_of(["a, b"]) != text_of(["a", "b"])


@pytest.mark.parametrize("value", [object(), mx.zeros((2,)), [object()], {"a": mx.zeros((2,))}])
def test_what_has_no_content_is_refused(value):
    with pytest.raises(NoContent, match="no content"):
        text_of(value)


def test_the_machine_has_the_name_that_mlx_reports():
    assert machine("metal").device == mx.device_info()["device_name"]
    assert machine("metal", any_device=True).device == ""
    assert machine("metal") != machine("cuda")
