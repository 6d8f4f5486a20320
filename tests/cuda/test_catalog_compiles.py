"""Every kernel of the registry with a source goes through NVIDIA's compiler, in each dtype."""

from __future__ import annotations

import mlx.core as mx
import pytest
from nvrtc_program import assemble, compile_program, is_missing

from zmlx.backend.cuda import CudaSource
from zmlx.backend.launch import forget
from zmlx.catalog.configurations import configurations
from zmlx.kernels.spec import all_specs

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)
SPECS = {name: spec for name, spec in all_specs().items() if "cuda" in spec.backends()}
#: Their packings are read by the same text.
FUSED = [
    name
    for name, spec in SPECS.items()
    if spec.fused is not None and "packing" in configurations(spec, "cuda")[0]
]
#: Of each kind one, by MLX's own headers as well: they are the same for all.
FULLY = ("expert_glu", "gather_quantized_combine", "rmsnorm", "top_k")


@pytest.fixture
def programs(monkeypatch):
    """Texts that reach `mx.fast.cuda_kernel`, by their header, while launches give zeros."""
    texts: dict[str, dict[str, None]] = {}

    def cuda_kernel(*, name, input_names, output_names, source, header, ensure_row_contiguous):
        def launch(*, inputs, output_shapes, output_dtypes, template, **_):
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            known = texts.setdefault(header, {})
            text = assemble(
                "CASE",
                CudaSource(header, source, tuple(input_names)),
                [(x.dtype, x.ndim) for x in arrays],
                list(zip(output_names, output_dtypes, strict=True)),
                template or (),
                with_header=False,
            )
            known[text] = None
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    forget()
    yield texts
    forget()


@pytest.mark.parametrize("name", SPECS)
def test_it_compiles(name, programs, monkeypatch):
    """Their Metal texts, which older devices get: test_tensor_cores_compile.py has the others."""
    monkeypatch.setattr("zmlx.backend.cuda.handwritten.architecture", lambda: 75)
    spec = SPECS[name]
    chosen = configurations(spec, "cuda")
    if name in FUSED:  # each is a text of its own: those of one kernel here, others there
        chosen = chosen[FUSED.index(name) :: len(FUSED)]
    for configuration in chosen:
        sample = spec.sample(**configuration)
        spec.implementation("cuda")(*sample.args, **sample.kwargs)
    assert programs, "nothing was launched"
    for header, bodies in programs.items():
        named = (text.replace("_CASE(", f"_{k}(") for k, text in enumerate(bodies))
        log = compile_program(header, *named, fully=name in FULLY)
        assert log is None, f"\n{log[:3000]}"
