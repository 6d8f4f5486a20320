"""Arithmetic on indices that are known but for a few variables, such as a thread's position.

Shapes are static, so a reshape of a slice of a transpose is one formula, and most of it falls away
here, before a compiler sees it. All indices are whole numbers from 0, and so is what is computed of
them; intermediate results may be negative only inside a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Atom:
    """A variable of the kernel: its name, and the limit that it stays below.

    Attributes:
        text: the name, or an expression that needs no brackets.
        limit: it is from 0 to limit - 1.
        depth: of the innermost scope in which it is known, 0 for the whole kernel.
        early: it is known at the kernel's beginning, and below its limit in every thread.
    """

    text: str
    limit: int
    depth: int = 0
    early: bool = False


@dataclass(frozen=True)
class Quotient:
    """An index divided by a number, rounded down."""

    value: Index
    divisor: int

    @property
    def limit(self) -> int:
        """What it stays below."""
        return self.value.high // self.divisor + 1

    @property
    def depth(self) -> int:
        """As of `Atom`."""
        return self.value.depth

    @property
    def early(self) -> bool:
        """As of `Atom`."""
        return self.value.early

    @property
    def text(self) -> str:
        """The expression, in brackets."""
        return f"({_bracketed(self.value)} / {self.divisor}u)"


@dataclass(frozen=True)
class Remainder:
    """What is left of an index divided by a number."""

    value: Index
    divisor: int

    @property
    def limit(self) -> int:
        """What it stays below."""
        return min(self.divisor, self.value.high + 1) if self.value.low >= 0 else self.divisor

    @property
    def depth(self) -> int:
        """As of `Atom`."""
        return self.value.depth

    @property
    def early(self) -> bool:
        """As of `Atom`."""
        return self.value.early

    @property
    def text(self) -> str:
        """The expression, in brackets."""
        return f"({_bracketed(self.value)} % {self.divisor}u)"


Part = Atom | Quotient | Remainder


@dataclass(frozen=True)
class Index:
    """A sum of a constant and of parts with whole factors."""

    constant: int = 0
    terms: tuple[tuple[Part, int], ...] = ()

    @cached_property
    def low(self) -> int:
        """The least that it can be, as far as the parts' limits tell."""
        return self.constant + sum(k * (p.limit - 1) for p, k in self.terms if k < 0)

    @cached_property
    def high(self) -> int:
        """The most that it can be."""
        return self.constant + sum(k * (p.limit - 1) for p, k in self.terms if k > 0)

    @cached_property
    def depth(self) -> int:
        """The depth of the innermost scope that its variables need."""
        return max((p.depth for p, _ in self.terms), default=0)

    @cached_property
    def early(self) -> bool:
        """Whether all its variables are known at the kernel's beginning, in every thread."""
        return all(p.early for p, _ in self.terms)

    @cached_property
    def text(self) -> str:
        """The formula, in unsigned numbers."""
        words = [(k, p.text) for p, k in self.terms]
        positive = [t if k == 1 else f"{t} * {k}u" for k, t in words if k > 0]
        negative = [t if k == -1 else f"{t} * {-k}u" for k, t in words if k < 0]
        if self.constant > 0 or not positive:
            positive.append(f"{self.constant}u" if self.constant >= 0 else "0u")
        if self.constant < 0:
            negative.append(f"{-self.constant}u")
        return " - ".join((" + ".join(positive), *negative))


def _bracketed(index: Index) -> str:
    simple = len(index.terms) == 1 and not index.constant and index.terms[0][1] == 1
    return index.text if simple else f"({index.text})"


def constant(value: int) -> Index:
    """Return a number as an index."""
    return Index(value)


def variable(text: str, limit: int, depth: int = 0, *, early: bool = False) -> Index:
    """Return a variable as an index; one that can only be 0 is 0."""
    return Index() if limit == 1 else Index(0, ((Atom(text, limit, depth, early), 1),))


def _made(number: int, factors: dict[Part, int]) -> Index:
    kept = [(part, factor) for part, factor in factors.items() if factor]
    return Index(number, tuple(sorted(kept, key=lambda term: (-abs(term[1]), term[0].text))))


def total(*indices: Index) -> Index:
    """Return a sum. `x / n * n + x % n` becomes `x`."""
    number = 0
    factors: dict[Part, int] = {}
    for index in indices:
        number += index.constant
        for part, factor in index.terms:
            factors[part] = factors.get(part, 0) + factor
    while True:
        joined = next(
            (
                p
                for p, k in factors.items()
                if k and isinstance(p, Remainder) and _whole(p, factors)
            ),
            None,
        )
        if joined is None:
            return _made(number, factors)
        assert isinstance(joined, Remainder)
        factor = factors.pop(joined)
        rest = quotient(joined.value, joined.divisor)
        number -= factor * joined.divisor * rest.constant
        for part, k in rest.terms:
            factors[part] -= factor * joined.divisor * k
        number += factor * joined.value.constant
        for part, k in joined.value.terms:
            factors[part] = factors.get(part, 0) + factor * k


def _whole(part: Remainder, factors: dict[Part, int]) -> bool:
    """Whether the multiples that a remainder lacks are among the factors."""
    lacking = quotient(part.value, part.divisor)
    scale = factors[part] * part.divisor
    return all(factors.get(p, 0) == k * scale for p, k in lacking.terms)


def scaled(index: Index, factor: int) -> Index:
    """Return a multiple."""
    return _made(index.constant * factor, {p: k * factor for p, k in index.terms})


def _split(index: Index, divisor: int) -> tuple[Index, Index]:
    """Return what is divisible in an index, and what is left; their sum is the index."""
    rest = index.constant % divisor
    whole = {p: k for p, k in index.terms if k % divisor == 0}
    others = {p: k for p, k in index.terms if k % divisor}
    return _made(index.constant - rest, whole), _made(rest, others)


@lru_cache(maxsize=1 << 14)
def quotient(index: Index, divisor: int) -> Index:
    """Return an index divided by a positive number, rounded down."""
    if divisor == 1:
        return index
    whole, rest = _split(index, divisor)
    if rest.low < 0:
        return Index(0, ((Quotient(index, divisor), 1),))
    moved = _made(whole.constant // divisor, {p: k // divisor for p, k in whole.terms})
    if rest.high < divisor:
        return moved
    only = rest.terms[0][0] if len(rest.terms) == 1 and not rest.constant else None
    if isinstance(only, Quotient) and rest.terms[0][1] == 1:
        return total(moved, quotient(only.value, only.divisor * divisor))
    return total(moved, Index(0, ((Quotient(rest, divisor), 1),)))


@lru_cache(maxsize=1 << 14)
def remainder(index: Index, divisor: int) -> Index:
    """Return what is left of an index divided by a positive number."""
    if divisor == 1:
        return Index()
    _, rest = _split(index, divisor)
    if rest.low < 0:
        return Index(0, ((Remainder(index, divisor), 1),))
    if rest.high < divisor:
        return rest
    only = rest.terms[0][0] if len(rest.terms) == 1 and not rest.constant else None
    if isinstance(only, Remainder) and rest.terms[0][1] == 1 and only.divisor % divisor == 0:
        return remainder(only.value, divisor)
    return Index(0, ((Remainder(rest, divisor), 1),))


def ravel(at: Sequence[Index], shape: Sequence[int]) -> Index:
    """Return the position in row-major order of an element at these indices."""
    position = Index()
    for index, length in zip(at, shape, strict=True):
        position = total(scaled(position, length), index)
    return position


def unravel(position: Index, shape: Sequence[int]) -> tuple[Index, ...]:
    """Return the indices along each axis of the element at a position in row-major order."""
    at: list[Index] = []
    for axis in range(len(shape) - 1, -1, -1):
        at.append(remainder(position, shape[axis]) if axis else position)
        position = quotient(position, shape[axis])
    return tuple(reversed(at))
