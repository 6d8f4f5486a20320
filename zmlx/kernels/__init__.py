"""The kernels, one file for each group of operations; registered when they are imported."""
