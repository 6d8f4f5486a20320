"""Tiny programs: a connected subgraph of operations on small arrays as one kernel.

A decode step launches many kernels that do almost nothing: a router's softmax, its partition, its
lookups and its division are ten launches for 128 numbers. Here they are one, of one threadgroup.
The text follows from the graph: elementwise operations are inlined, views are arithmetic on
indices, and what threads have to tell each other goes through threadgroup memory.

Each result is rounded to its dtype as MLX's own kernel would, so elementwise operations,
selections, indices and sorts are bit-identical to MLX on a GPU; sums run in float32 and are rounded
once.
"""

from zmlx.graph.tiny.program import TinyProgram, TooLarge, tiny_program
from zmlx.graph.tiny.refusals import refusal

__all__ = ["TinyProgram", "TooLarge", "refusal", "tiny_program"]
