"""Metal text and launch geometry for authors."""

from zmlx.authoring.msl import DEFAULT_HEADER, Launch2D

__all__ = ["DEFAULT_HEADER", "Launch2D"]
