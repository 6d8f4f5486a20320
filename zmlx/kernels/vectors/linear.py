"""Products of few vectors with the weights of linear layers, in one launch.

    products         y_i = [residual +] x @ w_i.T [+ bias_i]
    gated_product    y = act(x @ gate.T [+ bias]) * (x @ up.T [+ bias])
    of experts       the same with the weights of the experts that are chosen for each vector

x may be normalised first: x / sqrt(mean(x^2) + eps) * norm, rounded where stock's RMSNorm rounds
(after the division and after the product). Sums run in float32 over exact weights; bias and
activation are applied before the only rounding; a residual is added to the rounded product, as
stock does it, and rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.definition import Definition, Launch
from zmlx.backend.launch import launcher
from zmlx.kernels.rows import check_floats
from zmlx.kernels.vectors import plain
from zmlx.kernels.vectors.formats import format_of
from zmlx.kernels.vectors.sources import Product, product_definition
from zmlx.kernels.vectors.text import ACTIVATIONS
from zmlx.kernels.vectors.tiling import GROUPS, Tiling, tiling
from zmlx.kernels.vectors.weights import Weight, check_weight, result_dtype

#: From a kernel's definition to something to launch.
Compile = Callable[[Definition], Launch]
#: Most weights of one call.
MOST_WEIGHTS = 4
#: Metal passes arrays with fewer elements by another kind of pointer than the kernels take.
LEAST_ELEMENTS = 8


def compiler() -> Compile | None:
    """Return what compiles kernels where they run now; None where the reference runs."""
    backend = for_kernels(has_reference=True)
    return None if backend == "reference" else partial(launcher, backend=backend)


def products(
    x: mx.array,
    weights: Sequence[Weight],
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    residual: mx.array | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    compile: Compile | None = None,
) -> list[mx.array]:
    """Multiply vectors with one to four weights: [residual +] rms_norm(x) @ w.T [+ bias].

    Weights of one packing, with the same dtypes, share a launch; others take one for each packing.

    Args:
        x: (..., K) float32, float16 or bfloat16; meant for 1 to 32 vectors.
        weights: (N_i, K) each.
        norm: (K,) weight of an RMSNorm that x goes through first, or None.
        eps: of that norm, added to the mean square.
        residual: (..., N), added to the only product, or None.
        shapes: of the results, if they are wanted in others of as many elements.
        compile: compiles kernels; by default for where kernels run now.

    Returns:
        (..., N_i) for each weight, in the dtype of stock's products; with a residual in the dtype
        to which that promotes with it.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: no weights or more than four, several with a residual, or shapes that do not
            fit.
    """
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        raise ValueError(f"{len(weights)} weights; it takes 1 to {MOST_WEIGHTS}")
    _check(x, weights, norm, experts=False)
    if residual is not None:
        check_residual(residual, x, weights)
    compile = compile or compiler()
    if compile is None:
        made = [plain.product(plain.wide, x, w, None, norm, eps, residual) for w in weights]
        return _shaped(made, shapes)
    served: dict[tuple[object, ...], list[int]] = {}
    for number, weight in enumerate(weights):
        served.setdefault(_kind(weight), []).append(number)
    x, norm = _norm_apart(x, norm, eps, weights)
    results: dict[int, mx.array] = {}
    for numbers in served.values():
        some = tuple(weights[i] for i in numbers)
        if _small(x, norm, *some):
            made = [plain.product(plain.stock, x, w, None, norm, eps, residual) for w in some]
        else:
            wanted = None if shapes is None else [shapes[i] for i in numbers]
            made = _launched(compile, x, some, norm=norm, eps=eps, residual=residual, shapes=wanted)
        results.update(zip(numbers, made, strict=True))
    return _shaped([results[i] for i in range(len(weights))], shapes)


def _shaped(made: list[mx.array], shapes: Sequence[Sequence[int]] | None) -> list[mx.array]:
    if shapes is None:
        return made
    pairs = zip(made, map(tuple, shapes), strict=True)
    return [array if array.shape == shape else array.reshape(shape) for array, shape in pairs]


def gated_product(
    x: mx.array,
    gate: Weight | None,
    up: Weight,
    activation: str,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    compile: Compile | None = None,
) -> mx.array:
    """Return act(rms_norm(x) @ gate.T) * (rms_norm(x) @ up.T), both with their biases.

    Args:
        x: (..., K) float32, float16 or bfloat16; meant for 1 to 32 vectors.
        gate: (N, K); None for act(x @ up.T).
        up: (N, K). Where its packing is another than that of `gate`, their products are computed
            first and activated by MLX's operations.
        activation: "silu", "gelu", "gelu_tanh", "relu2" (squared ReLU) or "clipped_swiglu", which
            is gate * sigmoid(1.702 gate) * (up + 1) with gate of at most 7 and up within -7 and 7.
        norm: as of `products`.
        eps: as of `products`.
        compile: as of `products`.

    Returns:
        (..., N) in the dtype of stock's product with both.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: an activation that is not known or needs a gate, or shapes that do not fit.
    """
    weights = check_gated(x, gate, up, activation, norm, experts=False)
    compile = compile or compiler()
    if compile is None:
        return plain.gated(plain.wide, x, gate, up, activation, None, norm, eps)
    x, norm = _norm_apart(x, norm, eps, weights)
    if _small(x, norm, *weights):
        return plain.gated(plain.stock, x, gate, up, activation, None, norm, eps)
    if len({_kind(w, gated=True) for w in weights}) > 1:
        sides = products(x, weights, norm=norm, eps=eps, compile=compile)
        sides = [side.astype(mx.float32) for side in sides]
        return plain.activated(activation, *sides).astype(result_dtype(x, *weights))
    return _launched(compile, x, weights, activation=activation, norm=norm, eps=eps)[0]


def _check(x: mx.array, weights: Sequence[Weight], norm: mx.array | None, *, experts: bool) -> None:
    check_floats(x=x)
    if x.ndim == 0:
        raise ValueError("x has no axes; it takes vectors, shape (..., K)")
    for number, weight in enumerate(weights):
        check_weight(f"weight {number}", weight, x.shape[-1], experts=experts)
    if norm is not None:
        check_floats(norm=norm)
        if norm.shape != (x.shape[-1],):
            raise ValueError(f"norm has shape {norm.shape}; it takes ({x.shape[-1]},)")


def check_residual(residual: mx.array, x: mx.array, weights: Sequence[Weight]) -> None:
    """Refuse a residual that is not of the shape of the only product."""
    if len(weights) > 1:
        raise ValueError(f"a residual goes with one weight, not with {len(weights)}")
    check_floats(residual=residual)
    shape = (*x.shape[:-1], weights[0].rows)
    if residual.shape != shape:
        raise ValueError(f"residual has shape {residual.shape}; the product has {shape}")


def check_gated(
    x: mx.array,
    gate: Weight | None,
    up: Weight,
    activation: str,
    norm: mx.array | None,
    *,
    experts: bool,
) -> tuple[Weight, ...]:
    """Return gate, if it is there, and up; refuse what does not fit."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected {', '.join(ACTIVATIONS)}")
    weights = (up,) if gate is None else (gate, up)
    if gate is None and activation == "clipped_swiglu":
        raise ValueError("activation clipped_swiglu takes a gate")
    _check(x, weights, norm, experts=experts)
    if gate is not None and gate.w.shape[:-1] != up.w.shape[:-1]:
        raise ValueError(
            f"gate has rows {gate.w.shape[:-1]}, up {up.w.shape[:-1]}; they must be the same"
        )
    return weights


def _kind(weight: Weight, *, gated: bool = False) -> tuple[object, ...]:
    """What weights of one launch have in common."""
    dtypes = tuple((name, a.dtype) for name, a in weight.arrays().items() if name != "bias")
    # A dtype cannot be compared with None.
    bias = () if gated or weight.bias is None else (weight.bias.dtype,)
    return (*weight.packing, dtypes, bias)


def _small(x: mx.array, norm: mx.array | None, *weights: Weight) -> bool:
    """Whether there is nothing to gain, and a pointer that a kernel does not take."""
    arrays = [x, *([] if norm is None else [norm])]
    arrays += [array for weight in weights for array in weight.arrays().values()]
    return min(array.size for array in arrays) < LEAST_ELEMENTS


def count(x: mx.array) -> int:
    """Return the vectors of x."""
    return x.size // x.shape[-1] if x.size else 0


def _norm_apart(
    x: mx.array, norm: mx.array | None, eps: float, weights: Sequence[Weight]
) -> tuple[mx.array, mx.array | None]:
    """Normalise first where a kernel cannot: in another dtype, or vectors that are too long."""
    if norm is None or not x.size:
        return x, norm
    one = all(_tiling(x.dtype, count(x), (w,), 1).staged for w in weights)
    if norm.dtype == x.dtype and one:
        return x, norm
    return mx.fast.rms_norm(x, norm, eps), None


def _tiling(
    dtype: mx.Dtype, tokens: int, weights: Sequence[Weight], matrices: int, chosen: int = 0
) -> Tiling:
    rows = sum(w.rows for w in weights) // matrices
    return tiling(
        format_of(weights[0]),
        rows=rows,
        launches=tokens * chosen or -(-tokens // 4),
        matrices=matrices,
        tokens=1 if chosen else tokens,
        itemsize=dtype.size,
    )


def _launched(
    compile: Compile,
    x: mx.array,
    weights: tuple[Weight, ...],
    *,
    norm: mx.array | None,
    eps: float,
    activation: str = "",
    residual: mx.array | None = None,
    indices: mx.array | None = None,
    own: bool = False,
    shapes: Sequence[Sequence[int]] | None = None,
) -> list[mx.array]:
    """Launch the kernel; with `own` each chosen expert has a vector (..., k, K)."""
    tokens = count(x)
    chosen = 0 if indices is None else indices.shape[-1]
    tokens = tokens // chosen if own else tokens
    matrices = len(weights) if activation else 1
    product = Product(
        weights=weights,
        dtype=x.dtype,
        tokens=tokens,
        tiling=_tiling(x.dtype, tokens, weights, matrices, chosen),
        activation=activation,
        chosen=chosen,
        own=own,
        eps=None if norm is None else eps,
        residual=residual is not None,
    )
    leading = x.shape[:-1] if indices is None else indices.shape
    dtype = result_dtype(x, *weights)
    output = dtype if residual is None else mx.result_type(residual, mx.zeros((), dtype))
    shapes = shapes or [(*leading, rows) for rows in product.outputs]
    if 0 in shapes[0]:
        return [mx.zeros(shape, output) for shape in shapes]
    optional = (norm, *(a for w in weights for a in w.arrays().values()), residual, indices)
    blocks = sum(product.blocks(rows) for rows in product.outputs)
    return compile(product_definition(product))(
        inputs=[x, *(array for array in optional if array is not None)],
        output_shapes=shapes,
        output_dtypes=[output] * len(shapes),
        grid=(blocks * 32 * GROUPS, product.launches, 1),
        threadgroup=(32 * GROUPS, 1, 1),
        template=template(weights[0], P=dtype, O=output),
    )


def template(weight: Weight, **dtypes: mx.Dtype) -> list[tuple[str, mx.Dtype]]:
    """Return the types of a kernel's template."""
    kinds = {"W": weight.w, "S": weight.scales, "B": weight.bias}
    found = [(name, array.dtype) for name, array in kinds.items() if array is not None]
    return [*found, *dtypes.items()]
