"""Random chains of operations as tiny programs: phases, slots and indices in all combinations."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from tiny_cases import holds

SHAPES = ((3, 5, 8), (1, 64), (2, 1, 130), (1, 1, 700), (4, 33), (2, 3, 40))


def concatenated(u, v, axis):
    return mx.concatenate([u, u * 2], axis=axis) if u.size < 600 else u.reshape(-1, u.shape[-1])


def summed(u, v, axis):
    return u + v if u.shape == v.shape else u * v.max()


STEPS = (
    lambda u, v, axis: u + 1.5,
    lambda u, v, axis: u - u.max(axis=axis, keepdims=True),
    lambda u, v, axis: mx.argsort(u, axis=axis).astype(mx.float32),
    lambda u, v, axis: mx.sort(u, axis=axis),
    lambda u, v, axis: u.sum(axis=axis, keepdims=True) * 0.125 + u,
    lambda u, v, axis: mx.swapaxes(u, 0, u.ndim - 1),
    concatenated,
    lambda u, v, axis: u.reshape(-1)[: max(1, u.size // 2)],
    lambda u, v, axis: mx.take_along_axis(u, mx.argmax(u, axis=axis, keepdims=True), axis=axis),
    lambda u, v, axis: mx.where(u > 0, u, -u),
    summed,
    lambda u, v, axis: mx.cumsum(mx.round(u), axis=axis),
)


def chain(seed):
    chosen = random.Random(seed)
    plan = [(chosen.choice(STEPS), chosen.random(), chosen.random()) for _ in range(12)]

    def function(x, y):
        pool = [x, y]
        for step, first, second in plan:
            u, v = (pool[int(part * len(pool))] for part in (first, second))
            pool.append(step(u, v, int(second * u.ndim)))
        return tuple(pool[-3:])

    return function


@pytest.mark.parametrize("seed", range(24))
def test_a_random_program(seed):
    shape = SHAPES[seed % len(SHAPES)]
    # Eighths, so that sums are exact in any order.
    x, y = (
        mx.round(mx.random.normal(shape, key=mx.random.key(2 * seed + n)) * 8) / 8 for n in (0, 1)
    )
    mx.eval(x, y)
    holds(chain(seed), x, y, tolerance=1e-5)
