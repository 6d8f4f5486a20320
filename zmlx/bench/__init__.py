"""Benchmarks: timed generation, and capsules, the files that hold what was measured."""
