"""Kernels in Metal's language with what they must give: run on a GPU and on the emulator.

Each takes arrays and gives arrays that numpy computes too; together they use every name of the
preludes. All are Metal: the strict look takes each (`tests/strict/test_strict_cases.py`), and where
Metal has no such function for a type a case casts, or does without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from zmlx.backend.definition import Definition

#: Largest relative error by the output's dtype: half a unit in the last place and a little more.
ROUNDING = {mx.float32: 4e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """One kernel with inputs, a launch, and what numpy says of the outputs.

    `expected` takes the inputs as numpy arrays (16-bit floats as float32) and returns one array
    for each output. `rows` names the rows of the first output where each is a function of its own.
    """

    name: str
    source: str
    inputs: dict[str, Any]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    expected: Callable[..., Sequence[np.ndarray]]
    header: str = ""
    template: tuple[tuple[str, Any], ...] = ()
    tolerance: float | None = None
    rows: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)

    def definition(self) -> Definition:
        return Definition(
            name=self.name,
            input_names=tuple(self.inputs),
            output_names=tuple(self.outputs),
            source=self.source,
            header=self.header,
            **self.settings,
        )

    def arguments(self) -> dict[str, Any]:
        return {
            "inputs": list(self.inputs.values()),
            "output_shapes": [shape for shape, _ in self.outputs.values()],
            "output_dtypes": [dtype for _, dtype in self.outputs.values()],
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "template": list(self.template) or None,
            **self.launch,
        }

    def truths(self) -> list[np.ndarray]:
        return list(self.expected(*(as_numpy(x) for x in self.inputs.values())))


def as_numpy(x: Any) -> np.ndarray:
    if isinstance(x, mx.array):
        return np.array(x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x)
    return np.array(x)


def rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Round float32 values to a dtype, on the CPU."""
    with mx.stream(mx.cpu):
        return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))


def differences(case: Case, out: np.ndarray, truth: np.ndarray, dtype: mx.Dtype) -> list[str]:
    """Say for each row that differs where it does most."""
    tolerance = case.tolerance or ROUNDING.get(dtype, 0)
    rows = case.rows if case.rows and len(case.rows) == len(out) else [""] * len(out)
    told = []
    for name, got, want in zip(rows, np.atleast_1d(out), np.atleast_1d(truth), strict=True):
        got, want = np.atleast_1d(got).astype(float), np.atleast_1d(want).astype(float)
        with np.errstate(all="ignore"):
            near = np.abs(got - want) <= tolerance * np.maximum(np.abs(want), 1)
        bad = ~(near | (got == want) | (np.isnan(got) & np.isnan(want)))
        if bad.any():
            at = int(np.argmax(bad))
            told.append(
                f"{case.name}: {name or 'output'}: {bad.sum()} of {bad.size} wrong, first at {at}: "
                f"{got.flat[at]!r}, right is {want.flat[at]!r}"
            )
    return told


def array(x: Any, dtype: mx.Dtype) -> mx.array:
    with mx.stream(mx.cpu):
        result = mx.array(np.asarray(x)).astype(dtype)
        mx.eval(result)
    return result


N = 64


def generator() -> np.random.Generator:
    """Return where a maker's numbers come from: the same ones in whatever order cases are made."""
    return np.random.default_rng(4)


def _table(
    name: str, functions: dict[str, Any], inputs: dict[str, Any], dtype: mx.Dtype, **more: Any
):
    """A kernel that writes one row for each function; all take the inputs a, b, c of a thread."""
    n = next(iter(inputs.values())).size
    reads = " ".join(f"const auto {x} = {x}_in[i];" for x in inputs)
    lines = [f"out[{k} * {n} + i] = {code};" for k, (code, _) in enumerate(functions.items())]

    def expected(*arrays: np.ndarray) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            return [np.stack([np.asarray(f(*arrays)) + np.zeros(n) for f in functions.values()])]

    return Case(
        name=name,
        source=f"uint i = thread_position_in_grid.x; {reads}\n" + "\n".join(lines),
        inputs={f"{x}_in": value for x, value in inputs.items()},
        outputs={"out": ((len(functions), n), dtype)},
        grid=(n, 1, 1),
        threadgroup=(32, 1, 1),
        expected=expected,
        rows=tuple(functions),
        **more,
    )


ANY = np.linspace(-4, 4, N).astype(np.float32)
POSITIVE = np.linspace(0.05, 6, N).astype(np.float32)
UNIT = np.linspace(-0.95, 0.95, N).astype(np.float32)

_ON_ANY = {
    "exp": np.exp, "exp2": np.exp2, "exp10": lambda x: 10.0**x, "sin": np.sin, "cos": np.cos,
    "tanh": np.tanh, "sinh": np.sinh, "cosh": np.cosh, "atan": np.arctan, "asinh": np.arcsinh,
    "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "fabs": np.abs,
    "abs": np.abs, "sign": np.sign, "fract": lambda x: x - np.floor(x),
    "saturate": lambda x: np.clip(x, 0, 1), "sinpi": lambda x: np.sin(np.pi * x),
    "cospi": lambda x: np.cos(np.pi * x),
    "round": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
}  # fmt: skip
_ON_POSITIVE = {
    "log": np.log, "log2": np.log2, "log10": np.log10, "sqrt": np.sqrt, "log1p": np.log1p,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_ON_UNIT = {
    "asin": np.arcsin, "acos": np.arccos, "atanh": np.arctanh, "tan": np.tan,
    "tanpi": lambda x: np.tan(np.pi * x),
}  # fmt: skip


_FLOAT_ONLY = ("metal::sign(a)", "metal::saturate(a)")


def math_cases() -> list[Case]:
    calls: dict[str, Any] = {}
    for functions, x, pick in ((_ON_ANY, "a", 0), (_ON_POSITIVE, "b", 1), (_ON_UNIT, "c", 2)):
        for f, truth in functions.items():
            # MLX has its own log1p, outside of the namespace.
            call = f"{f}({x})" if f == "log1p" else f"metal::{f}({x})"
            calls[call] = lambda *v, t=truth, p=pick: t(v[p].astype(np.float64))
    inputs = {"a": ANY, "b": POSITIVE, "c": UNIT * np.float32(0.45)}
    cases = []
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        short = str(dtype).rpartition(".")[2]
        typed = {k: array(v, dtype) for k, v in inputs.items()}
        tolerance = {mx.float32: 2e-5}.get(dtype)
        cast = {
            # MLX has these for no bfloat: they give a float, which becomes none by itself.
            f"bfloat({call})" if dtype == mx.bfloat16 and call in _FLOAT_ONLY else call: truth
            for call, truth in calls.items()
        }
        cases.append(_table(f"math_{short}", cast, typed, dtype, tolerance=tolerance))
    spaces = {
        f"{space}::{f}({x})": calls[f"metal::{f}({x})"]
        for space in ("metal::precise", "metal::fast", "precise", "fast")
        for f, x in (
            ("exp", "a"), ("sin", "a"), ("cos", "a"), ("tanh", "a"), ("log", "b"), ("log2", "b"),
            ("sqrt", "b"), ("rsqrt", "b"), ("exp2", "a"), ("tan", "c"), ("log10", "b"),
        )
    }  # fmt: skip
    typed = {k: array(v, mx.float32) for k, v in inputs.items()}
    cases.append(_table("math_spaces", spaces, typed, mx.float32, tolerance=1e-4))
    return cases


def float_cases() -> list[Case]:
    rng = generator()
    a, b = rng.normal(size=N).astype(np.float32), rng.normal(size=N).astype(np.float32)
    c = rng.uniform(0.1, 0.9, N).astype(np.float32)
    a[:3] = [np.nan, np.inf, -np.inf]
    functions = {
        "max(a, b)": lambda a, b, c: np.fmax(a, b),
        "min(a, b)": lambda a, b, c: np.fmin(a, b),
        "fmax(a, b)": lambda a, b, c: np.fmax(a, b),
        "fmin(a, b)": lambda a, b, c: np.fmin(a, b),
        "max(b, 0.0f)": lambda a, b, c: np.maximum(b, 0),
        "max3(b, c, 0.5f)": lambda a, b, c: np.maximum(np.maximum(b, c), 0.5),
        "min3(b, c, 0.5f)": lambda a, b, c: np.minimum(np.minimum(b, c), 0.5),
        "median3(b, c, 0.5f)": lambda a, b, c: np.median([b, c, np.full_like(b, 0.5)], axis=0),
        "clamp(b, -0.5f, 0.5f)": lambda a, b, c: np.clip(b, -0.5, 0.5),
        "mix(b, c, 0.25f)": lambda a, b, c: b + (c - b) * 0.25,
        "fma(b, c, 2.0f)": lambda a, b, c: b * c + 2,
        "select(b, c, b > c)": lambda a, b, c: np.maximum(np.where(b > c, c, b), -9),
        "step(0.5f, c)": lambda a, b, c: c >= 0.5,
        "smoothstep(0.0f, 1.0f, c)": lambda a, b, c: c * c * (3 - 2 * c),
        "pow(c, b)": lambda a, b, c: np.float64(c) ** b,
        "powr(c, b)": lambda a, b, c: np.float64(c) ** b,
        "fast::pow(c, b)": lambda a, b, c: np.float64(c) ** b,
        "fmod(b, c)": lambda a, b, c: np.fmod(b, c),
        "atan2(b, c)": lambda a, b, c: np.arctan2(b, c),
        "copysign(c, b)": lambda a, b, c: np.copysign(c, b),
        "fdim(b, c)": lambda a, b, c: np.maximum(b - c, 0),
        "divide(b, c)": lambda a, b, c: b / c,
        "fast::divide(b, c)": lambda a, b, c: b / c,
        "hypot(b, c)": lambda a, b, c: np.hypot(b, c),
        "nextafter(c, 2.0f)": lambda a, b, c: np.nextafter(c, np.float32(2)),
        "isnan(a)": lambda a, b, c: np.isnan(a),
        "isinf(a)": lambda a, b, c: np.isinf(a),
        "isfinite(a)": lambda a, b, c: np.isfinite(a),
        "isnormal(a)": lambda a, b, c: np.isfinite(a),
        "isunordered(a, b)": lambda a, b, c: np.isnan(a),
        "isordered(a, b)": lambda a, b, c: ~np.isnan(a),
        "signbit(b)": lambda a, b, c: np.signbit(b),
        "ldexp(b, 3)": lambda a, b, c: np.ldexp(b, 3),
        "ilogb(c)": lambda a, b, c: np.floor(np.log2(c)),
        "as_type<float>(as_type<uint>(b) & 0x7fffffff)": lambda a, b, c: np.abs(b),
        "b > 0 ? b : 0": lambda a, b, c: np.maximum(b, 0),
        "b > 0 ? b : c > 0.5 ? c : -1.0": lambda a, b, c: np.where(
            b > 0, b, np.where(c > 0.5, c, -1)
        ),
        "M_PI_F * c": lambda a, b, c: np.float32(np.pi) * c,
        "isinf(INFINITY) && isnan(NAN) && FLT_MAX == MAXFLOAT && HUGE_VALF == INFINITY": (
            lambda a, b, c: np.ones(N)
        ),
        "numeric_limits<float>::max()": lambda a, b, c: np.full(N, np.finfo(np.float32).max),
        "-metal::numeric_limits<float>::infinity()": lambda a, b, c: np.full(N, -np.inf),
        "Limits<float>::finite_max": lambda a, b, c: np.full(N, np.finfo(np.float32).max),
        "1.0 / 3": lambda a, b, c: np.full(N, np.float32(1) / np.float32(3)),
        "1e-3 + .5f + 0x1.8p1": lambda a, b, c: np.full(N, np.float32(3.501)),
        "float(half(b))": lambda a, b, c: rounded(b, mx.float16),
        "float(bfloat(b))": lambda a, b, c: rounded(b, mx.bfloat16),
        "ceildiv(int(c * 100), 7)": lambda a, b, c: -(-(c * np.float32(100)).astype(int) // 7),
    }
    inputs = {"a": array(a, mx.float32), "b": array(b, mx.float32), "c": array(c, mx.float32)}
    table = _table("float_functions", functions, inputs, mx.float32, tolerance=2e-5)
    parts = Case(
        name="float_parts",
        source="""
            uint i = thread_position_in_grid.x;
            float c; out[i] = sincos(x[i], c); out[64 + i] = c;
            float whole; out[128 + i] = modf(x[i], whole); out[192 + i] = whole;
            int e; out[256 + i] = frexp(x[i], e); out[320 + i] = e;
        """,
        inputs={"x": array(b, mx.float32)},
        outputs={"out": ((6, N), mx.float32)},
        grid=(N, 1, 1),
        threadgroup=(N, 1, 1),
        expected=lambda x: [
            np.stack([np.sin(x), np.cos(x), *np.modf(x), *(v.astype(float) for v in np.frexp(x))])
        ],
        rows=("sincos", "cosine", "modf", "whole", "frexp", "exponent"),
        tolerance=1e-5,
    )
    return [table, parts]


def _bits(x: np.ndarray, f: Callable[[str], int]) -> np.ndarray:
    return np.array([f(f"{int(v) & 0xFFFFFFFF:032b}") for v in x])


def integer_cases() -> list[Case]:
    rng = generator()
    a = rng.integers(0, 2**32, N, dtype=np.uint64).astype(np.uint32)
    b = rng.integers(0, 2**32, N, dtype=np.uint64).astype(np.uint32)
    a[:2] = [0, 0xFFFFFFFF]
    wide = np.int64
    functions = {
        "popcount(a)": lambda a, b: _bits(a, lambda s: s.count("1")),
        "clz(a)": lambda a, b: _bits(a, lambda s: (s + "1").index("1")),
        "ctz(a)": lambda a, b: _bits(a, lambda s: ("1" + s)[::-1].index("1")),
        "reverse_bits(a)": lambda a, b: _bits(a, lambda s: int(s[::-1], 2)),
        "rotate(a, 5u)": lambda a, b: (a << np.uint32(5)) | (a >> np.uint32(27)),
        "extract_bits(a, 4, 9)": lambda a, b: (a >> np.uint32(4)) & np.uint32(511),
        "insert_bits(a, b, 4, 9)": lambda a, b: (
            (a & ~np.uint32(511 << 4)) | ((b & np.uint32(511)) << np.uint32(4))
        ),
        "mulhi(a, b)": lambda a, b: (a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32),
        "absdiff(a, b)": lambda a, b: np.abs(a.astype(wide) - b.astype(wide)),
        "addsat(a, b)": lambda a, b: np.minimum(a.astype(wide) + b.astype(wide), 2**32 - 1),
        "subsat(a, b)": lambda a, b: np.maximum(a.astype(wide) - b.astype(wide), 0),
        "hadd(a, b)": lambda a, b: (a.astype(wide) + b.astype(wide)) >> 1,
        "rhadd(a, b)": lambda a, b: (a.astype(wide) + b.astype(wide) + 1) >> 1,
        "max(a, b)": np.maximum,
        "min(a, b)": np.minimum,
        "clamp(a, 10u, 1000u)": lambda a, b: np.clip(a, 10, 1000),
        "mul24(a & 4095u, b & 4095u)": lambda a, b: (a & np.uint32(4095)) * (b & np.uint32(4095)),
        "mad24(a & 255u, b & 255u, 7u)": lambda a, b: (
            (a & np.uint32(255)) * (b & np.uint32(255)) + np.uint32(7)
        ),
        "a >> 3 << 2": lambda a, b: a >> np.uint32(3) << np.uint32(2),
        "uint(uchar(a)) + ushort(b)": lambda a, b: (a & np.uint32(255)) + (b & np.uint32(65535)),
        "uint(ulong(a) * b >> 8)": lambda a, b: (
            a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(8)
        ).astype(np.uint32),
        "a > b ? a : 0": lambda a, b: np.where(a > b, a, 0),
        "UINT_MAX - INT_MAX": lambda a, b: np.full(N, 2**31),
    }
    unsigned = {"a": array(a, mx.uint32), "b": array(b, mx.uint32)}
    c = a.view(np.int32)
    d = b.view(np.int32)
    edge = 2**31
    signed = {
        "abs(a)": lambda a, b: np.abs(a),
        "addsat(a, b)": lambda a, b: np.clip(a.astype(wide) + b.astype(wide), -edge, edge - 1),
        "subsat(a, b)": lambda a, b: np.clip(a.astype(wide) - b.astype(wide), -edge, edge - 1),
        "mulhi(a, b)": lambda a, b: (a.astype(wide) * b.astype(wide)) >> 32,
        "extract_bits(a, 3, 6)": lambda a, b: (a << 23) >> 26,
        "hadd(a, b)": lambda a, b: (a.astype(wide) + b.astype(wide)) >> 1,
        "max(a, b)": np.maximum,
        "clamp(a, -5, 5)": lambda a, b: np.clip(a, -5, 5),
        "a % 7": lambda a, b: np.fmod(a, 7),
        "absdiff(a, 5) > 7u": lambda a, b: np.abs(a.astype(wide) - 5) > 7,
    }
    return [
        _table("unsigned_functions", functions, unsigned, mx.uint32),
        _table(
            "signed_functions", signed, {"a": array(c, mx.int32), "b": array(d, mx.int32)}, mx.int32
        ),
    ]


def small_float_cases() -> list[Case]:
    """Sums and products of 16-bit floats are rounded each time, mixes with float are not."""
    rng = generator()
    a, b = rng.normal(size=N), rng.normal(size=N) + 3
    cases = []
    for dtype, name in ((mx.float16, "half"), (mx.bfloat16, "bfloat")):
        suffix = "h" if name == "half" else "bf"

        def r(x: np.ndarray, dtype: mx.Dtype = dtype) -> np.ndarray:
            return rounded(np.asarray(x), dtype)

        functions = {
            "a + b": lambda a, b, r=r: r(a + b),
            "a * b + a": lambda a, b, r=r: r(r(a * b) + a),
            "a / b - b": lambda a, b, r=r: r(r(a / b) - b),
            "a * 2": lambda a, b, r=r: r(a * 2),
            "a * 2.5f + b": lambda a, b, r=r: a * np.float32(2.5) + b,
            "a * 2.5 + b": lambda a, b, r=r: a * np.float32(2.5) + b,
            "3 - a": lambda a, b, r=r: r(3 - a),
            f"a * 1.5{suffix}": lambda a, b, r=r: r(a * 1.5),
            "-a": lambda a, b, r=r: -a,
            "a < b": lambda a, b, r=r: a < b,
            "a > 0 ? a : 0": lambda a, b, r=r: np.maximum(a, 0),
            "a > 0 ? a : 0.0f": lambda a, b, r=r: np.maximum(a, 0),
            "a > 0 ? a : 0.5f * b": lambda a, b, r=r: np.where(a > 0, a, np.float32(0.5) * b),
            "a > 0 ? b : a": lambda a, b, r=r: np.where(a > 0, b, a),
            "a > b ? 1.0 : a > 0 ? a : b > 3 ? 2 : b": lambda a, b, r=r: np.where(
                a > b, 1, np.where(a > 0, a, np.where(b > 3, 2, b))
            ),
            f"{name}(float(a) * b)": lambda a, b, r=r: r(a * b),
            f"static_cast<{name}>(7)": lambda a, b, r=r: np.full(N, 7.0),
            "max(a, b)": lambda a, b, r=r: np.maximum(a, b),
            f"max(a, {name}(0))": lambda a, b, r=r: np.maximum(a, 0),
            "max(float(a), 0.25f)": lambda a, b, r=r: np.maximum(a, np.float32(0.25)),
            "fma(a, b, b)": lambda a, b, r=r: r(a.astype(float) * b + b),
            "int(b)": lambda a, b, r=r: b.astype(int),
            f"as_type<{name}>(ushort(as_type<ushort>(a) ^ 0x8000))": lambda a, b, r=r: -a,
            f"float(numeric_limits<{name}>::max()) > 1000": lambda a, b, r=r: np.ones(N),
            f"Limits<{name}>::max == INFINITY": lambda a, b, r=r: np.ones(N),
            "bool(a) && !(a == b) && a != b": lambda a, b, r=r: np.ones(N),
        }
        # A float becomes half by itself, and bfloat only where that is said.
        scaled = "v *= 2.5f" if name == "half" else "v = bfloat(v * 2.5f)"
        inputs = {"a": array(a, dtype), "b": array(b, dtype)}
        cases.append(_table(f"{name}_arithmetic", functions, inputs, mx.float32, tolerance=1e-6))
        cases.append(
            Case(
                name=f"{name}_variables",
                header=f"constant {name} {name}_table[4] = "
                f"{{0.1{suffix}, 1.5{suffix}, -65504.0{suffix}, 3e-6{suffix}}};\n"
                f"constant {name} {name}_third = {name}(1.0f / 3.0f);\n",
                source=f"""
                    uint i = thread_position_in_grid.x;
                    {name} v = x[i];
                    v += 1; {scaled}; v -= x[i]; v /= {name}_third; ++v; v--;
                    {name} t = {name}_table[i % 4];
                    out[i] = v;
                    out[64 + i] = t;
                    {name}4 q = {name}4(x[i]) * {name}4(1, 2, 3, 4);
                    out[128 + i] = q.w + {name}(dot(q, q) > 0);
                """,
                inputs={"x": array(a, dtype)},
                outputs={"out": ((3, N), dtype)},
                grid=(N, 1, 1),
                threadgroup=(N, 1, 1),
                expected=lambda x, r=r: [
                    np.stack(
                        [
                            r(
                                r(
                                    r(
                                        r(
                                            r(r(r(x + 1) * np.float32(2.5)) - x)
                                            / r(1 / np.array(3.0))
                                        )
                                        + 1
                                    )
                                    - 1
                                )
                            ),
                            r(np.array([0.1, 1.5, -65504.0, 3e-6])[np.arange(N) % 4]),
                            r(r(x * 4) + r(np.ones(N))),
                        ]
                    )
                ],
                rows=("compound", "constant table", "vector"),
                tolerance=1e-7,
            )
        )
    return cases


def vector_cases() -> list[Case]:
    rng = generator()
    x = rng.normal(size=(N, 4)).astype(np.float32)

    def expected(x: np.ndarray) -> list[np.ndarray]:
        a, b, c, d = x.T
        dot = (x.astype(float) ** 2).sum(1)
        cross = np.cross(x[:, :3], x[:, 1:])
        rows = [
            a, d, c, b, a + c, 2 * d + 1, np.where(a < c, a, c), dot, np.sqrt(dot),
            b / np.sqrt(dot), cross[:, 2], np.maximum(a, 0), np.exp(b), (x > 0).all(1),
            (x > 0).any(1), d, b, 10 + c, 7 + a, np.trunc(d * 10), a, np.clip(d, -1, 1), c, b + a,
            -c, a * b, rounded(c, mx.float16), b, 3 * d,
        ]  # fmt: skip
        return [np.stack([np.asarray(r, dtype=np.float32) for r in rows])]

    codes = (
        "v.x", "v.w", "v.wzyx.y", "v.xy.y", "(v.xy + v.zw).x", "(2 * v + 1.0f).w",
        "min(v.xy, v.zw).x * (v.x < v.z) + (v.x < v.z ? 0 : v.z)", "dot(v, v)", "length(v)",
        "normalize(v).y", "cross(v.xyz, v.yzw).z", "max(v, 0.0f).x", "exp(v).y", "all(v > 0.0f)",
        "any(v > float4(0))", "v[3]", "v.g", "put.z", "put.w", "float4(int4(v * 10)).w",
        "float4(v.xy, v.zw).x", "clamp(v, -1.0f, 1.0f).w", "as_type<float4>(as_type<uint4>(v)).z",
        "p[1] + p[0]", "(-v).b", "(v * v.yxwz).x", "float4(half4(v)).z",
        "select(v, v.yxwz, bool4(true, false, true, false)).x", "sum.w",
    )  # fmt: skip
    lines = [f"out[{k} * 64 + i] = {code};" for k, code in enumerate(codes)]
    main = Case(
        name="vectors",
        source="""
            uint i = thread_position_in_grid.x;
            float4 v = ((const device float4*)x)[i];
            float4 put = 0;
            put.xw = float2(3, 7); put.zw += v.zx; put.z += 10.0f;
            packed_float3 p = packed_float3(v.xyz);
            float4 sum = {v.x, v.y, v.z, v.w};
            for (int k = 0; k < 2; ++k) { sum += v; }
            threadgroup float4 shared[64];
            shared[i] = v;
        """
        + "\n".join(lines),
        inputs={"x": array(x, mx.float32)},
        outputs={"out": ((len(codes), N), mx.float32)},
        grid=(N, 1, 1),
        threadgroup=(N, 1, 1),
        expected=expected,
        rows=codes,
        tolerance=1e-5,
    )
    layout = Case(
        name="vector_layout",
        source="""
            out[0] = sizeof(float2); out[1] = sizeof(float3); out[2] = sizeof(float4);
            out[3] = alignof(float3); out[4] = sizeof(half3); out[5] = sizeof(packed_float3);
            out[6] = sizeof(uchar4); out[7] = sizeof(bfloat4); out[8] = alignof(packed_half4);
            out[9] = sizeof(ulong3); out[10] = sizeof(bool4); out[11] = sizeof(long);
            uchar4 b = as_type<uchar4>(0x04030201u);
            out[12] = b.x + 10 * b.y + 100 * b.z + 1000 * b.w;
            uint3 u = uint3(1, uint2(2, 3)); u <<= 2; u.y |= 1; u = u ^ uint3(1);
            out[13] = u.x * 10000 + u.y * 100 + u.z;
            short2 s = short2(-3, 7) % short2(2); out[14] = s.x + 5 * s.y;
            int2 k = ~int2(5, 6); out[15] = k.x * k.y;
            vec<int, 3> w = vec<int, 3>(4); ++w; out[16] = w.z;
            out[17] = all(int2(1, 2) == int2(1, 2)) && !any(int2(1, 2) != int2(1, 2));
        """,
        inputs={},
        outputs={"out": ((18,), mx.int32)},
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        expected=lambda: [
            np.array([8, 16, 16, 16, 8, 12, 4, 8, 2, 32, 4, 8, 4321, 50813, 4, 42, 5, 1])
        ],
    )
    return [main, layout]


def simd_cases() -> list[Case]:
    """Across lanes, for whole simdgroups (64 threads) and with a last one of 20 (52 threads)."""
    rng = generator()
    cases = []
    kinds = {
        "float": (mx.float32, lambda n: rng.normal(size=n)),
        # Every sum of these is exact, in whatever order and rounded at whatever step.
        "half": (mx.float16, lambda n: rng.integers(-32, 33, n) / 16),
        "bfloat": (mx.bfloat16, lambda n: rng.normal(size=n)),
        "int": (mx.int32, lambda n: rng.integers(-5, 6, n)),
        "uint": (mx.uint32, lambda n: rng.integers(0, 7, n)),
        "long": (mx.int64, lambda n: rng.integers(-(2**40), 2**40, n)),
        "uchar": (mx.uint8, lambda n: rng.integers(0, 6, n)),
    }
    for kind, (dtype, values) in kinds.items():
        for n in (64, 52):
            cases.append(_simd_case(kind, dtype, values(n), n))
    return cases + _simd_others()


def _groups(x: np.ndarray) -> list[np.ndarray]:
    return [x[i : i + 32] for i in range(0, len(x), 32)]


def _per_group(f: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.concatenate([np.zeros(len(g), x.dtype) + f(g) for g in _groups(x)])


def _exclusive(g: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(g)[:-1]]).astype(g.dtype)


def _down(g: np.ndarray, by: int) -> np.ndarray:
    return np.concatenate([g[by:], g[-by:]])


def _is_metal(code: str, kind: str) -> bool:
    """Whether MLX adds a type that Metal's functions across lanes lack to one of them."""
    if kind == "bfloat":
        return not code.startswith(("quad_", "simd_broadcast_first"))
    if kind == "long":
        has = ("simd_shuffle(", "simd_shuffle_up", "simd_shuffle_down", "simd_shuffle_and_fill_up")
        return code.startswith(has)
    return True


def _simd_case(kind: str, dtype: mx.Dtype, values: np.ndarray, n: int) -> Case:
    whole = {
        "simd_sum(v)": np.sum,
        "simd_max(v)": np.max,
        "simd_min(v)": np.min,
        "simd_broadcast(v, 3)": lambda g: g[3],
        "simd_broadcast_first(v)": lambda g: g[0],
        "simd_shuffle(v, ushort(lane / 2))": lambda g: g[np.arange(len(g)) // 2],
        "simd_shuffle_up(v, 2)": lambda g: np.concatenate([g[:2], g[:-2]]),
        "simd_prefix_inclusive_sum(v)": np.cumsum,
        "simd_prefix_exclusive_sum(v)": _exclusive,
        "quad_sum(v)": lambda g: np.repeat(g.reshape(-1, 4).sum(1), 4),
        "quad_max(v)": lambda g: np.repeat(g.reshape(-1, 4).max(1), 4),
        "quad_broadcast(v, 1)": lambda g: np.repeat(g.reshape(-1, 4)[:, 1], 4),
        "quad_shuffle_xor(v, 1)": lambda g: g.reshape(-1, 2)[:, ::-1].ravel(),
        "simd_shuffle_xor(v, 2)": lambda g: g.reshape(-1, 2, 2)[:, ::-1].ravel(),
    }
    if n % 32 == 0:  # what comes from a lane that is not there is anything
        whole |= {
            "simd_shuffle_down(v, 2)": lambda g: _down(g, 2),
            "simd_shuffle_rotate_down(v, 5)": lambda g: np.roll(g, -5),
            "simd_shuffle_rotate_up(v, 5)": lambda g: np.roll(g, 5),
            "simd_shuffle_and_fill_down(v, v, 5)": lambda g: np.roll(g, -5),
            "simd_shuffle_and_fill_up(v, v, 5)": lambda g: np.roll(g, 5),
        }
    if kind in ("float", "int", "uint"):
        whole |= {"simd_product(v)": np.prod, "simd_prefix_inclusive_product(v)": np.cumprod}
    if kind in ("int", "uint", "uchar"):
        whole |= {
            "simd_or(v)": np.bitwise_or.reduce,
            "simd_and(v)": np.bitwise_and.reduce,
            "simd_xor(v)": np.bitwise_xor.reduce,
        }
    whole = {code: f for code, f in whole.items() if _is_metal(code, kind)}
    lines = [f"out[{k} * {n} + i] = {code};" for k, code in enumerate(whole)]

    def expected(x: np.ndarray) -> list[np.ndarray]:
        x = x.astype({mx.int32: np.int32, mx.uint32: np.uint32}.get(dtype, x.dtype))
        return [np.stack([_per_group(f)(x).astype(x.dtype) for f in whole.values()])]

    return Case(
        name=f"simd_{kind}_{n}",
        source=f"""
            uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;
            {kind} v = x[i];
        """
        + "\n".join(lines),
        inputs={"x": array(values, dtype)},
        outputs={"out": ((len(whole), n), dtype)},
        grid=(n, 1, 1),
        threadgroup=(64, 1, 1) if n == 64 else (52, 1, 1),
        expected=expected,
        rows=tuple(whole),
        tolerance=1e-5 if dtype == mx.float32 else None,
    )


def _simd_others() -> list[Case]:
    n = 52
    votes = Case(
        name="simd_votes",
        source="""
            uint i = thread_position_in_grid.x;
            bool yes = i % 3 == 0;
            out[i] = uint((simd_vote::vote_t)simd_ballot(yes));
            out[52 + i] = simd_any(i == 40);
            out[104 + i] = simd_all(i != 40);
            out[156 + i] = simd_sum(uint(yes));
            out[208 + i] = simd_is_first();
            out[260 + i] = uint((simd_vote::vote_t)simd_active_threads_mask());
            uint2 both = simd_broadcast_first(uint2(yes, !yes)); out[312 + i] = both.x;
            float4 q = simd_sum(float4(i, 1, 2, 3)); out[364 + i] = uint(q.y + q.w);
            uint divergent = 0;
            if (i % 2 == 0) { divergent = simd_sum(1u); }
            out[416 + i] = divergent;
            uint holes = 0;
            if (i % 2) { holes = simd_prefix_exclusive_sum(1u); }
            out[468 + i] = holes;
        """,
        inputs={},
        outputs={"out": ((10, n), mx.uint32)},
        grid=(n, 1, 1),
        threadgroup=(n, 1, 1),
        expected=lambda: [_votes(n)],
        rows=(
            "ballot", "any", "all", "sum of votes", "first", "mask", "vector", "sum of vectors",
            "in a branch", "prefix in a branch",
        ),
    )  # fmt: skip
    return [votes]


def _votes(n: int) -> np.ndarray:
    rows: list[list[int]] = [[] for _ in range(10)]
    for start in range(0, n, 32):
        lanes = list(range(start, min(start + 32, n)))
        for i in lanes:
            values = (
                sum(1 << (j - start) for j in lanes if j % 3 == 0),
                40 in lanes,
                40 not in lanes,
                sum(j % 3 == 0 for j in lanes),
                i == start,
                (1 << len(lanes)) - 1,
                start % 3 == 0,
                4 * len(lanes),
                sum(j % 2 == 0 for j in lanes) if i % 2 == 0 else 0,
                sum(j % 2 for j in lanes if j < i) if i % 2 else 0,
            )
            for row, value in zip(rows, values, strict=True):
                row.append(int(value))
    return np.array(rows)


def memory_cases() -> list[Case]:
    rng = generator()
    x = rng.normal(size=(6, 300)).astype(np.float32)
    reduction = Case(
        name="row_sums",
        header="""
            #include <metal_stdlib>
            using namespace metal;
            #define WIDTH 128
            constant constexpr float scales[4] = {1.0, 2.0, 3.0f, .5};
            template <typename T, int N>
            METAL_FUNC T total(threadgroup T* values, uint tid) {
                for (uint s = N / 2; s > 0; s >>= 1) {
                    if (tid < s) { values[tid] += values[tid + s]; }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                }
                return values[0];
            }
            struct Scale {
                float by;
                float operator()(thread const float& v) const thread { return v * by; }
            };
            inline float scale_of(constant const float* t, uint i) { return t[i % 4]; }
        """,
        source="""
            threadgroup float partial[WIDTH];  // one for each thread
            uint tid = thread_position_in_threadgroup.x;
            uint row = threadgroup_position_in_grid.y;
            const device float* in = x + row * 300;
            float sum = 0;
            #pragma clang loop unroll(full)
            for (uint i = tid; i < 300; i += WIDTH) sum += in[i];
            partial[tid] = sum;
            threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
            threadgroup float* p = partial;
            Scale scale = {scale_of(scales, row)};
            float whole = total<float, WIDTH>(p, tid);
            float all = scale(whole);
            if (tid == 0) { out[row] = all; }
        """,
        inputs={"x": array(x, mx.float32)},
        outputs={"out": ((6,), mx.float32)},
        grid=(128, 6, 1),
        threadgroup=(128, 1, 1),
        expected=lambda x: [x.sum(1) * np.array([1, 2, 3, 0.5, 1, 2])],
        tolerance=1e-5,
    )
    atomics = Case(
        name="atomics",
        source="""
            threadgroup atomic_uint count;
            threadgroup atomic<int> most[2];
            uint i = thread_position_in_grid.x, tid = thread_index_in_threadgroup;
            if (tid == 0) {
                atomic_store_explicit(&count, 0u, memory_order_relaxed);
                atomic_store_explicit(&most[0], 0, memory_order_relaxed);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            atomic_fetch_add_explicit(&count, 2, memory_order_relaxed);
            atomic_fetch_max_explicit(&most[0], int(tid + 1) / 2, metal::memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint old = atomic_load_explicit(&count, memory_order_relaxed);
            atomic_fetch_add_explicit(&sums[0], x[i], memory_order_relaxed);
            float m = atomic_load_explicit(&most[0], memory_order_relaxed) + 0.5f;
            atomic_fetch_add_explicit(&sums[1], m, memory_order_relaxed);
            atomic_fetch_sub_explicit(&ints[0], int(i), memory_order_relaxed);
            atomic_fetch_max_explicit(&ints[1], int(i), memory_order_relaxed);
            atomic_fetch_min_explicit(&ints[2], -int(i), memory_order_relaxed);
            atomic_fetch_or_explicit(&ints[3], 1 << (i % 8), memory_order_relaxed);
            atomic_fetch_xor_explicit(&ints[4], int(i), memory_order_relaxed);
            atomic_fetch_and_explicit(&ints[5], int(i % 2), memory_order_relaxed);
            if (i == 0) { atomic_exchange_explicit(&ints[6], int(old), memory_order_relaxed); }
            int expected = atomic_load_explicit(&ints[7], memory_order_relaxed);
            while (!atomic_compare_exchange_weak_explicit(
                &ints[7], &expected, expected + 3, memory_order_relaxed, memory_order_relaxed)) {}
        """,
        inputs={"x": array(np.ones(256), mx.float32)},
        outputs={"sums": ((2,), mx.float32), "ints": ((8,), mx.int32)},
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
        expected=lambda x: [
            np.array([256, 256 * 32.5]),
            np.array([-sum(range(256)), 255, -255, 255, 0, 0, 128, 768]),
        ],
        settings={"atomic_outputs": True},
        launch={"init_value": 0.0},
    )
    return [reduction, atomics]


def _transposed(x: np.ndarray) -> mx.array:
    with mx.stream(mx.cpu):
        result = mx.array(x).T
        mx.eval(result)
    return result


def argument_cases() -> list[Case]:
    rng = generator()
    x = rng.normal(size=(5, 7)).astype(np.float32)
    template = Case(
        name="template_values",
        source="""
            uint i = thread_position_in_grid.x;
            T acc[N] = {};
            for (int k = 0; k < N; ++k) acc[k] = T(x[i] * k);
            if (FLIP) { out[i] = -acc[N - 1] + OFFSET; } else { out[i] = acc[0]; }
        """,
        inputs={"x": array(x, mx.float32)},
        outputs={"out": ((5, 7), mx.float32)},
        grid=(35, 1, 1),
        threadgroup=(35, 1, 1),
        template=(("T", mx.float16), ("N", 3), ("FLIP", True), ("OFFSET", -4)),
        expected=lambda x: [rounded(-rounded(x * 2, mx.float16) - 4, mx.float16)],
        tolerance=1e-7,
    )
    strides = Case(
        name="strided_input",
        source="""
            uint i = thread_position_in_grid.x;
            auto at = elem_to_loc(i, x_shape, x_strides, x_ndim);
            out[i] = x[at] + 100 * x_shape[0] + 1000 * x_ndim;
        """,
        inputs={"x": _transposed(x)},
        outputs={"out": ((7, 5), mx.float32)},
        grid=(35, 1, 1),
        threadgroup=(7, 1, 1),
        expected=lambda x: [x + 100 * x.shape[0] + 2000],
        settings={"ensure_row_contiguous": False},
        tolerance=1e-6,
    )
    scalars = Case(
        name="scalar_inputs",
        source="""
            uint i = thread_position_in_grid.x;
            out[i] = x[i] * scale + (shift > 0 ? shift : 0) + few[1];
        """,
        inputs={
            "x": array(x, mx.float32),
            "scale": 2.5,
            "shift": array(3, mx.int32),
            "few": array([1, 2], mx.float16),
        },
        outputs={"out": ((5, 7), mx.float32)},
        grid=(35, 1, 1),
        threadgroup=(32, 1, 1),
        expected=lambda x, scale, shift, few: [x * np.float32(scale) + shift + few[1]],
        tolerance=1e-6,
    )
    return [template, strides, scalars]


#: Functions that make cases, so that nothing is computed where the tests are only listed.
MAKERS = (
    math_cases,
    float_cases,
    integer_cases,
    small_float_cases,
    vector_cases,
    simd_cases,
    memory_cases,
    argument_cases,
)
