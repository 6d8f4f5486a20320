"""What the start-up file costs: one interpreter after the other, plain and with our folder.

    python benchmarks/startup.py [--runs N] [--json FILE]

Interpreters take turns, so that a change of the machine's speed meets all of them: without
any start-up file, with an empty one, with ours, and with a loader imported under either (a
stand-in, so that what is timed is the hook and wrapt). The hook should add less than 10 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from zmlx_autopatch.launch.environment import site_folder  # noqa: E402

BUDGET_MILLISECONDS = 10.0


def cases(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return name -> (PYTHONPATH entries, code)."""
    empty, loader = folder / "empty", folder / "loader"
    (loader / "mlx_lm").mkdir(parents=True)
    (loader / "mlx_lm" / "__init__.py").touch()
    (loader / "mlx_lm" / "utils.py").write_text("def load(path):\n    return path, None\n")
    empty.mkdir()
    (empty / "sitecustomize.py").touch()
    ours = [site_folder(), str(ROOT)]
    return {
        "plain": ([], "pass"),
        "empty start-up file": ([str(empty)], "pass"),
        "zmlx": (ours, "pass"),
        "plain, a loader imported": ([str(loader)], "import mlx_lm.utils"),
        "zmlx, a loader imported": ([*ours, str(loader)], "import mlx_lm.utils"),
    }


def seconds(path: list[str], code: str) -> float:
    """Return the wall time of one interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ZMLX_"))}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - started


def measure(runs: int) -> dict[str, list[float]]:
    """Return name -> milliseconds of each run; the first round, which fills caches, is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        table = cases(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in table}
        for turn in range(runs + 1):
            for name, (path, code) in table.items():
                taken = seconds(path, code) * 1e3
                if turn:
                    times[name].append(taken)
    return times


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return name -> median and what it adds to its plain counterpart, in milliseconds.

    The addition is the median of the differences within a turn.
    """
    summary = {}
    for name, taken in times.items():
        base = times["plain, a loader imported" if "loader" in name else "plain"]
        added = [mine - plain for mine, plain in zip(taken, base, strict=True)]
        summary[name] = {"median": statistics.median(taken), "added": statistics.median(added)}
    return summary


def main() -> int:
    """Measure, print, and return 1 when the start-up file costs more than the budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="turns to time (default 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run there")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs: expected a positive number")
    times = measure(options.runs)
    summary = summarise(times)
    print(f"Python {platform.python_version()}, {options.runs} turns, milliseconds\n")
    print(f"{'interpreter':<28}{'median':>8}{'added':>8}")
    for name, row in summary.items():
        print(f"{name:<28}{row['median']:>8.1f}{row['added']:>8.1f}")
    if options.json:
        record = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "command": sys.argv,
            "budget_ms": BUDGET_MILLISECONDS,
            "summary": summary,
            "runs_ms": times,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(summary["zmlx"]["added"] > BUDGET_MILLISECONDS)


if __name__ == "__main__":
    sys.exit(main())
