"""`python -m zmlx` is the `zmlx` command."""

from zmlx.cli import main

main(prog_name="zmlx")
