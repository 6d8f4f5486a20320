"""`zmlx bench model` on tiny checkpoints: what it measures, says, writes and refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache
from zoo.build import build
from zoo.disk import make_checkpoint

from zmlx.bench import ceiling, model, suite
from zmlx.bench.capsule import read
from zmlx.bench.prompts import Prompts
from zmlx.bench.report import report
from zmlx.bench.suite import Bench, Settings
from zmlx.bench.traffic import cache_bytes
from zmlx.bench.twin import twin
from zmlx.bench.workloads import Batch, Decode, Prefill, generated, parts
from zmlx.graph.trace import TraceError

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--context", "8", "--context", "20", "--runs", "3", "--tokens", "6"),
    *("--batch", "2", "--batch", "3", "--prefill", "16"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("tiny") / "tiny-moe",
        "qwen3_moe",
        quantize={"bits": 4, "group_size": 32},
        dtype=mx.bfloat16,
    )


@pytest.fixture(scope="module", autouse=True)
def small_read():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ceiling, "READ", 2**20)
        ceiling._measured_read.cache_clear()
        yield
    ceiling._measured_read.cache_clear()


def called(capsys, *arguments):
    """Run the command in this process; return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        model.model.main([str(a) for a in arguments], prog_name="model")
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """One run of the command with everything: exit code, JSON, stderr, capsule."""
    file = tmp_path_factory.mktemp("capsule") / "models.json"
    import io
    from contextlib import redirect_stderr, redirect_stdout

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        model.model.main([str(folder), *SMALL, "--json", "--capsule", str(file)])
    return end.value.code, json.loads(out.getvalue()), err.getvalue(), read(file)


def test_everything_is_measured_for_both(measured):
    code, content, _, capsule = measured
    assert code == 0
    assert capsule.variants() == ["stock", "zmlx"]
    assert capsule.subjects() == [
        "this device",
        "tiny-moe",
        "tiny-moe, context 8",
        "tiny-moe, context 20",
        "tiny-moe, prefill 16",
        "tiny-moe, batch 2",
        "tiny-moe, batch 3",
    ]
    for label, rate in [("context 20", "decode"), ("prefill 16", "prefill"), ("batch 3", "decode")]:
        for variant in ("stock", "zmlx"):
            assert len(capsule.values(f"tiny-moe, {label}", variant, rate)) == 3
            assert len(capsule.values(f"tiny-moe, {label}", variant, "peak_memory")) == 3
    for quantity in ("python", "encoding", "weights", "cache"):
        assert capsule.median("tiny-moe, context 8", "zmlx", quantity) > 0
    for variant in ("stock", "zmlx"):
        assert 0 < capsule.median("tiny-moe, context 8", variant, "logits_error") < 50
    assert capsule.median("tiny-moe", "zmlx", "patching") > 0
    assert capsule.median("tiny-moe", "zmlx", "modules") > 0
    assert capsule.plans["tiny-moe"]["patched_count"] == capsule.median(
        "tiny-moe", "zmlx", "modules"
    )
    assert content["capsule"]["runs"] == json.loads(json.dumps(content["capsule"]["runs"]))
    assert len(content["capsule"]["runs"]) == len(capsule.runs)


def test_what_a_patched_model_keeps_is_not_stocks(folder, monkeypatch):
    kept, patch = [], suite.patch

    def keeping(network, **options):
        kept.append(mx.zeros(2**22, mx.uint8))
        mx.eval(kept)
        return patch(network, **options)

    monkeypatch.setattr(suite, "patch", keeping)
    network, _ = mlx_lm.load(str(folder))
    settings = Settings(contexts=(8,), runs=1, tokens=3, batches=(), prefill=0, breakdown=False)
    bench = Bench("tiny", network, 512, settings, 1e9)
    peaks = {run.variant: run.values.get("peak_memory") for run in bench.measure().runs}
    assert peaks["zmlx"] - peaks["stock"] >= 2**22 - 2**16


def test_stock_and_patched_take_turns(measured):
    timed = [
        (run.variant, run.repeat)
        for run in measured[3].runs
        if run.subject == "tiny-moe, context 20" and "decode" in run.values
    ]
    assert timed == [
        ("stock", 1),
        ("zmlx", 1),
        ("zmlx", 2),
        ("stock", 2),
        ("stock", 3),
        ("zmlx", 3),
    ]


def test_json_has_medians_and_ratios_of_the_raw_runs(measured):
    _, content, _, capsule = measured
    entries = {(e["subject"], e["quantity"]): e for e in content["results"]}
    entry = entries["tiny-moe, context 8", "decode"]
    stock, ours = (capsule.values("tiny-moe, context 8", v, "decode") for v in ("stock", "zmlx"))
    assert entry["unit"] == "tokens/s"
    assert entry["stock"] == {
        "median": pytest.approx(np.median(stock)),
        "min": min(stock),
        "max": max(stock),
        "runs": 3,
    }
    assert entry["ratio"] == pytest.approx(np.median(ours) / np.median(stock))
    memory = entries["tiny-moe, context 8", "peak_memory"]
    assert memory["ratio"] == pytest.approx(memory["stock"]["median"] / memory["zmlx"]["median"])
    # The rate is that of the steps after the first token.
    run = next(r for r in capsule.runs if "decode" in r.values)
    assert len(run.samples["step_seconds"]) == 5
    assert run.values["decode"] == pytest.approx(5 / sum(run.samples["step_seconds"]))
    batch = next(r for r in capsule.runs if "batch 3" in r.subject and "decode" in r.values)
    assert batch.values["decode"] == pytest.approx(3 * 5 / sum(batch.samples["step_seconds"]))


def test_the_share_of_the_limit_is_bytes_over_bandwidth(measured):
    capsule = measured[3]
    bandwidth = 1e9 * capsule.median("this device", "stock", "bandwidth")
    sizes = [capsule.median("tiny-moe, context 8", "stock", q) for q in ("weights", "cache")]
    run = next(r for r in capsule.runs if "of_the_limit" in r.values)
    assert run.values["of_the_limit"] == pytest.approx(
        100 * sum(sizes) * run.values["decode"] / bandwidth
    )


def test_progress_and_reasons_are_on_stderr(measured):
    err, notes = measured[2], measured[3].notes
    assert "no GPU here: this measures the CPU" in err
    assert "tiny-moe, batch 3: stock" in err
    assert any("no time on the GPU: kernels are recorded by" in note for note in notes)


def test_the_table_is_on_stdout_and_parts_can_be_left_out(folder, capsys):
    code, out, err = called(
        capsys, folder, *SMALL, "--skip", "batch", "--skip", "prefill", "--skip", "breakdown"
    )
    assert code == 0
    assert "decode, tokens/s" in out
    assert "zmlx / stock" in out
    assert "this measures the CPU" in err
    for absent in ("batch", "prefill 16", "python, us"):
        assert absent not in out.split("tokens after the prompt")[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to measure: give a folder, or --shape"),
        (("--shape", "llama-9b"), "unknown shape 'llama-9b'; known: llama-3.2-1b"),
        (("no/such",), "no/such: no such folder"),
        (("--shape", "llama-3.2-1b", "--profile", "none"), "none"),
    ],
)
def test_bad_use_is_refused(arguments, complaint, capsys):
    code, out, err = called(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("zmlx bench model: ")
    assert complaint in err


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    code, out, err = called(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert "no config.json there" in err


def test_a_model_that_does_not_fit_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(model, "free_bytes", lambda: 10**9)
    code, _, err = called(capsys, "--shape", "qwen3-30b-a3b", *SMALL)
    assert code == 2
    assert "its weights need 17.2 GB, and 1.0 GB are free on cpu" in err


def test_memory_that_ends_in_a_run_is_explained(folder, capsys, monkeypatch):
    def run(self, network, tokens, prompts):
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(Decode, "run", run)
    code, _, err = called(capsys, folder, *SMALL)
    assert code == 2
    assert "tiny-moe: out of memory" in err
    assert "a shorter --context" in err


def test_what_fails_on_the_patched_model_alone_fails_the_command(folder, capsys, monkeypatch):
    stock = Batch.run

    def run(self, network, tokens, prompts):
        if len(self.prompts) == 3 and "_zmlx_patch_result" in vars(network):
            raise TypeError("no such cache")
        return stock(self, network, tokens, prompts)

    monkeypatch.setattr(Batch, "run", run)
    code, out, err = called(capsys, folder, *SMALL, "--skip", "breakdown")
    assert code == 1
    assert "tiny-moe, batch 3: zmlx: TypeError: no such cache" in err
    assert "batch 2" in out


def test_a_patched_model_that_computes_something_else_fails_the_command(
    folder, capsys, monkeypatch
):
    stock = suite.patch

    def wrong(network, **options):
        network.model.norm.weight = -network.model.norm.weight
        return stock(network, **options)

    monkeypatch.setattr(suite, "patch", wrong)
    code, _, err = called(capsys, folder, *SMALL, "--skip", "batch", "--skip", "prefill")
    assert code == 1
    assert "logits are 200 % from those in float32, stock's " in err


def test_a_patched_model_that_is_as_far_off_as_stock_is_none_that_fails(folder, monkeypatch):
    """Routers that choose other experts for a difference in the last digit do so in both."""
    network, _ = mlx_lm.load(str(folder))
    bench = Bench("flips", network, 512, Settings(contexts=(8,)), 1e9)
    exact = mx.random.normal((512,), key=mx.random.key(1))
    far, as_far = (exact + mx.random.normal((512,), key=mx.random.key(k)) for k in (2, 3))
    for ours, failures in ((as_far, 0), (exact + 4 * (far - exact), 1)):
        monkeypatch.setattr(bench, "_logits", lambda variant, ours=ours: ours)
        bench._compare(far, exact)
        assert len(bench.drain().failures) == failures


def test_a_model_that_cannot_be_computed_in_float32_is_compared_with_stock(
    folder, capsys, monkeypatch
):
    def untraceable(*_):
        raise TraceError("reads an array")

    monkeypatch.setattr(suite, "step_in_float32", untraceable)
    options = ("--skip", "batch", "--skip", "prefill", "--skip", "breakdown", "--json")
    code, out, err = called(capsys, folder, *SMALL, *options)
    assert code == 0
    assert "tiny-moe: not computed in float32: reads an array" in err + out
    runs = json.loads(out)["capsule"]["runs"]
    assert [r["variant"] for r in runs if "logits_error" in r["values"]] == ["zmlx"]


def test_a_stock_model_without_finite_logits_is_refused(folder):
    network, _ = mlx_lm.load(str(folder))
    network.model.norm.weight = mx.full(network.model.norm.weight.shape, mx.nan)
    with pytest.raises(suite.Unmeasurable, match="logits are not finite"):
        Bench("bad", network, 512, Settings(contexts=(8,)), 1e9).measure()


def test_stock_runs_are_without_what_a_patched_model_changes_in_mlx_lm(folder, monkeypatch):
    loop = sys.modules["mlx_lm.generate"]
    seen = []
    stock = Decode.run

    def run(self, network, tokens, prompts):
        seen.append(("_zmlx_patch_result" in vars(network), loop.mx is mx))
        return stock(self, network, tokens, prompts)

    monkeypatch.setattr(Decode, "run", run)
    network, _ = mlx_lm.load(str(folder))
    settings = Settings(contexts=(8,), runs=2, tokens=3, batches=(), prefill=0, breakdown=False)
    bench = Bench("tiny", network, 512, settings, 1e9)
    found = bench.measure()
    assert "decode_step" in found.plan["pattern_counts"]
    assert [patched for patched, _ in seen] == [False, True, False, True, True, False]
    assert all(untouched is not patched for patched, untouched in seen)
    assert "_zmlx_patch_result" not in vars(network)


def test_a_twin_shares_the_arrays_and_nothing_else(folder):
    network, _ = mlx_lm.load(str(folder))
    before = network(mx.array([[1, 2, 3]]))
    mx.eval(before)
    held = mx.get_active_memory()
    other = twin(network)
    mx.eval(other.parameters())
    assert mx.get_active_memory() == held
    assert mx.array_equal(other(mx.array([[1, 2, 3]])), before)
    assert [type(m) for _, m in other.named_modules()] == [
        type(m) for _, m in network.named_modules()
    ]
    assert not {id(m) for _, m in other.named_modules()} & {
        id(m) for _, m in network.named_modules()
    }
    other.model.layers[0].self_attn.q_proj.scales *= 2
    other.freeze()
    assert mx.array_equal(network(mx.array([[1, 2, 3]])), before)
    assert network.trainable_parameters()["model"]["norm"]


def test_decode_is_the_greedy_text(folder):
    network, _ = mlx_lm.load(str(folder))
    prompt, text = [5, 6, 7, 8], []
    for _ in range(4):
        logits = network(mx.array([prompt + text]))[0, -1]
        text.append(mx.argmax(logits).item())
    assert [int(token) for token, _ in generated(network, prompt, 4)] == text


def test_a_prompt_is_read_once_and_stays_as_it_was(folder):
    network, _ = mlx_lm.load(str(folder))
    prompts, prompt = Prompts(network), [5, 6, 7, 8]
    assert prompts.bytes == 0
    expected = [int(token) for token, _ in generated(network, prompt, 4)]
    for _ in range(2):
        caches = prompts.after(prompt)
        assert {cache.offset for cache in caches} == {3}
        found = [int(token) for token, _ in generated(network, prompt[-1:], 4, caches)]
        assert found == expected
    held = prompts.bytes
    assert held == sum(cache.nbytes for cache in prompts.after(prompt)) > 0
    assert all(cache.empty() for cache in prompts.after([5]))
    assert prompts.bytes == held


class Slow:
    """A model that takes some milliseconds in Python, and whose cache is mlx-lm's."""

    def __init__(self, seconds):
        self.inner = build("llama")
        self.layers = self.inner.layers
        self.seconds = seconds

    def __call__(self, tokens, cache):
        time.sleep(self.seconds)
        return self.inner(tokens, cache=cache)


def test_times_are_those_of_the_model(virtual_time):
    slow = Slow(0.02)
    outcome = Decode((1, 2, 3, 4)).run(slow, 9, Prompts(slow))
    assert outcome.rate == pytest.approx(50)
    assert outcome.samples["step_seconds"] == pytest.approx([0.02] * 8)
    # The prompt goes through in two calls, and the step after it is built before it is there.
    assert Prefill((1, 2, 3, 4)).run(slow, 5, Prompts(slow)).rate == pytest.approx(4 / 0.06)
    outcome = Batch(((1, 2), (3, 4))).run(slow, 9, Prompts(slow))
    assert outcome.rate == pytest.approx(100)
    assert outcome.samples["step_seconds"] == pytest.approx([0.02] * 8)


def test_steps_are_taken_apart():
    before = mx.async_eval
    slow = Slow(0.02)
    found = parts(slow, [1, 2, 3, 4], 8, Prompts(slow))
    assert mx.async_eval is before
    assert [len(each) for each in (found.build, found.encode, found.wait)] == [8, 8, 8]
    assert 0.02 <= min(found.build) < 0.04
    assert 0 < min(found.encode) < 0.02


def test_async_eval_comes_back_when_a_model_fails():
    before = mx.async_eval

    class Failing(Slow):
        def __call__(self, tokens, cache):
            raise TypeError("no such step")

    with pytest.raises(TypeError, match="no such step"):
        parts(Failing(0), [1, 2], 2, Prompts(Slow(0)))
    assert mx.async_eval is before


def test_bytes_of_caches_are_what_is_filled():
    plain, sliding = KVCache(), RotatingKVCache(max_size=16)
    for length in (40, 1):
        new = mx.zeros((1, 2, length, 32), mx.bfloat16)
        for cache in (plain, sliding):
            cache.update_and_fetch(new, new)
    assert plain.nbytes > 41 * 256
    assert cache_bytes([plain]) == 41 * 2 * 2 * 32 * 2
    assert cache_bytes([sliding]) == 16 * 2 * 2 * 32 * 2
    assert cache_bytes([]) == 0


def test_the_reading_kernel_reads_everything_once():
    words = mx.random.randint(0, 2**30, (256 * 32 * 2,)).astype(mx.uint32)
    folded = np.array(ceiling.read_all(words, "emulator", threads=256))
    expected = np.bitwise_xor.reduce(np.array(words).reshape(-1, 256, 4), axis=(0, 2))
    assert np.array_equal(folded, expected)
    with pytest.raises(ValueError, match="give a multiple of 8192"):
        ceiling.read_all(words[:-1], "emulator", threads=256)


def test_the_limit_is_measured_once():
    first = ceiling.read_bandwidth()
    assert first == ceiling.read_bandwidth()
    assert 1e7 < first < 1e14


def test_tables_of_the_documentation_come_from_the_capsule(measured, tmp_path, monkeypatch, capsys):
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("benchmark_tables", path)
    tables = importlib.util.module_from_spec(spec)
    # Where dataclasses look their module up.
    monkeypatch.setitem(sys.modules, spec.name, tables)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "CAPSULES", tmp_path / "benchmarks" / "capsules")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "CPU.md").write_text("nothing")
    (tmp_path / "docs" / "DECODE.md").write_text("nothing")
    (tmp_path / "README.md").write_text("no place")
    cuda = tmp_path / "docs" / "CUDA.md"
    cuda.write_text((ROOT / "docs" / "CUDA.md").read_text())
    from zmlx.bench.capsule import write

    write(measured[3], tables.CAPSULES / "models-cuda.json")
    tables.main()
    text = cuda.read_text()
    assert "README.md: no <!-- models-cuda -->" in capsys.readouterr().err
    assert "| tokens/s, stock and zmlx | after 8 | after 20 | prefill 16 | batch 2 |" in text
    assert "[capsule](../benchmarks/capsules/models-cuda.json)" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| tiny-moe | ")]
    assert [len(row) for row in rows] == [6, 10, 10, 10, 10, 6]
    rate = measured[3].median("tiny-moe, context 8", "zmlx", "decode")
    assert tables.digits(rate) in rows[0][1]
    assert rows[2][:4] == ["| tiny-moe", "8", "zmlx", tables.digits(1e6 / rate)]
    (tmp_path / "README.md").write_text("<!-- models-cuda -->\nold\n<!-- end -->\n")
    tables.main()
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme
    assert "[capsule](benchmarks/capsules/models-cuda.json)" in readme


def test_kernels_are_recorded_last_for_every_model(folder, tmp_path, capsys, monkeypatch):
    from zmlx.bench.kernel_times import KernelTime, KernelTimes

    other = make_checkpoint(tmp_path / "other", "llama", quantize={"bits": 4, "group_size": 32})
    order = []

    def run(self, network, tokens, prompts):
        order.append("run" if tokens == 6 else "warm")
        return stock(self, network, tokens, prompts)

    def record(call, tokens):
        order.append("record")
        call()
        call()
        return KernelTimes((KernelTime("qmv", 3.0, 60.0), KernelTime("copy", 1.0, 2.0)), 3.0, 62.0)

    stock = Decode.run
    monkeypatch.setattr(Decode, "run", run)
    monkeypatch.setattr(suite, "record", record)
    monkeypatch.setattr(suite, "_WARM_TOKENS", 3)
    skipped = ("--skip", "batch", "--skip", "prefill", "--skip", "breakdown")
    code, out, _ = called(
        capsys, folder, other, "--context", 8, "--runs", 1, "--tokens", 6, "--kernels", 1, *skipped
    )
    assert code == 0
    one = ["warm", "warm", "run", "run"]
    assert order == [*one, *one, "record", "record", "warm", "warm", "record", "record"]
    assert out.count("3 kernels, 62 us a token") == 4
    assert "tiny-moe, context 8, stock: 3 kernels" in out
    assert "qmv" in out
    assert "copy" not in out
    gpu = next(line for line in out.splitlines() if "gpu, us a token" in line)
    assert gpu.count(" 62 ") == 2


def test_kernels_are_listed_by_name(capsys):
    from zmlx.bench.kernel_times import KernelTime, KernelTimes

    rows = tuple(KernelTime(f"kernel_{k}[x]", 2.0, 10.0 - k) for k in range(4))
    model.show_kernels(
        "tiny, context 8, stock", KernelTimes(rows, 8.0, sum(row.microseconds for row in rows)), 3
    )
    out = capsys.readouterr().out
    assert "8 kernels, 34 us a token" in out
    assert "kernel_2[x]" in out
    assert "kernel_3" not in out
    assert "4.50" in out  # nine microseconds by two


def test_reading_a_capsule_imports_no_mlx(measured, tmp_path):
    import subprocess

    from zmlx.bench.capsule import write

    file = write(measured[3], tmp_path / "capsule.json")
    code = (
        "import sys; from zmlx.cli import main\n"
        f"try: main(['bench', 'report', {str(file)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'mlx.core' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "tiny-moe, context 8" in ran.stdout
    report(file)
