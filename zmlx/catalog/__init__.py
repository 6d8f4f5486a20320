"""The catalog of kernels as tables, pages and runs: `zmlx kernels`."""
