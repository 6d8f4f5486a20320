"""Products on the tensor cores of NVIDIA's GPUs: their launch, and the text that says so.

The kernel is `include/products.cuh`, the same for all; its text here is the numbers of a launch.
Tensor cores take numbers of 16 bits, and small integers and small floats are such, exactly: a
weight needs one or two instructions, and further vectors cost no more. What they do not take keeps
the translated Metal text: float32 activations, weights of 2, 3, 5 and 6 bits, dense weights of
another dtype than the activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from zmlx.backend.definition import CudaBody
from zmlx.kernels.vectors.weights import Weight

#: Compute capability from which tensor cores take bfloat16, times ten.
ARCHITECTURE = 80
#: Of the GPU that launches are made for, an H200; others of its kind have about as many.
MULTIPROCESSORS = 132
#: Warps that keep it busy.
ENOUGH_WARPS = 2000
#: Blocks of 8 warps that a multiprocessor runs at once, where they loop over tiles.
RESIDENT = 2
#: Blocks of 8 warps for each multiprocessor from which they loop.
MOST_BLOCKS = 3
#: Chunks of 16 rows, a kilobyte each, that a warp asks for before it computes.
CHUNKS_IN_FLIGHT = 4
#: Warps of a block, and terms of a sum, which each has some of them.
MOST_WARPS, MOST_TERMS = 16, 32
#: Vectors that are multiplied at once: columns of a product of a tensor core.
MOST_TOKENS = 8
#: Bytes of a block's shared memory that need no permission.
SHARED_BYTES = 48 << 10

_FOLDER = Path(__file__).with_name("include")
_MODES = {"affine": "AFFINE", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "mxfp8": "MXFP8"}
_TYPES = {
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.float32: "float",
    mx.uint8: "unsigned char",
}


@dataclass(frozen=True)
class Layout:
    """Numbers of a launch.

    Attributes:
        warps: of a block.
        split: warps that share a tile of 16 rows, each with some chunks of 64 bytes a row.
        depth: chunks that a warp asks for before it uses the first.
        turns: times that it does so for a tile.
        blocks: of a launch.
        rounds: tiles that each does.
    """

    warps: int
    split: int
    depth: int
    turns: int
    blocks: int
    rounds: int = 1


@dataclass(frozen=True)
class Launch:
    """A product on tensor cores, or a weighted sum of products.

    Attributes:
        weights: one after another, or gate and up side by side.
        dtype: of the vectors.
        vectors: how many there are.
        matrices: weights that a warp multiplies side by side.
        activation: of a gated product, empty for none.
        chosen: experts of each vector, 0 for plain weights.
        terms: experts whose products are summed, 0 for none.
        own: whether each chosen expert has a vector of its own.
        eps: of the norm of the vectors, None for none.
        shared: whether something is added to a sum.
        residual: whether something is added last.
    """

    weights: tuple[Weight, ...]
    dtype: mx.Dtype
    vectors: int
    matrices: int = 1
    activation: str = ""
    chosen: int = 0
    terms: int = 0
    own: bool = False
    eps: float | None = None
    shared: bool = False
    residual: bool = False

    @property
    def outputs(self) -> tuple[Weight, ...]:
        """The weights that have an output of their own."""
        return self.weights[:1] if self.matrices > 1 else self.weights

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows of all outputs."""
        return sum(-(-weight.rows // 16) for weight in self.outputs)

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        weight = self.weights[0]
        return -(-weight.columns // _chunk(weight))


def fits(launch: Launch) -> bool:
    """Whether tensor cores take such weights and vectors."""
    biases = {weight.bias.dtype for weight in launch.weights if weight.bias is not None}
    return launch.dtype in (mx.bfloat16, mx.float16) and len(biases) < 2 and all(
        weight.columns % 8 == 0 and weight.w.dtype == launch.dtype
        if weight.mode == "dense"
        else weight.bits in (4, 8)
        for weight in launch.weights
    )  # fmt: skip


def body(launch: Launch) -> CudaBody | None:
    """Return the text for CUDA, None where tensor cores do not fit.

    The names of its arrays, and of the types P, M, C, D and O, are those of the Metal text.
    """
    if not fits(launch) or launch.terms > MOST_TERMS:
        return None
    most = 1 if launch.chosen or launch.terms else min(launch.vectors, MOST_TOKENS)
    for tokens in range(most, 0, -1):
        launches = launch.vectors * launch.chosen or -(-launch.vectors // tokens)
        balanced = tokens if launch.chosen else -(-launch.vectors // launches)
        layout = layout_of(launch, launches)
        if _shared_bytes(launch, layout, balanced) <= SHARED_BYTES:
            break
    else:
        return None
    threads = 32 * layout.warps
    return CudaBody(
        source=_text(launch, layout, balanced),
        header=_header(),
        architecture=ARCHITECTURE,
        launch=((layout.blocks * threads, launches, 1), (threads, 1, 1)),
        early=_early(launch),
    )


def _early(launch: Launch) -> tuple[str, ...]:
    """Return the inputs that are read before earlier kernels have ended: the first weights.

    Which experts' those are an earlier kernel says.
    """
    if launch.chosen or launch.terms:
        return ()
    norm = [] if launch.eps is None else ["norm"]
    weights = (
        f"{name}{number}"
        for number, weight in enumerate(launch.weights)
        for name in weight.arrays()
        if name != "bias"
    )
    return (*norm, *weights)


def layout_of(launch: Launch, launches: int) -> Layout:
    """Choose how `launches` times the tiles of all outputs are dealt out.

    A tile is split over as many warps as it takes to keep all multiprocessors busy, or over more
    where blocks come out more evenly then. Where there are several outputs blocks do not loop.
    """
    tiles, chunks = launch.tiles, launch.chunks
    found: list[tuple[float, int, Layout]] = []
    terms = launch.terms or 1
    for per in (1, 2, 4, 8, 16):
        if per > 1 and (per > chunks or per * terms > MOST_WARPS):
            break
        layout, even = _dealt(launch, launches, per)
        busy = min(0.95, tiles * launches * per * terms / ENOUGH_WARPS)
        found.append((round(busy * (0.5 + even / 2), 2), -per, layout))
    return max(found, key=lambda one: one[:2])[2]


def _dealt(launch: Launch, launches: int, per: int) -> tuple[Layout, float]:
    """Return a layout with `per` warps for a row, and which part of the blocks' time is used."""
    split = per * (launch.terms or 1)
    warps = split if launch.terms else max(8, split)
    each = -(-launch.chunks // per)
    turns = -(-each // max(1, CHUNKS_IN_FLIGHT // launch.matrices))
    depth = -(-each // turns)
    blocks = -(-launch.tiles // (warps // split))
    share = max(1, warps // 8)
    most = MOST_BLOCKS * MULTIPROCESSORS // share
    rounds = 1
    if blocks * launches > most and len(launch.outputs) == 1 and not launch.terms:
        most = RESIDENT * MULTIPROCESSORS // share
        rounds = -(-blocks * launches // most)
    else:
        most = -(-blocks * launches // MULTIPROCESSORS) * MULTIPROCESSORS
    even = blocks * launches / (most * rounds)
    return Layout(warps, split, depth, turns, -(-blocks // rounds), rounds), min(even, 1.0)


def _chunk(weight: Weight) -> int:
    """Return the columns of 64 bytes of a row."""
    return 512 // _bits(weight)


def _bits(weight: Weight) -> int:
    return weight.bits or 16


def _shared_bytes(launch: Launch, layout: Layout, tokens: int) -> int:
    """Return what a block takes, a little more at most."""
    weight = launch.weights[0]
    units = layout.split * layout.depth * layout.turns
    slots = 8 if weight.group_size <= 32 else 4  # of a chunk's sums, at most for each vector
    staged = tokens * units * _chunk(weight) * 2 + layout.warps * 13 * 16
    totals = -(-tokens * slots // 8) * units * 32 if weight.mode == "affine" else 0
    partial = min(2, layout.rounds) * layout.warps * launch.matrices * 64 * tokens
    return staged + totals + partial + tokens * layout.warps * 4


@cache
def _header() -> str:
    """Return the include, with a digest of what it includes: MLX compares texts."""
    texts = b"".join(file.read_bytes() for file in sorted(_FOLDER.glob("*.cuh")))
    digest = hashlib.sha256(texts).hexdigest()[:12]
    return f'#include "{_FOLDER / "products.cuh"}"  // {digest}\n'


def _text(launch: Launch, layout: Layout, tokens: int) -> str:
    weight, outputs = launch.weights[0], launch.outputs
    rows = [w.rows for w in outputs] + [0] * (4 - len(outputs))
    has = sum((w.bias is not None) << n for n, w in enumerate(launch.weights[: launch.matrices]))
    numbers = {
        "K": weight.columns,
        "MODE": _MODES.get(weight.mode, "DENSE"),
        "BITS": _bits(weight),
        "GROUP": weight.group_size,
        **{f"ROWS{n}": count for n, count in enumerate(rows)},
        "MATRICES": launch.matrices,
        "OUTPUTS": len(outputs),
        "TOKENS": tokens,
        "ALL": launch.vectors,
        "CHOSEN": launch.chosen,
        "OWN": int(launch.own),
        "TERMS": launch.terms,
        "WARPS": layout.warps,
        "SPLIT": layout.split,
        "DEPTH": layout.depth,
        "TURNS": layout.turns,
        "BLOCKS": layout.blocks,
        "ROUNDS": layout.rounds,
        "NORM": int(launch.eps is not None),
        "ACTIVATION": (launch.activation or "none").upper(),
        "BIAS": has,
        "RESIDUAL": int(launch.residual),
        "SHARED": int(launch.shared),
    }
    settings = ", ".join(f"{name} = {value}" for name, value in numbers.items())
    types = "M, M, C, D, O" if launch.terms else "P, P, P, P, O"
    none = "(const float*)nullptr"
    arguments = [
        "h" if launch.terms else "x",
        "norm" if launch.eps is not None else f"(const {_TYPES[launch.dtype]}*)nullptr",
        f"{float(launch.eps or 0)!r}f",
        _four("const void", "w", len(launch.weights)),
        _four(f"const {_scale_type(weight)}", "scales", _count(launch, "scales")),
        _four(f"const {_scale_type(weight)}", "biases", _count(launch, "biases")),
        _bias(launch),
        "residual" if launch.residual else none,
        "shared" if launch.shared else none,
        "indices" if launch.chosen or launch.terms else "(const int*)nullptr",
        "scores" if launch.terms else none,
        _four("O", "y", len(outputs), alone="y" if launch.terms else ""),
    ]
    return (
        f"using namespace zmlx::vectors;\nstruct Q {{ enum {{ {settings} }}; }};\n"
        f"products<Q, {types}>({', '.join(arguments)});\n"
    )


def _scale_type(weight: Weight) -> str:
    return "unsigned char" if weight.scales is None else _TYPES[weight.scales.dtype]


def _count(launch: Launch, part: str) -> int:
    return len(launch.weights) if getattr(launch.weights[0], part) is not None else 0


def _four(kind: str, name: str, count: int, *, alone: str = "") -> str:
    names = [alone] if alone else [f"{name}{n}" for n in range(count)]
    return f"Four<{kind}>{{{{{', '.join(names)}}}}}"


def _bias(launch: Launch) -> str:
    there: Sequence[mx.array | None] = [w.bias for w in launch.weights]
    kinds = [_TYPES[bias.dtype] for bias in there if bias is not None] or ["float"]
    names = ["nullptr" if bias is None else f"bias{n}" for n, bias in enumerate(there)]
    return f"Four<const {kinds[0]}>{{{{{', '.join(names)}}}}}"
