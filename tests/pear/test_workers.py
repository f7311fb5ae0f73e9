"""Whatever a job does, its process says so or is replaced, and ends with the one that started it."""

import os
import signal
import time

import pytest
import torch

from pear.io import DataError, WriteError
from pear.workers import Job, WorkerDied, Workers


class OddError(Exception):
    def __init__(self, first, second):  # pickled with the one argument that it passes on, it cannot be read again
        super().__init__(f"{first} and {second}")


def work(tick, what):
    tick(1, 4)
    match what:
        case "data":
            raise DataError("line 3: no such thing")
        case "disk":
            raise WriteError(28, "could not write it")
        case "odd":
            raise OddError("this", "that")
        case "lambda":
            return lambda: None
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            raise SystemExit(3)
    return what, os.getpid(), torch.get_num_threads()


def run(workers, *whats, function=work):
    """Results by job, errors by job."""
    waiting, results, ticks = list(whats), {}, set()

    def take():
        return (waiting[0], Job(function, dict(what=waiting.pop(0)))) if waiting else None

    def finished(outcome):
        results[outcome.name] = outcome.get()

    errors = workers.run(take, lambda *tick: ticks.add(tick), finished)
    assert {(name, 0.25) for name in results} <= ticks
    return results, errors


@pytest.fixture(scope="module")
def pair():
    with Workers(2) as workers:
        yield workers


def test_jobs_share_two_processes_of_one_thread(pair):
    results, errors = run(pair, "one", "two", "three")
    assert not errors and {name: what for name, (what, _, _) in results.items()} == {n: n for n in results}
    assert set(results) == {"one", "two", "three"}
    assert len({pid for _, pid, _ in results.values()} | {os.getpid()}) == 3
    assert {threads for _, _, threads in results.values()} == {1}


@pytest.mark.parametrize(
    "what, kind, message",
    [
        ("data", DataError, "^line 3: no such thing$"),
        ("disk", WriteError, "could not write it"),
        ("odd", RuntimeError, "^OddError: this and that$"),
        ("lambda", TypeError, "result must be picklable"),
        ("killed", WorkerDied, "killed by signal 9"),
        ("exit", WorkerDied, "exit code 3"),
    ],
)
def test_an_error_arrives_and_ends_this_call_alone(pair, what, kind, message):
    results, errors = run(pair, what, "beside", "never")
    assert list(errors) == [what] and set(results) <= {"beside", "never"}
    with pytest.raises(kind, match=message) as raised:
        raise errors[what]
    if what == "disk":
        assert raised.value.errno == 28
    if what in ("data", "disk", "odd"):
        assert "in work\n" in str(raised.value.__cause__)  # where it was raised
    results, errors = run(pair, "after", "and after")
    assert set(results) == {"after", "and after"} and not errors


def test_a_job_that_cannot_be_sent_is_an_error_of_its_own(pair):
    def local(tick, what):
        pass

    results, errors = run(pair, "local", function=local)
    assert not results and "local" in str(errors["local"])


def test_in_this_process_no_job_starts_after_an_error():
    with Workers(1) as workers:
        results, errors = run(workers, "one", "odd", "never")
    assert list(results) == ["one"] and results["one"][1] == os.getpid()
    assert isinstance(errors["odd"], OddError)


def wait_and_clean_up(tick, path):
    try:
        tick(1, 4)
        time.sleep(600)
    finally:
        path.touch()


def test_a_job_that_is_broken_off_cleans_up(tmp_path):
    def interrupt(name, share):
        if share == 0.25:
            raise KeyboardInterrupt

    jobs = iter([("waits", Job(wait_and_clean_up, dict(path=tmp_path / "cleaned up")))])
    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        workers.run(lambda: next(jobs, None), interrupt, print)
    assert (tmp_path / "cleaned up").exists()
