"""Decode attention goes through NVIDIA's compiler in its forms for CUDA."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from nvrtc_program import compile_program, is_missing, ptx, registers
from test_catalog_compiles import programs  # noqa: F401
from test_overlapped import instructions

from zmlx.kernels import attention_launch
from zmlx.kernels import decode_attention as plain
from zmlx.kernels import decode_attention_latent as latent
from zmlx.kernels.decode_attention import decode_attention
from zmlx.kernels.decode_attention_latent import decode_attention_latent
from zmlx.kernels.rope import Rope

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)
#: What a block in a cluster does, one thing after another.
ORDER = (
    "griddepcontrol.launch_dependents",
    "griddepcontrol.wait",
    "mbarrier.init",
    "barrier.cluster.arrive",
    "barrier.cluster.wait",
    "st.async",
    "mbarrier.try_wait",
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
    check(programs, fully=(name, dtype) == ("norms", mx.bfloat16))


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
    check(programs, architecture, fully=name == "norms")


@pytest.mark.parametrize("name", ["norms", "gpt-oss"])
def test_it_compiles_in_clusters(name, programs, monkeypatch):  # noqa: F811
    launch_all(mx.bfloat16, OPTIONS[name], monkeypatch, tensor=True, clusters=True)
    check(programs)
    check_clusters(programs)


def launch_all(dtype, options, monkeypatch, *, tensor, clusters=False):
    monkeypatch.setattr(plain, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(plain, "has_tensor_cores", lambda: tensor)
    monkeypatch.setattr(attention_launch, "may_cluster", lambda: clusters)
    for splits in (2, 8) if clusters else (1, 4):
        q, k, keys = (mx.zeros(s, dtype) for s in ((1, 16, 64), (1, 2, 64), (1, 2, 300, 64)))
        decode_attention(
            q, k, k, keys, keys, mx.zeros(3, mx.int32), scale=1.0, splits=splits, **options
        )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_it_compiles_for_latents(dtype, programs, monkeypatch):  # noqa: F811
    launch_latent(dtype, monkeypatch, tensor=False)
    check(programs, fully=dtype == mx.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "architecture"), [(mx.float16, "sm_80"), (mx.bfloat16, "sm_90a")], ids=str
)
def test_it_compiles_for_latents_on_tensor_cores(dtype, architecture, programs, monkeypatch):  # noqa: F811
    launch_latent(dtype, monkeypatch, tensor=True)
    check(programs, architecture, fully=dtype == mx.bfloat16)


def test_it_compiles_for_latents_in_clusters(programs, monkeypatch):  # noqa: F811
    launch_latent(mx.bfloat16, monkeypatch, tensor=True, clusters=True)
    check(programs)
    check_clusters(programs)


@pytest.mark.parametrize("clusters", [False, True])
def test_blocks_find_their_registers(clusters, programs, monkeypatch):  # noqa: F811
    """MLX says nothing of a block's threads to the compiler, and a launch of too many fails.

    A multiprocessor has four parts with 16,384 registers each, and a block's warps are dealt out.
    """
    launch_latent(mx.bfloat16, monkeypatch, tensor=True, clusters=clusters)
    for header, bodies in programs.items():
        for k, text in enumerate(bodies):
            [used] = registers(header, text.replace("_CASE(", f"_{k}("))
            assert -(-9 // 4) * 32 * -(-used // 8) * 8 <= 16384


@pytest.mark.parametrize("weight", [mx.bfloat16, mx.float32], ids=str)
def test_blocks_of_clusters_find_their_shared_memory(weight, programs, monkeypatch):  # noqa: F811
    """The most heads of the most elements, which have no more than 48 KB to begin with."""
    for module in (plain, latent):
        monkeypatch.setattr(module, "for_kernels", lambda **_: "cuda")
        monkeypatch.setattr(module, "has_tensor_cores", lambda: True)
    monkeypatch.setattr(attention_launch, "may_cluster", lambda: True)
    ones, at = {n: mx.ones(n, weight) for n in (128, 512)}, mx.zeros(3, mx.int32)
    q, k, keys = (mx.zeros(s, mx.bfloat16) for s in ((1, 8, 128), (1, 1, 128), (1, 1, 512, 128)))
    norms = {"q_norm": ones[128], "k_norm": ones[128], "rope": Rope(128, traditional=True)}
    decode_attention(q, k, k, keys, keys, at, scale=1.0, **norms)
    rope = Rope(64, traditional=True)
    arrays = latent_arrays(mx.bfloat16, heads=8, capacity=512)
    decode_attention_latent(*arrays, at, scale=1.0, norm=ones[512], rope=rope)
    assert all("__cluster_dims__(8, 1, 1)" in whole(header) for header in programs)
    check(programs)


def latent_arrays(dtype, heads=20, capacity=300):
    sizes = ((1, heads, 512), (1, heads, 64), (1, 512), (1, 64))
    caches = ((1, 1, capacity, 512), (1, 1, capacity, 64))
    return [mx.zeros(size, dtype) for size in (*sizes, *caches)]


def launch_latent(dtype, monkeypatch, *, tensor, clusters=False):
    monkeypatch.setattr(latent, "for_kernels", lambda **_: "cuda")
    monkeypatch.setattr(latent, "has_tensor_cores", lambda: tensor)
    monkeypatch.setattr(attention_launch, "may_cluster", lambda: clusters)
    for splits in (2, 8) if clusters else (1, 4):
        decode_attention_latent(
            *latent_arrays(dtype),
            mx.zeros(3, mx.int32),
            scale=1.0,
            norm=mx.ones(512),
            rope=Rope(64, traditional=True),
            splits=splits,
        )


def whole(header):
    """Return a header with what it includes."""
    return "".join(Path(file).read_text() for file in re.findall(r'#include "(.*)"', header))


def check_clusters(programs):  # noqa: F811
    """Every thread of every block waits for earlier kernels before anything else.

    Then it comes to its cluster, whose blocks have to be there before one gives to another.
    """
    sizes = [int(n) for h in programs for n in re.findall(r"__cluster_dims__\((\d),", whole(h))]
    assert sorted(sizes) == [2, 8]
    for header, bodies in programs.items():
        [body] = bodies
        lines = instructions(ptx(header, body.replace("_CASE(", "_0("), architecture="compute_90a"))
        where = {name: [i for i, line in enumerate(lines) if name in line] for name in ORDER}
        assert all(where.values())
        for earlier, later in pairwise(ORDER):
            assert max(where[earlier]) < min(where[later])
        before = lines[: where["griddepcontrol.wait"][0]]
        assert not any(re.match(r"@|bra|ret|st\.|ld\.(?!param)|atom|red\.", x) for x in before)


def check(programs, architecture="sm_90a", *, fully=False):  # noqa: F811
    assert sum(map(len, programs.values())) == 2
    for header, bodies in programs.items():
        for k, text in enumerate(bodies):
            assert len(header) + len(text) < 4000, "MLX hashes all of it at every evaluation"
            text = text.replace("_CASE(", f"_{k}(")
            log = compile_program(header, text, architecture=architecture, fully=fully)
            assert log is None, f"\n{log[:3000]}"
