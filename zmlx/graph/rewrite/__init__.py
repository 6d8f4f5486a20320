"""Rewrites of a decode step's graph: each finds operations that one kernel can do together."""
