"""What jit refuses: when it decorates, with the line, its text and the reason."""

from __future__ import annotations

import math
import textwrap

import mlx.core as mx
import pytest

from zmlx.jit_compiler import JitError, jit

#: statements of a function of x and y -> text of the line that is pointed at, part of the reason
REFUSED = {
    "while": ("while x > 1:\n    x = x - 1\nreturn x", "while x > 1:", "for ... in range"),
    "comprehension": ("return sum([x for i in range(3)])", None, "`sum` is no function of kernels"),
    "list": ("a = [x for i in range(3)]\nreturn x", "a = [x", "comprehensions"),
    "generator": ("yield x\nreturn x", "yield x", "generator"),
    "string": ("s = 'text'\nreturn x", "s = 'text'", "strings"),
    "f-string": ("s = f'{x}'\nreturn x", "s = f'{x}'", "strings"),
    "none": ("s = None\nreturn x", "s = None", "NoneType"),
    "attribute": ("return x.real", "return x.real", "attributes"),
    "shape": ("n = x.shape[0]\nreturn x", "n = x.shape[0]", "indexing"),
    "index": ("return x[0]", "return x[0]", "indexing: a kernel sees one element"),
    "assigned index": ("x[0] = y\nreturn x", "x[0] = y", "indexing: a kernel sees one element"),
    "assigned attribute": ("x.a = y\nreturn x", "x.a = y", "plain names"),
    "unknown name": ("return x * wigth", "return x * wigth", "`wigth` is not defined"),
    "unknown function": ("return foo(x)", "return foo(x)", "`foo` is not defined"),
    "unknown member": ("return math.exq(x)", "return math.exq(x)", "`math.exq` does not exist"),
    "other function": ("return math.gamma(x)", None, "`math.gamma` is no function of kernels"),
    "print": ("print(x)\nreturn x", "print(x)", "`print` is no function"),
    "reduction": ("return mx.max(x)", None, "`mx.max` is no function of kernels"),
    "recursion": ("return f(x - 1, y)", "return f(x - 1, y)", "calls itself"),
    "plain python": ("return plain(x)", "return plain(x)", "decorate your own with @jit"),
    "function as value": ("return math.exp * x", None, "is a function; it can only be called"),
    "module as value": ("return math * x", None, "is a module; only numbers"),
    "array from outside": ("return x * WEIGHTS", None, "is an array; make it a parameter"),
    "text from outside": ("return x * NAME", None, "strings"),
    "object from outside": ("return x * THINGS", None, "is a list; only numbers"),
    "number called": ("return x(y)", "return x(y)", "cannot be called"),
    "no return": ("if x > 0:\n    return x", "if x > 0:", "ends without `return`"),
    "no return in elif": (
        "if x > 0:\n    return x\nelif y > 0:\n    return y\nz = 1",
        "z = 1",
        "ends without `return`",
    ),
    "return in a loop": ("for i in range(x > 0):\n    return x", None, "ends without `return`"),
    "bare return": ("return", "return", "without a value"),
    "empty tuple": ("return ()", "return ()", "empty tuple"),
    "results that differ": (
        "if x > 0:\n    return x, y\nreturn x",
        "return x",
        "returns 1 value where another path returns 2",
    ),
    "unassigned on a path": (
        "if x > 0:\n    r = x\nreturn r * 2",
        "return r * 2",
        "`r` is not assigned on every path",
    ),
    "assigned later": ("a = b\nb = x\nreturn a", "a = b", "`b` is not assigned"),
    "assigned in a loop": (
        "for i in range(int(y)):\n    r = x\nreturn r",
        "return r",
        "`r` is not assigned",
    ),
    "counter after a loop": (
        "for i in range(int(y)):\n    x = x + 1\nreturn i",
        "return i",
        "`i` is not assigned",
    ),
    "augmented": ("r += x\nreturn r", "r += x", "`r` is not assigned"),
    "loop over something": ("for i in x:\n    pass\nreturn x", "for i in x:", "range(...)"),
    "loop over floats": ("for i in range(1.5):\n    x += 1\nreturn x", None, "whole numbers"),
    "step zero": ("for i in range(1, 5, 0):\n    x += 1\nreturn x", None, "zero"),
    "tuple target": ("for i, j in range(3):\n    x += 1\nreturn x", None, "one name"),
    "loop else": (
        "for i in range(3):\n    x += 1\nelse:\n    x = y\nreturn x",
        "x = y",
        "`else` of a loop",
    ),
    "range as value": ("a = range(3)\nreturn x", "a = range(3)", "only be looped over"),
    "too many arguments": ("return math.exp(x, y)", None, "takes 1 argument here"),
    "round to digits": ("return round(x, 2)", None, "takes 1 argument here"),
    "max of one": ("return max(x)", None, "takes 2 arguments here"),
    "keywords": ("return math.exp(x=y)", None, "by name"),
    "starred": ("return max(*x)", None, "`*` is not supported"),
    "unpacking": ("a, b = x\nreturn a", "a, b = x", "1 value for 2 names"),
    "starred target": ("a, *b = x, y\nreturn a", None, "plain names"),
    "lambda": ("g = lambda a: a\nreturn x", None, "functions in functions"),
    "inner function": ("def g(a):\n    return a\nreturn x", "def g(a):", "functions in functions"),
    "class": ("class A:\n    pass\nreturn x", "class A:", "class"),
    "import": ("import math\nreturn x", "import math", "outside"),
    "global": ("global Z\nZ = 1\nreturn x", "global Z", "writes nothing"),
    "try": ("try:\n    pass\nfinally:\n    pass\nreturn x", "try:", "raises"),
    "with": ("with x:\n    pass\nreturn x", "with x:", "`with`"),
    "raise": ("raise ValueError\nreturn x", "raise ValueError", "cannot raise"),
    "assert": ("assert x > 0\nreturn x", "assert x > 0", "cannot raise"),
    "delete": ("del x\nreturn y", "del x", "`del`"),
    "match": ("match x:\n    case 1:\n        pass\nreturn x", "match x:", "`elif`"),
    "walrus": ("return (a := x)", None, "assign in a statement of its own"),
    "no effect": ("x + 1\nreturn x", "x + 1", "changes nothing"),
    "is": ("return 1.0 if x is y else 0.0", None, "compare with =="),
    "in": ("return 1.0 if x in (1, 2) else 0.0", None, "compare with =="),
    "matrix product": ("return x @ y", None, "`@` is not supported"),
    "shift": ("return x << 2", None, "`<<` is not supported; multiply"),
    "and of floats": ("return x * 1.5 & y", None, "`&` of a float"),
    "dict": ("a = {}\nreturn x", "a = {}", "dicts"),
    "tuple as value": ("return max((x, y), y)", None, "tuple"),
    "constant division by zero": ("return x * (1 / 0)", None, "ZeroDivisionError"),
    "root of a constant": ("return x * math.sqrt(-1)", None, "ValueError"),
    "complex": ("return x * 2j", None, "complex"),
    "two results as one": ("return pair(x) + 1", None, "returns 2 values"),
    "too few names": ("a, b, c = pair(x)\nreturn a", None, "2 values for 3 names"),
    "too few arguments": ("return two(x)", None, "needs `b`"),
    "too many for a jit function": ("return two(x, y, 1)", None, "takes 2 arguments"),
    "float for a whole parameter": ("return counted(x + 0.5)", None, "`n` of `counted` takes int"),
}

AROUND = """
import math
import mlx.core as mx
from zmlx.jit_compiler import jit

WEIGHTS = mx.ones((3,))
NAME = "text"
THINGS = [1, 2]


def plain(x):
    return x


@jit
def pair(x):
    return x, -x


@jit
def two(a, b):
    return a + b


@jit
def counted(n: int):
    return n + 1


@jit
def f(x, y):
"""


def run(path, text):
    path.write_text(text)
    names = {}
    exec(compile(text, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_it_is_decorated(name, tmp_path):
    body, shown, reason = REFUSED[name]
    path = tmp_path / f"{name.replace(' ', '_')}.py"
    text = AROUND + textwrap.indent(body, "    ") + "\n"
    with pytest.raises(JitError) as caught:
        run(path, text)
    error = caught.value
    assert reason in error.reason
    assert error.filename == str(path)
    assert text.splitlines()[error.lineno - 1].strip() == error.text
    assert error.text.startswith(shown or body.splitlines()[0].split("\n")[0])
    assert str(error).startswith(f"{path}:{error.lineno}: zmlx.jit: {error.reason}")
    assert error.text in str(error)


def test_the_part_that_is_meant_is_underlined(tmp_path):
    with pytest.raises(JitError) as caught:
        run(tmp_path / "unknown.py", AROUND + "    größe = x\n    return größe + wigth * 2\n")
    assert str(caught.value).splitlines()[1:] == [
        "    return größe + wigth * 2",
        "                   ^^^^^",
    ]


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("*xs", "fixed number of inputs"),
        ("x, **more", "fixed number of inputs"),
        ("x, *, y", "keyword-only"),
        ("", "is a constant"),
        ("x, y='a'", "default of `y` is not a number"),
        ("x, y=None", "default of `y` is not a number"),
    ],
)
def test_refused_parameters(signature, reason, tmp_path):
    with pytest.raises(JitError, match=r"zmlx\.jit") as caught:
        run(
            tmp_path / "module.py",
            f"{AROUND[: AROUND.index('@jit')]}\n@jit\ndef f({signature}):\n    return 1\n",
        )
    assert reason in caught.value.reason


def test_async_functions(tmp_path):
    with pytest.raises(JitError, match="async functions"):
        run(
            tmp_path / "module.py",
            "from zmlx.jit_compiler import jit\n@jit\nasync def f(x):\n    return x\n",
        )


def test_a_function_without_source():
    names = {"jit": jit}
    with pytest.raises(JitError, match="no source"):
        exec("@jit\ndef f(x):\n    return x\n", names)
    with pytest.raises(JitError, match="no source"):
        jit(eval("lambda x: x"))


def test_two_lambdas_alike_on_one_line():
    with pytest.raises(JitError, match="several functions alike"):
        [jit(f) for f in (lambda x: x + 1, lambda x: x + 2)]


def test_a_file_that_changed(tmp_path):
    path = tmp_path / "changed.py"
    names = run(path, "def f(x):\n    return x\n")
    path.write_text("\n\ndef g(x):\n    return x + 1\n")
    with pytest.raises(JitError, match="has the file changed"):
        jit(names["f"])


@pytest.mark.parametrize("thing", [3, math.exp, len, mx.exp, int, object()])
def test_what_is_not_a_python_function(thing):
    with pytest.raises(TypeError, match="jit takes a Python function"):
        jit(thing)


def test_a_jit_function_is_left_as_it_is():
    @jit
    def f(x):
        return x

    assert jit(f) is f


# At the call: dtypes are known only then, but before anything is evaluated.


@jit
def counted(x, n: int):
    for _ in range(n):
        x = x + 1
    return x


@jit
def looped(x, n):
    for _ in range(n):
        x = x + 1
    return x


def test_a_float_where_a_whole_number_is_needed():
    x = mx.ones((3,))
    with pytest.raises(JitError, match=r"`n: int` is given mlx.core.float32"):
        counted(x, x)
    with pytest.raises(JitError, match="whole numbers"):
        looped(x, x)
    assert looped(x, mx.array([1, 2, 3])).tolist() == [2.0, 3.0, 4.0]


def test_a_whole_power_of_whole_numbers():
    @jit
    def f(x, y):
        return x**y

    with pytest.raises(JitError, match=r"write float\(...\)"):
        f(mx.array([1, 2]), mx.array([1, 2]))


@pytest.mark.parametrize("dtype", [mx.float64, mx.complex64, mx.uint64], ids=str)
def test_dtypes_that_kernels_do_not_have(dtype):
    with mx.stream(mx.cpu):
        x = mx.zeros((3,), dtype)
    with pytest.raises(JitError, match="which kernels do not compute in; cast it"):
        counted(x, 1)


def test_shapes_that_differ():
    for a, b in (((3,), (4,)), ((3,), (1,)), ((2, 3), (3,))):
        for _ in range(2):  # the second call finds the kernel made
            with pytest.raises(ValueError, match=r"counted: shapes differ \(x .*, n .*\)"):
                counted(mx.ones(a), mx.ones(b, mx.int32))
            counted(mx.ones(a), mx.ones(a, mx.int32))


def test_arguments_of_other_kinds():
    x = mx.ones((3,))
    with pytest.raises(TypeError, match=r"`n` is a str; it takes an mx\.array or a number"):
        counted(x, "a")
    with pytest.raises(TypeError, match="`n` is a list"):
        counted(x, [1, 2, 3])
    with pytest.raises(TypeError, match="counted: missing a required argument: 'n'"):
        counted(x)
    with pytest.raises(TypeError, match="too many"):
        counted(x, 1, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'm'"):
        counted(x, 1, m=2)


def test_a_whole_number_that_does_not_fit():
    @jit
    def f(x):
        return x + 2**40

    assert f(mx.array([1.0])).item() == 2.0**40
    assert f(mx.array([1], mx.int64)).item() == 2**40 + 1
    with pytest.raises(OverflowError, match=r"does not fit in mlx\.core\.int32"):
        f(mx.array([1]))
