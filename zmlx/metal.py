"""Kernels from sources in the Metal Shading Language, on Metal, CUDA and the CPU."""

from zmlx.backend.kernel import KernelStats, MetalKernel, MetalKernelSpec, kernel

__all__ = ["KernelStats", "MetalKernel", "MetalKernelSpec", "kernel"]
