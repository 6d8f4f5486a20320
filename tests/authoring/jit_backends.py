"""Where tests of jit run: everywhere that is possible here."""

from __future__ import annotations

from importlib.util import find_spec

from zmlx.backend import current

#: Values of ZMLX_BACKEND: the device of this machine, the reference, the emulator.
BACKENDS = ["reference"]
if current() != "cpu":
    BACKENDS.append("auto")
elif find_spec("zmlx.backend.emulator") is not None:
    BACKENDS.append("emulator")
