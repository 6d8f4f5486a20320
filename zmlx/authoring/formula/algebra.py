"""Sums, products and quotients that are simplified while they are built.

The rules keep derivatives readable and keep them finite where the mathematics is: a quotient
exp(u) / (1 + exp(u)) becomes sigmoid(u), which does not turn into inf / inf. As usual in calculus,
0 u is 0 and 1 u is u.
"""

from __future__ import annotations

from zmlx.authoring.formula.tree import Binary, Call, Choice, Number, Tree, Unary

ZERO = Number(0.0)
ONE = Number(1.0)


def constant(tree: Tree) -> float | None:
    """Return a number's value, None for anything else."""
    return float(tree.value) if isinstance(tree, Number) else None


def negative(a: Tree) -> Tree:
    """Return -a."""
    if isinstance(a, Number):
        return Number(-float(a.value))
    if isinstance(a, Unary) and a.operator == "-":
        return a.operand
    if isinstance(a, Binary) and a.operator == "-":
        return Binary("-", a.right, a.left)
    if isinstance(a, Binary) and a.operator in "*/" and isinstance(a.left, Number):
        return Binary(a.operator, negative(a.left), a.right)
    return Unary("-", a)


def total(a: Tree, b: Tree) -> Tree:
    """Return a + b."""
    left, right = constant(a), constant(b)
    if left == 0:
        return b
    if right == 0:
        return a
    if left is not None and right is not None:
        return Number(left + right)
    (one, base), (other, same) = _coefficient(a), _coefficient(b)
    if base == same:
        return product(Number(one + other), base)
    if isinstance(b, Unary) and b.operator == "-":
        return difference(a, b.operand)
    if isinstance(a, Unary) and a.operator == "-":
        return difference(b, a.operand)
    return Binary("+", a, b)


def _coefficient(a: Tree) -> tuple[float, Tree]:
    """Return k and u of k u; k is 1 where there is none."""
    if isinstance(a, Binary) and a.operator == "*" and isinstance(a.left, Number):
        return float(a.left.value), a.right
    if isinstance(a, Unary) and a.operator == "-":
        return -1.0, a.operand
    return 1.0, a


def difference(a: Tree, b: Tree) -> Tree:
    """Return a - b."""
    left, right = constant(a), constant(b)
    if right == 0:
        return a
    if left == 0:
        return negative(b)
    if left is not None and right is not None:
        return Number(left - right)
    if isinstance(b, Unary) and b.operator == "-":
        return total(a, b.operand)
    return Binary("-", a, b)


def product(a: Tree, b: Tree) -> Tree:
    """Return a b; a constant goes to the left."""
    left, right = constant(a), constant(b)
    if left is not None and right is not None:
        return Number(left * right)
    if right is not None:
        return product(b, a)
    if left is not None:
        return _scaled(left, b)
    if isinstance(a, Unary) and a.operator == "-":
        return negative(product(a.operand, b))
    if isinstance(b, Unary) and b.operator == "-":
        return negative(product(a, b.operand))
    if isinstance(a, Binary) and a.operator == "*" and isinstance(a.left, Number):
        return product(a.left, product(a.right, b))
    if isinstance(b, Binary) and b.operator == "*" and isinstance(b.left, Number):
        return product(b.left, product(a, b.right))
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Binary) and one.operator == "/" and isinstance(one.left, Number):
            return quotient(product(one.left, other), one.right)
        if isinstance(one, Choice) and _indicator(one):
            # 0 times infinity must not come out of the branch that is not taken.
            return choice(one.condition, product(one.yes, other), product(one.no, other))
    return Binary("*", a, b)


def _indicator(a: Choice) -> bool:
    return constant(a.yes) == 0 or constant(a.no) == 0


def _scaled(factor: float, b: Tree) -> Tree:
    if factor == 0:
        return ZERO
    if factor == 1:
        return b
    if factor == -1:
        return negative(b)
    if isinstance(b, Unary) and b.operator == "-":
        return _scaled(-factor, b.operand)
    if isinstance(b, Binary) and b.operator in "*/" and isinstance(b.left, Number):
        inner = Number(factor * float(b.left.value))
        return product(inner, b.right) if b.operator == "*" else Binary("/", inner, b.right)
    if isinstance(b, Choice) and _indicator(b):
        return choice(b.condition, _scaled(factor, b.yes), _scaled(factor, b.no))
    return Binary("*", Number(factor), b)


def quotient(a: Tree, b: Tree) -> Tree:
    """Return a / b."""
    left, right = constant(a), constant(b)
    if left == 0:
        return ZERO
    if right == 1:
        return a
    if left is not None and right:
        return Number(left / right)
    if isinstance(a, Unary) and a.operator == "-":
        return negative(quotient(a.operand, b))
    if isinstance(b, Unary) and b.operator == "-":
        return negative(quotient(a, b.operand))
    if isinstance(a, Binary) and a.operator == "*" and isinstance(a.left, Number):
        return product(a.left, quotient(a.right, b))
    if isinstance(a, Choice) and _indicator(a):
        return choice(a.condition, quotient(a.yes, b), quotient(a.no, b))
    return _logistic(a, b) or Binary("/", a, b)


def _logistic(a: Tree, b: Tree) -> Tree | None:
    """Return w sigmoid(u) for w exp(u) / (1 + exp(u)), None for anything else."""
    if not (isinstance(b, Binary) and b.operator == "+"):
        return None
    for one, power in ((b.left, b.right), (b.right, b.left)):
        if constant(one) == 1 and isinstance(power, Call) and power.name == "exp":
            factors = _factors(a)
            if power in factors:
                factors.remove(power)
                result: Tree = Call("sigmoid", power.arguments)
                for factor in reversed(factors):
                    result = product(factor, result)
                return result
    return None


def _factors(a: Tree) -> list[Tree]:
    if isinstance(a, Binary) and a.operator == "*":
        return _factors(a.left) + _factors(a.right)
    return [a]


def choice(condition: Tree, yes: Tree, no: Tree) -> Tree:
    """Return condition ? yes : no."""
    if yes == no:
        return yes
    known = constant(condition)
    if known is not None:
        return yes if known else no
    return Choice(condition, yes, no)
