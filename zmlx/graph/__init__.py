"""A model's step as a graph of MLX operations: traced, rewritten with fused kernels, replayed."""
