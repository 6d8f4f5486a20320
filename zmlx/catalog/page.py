"""docs/KERNELS.md: the catalog as a page, made from the registry."""

from __future__ import annotations

from collections import defaultdict

from zmlx.kernels.spec import KernelSpec

_INTRODUCTION = """# Kernels

Made by `zmlx kernels list --markdown`; edit the kernels in `zmlx/kernels`, not this page.

Each kernel has a reference in plain MLX operations, which is what it computes and what runs where
no kernel does. `source` means one Metal source, which also runs on CUDA and, in the emulator, on
any CPU; `cpu` a native function. A contract is what a kernel promises on a backend: `exact` the
bits of the operations that it replaces, `tighter` an error against a wider reference that is no
larger than theirs or at the level of float32 rounding, `tolerant` an error within a bound.
"""


def page(specs: dict[str, KernelSpec]) -> str:
    """Return the page: a table for each domain, kernels by name."""
    domains: dict[str, list[KernelSpec]] = defaultdict(list)
    for spec in specs.values():
        domains[spec.domain].append(spec)
    return "\n".join([_INTRODUCTION, *(_section(name, domains[name]) for name in sorted(domains))])


def _section(domain: str, specs: list[KernelSpec]) -> str:
    rows = [
        f"| `{spec.name}` | {_cell(spec.formula)} | {_cell('; '.join(spec.shapes))} "
        f"| {', '.join(ways(spec))} | {contracts(spec)} | {gradient(spec)} |"
        for spec in specs
    ]
    head = "| kernel | formula | arguments and result | runs as | contract | gradient |"
    return "\n".join([f"## {domain}\n", head, "|---|---|---|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is."""
    for character in "\\|*_<>":
        text = text.replace(character, "\\" + character)
    return text


def ways(spec: KernelSpec) -> list[str]:
    """Return how a kernel can run, besides as its reference."""
    return [
        *(["source"] if spec.definition or spec.fused else []),
        *(["cpu"] if spec.native else []),
    ]


def contracts(spec: KernelSpec) -> str:
    """Return a kernel's contracts in one line, such as "metal, cuda: tighter"."""
    by_contract: dict[str, list[str]] = defaultdict(list)
    for backend, contract in spec.contract.items():
        by_contract[contract].append(backend)
    return "; ".join(f"{', '.join(where)}: {what}" for what, where in by_contract.items())


def gradient(spec: KernelSpec) -> str:
    """Return where a kernel's gradient comes from."""
    if spec.no_gradient or spec.definition is None:
        return "none"
    return "kernel" if spec.gradient else "reference"
