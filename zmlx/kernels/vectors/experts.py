"""Products of vectors with the weights of the experts that are chosen for them.

    expert_products         y[t, j] = x[t, j] @ w[i].T [+ bias[i]],    i = indices[t, j]
    expert_gated_product    y[t, j] = act(x[t] @ gate[i].T) * (x[t] @ up[i].T)
    expert_combination      y[t] = sum_j scores[t, j] * (h[t, j] @ down[i].T [+ bias[i]])
                                   [+ shared[t]] [+ residual[t]]

Only the weights of chosen experts are read, each once for every vector. Every index must be that of
an expert, 0 to E - 1: kernels do not look at them beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.kernels.rows import check_floats
from zmlx.kernels.vectors import plain
from zmlx.kernels.vectors.formats import format_of
from zmlx.kernels.vectors.linear import (
    Compile,
    _check,
    _kind,
    _launched,
    _norm_apart,
    _small,
    check_gated,
    compiler,
    count,
    template,
)
from zmlx.kernels.vectors.sums import Combination, combination_definition
from zmlx.kernels.vectors.tiling import combining
from zmlx.kernels.vectors.weights import Weight, check_weight, result_dtype


def expert_products(
    x: mx.array,
    indices: mx.array,
    weight: Weight,
    *,
    shape: Sequence[int] | None = None,
    compile: Compile | None = None,
) -> mx.array:
    """Multiply each vector with the weight of its expert.

    Args:
        x: (..., k, K) float32, float16 or bfloat16, or (..., K) for the same vector with each of
            its k experts.
        indices: (..., k) integers from 0 to E - 1.
        weight: (E, N, K), its bias (E, N).
        shape: of the result, if it is wanted in another of as many elements.
        compile: as of `products`.

    Returns:
        (..., k, N) in the dtype of stock's product.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: shapes that do not fit.
    """
    _check(x, (weight,), None, experts=True)
    own = x.ndim > indices.ndim
    _check_indices(indices, x.shape[:-1] if own else _chosen(x, indices), "x (..., [k,] K)")
    compile = compile or compiler()
    if compile is None or _small(x, None, weight):
        multiply = plain.wide if compile is None else plain.stock
        y = plain.product(multiply, x if own else x[..., None, :], weight, indices)
        return y if shape is None else y.reshape(tuple(shape))
    shapes = None if shape is None else [shape]
    return _launched(
        compile, x, (weight,), norm=None, eps=0, indices=indices, own=own, shapes=shapes
    )[0]


def expert_gated_product(
    x: mx.array,
    indices: mx.array,
    gate: Weight | None,
    up: Weight,
    activation: str,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    compile: Compile | None = None,
) -> mx.array:
    """Return act(rms_norm(x) @ gate[i].T) * (rms_norm(x) @ up[i].T) for each chosen expert i.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        indices: (..., k) integers from 0 to E - 1.
        gate: (E, N, K), its bias (E, N); None for act(x @ up[i].T).
        up: like `gate`, of the same packing; if that differs, two launches and MLX's operations.
        activation: as of `gated_product`.
        norm: as of `products`.
        eps: as of `products`.
        compile: as of `products`.

    Returns:
        (..., k, N) in the dtype of stock's product with both.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: an activation that is not known or needs a gate, or shapes that do not fit.
    """
    weights = check_gated(x, gate, up, activation, norm, experts=True)
    _check_indices(indices, _chosen(x, indices), "x (..., K)")
    compile = compile or compiler()
    if compile is None:
        return plain.gated(plain.wide, x[..., None, :], gate, up, activation, indices, norm, eps)
    x, norm = _norm_apart(x, norm, eps, weights)
    if _small(x, norm, *weights):
        return plain.gated(plain.stock, x[..., None, :], gate, up, activation, indices, norm, eps)
    if len({_kind(w, gated=True) for w in weights}) > 1:
        sides = [
            _launched(compile, x, (w,), norm=norm, eps=eps, indices=indices)[0].astype(mx.float32)
            for w in weights
        ]
        return plain.activated(activation, *sides).astype(result_dtype(x, *weights))
    return _launched(
        compile, x, weights, activation=activation, norm=norm, eps=eps, indices=indices
    )[0]


def expert_combination(
    h: mx.array,
    indices: mx.array,
    scores: mx.array,
    down: Weight,
    *,
    residual: mx.array | None = None,
    shared: mx.array | None = None,
    dtype: mx.Dtype | None = None,
    compile: Compile | None = None,
) -> mx.array:
    """Return the weighted sum of the chosen experts' products, in one launch.

    Products are not rounded before they are weighted and summed, in float32: stock rounds each to
    the dtype of h, each times its score to the dtype to which both promote, and their sum. Here the
    sum is rounded once to that dtype, then to `dtype` if it is given; what is added after that is
    rounded as stock rounds it, after the shared expert's output and after the residual.

    Args:
        h: (..., k, K) float32, float16 or bfloat16.
        indices: (..., k) integers from 0 to E - 1.
        scores: (..., k) float32, float16 or bfloat16.
        down: (E, N, K), its bias (E, N).
        residual: (..., N), added last, or None.
        shared: (..., N), added to the sum, or None.
        dtype: what the sum is cast to; that of h, weight and scores together if it is None.
        compile: as of `products`.

    Returns:
        (..., N) in the dtype of the sum, promoted with `shared` and `residual`.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: shapes that do not fit.
    """
    check_floats(h=h, scores=scores)
    check_weight("down", down, h.shape[-1] if h.ndim else 0, experts=True)
    _check_indices(indices, h.shape[:-1], "h (..., k, K)")
    added = {"shared": shared, "residual": residual}
    _check_added(scores, indices, (*indices.shape[:-1], down.rows), added)
    compile = compile or compiler()
    if compile is None or _small(h, None, down):
        multiply = plain.wide if compile is None else plain.stock
        return plain.combination(multiply, h, indices, scores, down, shared, residual, dtype)
    return _combined(compile, h, indices, scores, down, added, dtype)


def _combined(
    compile: Compile,
    h: mx.array,
    indices: mx.array,
    scores: mx.array,
    down: Weight,
    added: dict[str, mx.array | None],
    dtype: mx.Dtype | None,
) -> mx.array:
    shape = (*indices.shape[:-1], down.rows)
    chosen = indices.shape[-1]
    types = {"M": mx.result_type(h, scores, *down.deciding)}
    types["C"] = types["D"] = types["O"] = dtype or types["M"]
    for name, kinds in (("shared", "DO"), ("residual", "O")):
        array = added[name]
        if array is not None:
            promoted = mx.result_type(mx.zeros((), types[kinds[0]]), array)
            types.update(dict.fromkeys(kinds, promoted))
    if 0 in shape or not chosen:
        return mx.zeros(shape, types["O"])
    tokens = count(h) // chosen
    layout = combining(format_of(down), rows=down.rows, terms=chosen, launches=tokens)
    present = {name: array is not None for name, array in added.items()}
    sum_of = Combination(down, h.dtype, tokens, chosen, layout, **present)
    optional = (*down.arrays().values(), *added.values())
    blocks = -(-down.rows // layout.rows)
    return compile(combination_definition(sum_of))(
        inputs=[h, indices, scores, *(array for array in optional if array is not None)],
        output_shapes=[shape],
        output_dtypes=[types["O"]],
        grid=(blocks * 32 * layout.groups, tokens, 1),
        threadgroup=(32 * layout.groups, 1, 1),
        template=template(down, **types),
    )[0]


def _chosen(x: mx.array, indices: mx.array) -> tuple[int, ...]:
    """Return the shape of indices for vectors (..., K): as many as there are for each."""
    return (*x.shape[:-1], indices.shape[-1] if indices.ndim else 0)


def _check_indices(indices: mx.array, shape: tuple[int, ...], what: str) -> None:
    if not mx.issubdtype(indices.dtype, mx.integer):
        raise TypeError(f"indices are {indices.dtype}; they take integers")
    if indices.shape != shape:
        raise ValueError(f"indices have shape {indices.shape}; {what} takes {shape}")


def _check_added(
    scores: mx.array,
    indices: mx.array,
    shape: tuple[int, ...],
    added: dict[str, mx.array | None],
) -> None:
    if scores.shape != indices.shape:
        raise ValueError(f"scores have shape {scores.shape}, indices {indices.shape}")
    for name, array in added.items():
        if array is not None:
            check_floats(**{name: array})
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}; the sum has {shape}")
