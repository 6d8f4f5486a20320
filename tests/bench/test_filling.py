"""Random parameters: every code is as likely, rows keep activations as they are, dtypes stay."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from zmlx.bench.filling import fill, random_words


def test_every_bit_of_a_word_is_random():
    words = np.array(random_words((300, 400), 7))
    bits = np.unpackbits(words.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.002
    for shift in range(0, 32, 4):
        counts = np.bincount((words.ravel() >> shift) & 15, minlength=16)
        assert counts.min() > 0.95 * counts.max() * 0.95
    # Neighbours are independent, and so are the sequences of different numbers.
    other = np.array(random_words((300, 400), 8))
    for a, b in ((words[:, 1:], words[:, :-1]), (words, other)):
        same = np.unpackbits((a ^ b).copy().view(np.uint8)).mean()
        assert abs(same - 0.5) < 0.002
    assert np.array_equal(words, np.array(random_words((300, 400), 7)))


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [(4, 64, "affine"), (8, 32, "affine"), (3, 64, "affine"), (4, 32, "mxfp4")],
)
def test_rows_have_the_variance_of_their_length(bits, group_size, mode):
    dense = nn.Linear(512, 96, bias=False)
    dense.set_dtype(mx.bfloat16)
    layer = dense.to_quantized(group_size, bits, mode=mode)
    before = {name: (p.shape, p.dtype) for name, p in tree_flatten(layer.parameters())}
    fill(layer)
    assert {n: (p.shape, p.dtype) for n, p in tree_flatten(layer.parameters())} == before
    biases = layer.get("biases")
    weight = mx.dequantize(
        layer.weight, layer.scales, biases, group_size=group_size, bits=bits, mode=mode
    ).astype(mx.float32)
    assert abs(mx.mean(weight).item()) < 0.002
    # Scales of mxfp4 are powers of two, so they are right to a factor of two only.
    least, most = (0.45, 1.1) if mode == "mxfp4" else (0.95, 1.07)
    assert least < mx.std(weight).item() * 512**0.5 < most


def test_dense_layers_norms_and_biases():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(400, 300)
            self.norm = nn.RMSNorm(300)
            self.conv = nn.Conv1d(300, 300, 3, groups=300)
            self.router = nn.Module()
            self.router.correction_bias = mx.zeros((8,))

    layer = Layer()
    layer.linear.set_dtype(mx.float16)
    fill(layer)
    assert layer.linear.weight.dtype == mx.float16
    assert mx.std(layer.linear.weight.astype(mx.float32)).item() == pytest.approx(0.05, rel=0.05)
    assert mx.all(layer.norm.weight == 1).item()
    assert 0.3 < mx.std(layer.conv.weight).item() < 0.8
    for bias in (layer.linear.bias, layer.router.correction_bias):
        assert 0 < mx.abs(bias).max().item() < 0.1


def test_seeds_differ():
    made = [fill(nn.QuantizedLinear(64, 32), seed).weight for seed in (0, 1, 0)]
    assert mx.array_equal(made[0], made[2])
    assert not mx.array_equal(made[0], made[1])


def test_another_mode_is_refused_with_the_layer():
    model = nn.Sequential(nn.QuantizedLinear(64, 32, group_size=32, bits=8, mode="mxfp8"))
    with pytest.raises(ValueError, match=r"layers\.0: mode 'mxfp8'"):
        fill(model)
