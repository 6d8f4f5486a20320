"""Print what blocks with experts gain on GPUs as a Markdown table: `python -m zoo.gains`.

Run it in `tests/`; docs/EXPERTS.md is its output.
"""

from __future__ import annotations

from gpu_path import on_gpu
from upstream import installed_types
from zoo.build import made

from zmlx.family.table import model_types
from zmlx.patch import PatchReport, patch, unpatch

HEADING = """# Routed experts on GPUs

What `moe_mlp` replaces in each model type of mlx-lm with routed experts, for calls with up to 64
chosen experts; written by `python -m zoo.gains` (in `tests/`), held current by a test. How a type
routes is in the table of families; routing, shared experts and scales are never replaced.

| type | experts | weighted sum |
|---|---|---|
"""

#: Where there is neither SwitchGLU nor SwitchMLP (dbrx has a list), or no experts are configured.
NONE = "none of mlx-lm's SwitchGLU and SwitchMLP"


def moe_types() -> list[str]:
    """Return the types with routed experts, those of other types' text models included."""
    types = model_types()
    return [
        name
        for name in installed_types()
        if any(types[each].router for each in (name, *types[name].text) if each in types)
    ]


def gains(name: str) -> tuple[str, str]:
    """Return what happens to the experts of a type and to the block around them."""
    model = made(name, "float32-4bit")
    with on_gpu():
        report: PatchReport = patch(model, patterns=["moe_mlp"])._zmlx_patch_result
    unpatch(model)
    experts, block = set(), set()
    for candidate in report.candidates:
        what = candidate.reason.partition(" (asked for by name")[0]
        own = candidate.module in ("SwitchGLU", "SwitchMLP")
        (experts if own else block).add(what)
    return tuple("; ".join(sorted(found)) or NONE for found in (experts, block))  # type: ignore[return-value]


def table() -> str:
    """Return the page."""
    rows = (f"| {name} | {' | '.join(gains(name))} |\n" for name in moe_types())
    return HEADING + "".join(rows)


if __name__ == "__main__":
    print(table(), end="")
