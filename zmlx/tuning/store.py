"""Tuning results on disk: a file of lines, which processes and threads add to at the same time.

Each result is one line of JSON. Lines are added under a lock, so two processes that tune at once
lose nothing. A line that is damaged costs that line alone: the file is written anew without it. A
folder that cannot be written costs the memory of this process's results, once it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from io import BufferedRandom
from pathlib import Path
from typing import Any

from zmlx.tuning.identity import Machine, Subject
from zmlx_autopatch import speech, variables

_FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """What tuning found.

    Attributes:
        subject: what was tuned, and where.
        best: label of the choice.
        timings_ms: label -> median of one call, in milliseconds, of the candidates that ran.
        dropped: label -> why it was no candidate any more.
    """

    subject: Subject
    best: str
    timings_ms: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "subject": self.subject.to_json(),
            "best": self.best,
            "timings_ms": self.timings_ms,
            "dropped": self.dropped,
        }


def result_from_json(content: Any) -> Result:
    """Return a result from what `Result.to_json` gave.

    Raises:
        ValueError: it is something else.
    """
    try:
        subject = dict(content["subject"])
        where = Machine(**subject.pop("machine"))
        candidates = tuple(subject.pop("candidates"))
        found = Result(
            Subject(machine=where, candidates=candidates, **subject),
            content["best"],
            dict(content["timings_ms"]),
            dict(content["dropped"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a tuning result: {type(error).__name__}: {error}") from error
    texts = [*asdict(found.subject.machine).values(), subject["kernel"], subject["content"]]
    texts += [subject["inputs"], found.best, *candidates, *found.dropped.values()]
    numbers = found.timings_ms.values()
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("not a tuning result: a name is not text")
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("not a tuning result: a timing is not a number")
    if found.best not in found.timings_ms or found.best not in candidates:
        raise ValueError(f"not a tuning result: {found.best!r} is not among the candidates")
    return found


def folder() -> Path:
    """Return the folder of the tuning results."""
    root = variables.text("ZMLX_CACHE_DIR") or "~/.cache/zmlx"
    return Path(root).expanduser() / "tuning"


def default_store() -> Store:
    """Return the store in the cache folder; one per folder and process."""
    return _store(folder() / _FILE)


class Memory:
    """Results that cannot outlast this process."""

    def __init__(self) -> None:
        self._known: dict[Subject, Result] = {}

    def find(self, subject: Subject) -> Result | None:
        """Return a result, or None."""
        return self._known.get(subject)

    def add(self, *results: Result) -> None:
        """Remember results."""
        self._known |= {result.subject: result for result in results}

    def all(self) -> list[Result]:
        """Return every result."""
        return list(self._known.values())

    def remove(self, *subjects: Subject) -> None:
        """Forget results."""
        for subject in subjects:
            self._known.pop(subject, None)


class Store(Memory):
    """The results of one file, as this process knows them.

    What is in memory holds also when the file cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self._seen: tuple[int, ...] = ()
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def find(self, subject: Subject) -> Result | None:
        """Return a result from memory, or from what was added to the file since."""
        with self._lock:
            if subject not in self._known:
                self._catch_up()
            return self._known.get(subject)

    def all(self) -> list[Result]:
        """Return every result that this process knows or that is in the file."""
        with self._lock:
            self._catch_up()
            return list(self._known.values())

    def add(self, *results: Result) -> None:
        """Remember results, in memory and at the end of the file."""
        with self._lock:
            self._known |= {result.subject: result for result in results}
            try:
                with _locked(self.file), self.file.open("ab+") as stream:
                    stream.write(_unfinished(stream) + b"".join(map(_line, results)))
            except OSError as error:
                self._say_once(
                    f"zmlx: cannot write {self.file} ({error.strerror}): tuning results are kept "
                    "for this run only; ZMLX_CACHE_DIR names a folder that keeps them"
                )

    def remove(self, *subjects: Subject) -> None:
        """Forget results, in memory and in the file."""
        with self._lock:
            for subject in subjects:
                self._known.pop(subject, None)
            self._rewrite(without=subjects)

    def clear(self) -> int:
        """Forget everything, in memory and on disk; return how many results there were.

        Raises:
            OSError: the file is there and cannot be removed.
        """
        with self._lock:
            self._catch_up()
            count = len(self._known)
            if self.file.exists():
                with _locked(self.file):
                    self.file.unlink(missing_ok=True)
            self._known.clear()
            return count

    def _catch_up(self) -> None:
        """Read the file if it changed since the last time; the caller holds the thread's lock."""
        try:
            status = self.file.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen:
                return
            found, damaged = _parsed(_text_of(self.file))
        except FileNotFoundError:
            return
        except OSError as error:
            self._say_once(f"zmlx: cannot read {self.file} ({error.strerror}): it is left out")
            return
        self._seen = seen
        self._known |= {result.subject: result for result in found}
        if damaged:
            self._say_once(
                f"zmlx: {self.file}: {damaged} damaged line{'s' * (damaged > 1)} left out; "
                "what they held is tuned again"
            )
            self._rewrite()

    def _rewrite(self, without: Sequence[Subject] = ()) -> None:
        """Write the file anew without some results and without what is damaged."""
        if not self.file.exists():
            return
        try:
            with _locked(self.file):
                found, _ = _parsed(self.file.read_bytes())
                write_results(self.file, [r for r in found if r.subject not in without])
        except OSError as error:
            self._say_once(f"zmlx: cannot write {self.file} ({error.strerror}): it stays as it is")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            speech.say(text)


def read_results(file: Path) -> list[Result]:
    """Return the results in a file that a store wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: a line of it is not a result.
    """
    found, damaged = _parsed(file.read_bytes())
    if damaged:
        raise ValueError(f"{file}: {damaged} of {damaged + len(found)} lines are no tuning results")
    return found


def write_results(file: Path, results: Sequence[Result]) -> None:
    """Replace a file by one with these results; the last one of a subject counts.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    last = {result.subject: result for result in results}
    handle, name = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines(map(_line, last.values()))
        # Whoever reads it sees the old one or the new one.
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


@cache
def _store(file: Path) -> Store:
    return Store(file)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file; the system drops it when this process ends, however it ends.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _text_of(file: Path) -> bytes:
    """Return a file's lines, with no other process in the middle of writing one."""
    try:
        with _locked(file):
            return file.read_bytes()
    except OSError:
        # In a folder that only others may write, a last line without an end may be unfinished.
        whole, newline, _ = file.read_bytes().rpartition(b"\n")
        return whole + newline


def _parsed(text: bytes) -> tuple[list[Result], int]:
    """Return the results in a file's lines, and how many lines are none."""
    found, damaged = [], 0
    for line in filter(None, text.split(b"\n")):
        try:
            found.append(result_from_json(json.loads(line)))
        except (ValueError, RecursionError):
            damaged += 1
    return found, damaged


def _line(result: Result) -> bytes:
    return json.dumps(result.to_json()).encode() + b"\n"


def _unfinished(stream: BufferedRandom) -> bytes:
    """Return what ends the last line of a file, when a process died while it wrote that line."""
    if stream.seek(0, os.SEEK_END) == 0:
        return b""
    stream.seek(-1, os.SEEK_END)
    return b"" if stream.read(1) == b"\n" else b"\n"
