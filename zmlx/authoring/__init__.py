"""Writing kernels: from a formula or a Python function to a differentiable kernel."""
