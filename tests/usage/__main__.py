"""Run the calls that users already make, on every backend that is here.

    python tests/usage

The other files of this folder hold them as they are written elsewhere, in any style.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import mlx.core as mx

from zmlx.backend import current


def main() -> None:
    here = current()
    for backend in ("reference", "emulator") if here == "cpu" else ("reference", here):
        os.environ["ZMLX_BACKEND"] = backend
        for file in sorted(Path(__file__).parent.glob("*.py")):
            if file.name == Path(__file__).name:
                continue
            made = runpy.run_path(str(file))
            mx.eval([value for value in made.values() if isinstance(value, mx.array)])
            print(f"{file.name} on {backend}: ran", file=sys.stderr)


main()
