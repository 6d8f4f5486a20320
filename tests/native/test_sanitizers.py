"""The kernels under the address, undefined-behaviour and thread sanitizers (`sanitized.cpp`)."""

from __future__ import annotations

import platform
import shlex

import exact
import harness
import pytest

from zmlx.backend.cpu import build


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_products_are_clean(sanitizers, tmp_path):
    compiler = shlex.split(build.find_compiler())
    flags = ["-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    program = harness.compile_program(compiler, flags, platform.machine(), tmp_path)
    best, *ran = harness.run([str(program)])
    assert ran == exact.kernel_sets()
    assert best == f"best: {ran[0]}"
