"""Random parameters for a model of any size, made where they stay: 17 GB in seconds on a GPU.

The codes of quantized weights are random bits; scales and biases are such that every row is drawn
around zero with a variance of 1 / (its length), so that activations keep their size from layer to
layer, nothing overflows, and routers choose among all experts.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import count

import mlx.core as mx
import mlx.nn as nn

#: Root mean square of the sixteen values of a 4-bit float (e2m1).
_E2M1 = 2.926
#: What a scale of mxfp4 stands for is 2 ** (code - 127).
_E8M0_BIAS = 127
#: Standard deviation of biases.
_BIAS = 0.01


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter of a model random values, evaluated one after the other.

    Parameters keep their shapes and dtypes. Equal seeds give equal values on equal backends. Norms
    (every parameter of one dimension that is no bias) become ones.

    Args:
        model: dense layers and layers that are quantized in the modes "affine" and "mxfp4"; its
            parameters need not be evaluated.
        seed: of the random numbers.

    Returns:
        The model.

    Raises:
        ValueError: a layer is quantized in another mode.
    """
    mx.random.seed(seed)
    numbers = count(1000003 * seed)
    for path, layer in model.named_modules():
        own = {name: value for name, value in layer.items() if isinstance(value, mx.array)}
        made: dict[str, mx.array] = {}
        if "scales" in own:
            made = _quantized(path, layer, next(numbers))
        for name in own:
            if name not in made:
                made[name] = _dense(name, own[name])
            mx.eval(made[name])
            setattr(layer, name, made[name])
    return model


def _quantized(path: str, layer: nn.Module, number: int) -> dict[str, mx.array]:
    """Return weight, scales and, where there are, biases of a quantized layer."""
    mode, bits = getattr(layer, "mode", "affine"), layer.bits
    weight, scales = layer.weight, layer.scales
    deviation = 1 / math.sqrt(scales.shape[-1] * layer.group_size)
    made = {"weight": random_words(weight.shape, 2 * number)}
    noise = random_words(scales.shape, 2 * number + 1)
    if mode == "affine":
        levels = 2**bits - 1
        step = deviation * math.sqrt(12) / math.sqrt((levels + 1) ** 2 - 1)
        # From 0.75 to 1.25 of the step.
        spread = step * (0.75 + (noise & 255).astype(mx.float32) / 510)
        made["scales"] = spread.astype(scales.dtype)
        made["biases"] = (-levels / 2 * spread).astype(layer.biases.dtype)
    elif mode == "mxfp4":
        exponent = round(math.log2(deviation / _E2M1)) + _E8M0_BIAS
        made["scales"] = (exponent - (noise & 1).astype(mx.int32)).astype(scales.dtype)
    else:
        raise ValueError(f"{path}: mode {mode!r}: random weights are made for affine and mxfp4")
    return made


def _dense(name: str, like: mx.array) -> mx.array:
    """Return a value for a parameter that is not quantized."""
    if name.endswith("bias"):
        return (_BIAS * mx.random.normal(like.shape)).astype(like.dtype)
    if like.ndim < 2:
        return mx.ones(like.shape, like.dtype)
    # The last axis is summed over, or the one before in a convolution of one channel.
    length = like.shape[-1] if like.shape[-1] > 1 else like.shape[-2]
    return (mx.random.normal(like.shape) / math.sqrt(length)).astype(like.dtype)


def random_words(shape: tuple[int, ...], number: int) -> mx.array:
    """Return random 32-bit words (uint32): every bit is 0 or 1 with equal chance.

    MLX's `randint` goes through floats, which leaves the low bits of a word constant. This is a
    counter mixed by multiplications and shifts, as the finaliser of MurmurHash3 does it.

    Args:
        shape: of the result; fewer than 2**32 elements.
        number: which of the sequences of words.
    """
    word = partial(mx.array, dtype=mx.uint32)
    start = (number * 0x9E3779B9 + 0x7F4A7C15) & 0xFFFFFFFF
    x = mx.arange(math.prod(shape), dtype=mx.uint32) * word(0x9E3779B1) + word(start)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> word(shift))) * word(factor)
    return (x ^ (x >> word(16))).reshape(shape)
