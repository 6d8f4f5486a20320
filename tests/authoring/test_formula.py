"""The language of formulas: reading, types, values, derivatives and Metal text."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from zmlx.authoring.formula.derive import derivative
from zmlx.authoring.formula.errors import FormulaError, NotDifferentiable
from zmlx.authoring.formula.evaluate import program
from zmlx.authoring.formula.formula import formula
from zmlx.authoring.formula.functions import FUNCTIONS
from zmlx.authoring.formula.inference import Types
from zmlx.authoring.formula.kinds import TYPES, inside
from zmlx.authoring.formula.metal import prelude, printed, shortest
from zmlx.authoring.msl import DEFAULT_HEADER
from zmlx.authoring.pointwise import Pointwise

NAMES = ("x", "a", "b", "c")


def tree_of(text: str, names=NAMES, header: str = ""):
    read = formula(text, names, header=header)
    assert read.tree is not None, read.opaque
    return read.tree


def value(text: str, **arrays: mx.array) -> mx.array:
    tree = tree_of(text, tuple(arrays))
    types = Types(text, {name: inside(array.dtype) for name, array in arrays.items()})
    dtypes = {name: array.dtype for name, array in arrays.items()}
    return program([tree], dtypes, [TYPES[types.of(tree)]], types)(list(arrays.values()))[0]


def metal(text: str, kind: str = "float") -> str:
    tree = tree_of(text)
    statements, (result,) = printed([tree], Types(text, dict.fromkeys(NAMES, kind)))
    return " ".join([*statements, result])


MISTAKES = [
    ("log(1 + z)", 8, "unknown name 'z'", "known here: x"),
    ("log(1 + x", 3, "'(' is never closed", "close it"),
    ("x * 2)", 5, "')' closes nothing", "remove it"),
    ("lgo(x)", 0, "unknown function 'lgo'", "did you mean 'log'"),
    ("metal::expp(x)", 0, "unknown function 'metal::expp'", "did you mean 'exp'"),
    ("pow(x)", 0, "'pow' takes 2 arguments and is given 1", "write pow(a, b)"),
    ("exp(x, x)", 0, "'exp' takes 1 argument and is given 2", ""),
    ("x +", 3, "ends too early", "a value is missing"),
    ("x x", 2, "unexpected 'x'", "operator is missing"),
    ("x = 2", 2, "cannot assign", "compare with =="),
    ("x[0]", 1, "cannot index", "write a kernel"),
    ("x.y", 1, "cannot read members", "write a kernel"),
    ("x ? 1.0f", 8, "expected ':'", "the formula ends here"),
    ("x $ 2", 2, "unexpected character '$'", ""),
    ("", 0, "empty", ""),
    ("1 / 2 * x", 2, "divides whole numbers", "1.0f / 2.0f"),
    ("x * 2f", 4, "'2f' is not a number in C", "write 2.0f"),
    ("M_PI * x", 0, "unknown name 'M_PI'", "M_PI_F"),
    ("kk_silu(x)", 0, "function of msl.DEFAULT_HEADER", "pass header=msl.DEFAULT_HEADER"),
    ("exp + x", 0, "has no arguments", "write exp(...)"),
    ("static_cast<double>(x)", 12, "unknown type 'double'", "float"),
    ("x % 2", 2, "'%' takes whole numbers", "fmod"),
    ("~(x * 0.5f)", 0, "'~' takes whole numbers", "~int(x)"),
]


@pytest.mark.parametrize(("text", "at", "problem", "advice"), MISTAKES)
def test_a_mistake_is_pointed_at(text, at, problem, advice):
    if text == "x % 2":
        # Right for whole numbers; for floats it is found with their types.
        with pytest.raises(FormulaError) as caught:
            Types(text, {"x": "float"}).of(tree_of(text))
    else:
        with pytest.raises(FormulaError) as caught:
            formula(text, ("x",))
    error = caught.value
    assert error.at == at
    assert problem in str(error)
    assert advice in str(error)
    lines = str(error).splitlines()
    assert f"(column {at + 1})" in lines[0]
    assert lines[1] == f"  {text}"
    assert lines[2] == " " * (at + 2) + "^"


def test_an_error_in_a_formula_of_several_lines_shows_its_line():
    with pytest.raises(FormulaError, match=r"line 2, column 3") as caught:
        formula("x +\n  q", ("x",))
    assert "\n    q\n    ^" in str(caught.value)


def test_operators_that_fit_no_type_at_all_are_refused_when_the_formula_is_made():
    with pytest.raises(FormulaError, match="takes whole numbers"):
        formula("(x * 0.5f) % 2", ("x",))


@pytest.mark.parametrize(
    ("text", "header", "prelude_text", "why"),
    [
        ("mine(x)", "float mine(float v) { return v; }", "", "the header's function 'mine'"),
        ("x * SCALE", "constant float SCALE = 2;", "", "'SCALE' is defined outside"),
        ("metal::popcount(int(x))", "", "", "Metal's function 'metal::popcount'"),
        ("as_type<uint>(x)", "", "", "'as_type' has no formula"),
        ("x * s", "", "float s = x; s *= 2;", "no plain declaration"),
        ("{ return x; }", "", "", "statements"),
    ],
)
def test_what_has_no_formula_is_opaque_and_says_why(text, header, prelude_text, why):
    read = formula(text, ("x",), header=header, prelude=prelude_text)
    assert read.tree is None
    assert why in read.opaque


def test_a_mistake_beside_something_opaque_is_still_a_mistake():
    with pytest.raises(FormulaError, match="unknown name 'z'"):
        formula("mine(x) + z", ("x",), header="float mine(float v);")


def test_names_inside_of_a_headers_functions_are_not_names_of_formulas():
    header = "constant float SCALE = 2.0f;\nfloat mine(float inner) { return inner * SCALE; }"
    assert "'SCALE' is defined outside" in formula("x * SCALE", ("x",), header=header).opaque
    with pytest.raises(FormulaError, match="unknown name 'inner'"):
        formula("x * inner", ("x",), header=header)


def test_declarations_before_a_formula_are_put_in_their_place():
    read = formula(
        "g * (s + t)", ("x", "g"), prelude="float s = exp(x); // one\n const auto t = s * x;"
    )
    assert read.tree == formula("g * (float(exp(x)) + float(exp(x)) * x)", ("x", "g")).tree


X = mx.array([-2.5, -1.0, -0.25, 0.0, 0.25, 0.5, 1.0, 3.5])
EXPRESSIONS = [
    ("x * 2 + 1", lambda x: x * 2 + 1),
    ("-x * x", lambda x: -x * x),
    ("2 - 3 - x", lambda x: -1 - x),
    ("8.0f / 4 / (x + 9)", lambda x: 2 / (x + 9)),
    ("x > 0 && x < 1 || x == 3.5f", lambda x: ((x > 0) & (x < 1)) | (x == 3.5)),
    ("!(x > 0)", lambda x: ~(x > 0)),
    ("x > 0 ? x : x < -1 ? -2.0f : 0", lambda x: mx.where(x > 0, x, mx.where(x < -1, -2, 0))),
    ("1e-1 + .5f + 2.", lambda x: mx.full(x.shape, 2.6)),
    ("0x1f + x", lambda x: x + 31),
    ("-INFINITY", lambda x: mx.full(x.shape, -math.inf)),
    ("M_PI_F * x", lambda x: math.pi * x),
    ("true ? x : 0", lambda x: x),
    ("(float)int(x)", lambda x: mx.trunc(x)),
    ("static_cast<half>(x / 3)", lambda x: (x / 3).astype(mx.float16).astype(mx.float32)),
    ("float(x)", lambda x: x),
    ("metal::precise::exp(x)", mx.exp),
    ("metal::fast::exp(x)", mx.exp),
    ("precise::tanh(x)", mx.tanh),
    ("select(1.0f, x, x > 0)", lambda x: mx.where(x > 0, x, 1)),
    ("round(x)", lambda x: mx.array([-3, -1, 0, 0, 0, 1, 1, 4.0])),
    ("fmod(x, 1)", lambda x: mx.array([-0.5, 0, -0.25, 0, 0.25, 0.5, 0, 0.5])),
    ("max(x, 0) - min(x, 0.0f)", mx.abs),
    ("clamp(x, -1, 1)", lambda x: mx.clip(x, -1, 1)),
    ("int(x) / 2", lambda x: mx.array([-1, 0, 0, 0, 0, 0, 0, 1])),
    ("int(x * 3) % 2", lambda x: mx.array([-1, -1, 0, 0, 0, 1, 1, 0])),
    ("(int(x) << 2 | 1) ^ 3 & 7", lambda x: mx.array([-6, -2, 2, 2, 2, 2, 6, 14])),
    ("~int(x)", lambda x: mx.array([1, 0, -1, -1, -1, -1, -2, -4])),
    ("x /* a comment */ + 1 // and more", lambda x: x + 1),
]


@pytest.mark.parametrize(("text", "expected"), EXPRESSIONS)
def test_expressions_mean_what_they_mean_in_c(text, expected):
    result, truth = value(text, x=X), expected(X)
    assert result.shape == truth.shape
    assert mx.allclose(result.astype(mx.float32), truth.astype(mx.float32), rtol=1e-6, atol=1e-6)


def test_the_same_expressions_in_metal_give_the_same(device):
    names = ("x",)
    read = [formula(text, names) for text, _ in EXPRESSIONS]
    kernel = Pointwise("expressions", names, read)
    for (text, expected), result in zip(EXPRESSIONS, kernel([X]), strict=True):
        truth = expected(X).astype(mx.float32)
        assert mx.allclose(result, truth, rtol=1e-5, atol=1e-5), (text, result, truth)


#: where a function has a value and a derivative; else [-2, 2]
DOMAINS = {
    "log": (0.1, 4),
    "log2": (0.1, 4),
    "log10": (0.1, 4),
    "log1p": (-0.9, 4),
    "sqrt": (0.1, 4),
    "rsqrt": (0.1, 4),
    "asin": (-0.9, 0.9),
    "acos": (-0.9, 0.9),
    "atanh": (-0.9, 0.9),
    "acosh": (1.1, 4),
    "reciprocal": (0.2, 3),
    "pow": (0.2, 3),
    "powr": (0.2, 3),
    "tan": (-1.2, 1.2),
    "smoothstep": (0.1, 2.9),
}
ALL = sorted({function.name for function in FUNCTIONS.values()})
SMOOTH = [name for name in ALL if FUNCTIONS[name].result != "bool"]


def points(name: str, seed: int = 0) -> list[np.ndarray]:
    """Return float64 arguments away from corners."""
    low, high = DOMAINS.get(name, (-2, 2))
    rng = np.random.default_rng(seed)
    found = [rng.uniform(low, high, 24) for _ in range(FUNCTIONS[name].arguments)]
    if name == "smoothstep":
        found[0], found[1] = rng.uniform(-0.5, 0, 24), rng.uniform(3, 3.5, 24)
    if name == "fmod":
        found[1] = rng.uniform(0.5, 0.9, 24)
    return found


def call_of(name: str) -> str:
    return f"{name}({', '.join('abc'[: FUNCTIONS[name].arguments])})"


def exact(name: str, *arguments: float) -> float:
    return float(FUNCTIONS[name].python(*map(float, arguments)))


@pytest.mark.parametrize("name", ALL)
def test_functions_have_the_values_of_mathematics(name):
    arguments = points(name)
    names = dict(zip("abc", [mx.array(a.astype(np.float32)) for a in arguments], strict=False))
    tree = tree_of(call_of(name), header=DEFAULT_HEADER)
    types = Types("", dict.fromkeys(NAMES, "float"))
    dtypes = dict.fromkeys(names, mx.float32)
    (result,) = program([tree], dtypes, [mx.float32], types)(list(names.values()))
    inputs = [np.float64(np.float32(a)) for a in arguments]
    truth = [exact(name, *values) for values in zip(*inputs, strict=True)]
    np.testing.assert_allclose(np.array(result), truth, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("start", range(0, len(ALL), 12))
def test_functions_have_the_same_values_in_metal(start, device):
    """A dozen in one kernel, to compile once."""
    names, arrays, texts = [], [], []
    for name in ALL[start : start + 12]:
        own = [f"{name}_{letter}" for letter in "abc"[: FUNCTIONS[name].arguments]]
        texts.append(f"{name}({', '.join(own)})")
        names += own
        arrays += [mx.array(a.astype(np.float32)) for a in points(name)]
    read = [formula(text, names, header=DEFAULT_HEADER) for text in texts]
    kernel = Pointwise("functions", names, read, header=DEFAULT_HEADER)
    for name, result in zip(ALL[start : start + 12], kernel(arrays), strict=True):
        inputs = [np.float64(np.float32(a)) for a in points(name)]
        truth = [exact(name, *values) for values in zip(*inputs, strict=True)]
        np.testing.assert_allclose(np.array(result), truth, rtol=4e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_are_the_limits_of_differences(name):
    tree = tree_of(call_of(name), header=DEFAULT_HEADER)
    types = Types("", dict.fromkeys(NAMES, "float"))
    arguments = points(name)
    count = len(arguments)
    for k, letter in enumerate("abc"[:count]):
        slope = derivative(tree, letter)
        arrays = [mx.array(a.astype(np.float32)) for a in arguments]
        dtypes = dict.fromkeys("abc"[:count], mx.float32)
        (result,) = program([slope], dtypes, [mx.float32], types)(arrays)
        step = 1e-6
        truth = []
        for values in zip(*arguments, strict=True):
            up = [v + step * (i == k) for i, v in enumerate(values)]
            down = [v - step * (i == k) for i, v in enumerate(values)]
            truth.append((exact(name, *up) - exact(name, *down)) / (2 * step))
        np.testing.assert_allclose(np.array(result), truth, rtol=2e-4, atol=2e-4, err_msg=letter)


FORMULAS = [
    "x * x * x",
    "x / (1 + exp(-x))",
    "0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)))",
    "x * tanh(log(1 + exp(x)))",
    "max(x, 0.0f)",
    "min(x, x * x)",
    "abs(x) + sign(x)",
    "x > 0 ? x : 0.1f * (exp(x) - 1)",
    "(x > 0) * x",
    "clamp(x, -1.0f, 1.0f)",
    "sqrt(x * x + 1) / (2 + x * x)",
    "pow(x, 2) + pow(x * x + 1, 0.5f)",
    "-(x - 3) * -x",
    "exp(-x * x) / (1 + x * x) - -x",
    "fma(x, x, x)",
]
GRID = mx.array([-30.0, -2.0, -0.5, 0.0, 0.5, 1.0, 2.5, 30.0])


@pytest.mark.parametrize("text", FORMULAS)
def test_derivatives_are_those_of_mlx(text):
    tree = tree_of(text, ("x",))
    types = Types(text, {"x": "float"})
    run = program([tree], {"x": mx.float32}, [mx.float32], types)
    slope = derivative(tree, "x")
    (result,) = program([slope], {"x": mx.float32}, [mx.float32], types)([GRID])
    truth = mx.grad(lambda x: run([x])[0].sum())(GRID)
    assert mx.allclose(result, truth, rtol=1e-5, atol=1e-6), (result, truth)


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        ("log(1 + exp(x))", 0, 1),
        ("log(exp(x) + 1)", 0, 1),
        ("log(1 + exp(2 * x))", 0, 2),
        ("1 / (1 + exp(-x))", 0, 0),
        ("x / (1 + exp(-x))", 0, 1),
        ("x * tanh(log(1 + exp(x)))", 0, 1),
        ("x > 20 ? x : log(1 + exp(x))", 0, 1),
        ("tanh(x)", 0, 0),
        ("sigmoid(x)", 0, 0),
        ("sqrt(x * x)", -1, 1),
        ("x / (1 + abs(x))", 0, 0),
    ],
)
def test_derivatives_are_finite_where_mathematics_is(text, left, right):
    tree = tree_of(text, ("x",))
    slope = derivative(tree, "x")
    types = Types(text, {"x": "float"})
    far = mx.array([-1e4, -200.0, 200.0, 1e4])
    (result,) = program([slope], {"x": mx.float32}, [mx.float32], types)([far])
    assert mx.allclose(result, mx.array([left, left, right, right]), atol=1e-4), result


def test_sources_of_derivatives_are_readable():
    def slope(text: str) -> str:
        tree = derivative(tree_of(text, ("x",)), "x")
        statements, (result,) = printed([tree], Types("", {"x": "float"}))
        return "\n".join([*statements, result])

    assert slope("log(1 + exp(x))") == "zmlx_sigmoid(x)"
    assert slope("x * x * x") == "3.0f * (x * x)"
    assert slope("exp(2 * x)") == "2.0f * metal::precise::exp(2.0f * x)"
    assert slope("5 * x + 3") == "5.0f"
    assert slope("tanh(x)") == "const float t0 = metal::precise::tanh(x);\n1.0f - t0 * t0"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("x * (a + b) * c", "float", "x * (a + b) * c"),
        ("x - (a - b) - (c)", "float", "x - (a - b) - c"),
        ("x + 1 + 0.1", "float", "x + 1.0f + 0.1f"),
        ("exp(x)", "int", "metal::precise::exp(static_cast<float>(x))"),
        ("max(x, 2)", "float", "zmlx_max(x, 2.0f)"),
        ("max(x, 2)", "int", "zmlx_max(x, 2)"),
        ("x + 1", "int64_t", "x + 1"),
        ("half(x) * x", "float", "static_cast<float>(static_cast<half>(x)) * x"),
        ("x > a && b > c", "float", "(x > a) && (b > c)"),
        ("x ? a : b", "float", "x ? a : b"),
        ("-(-x)", "float", "- -x"),
        ("x * -INFINITY", "float", "x * -INFINITY"),
        ("fast::sin(x)", "float", "metal::fast::sin(x)"),
        ("16777217 * x", "float", "16777216.0f * x"),
    ],
)
def test_metal_text_has_every_conversion_written_out(text, kind, expected):
    assert metal(text, kind) == expected


def test_repeated_calls_are_computed_once_and_preludes_come_along():
    tree = tree_of("erf(x) * erf(x) + log1p(x)")
    text = prelude([tree])
    assert text.count("zmlx_erf(") == 1
    assert "zmlx_log1p(" in text
    assert metal("erf(x) * erf(x)") == "const float t0 = zmlx_erf(x); t0 * t0"


@pytest.mark.parametrize("value_", [0.1, 1 / 3, 1e-30, 1.5e38, 16777216.0, 0.044715, -0.0, 5.0])
def test_numbers_are_printed_as_short_as_they_stay_the_same(value_):
    text = shortest(value_)
    assert np.float32(float(text)) == np.float32(value_)
    assert "." in text
    assert len(text) <= 16


def test_whole_operators_have_no_derivative():
    tree = formula("int(x) & 3", ("x",)).tree
    assert derivative(tree, "x").value == 0
    with pytest.raises(NotDifferentiable, match="'&' has no derivative by 'x'"):
        derivative(formula("x & 3", ("x",)).tree, "x")


def test_promotions_are_those_of_c():
    small = mx.array([100, -100, 127], mx.int8)
    assert value("x * 2", x=small).tolist() == [200, -200, 254]
    unsigned = mx.array([1, 2], mx.uint32)
    assert value("x - 2", x=unsigned).tolist() == [4294967295, 0]
    assert value("a + b", a=mx.array([1], mx.int64), b=mx.array([2], mx.uint32)).dtype == mx.int64
    assert value("a + b", a=mx.array([True]), b=mx.array([True])).tolist() == [2]
