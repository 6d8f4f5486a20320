"""`zmlx kernels`: the list, the page, a kernel's text, a kernel's runs and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from kernels.checks import SPECS, altered

from zmlx.catalog import page as pages
from zmlx.catalog.command import compiled_text
from zmlx.catalog.configurations import configurations
from zmlx.cli import main
from zmlx.kernels.spec import KernelSpec

ROOT = Path(__file__).parents[2]


def call(*arguments, code=0):
    done = CliRunner().invoke(main, ["kernels", *arguments])
    assert done.exit_code == code, done.output
    return done


def test_the_list_has_every_kernel():
    text = call("list").stdout
    assert all(f" {name} " in text for name in SPECS)
    assert "y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i]" in text
    found = json.loads(call("list", "--json").stdout)
    assert [row["name"] for row in found] == list(SPECS)
    norm = next(row for row in found if row["name"] == "rmsnorm")
    assert norm["runs_as"] == ["source"]
    assert norm["contract"] == {"metal": "tighter", "cuda": "tighter"}
    assert norm["gradient"] == "kernel"


def test_the_list_of_a_domain():
    found = json.loads(call("list", "--json", "--domain", "softmax").stdout)
    assert [row["name"] for row in found] == sorted(
        name for name, spec in SPECS.items() if spec.domain == "softmax"
    )
    done = call("list", "--domain", "soft", code=2)
    assert "no kernel is of domain 'soft'; there are attention, graph" in done.stderr


def test_the_page_in_docs_is_current():
    page = (ROOT / "docs" / "KERNELS.md").read_text()
    text = "run `zmlx kernels list --markdown > docs/KERNELS.md`"
    assert page == call("list", "--markdown").stdout, text
    assert page == pages.page(SPECS)


def test_a_kernel_is_shown_as_metal_compiles_it():
    text = call("show", "rmsnorm", "--backend", "metal").stdout
    for part in (
        "y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i]",
        "w (D,) float",
        "metal: tighter",
        "[[kernel]] void custom_kernel_rmsnorm_",
        "const constant float& eps",
        SPECS["rmsnorm"].definition.source.strip(),
    ):
        assert part in text, part
    found = json.loads(call("show", "rmsnorm", "--backend", "metal", "--json").stdout)
    assert found["backend"] == "metal"
    assert found["text"] in text


def test_a_native_kernel_is_shown_without_a_text():
    text = call("show", "lookup").stdout
    assert "y[t] = s * q[indices[t]] + b" in text
    assert "[[kernel]]" not in text
    done = call("show", "lookup", "--backend", "metal", code=2)
    assert "lookup has no source; it runs as cpu" in done.stderr


@pytest.mark.parametrize("command", ["show", "run"])
def test_an_unknown_kernel(command):
    done = call(command, "softmacs", code=2)
    assert "no kernel is named 'softmacs'; `zmlx kernels list` has their names" in done.stderr


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.definition])
def test_mlx_takes_the_launch_of_every_sample(name, monkeypatch):
    """Metal's own text for each dtype and length, with every name that the source uses."""
    spec = SPECS[name]
    for configuration in configurations(spec):
        monkeypatch.setattr(
            "zmlx.catalog.command.configurations", lambda _, chosen=configuration: [chosen]
        )
        text = compiled_text(spec, "metal")
        assert f"custom_kernel_{name}" in text
        for label in spec.definition.input_names:
            assert f" {label} [[buffer(" in text
        short = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
        assert f"device {short[configuration['dtype']]}* " in text


def test_a_run_of_a_right_and_of_a_wrong_kernel():
    done = call("run", "logsumexp", "--backend", "cpu", "--repeats", "1")
    assert "logsumexp on cpu" in done.stdout
    assert done.stdout.count(" ok ") == 3
    with altered(lambda y: (y * 1.05).astype(y.dtype)):
        done = call("run", "logsumexp", "--backend", "cpu", "--json", "--repeats", "1", code=1)
    found = json.loads(done.stdout)
    assert [run["configuration"] for run in found["runs"]] == [
        "float32",
        "float16",
        "bfloat16",
    ]
    for run in found["runs"]:
        assert "allowed" in run["fault"]
        assert 0.04 < run["error"] < 0.06
        assert run["kernel_us"] > 0
        assert run["reference_us"] > 0


@pytest.mark.parametrize(
    ("backend", "part"),
    [("cuda", "__shared__ float partial[32]"), ("emulator", 'extern "C"')],
)
def test_a_kernel_is_shown_as_other_backends_compile_it(backend, part):
    text = call("show", "rmsnorm", "--backend", backend).stdout
    assert part in text
    assert "squares += a * a;" in text


def test_a_run_in_the_emulator():
    found = json.loads(
        call("run", "rmsnorm", "--backend", "emulator", "--json", "--repeats", "1").stdout
    )
    assert found["backend"] == "emulator"
    assert len(found["runs"]) == len(configurations(SPECS["rmsnorm"])) == 12
    assert all(run["error"] < run["allowed"] and not run["fault"] for run in found["runs"])


def test_a_kernel_that_raises_is_a_fault(monkeypatch):
    def broken(self):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(KernelSpec, "_native", broken)
    done = call("run", "logsumexp", "--backend", "cpu", "--json", code=1)
    run = json.loads(done.stdout)["runs"][0]
    assert (run["fault"], run["error"], run["kernel_us"]) == ("no such luck", None, None)


def test_a_run_that_would_compare_the_reference_to_itself(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    done = call("run", "rmsnorm", code=2)
    assert "rmsnorm runs as its reference here" in done.stderr
    assert "take --backend emulator" in done.stderr
    monkeypatch.setenv("ZMLX_BACKEND", "abacus")
    assert "expected one of auto" in call("run", "rmsnorm", code=2).stderr
    done = call("run", "lookup", "--backend", "cuda", code=2)
    assert "lookup has no cuda kernel; it has cpu" in done.stderr
