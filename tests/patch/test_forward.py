"""Reading and rewriting upstream forwards."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import textwrap
import types

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from mlx_lm.models import llama

from zmlx.patch import forward as fw

# olmo's module ends the process when its own package is missing.
MODULES = sorted(m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__) if m.name != "olmo")


def _classes(name):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and cls.__module__ == module.__name__
    ]


def test_every_upstream_forward_is_read_and_recompiles_to_the_same_code():
    read, refused = 0, {}
    for name in MODULES:
        for cls in _classes(name):
            try:
                forward = fw.own_forward(cls)
            except fw.ForwardRefused as refusal:
                refused[f"{name}.{cls.__name__}"] = str(refusal)
                continue
            again = fw.rewritten(forward, {})
            assert fw._identity(again.__code__) == fw._identity(forward.function.__code__)
            assert again.__defaults__ == forward.function.__defaults__
            read += 1
    assert read > 400
    # What is refused has no forward of its own, or closes over its class.
    assert all("has no forward" in r or "not what runs" in r for r in refused.values()), refused
    assert len(refused) < 15, refused


class Block(nn.Module):
    def __call__(self, x, scale=2.0):
        y = x * scale
        return y + 1


def test_a_substituted_expression_runs_and_the_original_stays():
    forward = fw.own_forward(Block)
    product = next(n for n in ast.walk(forward.tree) if isinstance(n, ast.BinOp))
    new = fw.rewritten(forward, {product: fw.expression("x * 10 + old", old=product)})
    assert new(Block(), mx.array(1.0)).item() == 13.0
    assert Block()(mx.array(1.0)).item() == 3.0
    assert new.__name__ == "__call__"
    assert new.__defaults__ == (2.0,)


def test_errors_in_a_rewritten_forward_point_at_the_upstream_line():
    forward = fw.own_forward(Block)
    new = fw.rewritten(forward, {})
    with pytest.raises(TypeError) as caught:
        new(Block(), None)
    line = caught.traceback[-1]
    assert str(line.path) == __file__
    assert "y = x * scale" in str(line.statement)


def test_a_forward_that_was_replaced_is_refused(monkeypatch):
    def other(self, x):
        return x

    monkeypatch.setattr(llama.MLP, "__call__", other)
    with pytest.raises(
        fw.ForwardRefused, match=r"MLP.__call__ is not the one that .*llama defined"
    ):
        fw.own_forward(llama.MLP)


def test_a_wrapper_that_pretends_to_be_the_forward_is_refused(monkeypatch):
    original = llama.MLP.__call__

    @functools.wraps(original)
    def wrapper(self, x):
        return original(self, x)

    monkeypatch.setattr(llama.MLP, "__call__", wrapper)
    with pytest.raises(fw.ForwardRefused):
        fw.own_forward(llama.MLP)
    del wrapper.__wrapped__
    with pytest.raises(fw.ForwardRefused):
        fw.own_forward(llama.MLP)


def test_a_forward_without_source_is_refused():
    scope = {"nn": nn, "__name__": "made_up"}
    exec(  # a class whose text is in no file
        textwrap.dedent(
            """
            class Made(nn.Module):
                def __call__(self, x):
                    return x
            """
        ),
        scope,
    )
    with pytest.raises(fw.ForwardRefused, match="has no source"):
        fw.own_forward(scope["Made"])


def test_a_file_that_changed_after_import_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "shifting.py"
    file.write_text(
        "import mlx.nn as nn\nclass A(nn.Module):\n    def __call__(self, x):\n        return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("shifting")
    file.write_text(file.read_text().replace("return x", "return x * 2"))
    with pytest.raises(fw.ForwardRefused, match="not what runs"):
        fw.own_forward(module.A)


def test_a_forward_that_is_no_function_is_refused():
    class Odd(nn.Module):
        __call__ = functools.partial(print)

    with pytest.raises(fw.ForwardRefused, match="not the one"):
        fw.own_forward(Odd)


def test_parse_takes_what_mx_compile_returns():
    from mlx_lm.models.activations import swiglu

    assert fw.parse(swiglu).parameters == ["gate", "x"]
    with pytest.raises(fw.ForwardRefused, match="not written in Python"):
        fw.parse(mx.matmul)
    assert isinstance(fw.parse(swiglu).function.__globals__["nn"], types.ModuleType)
