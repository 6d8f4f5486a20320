"""The demo's checkpoints, made once per process."""

from __future__ import annotations

import mlx_lm
import pytest

from zmlx.demo.prepare import prepare
from zmlx.demo.smollm import DemoUnavailable, gguf_path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Return a function from shape and dtype to a checkpoint's folder."""
    try:
        gguf_path()
    except DemoUnavailable as error:
        pytest.fail(f"these tests need the demo's model; `make test` installs it. {error}")
    home = tmp_path_factory.mktemp("demo")
    return lambda shape="dense", dtype="float32": prepare(home, shape, dtype)


@pytest.fixture(scope="session")
def dense(checkpoints):
    """Return model and tokenizer of the dense model in float32."""
    return mlx_lm.load(str(checkpoints()))
