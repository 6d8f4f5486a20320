"""From products of one launch to their `Definition`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from zmlx.backend.definition import CudaBody, Definition
from zmlx.kernels.vectors import tensor_cores, text
from zmlx.kernels.vectors.formats import Format, format_of
from zmlx.kernels.vectors.tiling import GROUPS, MOST, Tiling
from zmlx.kernels.vectors.weights import Weight

PLACE = """\
uint lane = thread_index_in_simdgroup;
uint group = simdgroup_index_in_threadgroup;
uint block = threadgroup_position_in_grid.x;
uint launch = threadgroup_position_in_grid.y;
"""


@dataclass(frozen=True)
class Product:
    """Products of one launch, which share the activations.

    Attributes:
        weights: matrices of one packing and K; for a gated product gate and up, or up alone.
        dtype: of the activations.
        tokens: vectors of activations.
        tiling: how it is dealt out.
        activation: of a gated product, empty for plain ones.
        chosen: experts of each token, 0 for plain weights.
        own: whether each chosen expert has activations of its own.
        eps: of the norm of the activations, None for none.
        residual: whether something is added to the product.
    """

    weights: tuple[Weight, ...]
    dtype: mx.Dtype
    tokens: int
    tiling: Tiling
    activation: str = ""
    chosen: int = 0
    own: bool = False
    eps: float | None = None
    residual: bool = False

    @property
    def format(self) -> Format:
        """How the weights are read."""
        return format_of(self.weights[0])

    @property
    def matrices(self) -> int:
        """Matrices that a simdgroup reads."""
        return len(self.weights) if self.activation else 1

    @property
    def outputs(self) -> tuple[int, ...]:
        """Rows of each output."""
        return tuple(w.rows for w in (self.weights[:1] if self.activation else self.weights))

    @property
    def sets(self) -> int:
        """Sets of rows of a threadgroup."""
        return GROUPS // self.tiling.split

    @property
    def launches(self) -> int:
        """How often the matrices are read: for each chosen expert, or block of tokens."""
        return self.tokens * self.chosen or -(-self.tokens // self.tiling.tokens)

    def blocks(self, rows: int) -> int:
        """Return the threadgroups that share the rows of an output."""
        blocks = -(-rows // (self.sets * self.tiling.rows))
        if len(self.outputs) > 1:
            return blocks
        return min(blocks, max(1, MOST // GROUPS // self.launches))


def product_definition(product: Product) -> Definition:
    """Return the kernel of some products.

    Its inputs are x, the norm's weight, for each weight what is there of w, scales, biases and
    bias, the residual and the experts' indices; of its template W, S and X are dtypes of w, scales
    and x, P that of a product and O that of the outputs.
    """
    names = ["x", *(["norm"] if product.eps is not None else [])]
    for number, weight in enumerate(product.weights):
        names += [f"{name}{number}" for name in weight.arrays()]
    names += ["residual"] if product.residual else []
    names += ["indices"] if product.chosen else []
    form, tiling = product.format, product.tiling
    header = [
        form.text,
        text.reading(product.dtype, product.weights[0].columns),
        text.activations(product.dtype, staged=tiling.staged),
        text.held(scaled=form.scaled, biased=form.biased),
        text.USE,
        text.staging(product.dtype, product.eps) if tiling.staged else "",
        text.ERF if product.activation == "gelu" else "",
    ]
    outputs = [f"y{number}" for number in range(len(product.outputs))]
    cuda = tensor_cores.body(
        tensor_cores.Launch(
            weights=product.weights,
            dtype=product.dtype,
            vectors=product.tokens,
            matrices=product.matrices,
            activation=product.activation,
            chosen=product.chosen,
            own=product.own,
            eps=product.eps,
            residual=product.residual,
        )
    )
    source = _product_source(product)
    return definition_of("product", names, outputs, source, "".join(header), cuda)


def definition_of(
    what: str,
    names: Sequence[str],
    outputs: Sequence[str],
    source: str,
    header: str,
    cuda: CudaBody | None,
) -> Definition:
    digest = hashlib.sha256((header + source).encode()).hexdigest()[:12]
    return Definition(f"{what}_{digest}", tuple(names), tuple(outputs), source, header, cuda=cuda)


def _product_source(product: Product) -> str:
    tiling = product.tiling
    count = product.matrices * tiling.rows * tiling.tokens
    return "".join(
        (
            PLACE,
            _memory(product),
            _matrices(product),
            _tokens(product),
            f"Held<{scale_type(product.format)}, {product.matrices * tiling.rows}> "
            f"held[{tiling.depth}];\n"
            f"uint set = group / {tiling.split}, part = group % {tiling.split};\n"
            f"uint row = (block * {product.sets} + set) * {tiling.rows};\n"
            f"float sums[{count}];\n"
            f"for (int i = 0; i < {count}; ++i) sums[i] = 0.0f;\n",
            _fetch(product, "0"),
            _stage(product),
            _turns(product, count),
        )
    )


def scale_type(form: Format) -> str:
    return "S" if form.scaled else "uchar"


def _memory(product: Product) -> str:
    tiling, form = product.tiling, product.format
    lines = []
    if tiling.staged:
        size = form.steps * 4 * form.run * tiling.tokens * text.PARTS[product.dtype]
        lines.append(f"threadgroup uint4 staged[{size}];\n")
    lines.append(f"threadgroup float partial[{GROUPS * 32}];\n")
    return "".join(lines)


def _matrices(product: Product) -> str:
    """Choose the matrix of this threadgroup; of a gated product both are there side by side."""
    if product.activation:
        lines = [_pointers(product, n, str(n)) for n in range(product.matrices)]
        return "".join(lines) + f"const uint rows = {product.weights[0].rows};\n"
    lines = [_pointers(product, 0, "0"), f"uint rows = {product.outputs[0]};\ndevice O* y = y0;\n"]
    if len(product.weights) == 1:
        return "".join(lines)
    starts = [0]
    for rows in product.outputs:
        starts.append(starts[-1] + product.blocks(rows))
    lines.append(_bias_pointer(product))
    for n in range(len(product.weights) - 1, 0, -1):
        word = "if" if n == len(product.weights) - 1 else "else if"
        lines.append(
            f"{word} (block >= {starts[n]}) {{\n  block -= {starts[n]};\n"
            f"  rows = {product.outputs[n]};\n  y = y{n};\n{_assigned(product, n)}}}\n"
        )
    return "".join(lines)


def _has_bias(product: Product) -> bool:
    return product.weights[0].bias is not None


def _bias_pointer(product: Product) -> str:
    return "const device B* bias = bias0;\n" if _has_bias(product) else ""


def _pointers(product: Product, number: int, name: str) -> str:
    """Declare w, scales and biases of a matrix, those of this threadgroup's expert."""
    form, weight = product.format, product.weights[number]
    kind = word_type(weight)
    lines = [f"const device {kind}* w_{name} = (const device {kind}*)w{number}"]
    scales = f"scales{number}" if form.scaled else f"(const device uchar*)w{number}"
    biases = f"biases{number}" if form.biased else f"scales_{name}"
    lines.append(f"const device {scale_type(form)}* scales_{name} = {scales}")
    lines.append(f"const device {scale_type(form)}* biases_{name} = {biases}")
    if product.chosen:
        lines[0] += f" + size_t(indices[launch]) * {weight.rows * row_length(weight)}"
        if form.scaled:
            lines[1] += f" + size_t(indices[launch]) * {weight.rows * scales_of_row(weight)}"
        if form.biased:
            lines[2] += f" + size_t(indices[launch]) * {weight.rows * scales_of_row(weight)}"
    return "".join(f"{line};\n" for line in lines)


def _assigned(product: Product, number: int) -> str:
    form, kind = product.format, word_type(product.weights[0])
    lines = [f"w_0 = (const device {kind}*)w{number}"]
    lines += [f"scales_0 = scales{number}"] if form.scaled else []
    lines += [f"biases_0 = biases{number}"] if form.biased else []
    lines += [f"bias = bias{number}"] if _has_bias(product) else []
    return "".join(f"  {line};\n" for line in lines)


def word_type(weight: Weight) -> str:
    return "W" if weight.mode == "dense" and weight.columns % 8 else "uint"


def row_length(weight: Weight) -> int:
    """Return the elements of a row, in the type in which it is read."""
    if weight.mode != "dense":
        return weight.w.shape[-1]
    return (
        weight.columns
        * (1 if word_type(weight) == "W" else weight.w.dtype.size)
        // (1 if word_type(weight) == "W" else 4)
    )


def scales_of_row(weight: Weight) -> int:
    return weight.columns // weight.group_size


def _tokens(product: Product) -> str:
    if not product.chosen:
        return (
            f"size_t first = size_t(launch) * {product.tiling.tokens};\n"
            f"const size_t last = {product.tokens - 1};\n"
        )
    return f"size_t first = launch{'' if product.own else f' / {product.chosen}'}, last = first;\n"


def _fetch(product: Product, chunk: str) -> str:
    """Ask for the weights of the next runs."""
    tiling = product.tiling
    loads = "".join(
        f"    load<{tiling.rows}>(held[d], {n * tiling.rows}, w_{n}, scales_{n}, biases_{n}, row, "
        "rows, column);\n"
        for n in range(product.matrices)
    )
    return (
        f"#pragma unroll\nfor (int d = 0; d < {tiling.depth}; ++d) {{\n"
        f"  uint step = part + {tiling.split} * ({chunk} * {tiling.depth} + d);\n"
        f"  if (step < Q::STEPS) {{\n    uint column = (step * 32 + lane) * Q::RUN;\n{loads}  }}\n"
        "}\n"
    )


def _stage(product: Product) -> str:
    if not product.tiling.staged:
        return ""
    norm = "norm, " if product.eps is not None else ""
    return (
        f"stage<{product.tiling.tokens}, {32 * GROUPS}>(x, {norm}first, last, staged, partial, "
        "thread_position_in_threadgroup.x);\n"
    )


def _turns(product: Product, count: int) -> str:
    tiling, form = product.tiling, product.format
    chunks = -(-form.steps // (tiling.split * tiling.depth))
    stride = product.blocks(product.outputs[0]) * product.sets * tiling.rows
    turns = chunks
    if len(product.outputs) == 1:
        turns *= -(-product.outputs[0] // stride)
    x = "staged" if tiling.staged else "x"
    return f"""\
for (uint turn = 1; turn <= {turns}; ++turn) {{
#pragma unroll
  for (int d = 0; d < {tiling.depth}; ++d) {{
    uint step = part + {tiling.split} * ((turn - 1) % {chunks} * {tiling.depth} + d);
    if (step < Q::STEPS) {{
      use<{product.matrices * tiling.rows}, {tiling.tokens}>(
          held[d], {x}, first, last, step, lane, 1.0f, sums);
    }}
  }}
  uint done = row;
  if (turn % {chunks} == 0) row += {stride};
  if (turn < {turns}) {{
{_fetch(product, f"(turn % {chunks})")}  }}
  if (turn % {chunks}) continue;
  simdgroup_barrier(mem_flags::mem_none);
#pragma unroll
  for (int i = 0; i < {count}; ++i) sums[i] = simd_sum(sums[i]);
{_finish(product, count)}  for (int i = 0; i < {count}; ++i) sums[i] = 0.0f;
}}
"""


def _finish(product: Product, count: int) -> str:
    """Give each of the first lanes one result, and let it write that."""
    tiling = product.tiling
    each = tiling.rows * tiling.tokens
    names = "ab"[: product.matrices]
    if tiling.split == 1:
        values = [f"    float {v} = chosen<{each}>(sums + {i * each}, lane);\n"
                  for i, v in enumerate(names)]  # fmt: skip
        return f"  if (lane < {each}) {{\n{''.join(values)}{_write(product)}  }}\n"
    values = [
        f"    float {v} = 0.0f;\n    for (uint s = 0; s < {tiling.split}; ++s) "
        f"{v} += partial[(group + s) * 32 + {i * each} + lane];\n"
        for i, v in enumerate(names)
    ]
    return (
        f"  if (lane < {count}) partial[group * 32 + lane] = chosen<{count}>(sums, lane);\n"
        "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        f"  if (part == 0 && lane < {each}) {{\n{''.join(values)}{_write(product)}  }}\n"
        "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    )


def _write(product: Product) -> str:
    tokens = product.tiling.tokens
    if product.chosen:
        place = "    uint n = done + lane;\n    size_t to = size_t(launch) * rows + n;\n"
        inside = "n < rows"
    else:
        place = (
            f"    uint n = done + lane / {tokens};\n    size_t t = first + lane % {tokens};\n"
            "    size_t to = t * rows + n;\n"
        )
        inside = "n < rows && t <= last"
    lines = [place, f"    if ({inside}) {{\n"]
    lines += [f"      {line}\n" for line in _results(product)]
    lines.append("    }\n")
    return "".join(lines)


def _results(product: Product) -> list[str]:
    row = f"size_t(indices[launch]) * {product.weights[0].rows} + n" if product.chosen else "n"
    named = not product.activation and len(product.weights) > 1
    lines = []
    for number, value in enumerate("ab"[: product.matrices]):
        if product.weights[number].bias is not None:
            lines.append(f"{value} += float({'bias' if named else f'bias{number}'}[{row}]);")
    if product.activation:
        lines.append(f"a = {text.ACTIVATIONS[product.activation]};")
        if product.activation == "clipped_swiglu":
            lines.append("b = metal::clamp(b, -7.0f, 7.0f) + 1.0f;")
        lines += ["a *= b;"] if product.matrices == 2 else []
    if product.residual:
        lines.append("a = float(P(a)) + float(residual[to]);")
    return [*lines, f"{'y0' if product.activation else 'y'}[to] = O(a);"]
