"""Every kernel begins with the wait that lets it come to the device while the one before runs."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from nvrtc_program import assemble, is_missing, ptx
from places import stand_still

from zmlx.backend.cuda import CudaSource, compiled
from zmlx.backend.cuda.addresses import Addresses
from zmlx.backend.cuda.launching import InForce, in_force
from zmlx.backend.cuda.recording import mover_text
from zmlx.backend.cuda.source import OVERLAPPED, WAIT
from zmlx.backend.definition import CudaBody, Definition

NAMES = ("x", "weight", "bias")
METAL = "uint i = thread_position_in_grid.x; out[i] = x[i] * weight[i] + bias[i];"
BY_HAND = "if (threadIdx.x) return; out[0] = x[0] * weight[0] + bias[0];"
EARLY = f"float w = weight[0], b = bias[0]; {WAIT} if (threadIdx.x) return; out[0] = x[0] * w + b;"
WAITS = ("griddepcontrol.launch_dependents;", "griddepcontrol.wait;")


@pytest.fixture
def texts(monkeypatch):
    """What reaches `mx.fast.cuda_kernel` at each launch."""
    launched: list[dict] = []

    def cuda_kernel(**given):
        def launch(*, inputs, output_shapes, output_dtypes, **_):
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            launched.append({**given, "kinds": [(x.dtype, x.ndim) for x in arrays]})
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    stand_still(monkeypatch)
    return launched


def launch(by_hand: bool, cut: bool = False, held: bool = False, early: bool = False) -> None:
    body = CudaBody(BY_HAND, header="constexpr int one = 1;\n")
    if early:
        body = CudaBody(EARLY, early=NAMES[1:])
    more = {"cuda": body} if by_hand else {}
    arrays = [mx.ones(64) for _ in NAMES]
    kernel = compiled(Definition("waits", NAMES, ("out",), METAL, **more))
    with in_force(InForce(Addresses(arrays[1:]) if held else None)):
        kernel(
            inputs=arrays,
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(60 if cut else 64, 1, 1),
            threadgroup=(32, 1, 1),
        )


FORMS = {
    "translated": {"by_hand": False},
    "cut": {"by_hand": False, "cut": True},
    "by hand": {"by_hand": True},
    "by address": {"by_hand": False, "held": True},
    "by hand and address": {"by_hand": True, "held": True},
    "early": {"by_hand": True, "early": True},
    "early, by address": {"by_hand": True, "early": True, "held": True},
}
#: What is read before the wait: the table of addresses, and what a body reads early.
READ = {"by address": 2, "by hand and address": 2, "early": 2, "early, by address": 4}


@pytest.mark.parametrize("form", FORMS)
def test_the_wait_is_there_once_and_first(form, texts):
    launch(**FORMS[form])
    body, header = texts[-1]["source"], texts[-1]["header"]
    told = "".join(line for line in body.splitlines(True) if line.startswith("const float* const"))
    assert body.startswith(told if "early" in FORMS[form] else f"{told}{WAIT}\n")
    assert bool(told) == ("held" in FORMS[form])
    assert body.count(WAIT) == 1
    assert header.count(f'#include "{OVERLAPPED}"') == 1


def test_the_kernel_that_copies_waits_as_well():
    text = mover_text(128)
    assert text.count(WAIT) == 1
    assert re.search(r"zmlx_move\([^)]*\) \{\s*" + re.escape(WAIT), text)


def instructions(text: str) -> list[str]:
    """Return the instructions of a kernel in PTX that are no declarations and compute nothing."""
    body = text[text.index("\n{", text.index(".entry")) :]
    lines = (line.strip() for line in body.splitlines())
    return [line for line in lines if line.endswith(";") and not line.startswith(".")]


@pytest.mark.skipif(is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev)")
@pytest.mark.parametrize("form", FORMS)
def test_only_constants_are_read_before_it(form, texts):
    launch(**FORMS[form])
    given = texts[-1]
    source = CudaSource(given["header"], given["source"], tuple(given["input_names"]))
    text = assemble("K", source, given["kinds"], [("out", mx.float32)])
    new, old = (instructions(ptx(text, architecture=a)) for a in ("compute_90a", "compute_80"))
    where = [new.index(wait) for wait in WAITS]
    assert where == sorted(where)
    assert not any(re.match(r"@|bra|ret|st\.|atom|red\.", line) for line in new[: where[0]])
    loads = [line for line in new[: where[0]] if re.match(r"ld\.(?!param)", line)]
    assert len(loads) == READ.get(form, 0)
    assert any(line.startswith("ld.") for line in new[where[1] :])
    assert [sum(wait in line for line in new) for wait in WAITS] == [1, 1]
    assert not any("griddepcontrol" in line for line in old)


@pytest.mark.skipif(is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev)")
def test_the_kernel_that_copies_reads_nothing_before_it():
    new = instructions(ptx(mover_text(128), architecture="compute_90a"))
    where = new.index(WAITS[0])
    assert new[where + 1] == WAITS[1]
    assert not any(line.startswith("ld.global") for line in new[:where])
