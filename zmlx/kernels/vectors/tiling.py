"""How a product is dealt out to simdgroups."""

from __future__ import annotations

from dataclasses import dataclass

from zmlx.kernels.vectors.formats import Format

#: Simdgroups of a threadgroup, which share the activations that they multiply with.
GROUPS = 8
#: As many simdgroups keep a GPU busy: fewer read memory slower than it can.
ENOUGH = 1024
#: Rows in flight in a large GPU; a threadgroup of more takes several blocks of rows in turn.
MOST = 8192
#: 32-bit words of weights that a lane asks for before it computes.
WORDS_IN_FLIGHT = 32
#: Tokens whose activations a lane multiplies a weight with.
MOST_TOKENS = 4
#: Bytes of threadgroup memory for activations; Metal has 32 KB for all.
STAGED_BYTES = 28 << 10


@dataclass(frozen=True)
class Tiling:
    """Numbers of a launch.

    Attributes:
        rows: rows of each matrix that a simdgroup computes at once.
        split: simdgroups that share rows, each a part of the columns.
        depth: runs that a lane loads before it uses the first.
        tokens: activations that are multiplied at once.
        staged: whether activations go through threadgroup memory.
    """

    rows: int
    split: int
    depth: int
    tokens: int
    staged: bool


def tiling(
    form: Format, *, rows: int, launches: int, matrices: int, tokens: int, itemsize: int
) -> Tiling:
    """Choose for `matrices` of `rows` rows, `launches` times (experts or blocks of tokens).

    Fewer rows for a simdgroup where they are few, so that there are enough simdgroups; and more
    simdgroups for a row where it is long, so that each asks for all of its part at once.
    """
    tokens = min(tokens, MOST_TOKENS)
    each = 4 if matrices == 1 else 2
    split = 1
    while split < GROUPS and form.steps > split * max(1, _depth(form, each * matrices)):
        split *= 2
    while each > 1 and -(-rows // each) * launches * split < ENOUGH:
        each //= 2
    while split < GROUPS and 2 * split <= form.steps and rows * launches * split < ENOUGH:
        split *= 2
    depth = min(_depth(form, each * matrices), -(-form.steps // split))
    size = form.steps * 32 * form.run * itemsize * tokens
    return Tiling(each, split, depth, tokens, size <= STAGED_BYTES)


def _depth(form: Format, rows: int) -> int:
    return max(1, WORDS_IN_FLIGHT // (rows * form.words))


@dataclass(frozen=True)
class Combining:
    """The same of a weighted sum over experts, where a threadgroup has all terms of its rows.

    Attributes:
        rows: rows that a threadgroup computes.
        groups: its simdgroups, each with some of the terms.
        depth: runs that a lane loads before it uses the first.
    """

    rows: int
    groups: int
    depth: int


def combining(form: Format, *, rows: int, terms: int, launches: int) -> Combining:
    """Choose for `terms` matrices of `rows` rows, `launches` times."""
    units = terms * form.steps
    groups = -(-units // -(-units // GROUPS))
    each = 8
    while each > 1 and -(-rows // each) * groups * launches < ENOUGH:
        each //= 2
    depth = min(-(-units // groups), max(1, WORDS_IN_FLIGHT // (each * form.words)))
    return Combining(each, groups, depth)
