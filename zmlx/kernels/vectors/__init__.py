"""Products with the weights of a model for one to a few tokens, each in one launch on a GPU.

They are made for decode, where reading the weights is all that takes time: packed weights are read
as MLX stores them, once, with norms before and activations and sums after them in the same launch.
"""

from zmlx.kernels.vectors.experts import (
    expert_combination,
    expert_gated_product,
    expert_products,
)
from zmlx.kernels.vectors.products import gated_product, products
from zmlx.kernels.vectors.weights import Weight

__all__ = [
    "Weight",
    "expert_combination",
    "expert_gated_product",
    "expert_products",
    "gated_product",
    "products",
]
