"""Jobs of a block run in other threads, and are done when it ends."""

from __future__ import annotations

import threading

import pytest

from zmlx.backend.cuda import side_by_side as module
from zmlx.backend.cuda.side_by_side import run, side_by_side


def together(jobs, failure=None):
    with side_by_side():
        for job in jobs:
            run(job)
        if failure is not None:
            raise failure


def test_alone_a_job_runs_at_once_and_here():
    seen = []
    run(lambda: seen.append(threading.current_thread()))
    assert seen == [threading.current_thread()]


def test_jobs_run_beside_each_other(monkeypatch):
    monkeypatch.setattr(module, "usable_cpus", lambda: {0, 1, 2})
    meet = threading.Barrier(3, timeout=30)  # which nobody passes alone
    with side_by_side():
        for _ in range(3):
            run(lambda: meet.wait() and None)
    assert not meet.broken


def test_all_are_done_at_the_end():
    done, may_go_on = [], threading.Event()

    def job():
        assert may_go_on.wait(30)
        done.append(threading.current_thread().name)

    with side_by_side():
        run(job)
        with side_by_side():  # belongs to the outer one, which is waited for
            run(job)
        assert not done
        may_go_on.set()
    assert [name.startswith("zmlx-compiler") for name in done] == [True, True]
    assert not any(t.name.startswith("zmlx-compiler") for t in threading.enumerate())


def test_a_block_without_jobs_starts_no_thread(monkeypatch):
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *_: pytest.fail("threads"))
    with side_by_side():
        pass


def test_what_a_job_raises_is_raised_at_the_end():
    def broken():
        raise KeyError("broken")

    done = []
    jobs = [broken, lambda: done.append(1)]
    with pytest.raises(KeyError, match="broken"):
        together(jobs)
    assert done == [1]


def test_a_block_that_raises_waits_too():
    done = []
    with pytest.raises(ValueError, match="block"):
        together([lambda: done.append(1)], ValueError("block"))
    assert done == [1]
    run(lambda: done.append(2))  # at once again
    assert done == [1, 2]


def test_other_threads_have_blocks_of_their_own():
    names = []
    with side_by_side():
        other = threading.Thread(
            target=lambda: run(lambda: names.append(threading.current_thread().name)), name="other"
        )
        other.start()
        other.join()
    assert names == ["other"]
