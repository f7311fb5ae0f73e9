"""A run that is killed, crashes, hangs or runs out of time loses the cell it was in; the next goes on from there."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench import machine, runner
from bench.cells import Cell
from bench.store import Store

FACTS = {"device": "tiny", "versions": "torch 0", "source": "0", "commit": "abc"}
CELLS = [Cell("sweeps", "tiny", peer) for peer in ("bare", "naive", "pear-token")]
SWEEPS = ["-m", "pytest", "bench/test_sweeps.py", "--device=tiny", "-q", "-s", "-p", "no:cacheprovider"]


def test_rows_of_another_source_or_version_are_not_taken_for_these(tmp_path):
    Store(tmp_path, FACTS).finish(CELLS[0], {"seconds": [1.0]})
    assert Store(tmp_path, {**FACTS, "commit": "def"}).done(CELLS[0])  # the source is the same
    for changed in ("source", "versions", "device"):
        assert not Store(tmp_path, {**FACTS, changed: "other"}).done(CELLS[0])
    assert Store(tmp_path, FACTS).done(CELLS[0]), "those of before are still there"


def test_source_changes_with_the_files(tmp_path, monkeypatch):
    (tmp_path / "pear_kernels" / "triton").mkdir(parents=True)
    file = tmp_path / "pear_kernels" / "triton" / "head.py"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    seen = set()
    for text in ("a = 1", "a = 2", "a = 1"):
        file.write_text(text)
        seen.add(machine.source())
    assert len(seen) == 2


def test_errors_are_kept_until_asked_to_retry(tmp_path):
    store = Store(tmp_path, FACTS)
    store.finish(CELLS[0], {"error": "RuntimeError: no"})
    store.finish(CELLS[1], {"skipped": "not installed"})
    assert store.done(CELLS[0]) and store.done(CELLS[1])
    store.forget_errors()
    again = Store(tmp_path, FACTS)
    assert not again.done(CELLS[0]) and again.done(CELLS[1])


def worker(tmp_path: Path, body: str):
    """In place of pytest: a process that knows the store and does `body` with the first cell that is not done."""
    script = f"""
        import os, sys, time, signal
        sys.path.insert(0, {str(machine.ROOT)!r})
        import json, pathlib
        out = pathlib.Path({str(tmp_path)!r})
        def start(cell):
            (out / "running.json").write_text(json.dumps({{"cell": cell, "since": time.time()}}))
    """
    code = textwrap.dedent(script) + textwrap.dedent(body)
    return lambda *_: subprocess.Popen([sys.executable, "-c", code])


@pytest.fixture
def machinery(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "facts", lambda device: FACTS)
    monkeypatch.setattr(runner, "all_cells", lambda *_: CELLS[:1])

    def measured(body: str, **options):
        monkeypatch.setattr(runner, "start", worker(tmp_path, body))
        return runner.measure_all("tiny", tmp_path, **options)

    return measured


WITHOUT_PYTEST_BENCHMARK = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "pytest_benchmark" else find_spec(name, *more)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
CELL = repr(CELLS[0]._asdict())


def test_a_crash_is_recorded_and_not_repeated(machinery):
    done = machinery(f"start({CELL}); os.kill(os.getpid(), signal.SIGSEGV)")
    assert done.left == [] and done.errors == [f"{CELLS[0]}: the process died with exit code -11"]


def test_a_cell_that_hangs_is_ended(machinery, monkeypatch):
    monkeypatch.setattr(runner, "CELL_SECONDS", 0.3)
    done = machinery(f"start({CELL}); time.sleep(60)")
    assert done.left == [] and done.errors == [f"{CELLS[0]}: took longer than 0.3 s"]


def test_out_of_time_is_no_error(machinery, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.2)
    begin = time.time()
    done = machinery(f"start({CELL}); time.sleep(60)", deadline=begin + 0.5)
    assert done.left == CELLS[:1] and done.errors == []
    assert time.time() - begin < 30


def test_stopping_by_itself_in_time_is_no_error_either(machinery):
    done = machinery("time.sleep(0.6); sys.exit(2)", deadline=time.time() + 0.5)  # as pytest does when told to stop
    assert done.left == CELLS[:1] and done.errors == []


def test_a_failure_before_any_cell_ends_it_with_words(machinery):
    with pytest.raises(SystemExit, match="pytest failed with exit code 4"):
        machinery("sys.exit(4)")


def test_killed_midway_and_resumed(tmp_path):
    """The real thing, with small shapes: no row is lost, none is measured twice, and none is missing in the end.

    What goes on has no pytest-benchmark, as on a machine where it is not installed.
    """
    command = [sys.executable, *SWEEPS, f"--out={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def rows() -> dict:
        files = [file for file in tmp_path.glob("*.json") if file.name != "running.json"]
        return json.loads(files[0].read_text())["rows"] if files else {}

    with subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=subprocess.DEVNULL) as first:
        while len(rows()) < 3 and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    before = rows()
    wanted = {str(cell) for cell in runner.all_cells("tiny", 5) if cell.question == "sweeps"}
    assert 3 <= len(before) < len(wanted)
    without = [sys.executable, "-c", WITHOUT_PYTEST_BENCHMARK, *command[3:], "-p", "no:benchmark"]
    subprocess.run(without, cwd=machine.ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = rows()
    assert set(after) == wanted and {name: after[name] for name in before} == before
