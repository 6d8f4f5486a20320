"""`python -m zmlx.demo` runs the demo."""

from zmlx.demo.command import demo

demo(prog_name="python -m zmlx.demo")
