"""The native library in a whole process: threads when idle, after a fork, at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zmlx.backend.cpu import native

ROOT = Path(__file__).parents[2]
SETUP = """
import os, resource, sys, threading, time
import mlx.core as mx
from zmlx.backend.cpu import native

library = native.load()
library.set_num_threads(4)
w = mx.quantize(mx.random.normal((4096, 512)), 64, 4)

def product(stream=None):
    with mx.stream(stream or mx.default_stream(mx.cpu)):
        y = library.quantized_matmul(mx.ones((1, 512)), *w, group_size=64, bits=4)
        return y.sum().item()

first = product()
"""


@pytest.fixture(scope="module", autouse=True)
def _built():
    native.load()


def run(script: str) -> str:
    done = subprocess.run(
        # From 3.12 on Python warns about every fork of a process with threads.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SETUP + script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_nothing_runs_when_there_is_nothing_to_do():
    out = run("""
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
""")
    assert float(out) < 0.05


def test_a_forked_child_computes_with_threads_of_its_own():
    out = run("""
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    # MLX's own stream has lost its thread; a new one has its own.
    os.write(writer, str(product(mx.new_stream(mx.cpu)) == first).encode())
    os.write(writer, b" %d" % len(os.listdir("/proc/self/task")))
    os._exit(0)
deadline = time.monotonic() + 60
while os.waitpid(child, os.WNOHANG)[0] == 0:
    if time.monotonic() > deadline:
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.01)
print(os.read(reader, 100).decode(), product() == first)
""")
    same, tasks, parent = out.split()
    assert (same, parent) == ("True", "True")
    assert int(tasks) >= 1 + 1 + 3  # itself, MLX's stream, and three of ours


def test_a_process_ends_while_threads_compute():
    out = run("""
def work():
    stream = mx.new_stream(mx.cpu)
    while True:
        product(stream)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("done", flush=True)
os._exit(0)
""")
    assert out == "done\n"


def test_a_process_ends_in_the_usual_way():
    assert run("print(product() == first)") == "True\n"


def test_large_memory_is_given_back():
    out = run("""
x = mx.random.normal((32768, 512))
mx.eval(x)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

small = mx.quantize(mx.random.normal((8, 512)), 64, 4)
mx.eval(library.quantized_matmul(x[:1], *small, group_size=64, bits=4))
before = resident()
for _ in range(3):
    mx.eval(library.quantized_matmul(x, *small, group_size=64, bits=4))
print(resident() - before)
""")
    assert float(out) < 40  # the packed activations take 64 MiB; the C library keeps up to 32
