"""With wrong kernels every test of authors' operations that sees a kernel's result fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from sabotage import WAYS

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="the emulator needs the CPU")
@pytest.mark.parametrize("way", WAYS)
def test_wrong_kernels_are_noticed(way):
    options = ["-q", "--tb=no", "-p", "sabotage", "--sabotage", way, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/authoring", "-k", "emulator"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seen = re.search(r"(\d+) tests saw kernels", done.stdout)
    assert seen is not None, done.stdout + done.stderr
    assert int(seen[1]) > 200
    assert re.findall(r"unnoticed: (.*)", done.stdout) == []
