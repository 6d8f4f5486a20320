"""Results on disk: between processes and threads, after damage, in folders of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from zmlx.tuning.identity import Machine, Subject
from zmlx.tuning.store import Result, Store, default_store, result_from_json

HERE = Machine("Apple M4", "metal", "0.32.4", "1.0")


def result(number, *, where=HERE, best="64"):
    subject = Subject(where, f"k{number}", "c0ffee", "(8,) float32", ("64", "128"))
    return Result(subject, best, {"64": 0.5, "128": 1.0})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "results.jsonl"


def test_what_is_added_is_found_by_the_next_process(file):
    Store(file).add(result(1), result(2, best="128"))
    found = Store(file)
    assert found.find(result(2).subject) == result(2, best="128")
    assert found.find(result(3).subject) is None
    assert len(found.all()) == 2


def test_what_others_add_later_is_found_and_the_last_one_counts(file):
    mine, other = Store(file), Store(file)
    mine.add(result(1))
    assert mine.find(result(2).subject) is None
    other.add(result(2))
    other.add(result(2, best="128"))
    assert mine.find(result(2).subject).best == "128"


@pytest.mark.parametrize(
    "where",
    [
        Machine("Apple M4 Max", "metal", "0.32.4", "1.0"),
        Machine("Apple M4", "cuda", "0.32.4", "1.0"),
        Machine("Apple M4", "metal", "0.32.5", "1.0"),
        Machine("Apple M4", "metal", "0.32.4", "1.1"),
    ],
    ids=["device", "backend", "mlx", "zmlx"],
)
def test_a_result_belongs_to_one_device_backend_and_version(file, where):
    Store(file).add(result(1))
    assert Store(file).find(result(1, where=where).subject) is None


WRITER = """
import sys
from pathlib import Path
from zmlx.tuning.identity import Machine, Subject
from zmlx.tuning.store import Result, Store
store = Store(Path(sys.argv[1]))
sys.stdin.readline()  # all start at once
for number in range(60):
    subject = Subject(Machine("d", "metal", "1", "1"), f"{sys.argv[2]}-{number}", "c", "", ("64",))
    store.add(Result(subject, "64", {"64": 1.0}))
    if number % 20 == 19:
        store.remove(subject)
        store.add(Result(subject, "64", {"64": 2.0}))
"""


def test_processes_that_write_at_once_lose_nothing(file):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(number)], stdin=subprocess.PIPE
        )
        for number in range(4)
    ]
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    for writer in writers:
        writer.stdin.close()
    assert len(Store(file).all()) == 4 * 60
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_threads_that_write_at_once_lose_nothing(file):
    store = Store(file)
    threads = [
        threading.Thread(target=lambda n=n: [store.add(result(100 * n + i)) for i in range(25)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.all()) == len(Store(file).all()) == 100


@pytest.mark.parametrize(
    "damage",
    [
        b"not JSON\n",
        b"\xff\xfe\x00binary without an end",
        b'{"subject": 3}\n',
        b"[" * 100_000 + b"\n",
        json.dumps({**result(1).to_json(), "best": "17"}).encode() + b"\n",
        json.dumps({**result(1).to_json(), "timings_ms": {"64": "fast"}}).encode() + b"\n",
    ],
    ids=["text", "binary", "other", "deep", "no-candidate", "no-number"],
)
def test_a_damaged_line_costs_one_line_and_itself_only(file, damage, capsys):
    Store(file).add(result(1))
    with file.open("ab") as stream:
        stream.write(damage)
    found = Store(file)
    assert found.find(result(1).subject) == result(1)
    assert found.find(result(2).subject) is None
    text = capsys.readouterr()
    assert text.err.count("\n") == 1
    assert "1 damaged line left out" in text.err
    assert text.out == ""
    found.add(result(2))
    assert len(Store(file).all()) == 2
    assert capsys.readouterr().err == ""


def test_a_result_added_after_a_torn_line_is_whole(file):
    Store(file).add(result(1))
    with file.open("ab") as stream:
        stream.write(b'{"subject": {"mach')
    Store(file).add(result(2))
    assert {r.subject.kernel for r in Store(file).all()} == {"k1", "k2"}


def unwritable(tmp_path, kind):
    """Return a file that cannot be written; root may write anywhere but into a file or /proc."""
    if kind == "parent is a file":
        (tmp_path / "cache").write_text("")
        return tmp_path / "cache" / "results.jsonl"
    folder = tmp_path / "cache"
    folder.mkdir()
    if os.geteuid() == 0:
        (folder / "results.lock").mkdir()  # what cannot be opened as a lock
    else:
        folder.chmod(0o500)
    return folder / "results.jsonl"


@pytest.mark.parametrize("kind", ["parent is a file", "read only"])
def test_where_nothing_can_be_written_results_hold_for_this_process(tmp_path, kind, capsys):
    store = Store(unwritable(tmp_path, kind))
    store.add(result(1))
    store.add(result(2))
    assert store.find(result(1).subject) == result(1)
    text = capsys.readouterr().err
    assert sum("cannot write" in line for line in text.splitlines()) == 1
    assert "ZMLX_CACHE_DIR names a folder that keeps them" in text
    assert not store.file.exists()


def test_a_file_in_a_folder_without_a_lock_is_still_read(tmp_path):
    store = Store(tmp_path / "results.jsonl")
    store.add(result(1))
    store.file.with_suffix(".lock").unlink()
    store.file.with_suffix(".lock").mkdir()
    assert Store(store.file).find(result(1).subject) == result(1)


def test_results_are_removed_in_memory_and_on_disk(file):
    store = Store(file)
    store.add(result(1), result(2), result(3))
    store.remove(result(1).subject)
    assert store.find(result(1).subject) is None
    assert len(Store(file).all()) == 2
    assert store.clear() == 2
    assert store.all() == Store(file).all() == []
    assert store.clear() == 0


def test_the_folder_is_the_one_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path))
    assert default_store().file == tmp_path / "tuning" / "results.jsonl"
    assert default_store() is default_store()


def test_what_is_no_result_is_refused():
    assert result_from_json(result(1).to_json()) == result(1)
    with pytest.raises(ValueError, match="not a tuning result"):
        result_from_json(["no"])
