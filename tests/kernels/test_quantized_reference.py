"""The formulas of quantized products, which also stand in where no kernel runs: at any size."""

from __future__ import annotations

import mlx.core as mx

from zmlx.kernels.quantized import _MOST_TERMS, _products


def test_large_products_take_no_memory_for_their_terms():
    for rows in (3, 300):
        x, w = mx.random.normal((rows, 512)), mx.random.normal((1024, 512))
        mx.eval(x, w)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        y = _products(x, w)
        mx.eval(y)
        assert mx.allclose(y, x @ w.T, rtol=1e-4, atol=1e-3).item()
        assert mx.get_peak_memory() - before <= 4 * _MOST_TERMS + 4 * y.nbytes
