"""The version of zmlx, read by the build and by `zmlx doctor`."""

__version__ = "0.1.0"
