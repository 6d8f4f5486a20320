"""Whether the start-up hook works: start a child as `zmlx run` does, and look."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

#: Run in the child: load the library that loads models, then say what the hook saw.
_PROBE = (
    "import json, mlx_lm.utils, zmlx_autopatch; print('zmlx-hook ' + "
    "json.dumps(zmlx_autopatch.state()))"
)
_MARK = "zmlx-hook "
_TIMEOUT_SECONDS = 120
_NOT_INSTALLED = "the start-up file did not run in the child, or stood aside there"


def look() -> dict[str, Any]:
    """Start `zmlx run python` and return what the hook reports from there.

    Returns:
        {"alive": bool, "reason": text, "state": {...}}; the reason is empty when it is alive.
    """
    command = [sys.executable, "-m", "zmlx", "run", sys.executable, "-c", _PROBE]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _dead(f"the child did not run: {error}")
    answers = [line for line in ran.stdout.splitlines() if line.startswith(_MARK)]
    if ran.returncode or not answers:
        lines = ran.stderr.strip().splitlines() or ["no answer"]
        return _dead(f"the child ended with exit code {ran.returncode}: {lines[-1]}")
    state: dict[str, Any] = json.loads(answers[-1].removeprefix(_MARK))
    if not state.get("installed"):
        return _dead(state.get("error") or _NOT_INSTALLED, state)
    if not state.get("wrapped"):
        return _dead(state.get("error") or "it saw no function that loads a model", state)
    return {"alive": True, "reason": "", "state": state}


def _dead(reason: str, state: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"alive": False, "reason": reason, "state": state or {}}
