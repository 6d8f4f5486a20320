"""From a weighted sum over experts to its `Definition`."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.kernels.vectors import tensor_cores, text
from zmlx.kernels.vectors.formats import Format, format_of
from zmlx.kernels.vectors.sources import (
    PLACE,
    definition_of,
    row_length,
    scale_type,
    scales_of_row,
    word_type,
)
from zmlx.kernels.vectors.tiling import Combining
from zmlx.kernels.vectors.weights import Weight


@dataclass(frozen=True)
class Combination:
    """The weighted sum of the chosen experts' products, in one launch.

    Attributes:
        weight: the experts.
        dtype: of the activations.
        tokens: how many there are.
        chosen: experts of each.
        tiling: how it is dealt out.
        shared: whether something is added to the sum.
        residual: whether something is added to that.
    """

    weight: Weight
    dtype: mx.Dtype
    tokens: int
    chosen: int
    tiling: Combining
    shared: bool = False
    residual: bool = False


def combination_definition(sum_of: Combination) -> Definition:
    """Return the kernel of a weighted sum over experts.

    Its inputs are h, indices, scores, what is there of w, scales, biases and bias, shared and
    residual; of its template W and S are dtypes of w and scales, C that of the sum, D that of the
    sum with the shared expert's output and O that of the output.
    """
    weight = sum_of.weight
    form = format_of(weight)
    names = ["h", "indices", "scores", *(f"{name}0" for name in weight.arrays())]
    names += [name for name in ("shared", "residual") if getattr(sum_of, name)]
    header = [
        form.text,
        text.reading(sum_of.dtype, weight.columns),
        text.activations(sum_of.dtype, staged=False),
        text.held(scaled=form.scaled, biased=form.biased),
        text.USE,
    ]
    source = PLACE + _terms(sum_of, form) + _summed(sum_of)
    cuda = tensor_cores.body(
        tensor_cores.Launch(
            weights=(weight,),
            dtype=sum_of.dtype,
            vectors=sum_of.tokens,
            terms=sum_of.chosen,
            shared=sum_of.shared,
            residual=sum_of.residual,
        )
    )
    return definition_of("combination", names, ["y"], source, "".join(header), cuda)


def _terms(sum_of: Combination, form: Format) -> str:
    tiling, weight, kind = sum_of.tiling, sum_of.weight, word_type(sum_of.weight)
    units = sum_of.chosen * form.steps
    chunks = -(-units // (tiling.groups * tiling.depth))
    scale, length = scale_type(form), weight.rows * row_length(weight)
    scales = (
        f"scales0 + expert * {weight.rows * scales_of_row(weight)}"
        if form.scaled
        else "(const device uchar*)w0"
    )
    biases = (
        f"biases0 + expert * {weight.rows * scales_of_row(weight)}" if form.biased else "scales"
    )
    unit = (
        f"    uint unit = group + {tiling.groups} * (chunk * {tiling.depth} + d);\n"
        f"    if (unit < {units}) {{\n"
        f"      uint term = launch * {sum_of.chosen} + unit / Q::STEPS;\n"
        "      uint step = unit % Q::STEPS;\n"
    )
    return f"""\
threadgroup float partial[{tiling.groups * tiling.rows}];
uint row = block * {tiling.rows};
float sums[{tiling.rows}];
for (int i = 0; i < {tiling.rows}; ++i) sums[i] = 0.0f;
for (uint chunk = 0; chunk < {chunks}; ++chunk) {{
  Held<{scale}, {tiling.rows}> held[{tiling.depth}];
#pragma unroll
  for (int d = 0; d < {tiling.depth}; ++d) {{
{unit}      size_t expert = indices[term];
      const device {kind}* w = (const device {kind}*)w0 + expert * {length};
      const device {scale}* scales = {scales};
      const device {scale}* biases = {biases};
      load<{tiling.rows}>(held[d], 0, w, scales, biases, row, {weight.rows},
          (step * 32 + lane) * Q::RUN);
    }}
  }}
#pragma unroll
  for (int d = 0; d < {tiling.depth}; ++d) {{
{unit}      use<{tiling.rows}, 1>(held[d], h, term, term, step, lane,
          float(scores[term]), sums);
    }}
  }}
}}
"""


def _summed(sum_of: Combination) -> str:
    tiling, rows = sum_of.tiling, sum_of.weight.rows
    lines = []
    if sum_of.weight.bias is not None:
        terms = f"uint j = launch * {sum_of.chosen}; j < (launch + 1) * {sum_of.chosen}; ++j"
        bias = f"bias0[size_t(indices[j]) * {rows} + n]"
        lines.append(f"for ({terms}) a += float(scores[j]) * float({bias});")
    lines.append("a = float(C(float(M(a))));")
    if sum_of.shared:
        lines.append("a = float(D(a + float(shared[to])));")
    if sum_of.residual:
        lines.append("a += float(residual[to]);")
    results = "".join(f"    {line}\n" for line in [*lines, "y[to] = O(a);"])
    return f"""\
simdgroup_barrier(mem_flags::mem_none);
#pragma unroll
for (int i = 0; i < {tiling.rows}; ++i) sums[i] = simd_sum(sums[i]);
if (lane < {tiling.rows}) partial[group * {tiling.rows} + lane] = chosen<{tiling.rows}>(sums, lane);
threadgroup_barrier(mem_flags::mem_threadgroup);
if (group == 0 && lane < {tiling.rows}) {{
  uint n = row + lane;
  if (n < {rows}) {{
    size_t to = size_t(launch) * {rows} + n;
    float a = 0.0f;
    for (uint g = 0; g < {tiling.groups}; ++g) a += partial[g * {tiling.rows} + lane];
{results}  }}
}}
"""
