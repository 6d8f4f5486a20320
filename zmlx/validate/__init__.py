"""`zmlx validate`: stock against patched on one model, with the contract as a verdict."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run `zmlx validate` with the arguments of this process."""
    from zmlx.validate.command import validate  # noqa: PLC0415 - MLX is loaded only when it runs

    validate(prog_name="zmlx validate")
