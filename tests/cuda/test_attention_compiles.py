"""Decode attention goes through NVIDIA's compiler in its forms for CUDA."""

from __future__ import annotations

import mlx.core as mx
import pytest
from nvrtc_program import compile_program, is_missing, registers
from test_catalog_compiles import programs  # noqa: F401

from zmlx.kernels import decode_attention as plain
from zmlx.kernels import decode_attention_latent as latent
from zmlx.kernels.decode_attention import decode_attention
from zmlx.kernels.decode_attention_latent import decode_attention_latent
from zmlx.kernels.rope import Rope

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)
OPTIONS = {
    "plain": {},
    "norms": {"q_norm": mx.ones(64), "k_norm": mx.ones(64), "rope": Rope(64)},
    "gpt-oss": {
        "rope": Rope(64, base=None, freqs=mx.ones(32), multiplier=1.3),
        "sinks": mx.ones(16),
        "window": 128,
        "after": mx.ones(1),
    },
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_compiles(name, dtype, programs, monkeypatch):  # noqa: F811
    launch_all(dtype, OPTIONS[name], monkeypatch, tensor=False)
    check(programs)


@pytest.mark.parametrize(
    ("name", "dtype", "architecture"),
    [
        ("plain", mx.bfloat16, "sm_90a"),
        ("norms", mx.bfloat16, "sm_90a"),
        ("gpt-oss", mx.bfloat16, "sm_80"),
        ("gpt-oss", mx.float16, "sm_90a"),
    ],
    ids=str,
)
def test_it_compiles_for_tensor_cores(name, dtype, architecture, programs, monkeypatch):  # noqa: F811
    launch_all(dtype, OPTIONS[name], monkeypatch, tensor=True)
    check(programs, architecture)


def launch_all(dtype, options, monkeypatch, *, tensor):
    monkeypatch.setattr(plain, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(plain, "has_tensor_cores", lambda: tensor)
    for splits in (1, 4):
        q, k, keys = (mx.zeros(s, dtype) for s in ((1, 16, 64), (1, 2, 64), (1, 2, 300, 64)))
        decode_attention(
            q, k, k, keys, keys, mx.zeros(3, mx.int32), scale=1.0, splits=splits, **options
        )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_it_compiles_for_latents(dtype, programs, monkeypatch):  # noqa: F811
    launch_latent(dtype, monkeypatch, tensor=False)
    check(programs)


@pytest.mark.parametrize(
    ("dtype", "architecture"), [(mx.float16, "sm_80"), (mx.bfloat16, "sm_90a")], ids=str
)
def test_it_compiles_for_latents_on_tensor_cores(dtype, architecture, programs, monkeypatch):  # noqa: F811
    launch_latent(dtype, monkeypatch, tensor=True)
    check(programs, architecture)


def test_blocks_find_their_registers(programs, monkeypatch):  # noqa: F811
    """MLX says nothing of a block's threads to the compiler, and a launch of too many fails.

    A multiprocessor has four parts with 16,384 registers each, and a block's warps are dealt out.
    """
    launch_latent(mx.bfloat16, monkeypatch, tensor=True)
    for header, bodies in programs.items():
        for k, text in enumerate(bodies):
            [used] = registers(header, text.replace("_CASE(", f"_{k}("))
            assert -(-9 // 4) * 32 * -(-used // 8) * 8 <= 16384


def launch_latent(dtype, monkeypatch, *, tensor):
    monkeypatch.setattr(latent, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(latent, "has_tensor_cores", lambda: tensor)
    sizes = ((1, 20, 512), (1, 20, 64), (1, 512), (1, 64), (1, 1, 300, 512), (1, 1, 300, 64))
    arrays = [mx.zeros(size, dtype) for size in sizes]
    for splits in (1, 4):
        decode_attention_latent(
            *arrays,
            mx.zeros(3, mx.int32),
            scale=1.0,
            norm=mx.ones(512),
            rope=Rope(64, traditional=True),
            splits=splits,
        )


def check(programs, architecture="sm_90a"):  # noqa: F811
    assert sum(map(len, programs.values())) == 2
    for header, bodies in programs.items():
        for k, text in enumerate(bodies):
            assert len(header) + len(text) < 4000, "MLX hashes all of it at every evaluation"
            log = compile_program(
                header, text.replace("_CASE(", f"_{k}("), architecture=architecture
            )
            assert log is None, f"\n{log[:3000]}"
