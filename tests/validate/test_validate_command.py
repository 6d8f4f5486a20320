"""`zmlx validate` on a tiny model: its exit codes, its JSON, and its capsule."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from click.testing import CliRunner

from zmlx.bench.capsule import read
from zmlx.validate.command import validate

QUICK = ["--runs", "2", "--tokens", "4", "--prompt", "import this module"]


def run(*arguments):
    return CliRunner().invoke(validate, [str(argument) for argument in arguments])


def test_a_sound_patch_passes(tiny, tmp_path):
    capsule = tmp_path / "capsule.json"
    result = run(tiny, *QUICK, "--json", "--capsule", capsule)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["contract"] == "tighter"
    assert found["reference_dtype"] == "float64"
    assert found["report"]["patched_count"] > 0
    assert 0 < found["stock_error"]["rms"] < 1e-5
    assert 0 < found["patched_error"]["rms"] < 1e-5
    assert len(found["stock"]) == len(found["patched"]) == 2
    assert all(len(r["step_seconds"]) == 3 for r in found["stock"] + found["patched"])
    measured = read(capsule)
    assert measured.variants() == ["stock", "zmlx"]
    assert len(measured.runs) == 4


def test_the_table_is_on_stdout(tiny):
    result = run(tiny, *QUICK)
    assert result.exit_code == 0
    for text in ("prefill, tokens/s", "decode, tokens/s", "peak memory, MiB", "contract tighter"):
        assert text in result.stdout
    assert result.stderr == ""


def test_kernels_that_are_five_percent_off_fail(tiny, sabotage):
    sabotage(lambda y: (y * 1.05).astype(y.dtype))
    result = run(tiny, *QUICK)
    assert result.exit_code == 1, result.output
    assert "BROKEN: root mean square error of the patched logits" in result.stdout


def test_kernels_that_are_a_little_off_fail(tiny, sabotage):
    sabotage(lambda y: (y * 1.001).astype(y.dtype))
    assert run(tiny, *QUICK).exit_code == 1


def test_nan_fails(tiny, sabotage):
    sabotage(lambda y: y * mx.nan)
    result = run(tiny, *QUICK, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout, parse_constant=pytest.fail)  # JSON has no NaN
    assert found["patched_error"]["rms"] is None
    assert "NaN in the patched logits of run 0, 1" in found["breaches"]


def test_an_error_in_a_later_run_only_fails(tiny, sabotage):
    calls = {"generations": 0}

    def change(y):
        return -y if calls["generations"] >= 4 else y

    from zmlx.validate import compare as comparing

    sabotage(change)
    original = comparing.generate

    def counting(*args, **kwargs):
        # warm-up and forced run, first timed run; what follows is the second patched run
        if "_zmlx_patch_result" in vars(args[0]):
            calls["generations"] += 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(comparing, "generate", counting)
        result = run(tiny, *QUICK, "--json")
    found = json.loads(result.stdout)
    assert calls["generations"] == 4
    assert result.exit_code == 1
    assert [d["run"] for d in found["divergences"]] == [1]
    assert found["patched"][0]["tokens"] == found["stock"][0]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["/no/such/model"], "no config.json there"),
        (["MODEL", "--profile", "nope"], "nope"),
        (["MODEL", "--runs", "0"], "0"),
        (["MODEL", "--tokens", "1"], "1"),
        ([], "Missing argument"),
    ],
)
def test_bad_usage_is_code_2(tiny, arguments, complaint):
    result = run(*[tiny if a == "MODEL" else a for a in arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stdout == ""


def test_a_broken_checkpoint_is_one_line(tiny, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    result = run(tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "mlx-lm cannot load it" in result.stderr


def test_as_a_module_the_exit_code_reaches_the_shell(tiny):
    command = [sys.executable, "-m", "zmlx.validate", str(tiny), *QUICK]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "contract tighter holds" in ran.stdout
