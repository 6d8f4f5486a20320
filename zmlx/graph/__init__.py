"""A step of a model as a graph of MLX's operations: traced, rewritten with fused kernels, replayed."""
