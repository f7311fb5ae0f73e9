"""`python -m bench.gpu` around the bench: what compute-sanitizer says, and the exit codes."""

import subprocess
import sys

import pytest

from bench import gpu, machine, runner
from bench.cells import Cell
from bench.store import Store

FACTS = {"device": "tiny", "cpu": "a CPU", "threads": 1, "versions": "torch 0", "source": "0", "commit": "abc"}


@pytest.mark.parametrize(
    "prints, code, row",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"passed": True, "said": "ERROR SUMMARY: 0 errors"}),
        ("========= ERROR SUMMARY: 2 errors", 0, {"passed": False, "said": "ERROR SUMMARY: 2 errors"}),
        ("Traceback\nRuntimeError: no", 1, {"passed": False, "said": "RuntimeError: no"}),
        (
            "========= Error: Device not supported",
            1,
            {"skipped": "compute-sanitizer cannot watch this device: ========= Error: Device not supported"},
        ),
    ],
)
def test_what_the_sanitizer_says(tmp_path, monkeypatch, prints, code, row):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.sanitize("memcheck", 30) == row


def test_a_sanitizer_that_takes_too_long_is_stopped_with_its_children(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.sanitize("memcheck", 0.3) == {"passed": False, "said": "stopped after 0 s"}


@pytest.mark.parametrize(
    "left, row, tests_pass, code",
    [
        ([], {"seconds": [1.0]}, True, 0),
        ([], {"seconds": [1.0]}, False, 1),
        ([], {"error": "RuntimeError: no"}, True, 1),
        ([Cell("sweeps", "tiny", "naive")], {"seconds": [1.0]}, True, gpu.RUN_ME_AGAIN),
    ],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, left, row, tests_pass, code):
    store = Store(tmp_path, FACTS)
    store.finish(Cell("sweeps", "tiny", "bare"), row)
    monkeypatch.setattr(gpu.machine, "facts", lambda device: FACTS)
    monkeypatch.setattr(gpu, "gpu_tests", lambda device, seconds: {"passed": tests_pass, "said": "as it says"})
    monkeypatch.setattr(gpu, "sanitize", lambda tool, seconds: {"skipped": "compute-sanitizer is not installed"})
    monkeypatch.setattr(runner, "end_children_when_ended", lambda: None)
    monkeypatch.setattr(runner, "measure_all", lambda *args, **options: runner.Outcome(store, left))
    monkeypatch.setenv("PEAR_BENCH_COMMAND", "set anew by main")
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == code
    told = capsys.readouterr().out
    assert "- tests: as it says" in told and "- memcheck: compute-sanitizer is not installed" in told
    assert ("run me again" in told) == bool(left)
    assert ("- racecheck" in told) != bool(left)


def test_the_gpu_tests_need_no_plugin_of_pytest():
    """A machine with a GPU may have torch, triton and pytest alone; the project sets an option of pytest-timeout."""
    command = [
        *gpu.tests_command("cuda"),
        "--collect-only",
        "-p",
        "no:timeout",
        "-p",
        "no:xdist",
        "-p",
        "no:hypothesispytest",
    ]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "tests collected" in done.stdout and "test_gpu.py" in done.stdout
