"""Operations over rows of a fixed length."""

from zmlx.authoring.reductions import rowwise_map_reduce as map_reduce

__all__ = ["map_reduce"]
