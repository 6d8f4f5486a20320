"""Random programs: the kernel, the reference and Python compute the same, gradients included."""

from __future__ import annotations

import linecache
import math
import random

import mlx.core as mx
import numpy as np
import pytest
from authoring.jit_backends import BACKENDS
from authoring.jit_random import Programs

from zmlx.jit_compiler import jit

#: Functions of a module; they share one kernel, which is compiled once.
FUNCTIONS = 6
WEIGHTS = [0.3 + 0.1 * index for index in range(FUNCTIONS)]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", request.param)
    return request.param


def load(path, decorator):
    """Run a module's text with its own `jit`, and return its function `every`."""
    linecache.checkcache(str(path))
    names = {"jit": decorator}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["every"]


def elements(seed, count):
    generator = random.Random(seed)
    x = [generator.uniform(-3, 3) for _ in range(count)]
    y = [generator.uniform(-3, 3) for _ in range(count)]
    n = [generator.randint(0, 4) for _ in range(count)]
    return np.array(x, np.float32), np.array(y, np.float32), np.array(n, np.int32)


def around(function, x, y, n):
    """Return the results at a point and close to it in four directions."""
    h = 1e-5
    points = [(0, 0), (h, 0), (-h, 0), (0, h), (0, -h)]
    return np.array([function(x + a, y + b, n) for a, b in points], float)


def steady(values):
    """Return which results are nearly the same all around; others go another way in float32."""
    spread = np.abs(values - values[0]).max(axis=0)
    return (spread < 2e-3 * (1 + np.abs(values[0]))) & (np.abs(values[0]) < 1e3)


def slopes(values):
    """Return the derivatives of the weighted sum by x and y; NaN where it bends."""
    sums = values @ np.array(WEIGHTS)
    found = []
    for high, low in ((1, 2), (3, 4)):
        right, left = (sums[high] - sums[0]) / 1e-5, (sums[0] - sums[low]) / 1e-5
        bends = abs(left - right) > 1e-2 * (1 + abs(left))
        found.append(math.nan if bends else (left + right) / 2)
    return found


@pytest.mark.parametrize("seed", range(100, 106))
def test_random_programs(seed, tmp_path):
    path = tmp_path / "programs.py"
    path.write_text(Programs(seed).module(FUNCTIONS))
    plain, kernel = load(path, lambda function: function), load(path, jit)
    x, y, n = elements(seed, 61)
    arrays = [mx.array(v) for v in (x, y, n)]

    def loss(a, b):
        return sum((r * w).sum() for r, w in zip(kernel(a, b, arrays[2]), WEIGHTS, strict=True))

    found = np.array([np.array(result) for result in kernel(*arrays)]).T
    gradients = np.array([np.array(g) for g in mx.grad(loss, argnums=(0, 1))(*arrays[:2])]).T
    compared = [0, 0]
    for index, point in enumerate(zip(x.tolist(), y.tolist(), n.tolist(), strict=True)):
        values = around(plain, *point)
        kept = steady(values)
        compared[0] += kept.sum()
        np.testing.assert_allclose(
            found[index][kept], values[0][kept], rtol=3e-4, atol=3e-4, err_msg=f"{point}"
        )
        if kept.all():
            for value, truth in zip(gradients[index], slopes(values), strict=True):
                if not math.isnan(truth) and abs(truth) < 1e3:
                    compared[1] += 1
                    assert value == pytest.approx(truth, rel=1e-2, abs=1e-2), point
    assert compared[0] > 0.9 * found.size
    assert compared[1] > 0.5 * gradients.size
