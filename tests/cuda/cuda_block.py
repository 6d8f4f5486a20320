"""Runs kernels written for CUDA by hand on the CPU: blocks of fibers, checked by a sanitizer.

The texts are those that NVIDIA's compiler gets, but for the instructions in `machine.cuh`, which
stand in `block/machine.cuh` as the manual describes them. What a body does not read early is there
only when it has waited for earlier kernels.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from nvrtc_program import DTYPES, assemble
from precompiled import compile_with

from zmlx.backend.cuda import CudaSource
from zmlx.backend.cuda.source import WAIT
from zmlx.backend.definition import Definition

_HERE = Path(__file__).with_name("block")
_OPTIONS = ("-std=c++17", "-O1", "-fsanitize=address", "-Wno-enum-compare", "-w")
_MAIN = """
int main(int, char** sizes) {{
  const unsigned seed = std::atol(sizes[0]);
  {loads}
  for (unsigned y = 0; y < {gy}; ++y) {{
    for (unsigned x = 0; x < {gx}; ++x) {{
      static void (*const call)() = [] {{ mlx::core::cu::custom_kernel_K({names}); }};
      block::kernel = call;
      block::take_away();
      block::run({threads}, {{x, y, 0}}, seed + 977 * x + y);
    }}
  }}
  if (block::waited != {gx} * {gy} * {threads}) block::fail("threads did not wait once", "the end");
  {stores}
}}
"""
_LOAD = (
    "{{ size_t n = std::atol(sizes[{i}]); char* p = new char[n + {shift}] + {shift}; "
    "if (std::fread(p, 1, n, stdin) != n) return 2; g{i} = (decltype(g{i}))p; {late} }}"
)
_LATE = "block::late.push_back({p, {p, p + n}});"
_STORE = "std::fwrite(g{i}, 1, std::atol(sizes[{i}]), stdout);"


class Block:
    """What compiles definitions that have a body for CUDA, and what it has launched.

    Attributes:
        folder: for programs.
        shifted: names of inputs that are put at an address that is no multiple of 16 bytes.
        seen: definitions that were launched.
    """

    def __init__(self, folder: Path, shifted: Sequence[str] = ()) -> None:
        self.folder = folder
        self.shifted = tuple(shifted)
        self.seen: list[Definition] = []

    def __call__(self, definition: Definition) -> Any:
        """Return a launch of a definition."""
        return partial(self._launch, definition)

    def _launch(
        self,
        definition: Definition,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Any = None,
        **_: Any,
    ) -> list[mx.array]:
        assert definition.cuda is not None, "it has no body for CUDA"
        self.seen.append(definition)
        mx.eval(*inputs)
        empty = [np.full(mx.zeros(s, d).nbytes, 0xFF, np.uint8)
                 for s, d in zip(output_shapes, output_dtypes, strict=True)]  # fmt: skip
        raw = [np.array(mx.contiguous(a).view(mx.uint8)).reshape(-1) for a in inputs] + empty
        program = self._built(definition, inputs, output_dtypes, template)
        done = subprocess.run(
            [str(len(self.seen)), *(str(len(r)) for r in raw)],
            executable=program,
            input=b"".join(r.tobytes() for r in raw),
            capture_output=True,
            env={"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()[:3000]
        outputs, at = [], 0
        for shape, dtype, bytes_ in zip(output_shapes, output_dtypes, empty, strict=True):
            part = np.frombuffer(done.stdout, np.uint8, len(bytes_), at)
            outputs.append(mx.array(part).view(dtype).reshape(shape))
            at += len(bytes_)
        return outputs

    def _built(
        self,
        definition: Definition,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Any,
    ) -> Path:
        body = definition.cuda
        assert body is not None
        assert body.launch is not None
        grid, threadgroup = body.launch
        kinds = [*(a.dtype for a in inputs), *output_dtypes]
        header = re.sub(r'#include "(.*)"', self._copied, body.header)
        kernel = assemble(
            "K",
            CudaSource(
                header, ("" if body.early else f"{WAIT}\n") + body.source, definition.input_names
            ),
            [(a.dtype, a.ndim) for a in inputs],
            list(zip(definition.output_names, output_dtypes, strict=True)),
            template or (),
        ).replace("namespace cg = cooperative_groups;", "")
        names = (*definition.input_names, *definition.output_names)
        assert set(body.early) <= set(definition.input_names)
        late = set(definition.input_names) - set(body.early)
        main = _MAIN.format(
            loads="".join(
                _LOAD.format(
                    i=i + 1,
                    shift=6 if name in self.shifted else 0,
                    late=_LATE if name in late else "",
                )
                for i, name in enumerate(names)
            ),
            stores="".join(_STORE.format(i=i + 1) for i in range(len(inputs), len(names))),
            names=", ".join(f"g{i + 1}" for i in range(len(names))),
            gx=grid[0] // threadgroup[0],
            gy=grid[1],
            threads=threadgroup[0],
        )
        globals_ = "".join(f"{DTYPES[kind]}* g{i + 1};\n" for i, kind in enumerate(kinds))
        text = f"{kernel}\n{globals_}{main}"
        stem = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not stem.exists():
            compile_with(_HERE / "device.hpp", _OPTIONS, text, stem)
        return stem

    def _copied(self, match: re.Match[str]) -> str:
        """Put the included texts beside other instructions."""
        path = Path(match[1])
        for file in (*path.parent.glob("*.cuh"), _HERE / "machine.cuh"):
            shutil.copy(file, self.folder / file.name)
        return f'#include "{self.folder / path.name}"'
