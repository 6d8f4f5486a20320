"""A formula with all that is known of it: its tree, or why it is opaque."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zmlx.authoring.formula.errors import FormulaError
from zmlx.authoring.formula.inference import Types
from zmlx.authoring.formula.metal import printed
from zmlx.authoring.formula.parser import Opaque, let, parse
from zmlx.authoring.formula.tokens import tokens
from zmlx.authoring.formula.tree import Tree, names, substituted


@dataclass(frozen=True)
class Formula:
    """A formula that was read.

    Attributes:
        text: as it was written.
        tree: what it means; None when it is opaque: it runs on devices and in the emulator, has no
            reference in MLX operations and no derivative.
        opaque: why it is opaque; empty when it is not.
        prelude: statements that an opaque formula needs before it.
    """

    text: str
    tree: Tree | None
    opaque: str = ""
    prelude: str = ""

    def mentions(self, name: str) -> bool:
        """Return whether the formula, or an opaque one's prelude, uses a name."""
        if self.tree is not None:
            return name in names(self.tree)
        words = [*tokens(self.text), *(tokens(self.prelude) if self.prelude.strip() else ())]
        return any(word.kind == "name" and word.text == name for word in words)


def formula(text: str, variables: Sequence[str], *, header: str = "", prelude: str = "") -> Formula:
    """Read a formula.

    Args:
        text: an expression of C or Metal.
        variables: the names that it may use.
        header: what stands before the kernel; the formula may use its functions and constants.
        prelude: declarations before the formula, such as "float s = kk_sigmoid(x);".

    Raises:
        TypeError: the text is not a string.
        FormulaError: the formula has a mistake; the error points to it.
    """
    if not isinstance(text, str):
        raise TypeError(f"a formula is a string; got a {type(text).__name__}")
    reason, known = "", {}
    try:
        known = dict(let(prelude, variables, header=header)) if prelude.strip() else {}
    except Opaque as why:
        reason = str(why)
    elsewhere = prelude if reason else ""
    try:
        tree = parse(text, [*variables, *known], header=header, elsewhere=elsewhere)
    except Opaque as why:
        return Formula(text, None, reason or str(why), prelude)
    if reason:
        return Formula(text, None, reason, prelude)
    whole = substituted(tree, known)
    _check_types(text, whole, variables)
    return Formula(text, whole)


def derived(tree: Tree) -> Formula:
    """Return the formula of a tree that was not written but derived."""
    kinds: Mapping[str, str] = dict.fromkeys(names(tree), "float")
    statements, (text,) = printed([tree], Types("", kinds))
    return Formula(" ".join([*statements, text]), tree)


def _check_types(text: str, tree: Tree, variables: Sequence[str]) -> None:
    """Refuse a formula that fits neither floats nor whole numbers."""
    try:
        Types(text, dict.fromkeys(variables, "float")).of(tree)
    except FormulaError:
        try:
            Types(text, dict.fromkeys(variables, "int")).of(tree)
        except FormulaError as error:
            raise error from None
