"""A part of a lazy graph as one operation.

    program     y[i] = the array wanted[i], whatever operations lead to it

MLX makes an array, a task and several locks for every operation that it runs. In a decode step of a
small model they take longer than the arithmetic. On the CPU, `program` rewrites the graph behind
some arrays that have not been evaluated: operations that the native library knows run in one go,
the others stay as they are, between programs. Products, norms, rotary embeddings and attention are
those of this package and give the same bits as by themselves; element by element operations round
as stock does; sums and softmax along the last axis are float32. The given array objects themselves
become the results, so that whoever holds one has the fused one.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.kernels.spec import KernelSpec, Sample, register


def _reference(wanted: Sequence[mx.array]) -> list[mx.array]:
    return list(wanted)


def _sample(*, dtype: mx.Dtype) -> Sample:
    """Rows that are updated, viewed, routed and summed, as a decode step does."""
    x = mx.sin(mx.arange(40, dtype=mx.float32)).reshape(1, 2, 20).astype(dtype)
    rows = mx.zeros((1, 2, 8, 10), dtype)
    mx.eval(x, rows)
    heads = x.reshape(1, 2, 2, 10).transpose(0, 2, 1, 3)
    rows[..., 3:5, :] = heads
    seen = rows[..., :5, :] * heads[..., :1, :]
    scores = mx.softmax(seen, axis=-1, precise=True)
    best = mx.argpartition(-scores, kth=1, axis=-1)[..., :2]
    weights = mx.take_along_axis(scores, best, axis=-1)
    y = x.sum(axis=-1, keepdims=True) + weights.sum(axis=-1)[..., :2, None].reshape(1, 2, -1)
    return Sample(([y, rows],))


PROGRAM = register(
    KernelSpec(
        name="program",
        domain="graph",
        formula="y[i] = wanted[i], computed in one operation",
        shapes=("wanted: arrays of any shape, not evaluated", "y: as many, of the same shapes"),
        reference=_reference,
        sample=_sample,
        contract={"cpu": "tighter"},
        native="fuse_in_place",
    )
)
