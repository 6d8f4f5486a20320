"""A spec that is called: gradients, batches, compiling, empty arrays, and what is refused."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

from zmlx.backend.definition import Definition
from zmlx.kernels import calling
from zmlx.kernels import spec as kernels
from zmlx.kernels.calling import Geometry
from zmlx.kernels.norms import RMSNORM, layernorm, rmsnorm, rmsnorm_grad
from zmlx.kernels.rows import wide
from zmlx.kernels.softmax import log_softmax_lastdim, softmax_grad, softmax_lastdim
from zmlx.kernels.spec import KernelSpec, Sample, all_specs
from zmlx.kernels.transformer import geglu2, swiglu2


def scaled(x, y, *, factor=2.0):
    return (wide(x) * wide(y) * factor).astype(x.dtype)


def geometry(x, y, *, factor=2.0, threadgroup=32):
    if x.shape[-1:] != y.shape[-1:]:
        raise ValueError(f"rows of {x.shape} and {y.shape} differ")
    return Geometry(
        grid=(x.size, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        output_shapes=(x.shape,),
        output_dtypes=(x.dtype,),
        template=(("T", x.dtype),),
    )


def gradient(primals, cotangent, output, *, factor=2.0, threadgroup=32):
    x, y = primals
    return [cotangent * y * factor, cotangent * x * factor]


def make(**changes):
    spec = {
        "name": "scaled",
        "domain": "test",
        "formula": "x * y * factor",
        "shapes": ("x", "y"),
        "reference": scaled,
        "sample": lambda: Sample(()),
        "contract": {},
        "definition": Definition("scaled", ("x", "y", "factor"), ("out",), "source"),
        "geometry": geometry,
        "gradient": gradient,
        "batched": (True, True),
        **changes,
    }
    return KernelSpec(**spec)


@pytest.fixture
def launches(monkeypatch):
    """Run `scaled` on a backend that only we have, noting its launches."""
    calls = []

    def launcher(definition, backend):
        assert backend == "emulator"

        def launch(**given):
            calls.append(given)
            x, y, factor = given["inputs"]
            return [mx.stop_gradient(scaled(x, y, factor=factor))]

        return launch

    monkeypatch.setattr(kernels, "launcher", launcher)
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    calling.forget()
    yield calls
    calling.forget()


X, Y = mx.arange(6.0).reshape(2, 3), mx.arange(6.0).reshape(2, 3) + 1
mx.eval(X, Y)  # in this thread: another one has other streams


def same(found, truth):
    assert found.shape == truth.shape
    assert mx.array_equal(found, truth).item()


def test_a_call_launches_with_its_options(launches):
    same(make()(X, Y, factor=3.0), X * Y * 3)
    (given,) = launches
    assert given["inputs"][2] == 3.0
    assert given["grid"] == (6, 1, 1)
    assert given["template"] == (("T", mx.float32),)
    same(make()(X, Y), X * Y * 2)
    assert launches[1]["inputs"][2] == 2.0


def test_options_of_the_geometry_alone_do_not_reach_the_reference(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    same(make()(X, Y, threadgroup=64, factor=1.0), X * Y)


def test_what_does_not_depend_on_values_is_made_once(launches, monkeypatch):
    made, laid = [], []
    custom = mx.custom_function
    monkeypatch.setattr(mx, "custom_function", lambda f: made.append(f) or custom(f))
    spec = make(geometry=lambda *a, **k: laid.append(a) or geometry(*a, **k))
    for _ in range(3):
        spec(X, Y, factor=3.0)
    # The second call is recorded, the third replayed without any Python.
    assert (len(made), len(laid), len(launches)) == (1, 1, 2)
    spec(X[0], Y[0], factor=3.0)
    assert (len(made), len(laid)) == (1, 2)
    spec(X, Y, factor=4.0)
    assert (len(made), len(laid)) == (2, 3)


def test_geometries_do_not_pile_up(monkeypatch, launches):
    monkeypatch.setattr(calling, "_REMEMBERED", 4)
    spec = make()
    for length in range(1, 20):
        spec(mx.ones(length), mx.ones(length))
    assert len(calling.bound(spec, {})._geometries) <= 4


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("changes", [{}, {"gradient": None}])
def test_every_argument_has_its_gradient(changes):
    spec = make(**changes)
    dx, dy = mx.grad(lambda x, y: spec(x, y, factor=3.0).sum(), argnums=(0, 1))(X, Y)
    same(dx, 3 * Y)
    same(dy, 3 * X)


@pytest.mark.usefixtures("launches")
def test_gradients_that_are_none_or_misshapen_are_refused():
    for wrong in ([X, None], [X], [X, Y[0]], None, [X, Y, Y]):
        spec = make(gradient=lambda *a, wrong=wrong, **k: wrong)
        with pytest.raises(ValueError, match="gradient of kernel scaled has shapes"):
            mx.grad(lambda x, spec=spec: spec(x, Y).sum())(X)
        calling.forget()


@pytest.mark.usefixtures("launches")
def test_a_kernel_without_a_gradient_says_so():
    spec = make(gradient=None, no_gradient="it counts")
    same(spec(X, Y), X * Y * 2)
    with pytest.raises(ValueError, match="kernel scaled has no gradient: it counts"):
        mx.grad(lambda x: spec(x, Y).sum())(X)


@pytest.mark.usefixtures("launches")
def test_integer_arguments_have_no_gradient_to_give():
    spec = make(gradient=None)
    y = mx.arange(6).reshape(2, 3)
    same(mx.grad(lambda x: spec(x, y).sum())(X), 2.0 * y)


def test_forward_gradients_come_from_the_reference(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    _, (moved,) = mx.jvp(make(), [X, Y], [mx.ones_like(X), mx.ones_like(Y)])
    same(moved, 2 * Y + 2 * X)


@pytest.mark.parametrize("axes", [(0, 0), (1, 1), (0, 1), (0, None), (None, 1)])
def test_a_batch_is_one_launch(axes, launches):
    spec = make()
    x = mx.random.normal((4, 4) if axes[0] is not None else (4,))
    y = mx.random.normal((4, 4) if axes[1] is not None else (4,))
    found = mx.vmap(spec, in_axes=axes)(x, y)
    mx.eval(found)
    same(found, mx.vmap(scaled, in_axes=axes)(x, y))
    assert [given["output_shapes"] for given in launches][-1] == ((4, 4),)


@pytest.mark.usefixtures("launches")
def test_a_batch_that_the_kernel_has_no_place_for_maps_the_reference():
    spec = make(batched=(True, False))
    same(mx.vmap(spec, in_axes=(None, 0))(X, mx.stack([Y, X])), mx.stack([X * Y, X * X]) * 2)
    spec = make(batched=(), name="other")
    same(mx.vmap(spec)(X, Y), X * Y * 2)
    calling.forget()
    grads = mx.vmap(mx.grad(lambda x, y: spec(x, y).sum()))(X, Y)
    same(grads, 2 * Y)


@pytest.mark.usefixtures("launches")
def test_in_threads():
    spec = make()
    found = {}

    def work(number):
        with mx.stream(mx.default_device()):
            found[number] = spec(X * number, Y, factor=float(number)).tolist()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: (X * n * Y * n).tolist() for n in range(8)}


def test_nothing_to_compute_launches_nothing(launches):
    for shape in ((0, 3), (3, 0), (0,)):
        out = make()(mx.ones(shape, mx.float16), mx.ones(shape, mx.float16))
        assert (out.shape, out.dtype) == (shape, mx.float16)
    assert launches == []


@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_errors_name_the_kernel_on_every_backend(backend, launches, monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", backend)
    with pytest.raises(ValueError, match=r"scaled: rows of \(2, 3\) and \(2,\) differ"):
        make()(X, Y[0, :2])
    with pytest.raises(TypeError, match="scaled: got a int where"):
        make()(X, 1)
    with pytest.raises(TypeError, match=r"scaled: .*'spin'"):
        make()(X, Y, spin=1)
    with pytest.raises(ValueError, match=r"kernel 'scaled': threadgroup=\(2048, 1, 1\) has 2048"):
        make()(X, Y, threadgroup=2048)
    assert launches == []


# The catalog's public functions, where they run here


ROWS = mx.random.normal((2, 3, 5), key=mx.random.key(1))


@pytest.mark.parametrize("function", [softmax_lastdim, log_softmax_lastdim])
def test_rows_are_checked(function):
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name}: x is mlx.core.int32; it takes float32"):
        function(mx.arange(3))
    with pytest.raises(ValueError, match=f"{name}: x has no axes"):
        function(mx.array(1.0))
    for wrong in (0, -32, 100, 2048):
        with pytest.raises(ValueError, match=f"{name}: threadgroup={wrong}; give a multiple of 32"):
            function(ROWS, threadgroup=wrong)
    for wrong in ("256", 32.0, True):
        with pytest.raises(TypeError, match=f"{name}: threadgroup={wrong!r}; give an int"):
            function(ROWS, threadgroup=wrong)


def test_shapes_of_weights_and_pairs_are_checked():
    with pytest.raises(ValueError, match=r"rmsnorm: weight has shape \(4,\); rows of 5 need \(5,"):
        rmsnorm(ROWS, mx.ones(4))
    with pytest.raises(ValueError, match=r"layernorm: beta has shape \(1, 5\); rows of 5"):
        layernorm(ROWS, mx.ones(5), mx.ones((1, 5)))
    with pytest.raises(ValueError, match=r"rmsnorm_grad: shapes differ: x \(2, 3, 5\), cotan"):
        rmsnorm_grad(ROWS, mx.ones(5), ROWS[0])
    with pytest.raises(ValueError, match="softmax_grad: shapes differ"):
        softmax_grad(ROWS, ROWS[0])
    for function in (swiglu2, geglu2):
        with pytest.raises(ValueError, match=r"shapes differ: gate \(2, 3, 5\), up \(3, 5\)"):
            function(ROWS, ROWS[0])
        with pytest.raises(TypeError, match="up is mlx"):
            function(ROWS, ROWS.astype(mx.int32))


def test_results_of_public_functions():
    weight, bias = mx.arange(5.0), mx.ones(5)
    pairs = [
        (softmax_lastdim(ROWS), mx.softmax(ROWS, axis=-1, precise=True)),
        (log_softmax_lastdim(ROWS), ROWS - mx.logsumexp(ROWS, axis=-1, keepdims=True)),
        (rmsnorm(ROWS, weight, eps=0.5), mx.fast.rms_norm(ROWS, weight, 0.5)),
        (layernorm(ROWS, weight, bias, eps=0.5), mx.fast.layer_norm(ROWS, weight, bias, 0.5)),
        (swiglu2(ROWS, ROWS), ROWS * mx.sigmoid(ROWS) * ROWS),
        (geglu2(ROWS, ROWS), mx.array(0)),
    ]
    for found, truth in pairs[:-1]:
        assert mx.allclose(found, truth, rtol=1e-5, atol=1e-6).item()
    gelu = ROWS / 2 * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (ROWS + 0.044715 * ROWS**3)))
    assert mx.allclose(pairs[-1][0], gelu * ROWS, rtol=1e-5, atol=1e-6).item()
    dx, dweight = rmsnorm_grad(ROWS, weight, mx.ones_like(ROWS), eps=0.5)
    grads = mx.grad(lambda x, w: mx.fast.rms_norm(x, w, 0.5).sum(), argnums=(0, 1))(ROWS, weight)
    assert mx.allclose(dx, grads[0], rtol=1e-4, atol=1e-5).item()
    assert mx.allclose(dweight, grads[1], rtol=1e-4, atol=1e-5).item()


def test_dtypes_promote_as_in_mlx():
    half, brain = ROWS.astype(mx.float16), ROWS.astype(mx.bfloat16)
    assert rmsnorm(brain, mx.ones(5)).dtype == mx.float32
    assert rmsnorm(brain, mx.ones(5, mx.bfloat16)).dtype == mx.bfloat16
    assert swiglu2(half, brain).dtype == mx.float32
    dx, dweight = rmsnorm_grad(half, mx.ones(5, mx.bfloat16), half)
    assert (dx.dtype, dweight.dtype) == (mx.float16, mx.bfloat16)


@pytest.mark.parametrize("function", [softmax_lastdim, swiglu2])
def test_compute_dtype_warns(function):
    arrays = [ROWS] * (2 if function is swiglu2 else 1)
    with pytest.warns(DeprecationWarning, match=f"{function.__name__}: compute_dtype is ignored"):
        same(function(*arrays, compute_dtype=mx.float16), function(*arrays))


def test_a_native_kernel_serves_where_it_is_built(monkeypatch):
    spec = all_specs()["rms_norm"]
    called = []
    monkeypatch.setattr(KernelSpec, "_native", lambda self: lambda *a: called.append(a) or a[0])
    monkeypatch.delenv("ZMLX_BACKEND", raising=False)
    weight = mx.ones(5)
    with mx.stream(mx.cpu):
        for serves, count in ((True, 1), (False, 1)):
            monkeypatch.setattr(kernels, "native_serves", lambda spec, serves=serves: serves)
            assert spec(ROWS, weight, 1e-5).shape == ROWS.shape
            assert len(called) == count
    assert RMSNORM.native is None
