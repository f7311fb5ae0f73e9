"""Runs the cells in a process of their own, which may die, hang or run out of time without taking the rest along."""

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import machine
from bench.cells import Cell
from bench.peers import OURS, PEERS
from bench.store import Store

QUESTIONS = ("sweeps", "overheads", "policy", "objectives", "accuracy", "memory", "largest", "real")
CELL_SECONDS = 300  # a cell that takes longer is stopped, and recorded as such
GRACE = 15  # seconds that the cell in hand may go on past the deadline
NOTHING_TO_DO, BROKEN_DEVICE = 5, 86  # exit codes: pytest's, and ours (conftest.py)


class Outcome(NamedTuple):
    store: Store
    left: list[Cell]  # not measured yet

    @property
    def errors(self) -> list[str]:
        """Of ours and of PyTorch's. Another library's are in the report: it may not fit the versions that are here."""
        mine = {name for name, peer in PEERS.items() if peer.package in (OURS, "torch")}
        rows = self.store.rows.items()
        return [f"{name}: {row['error']}" for name, row in rows if "error" in row and row["peer"] in mine]


def end_children_when_ended() -> None:
    """For a `main`: SIGTERM unwinds the stack, as Ctrl-C does, so that the measuring process is ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))


def all_cells(device: str, turns: int, questions: Sequence[str] = QUESTIONS) -> list[Cell]:
    """Of these questions, the most important first."""
    modules = [importlib.import_module(f"bench.test_{question}") for question in questions]
    cells = [cell for module in modules for cell in module.cells(device, turns)]
    return sorted(cells, key=lambda cell: cell.rank)


def measure_all(
    device: str,
    out: Path,
    *,
    turns: int = 5,
    deadline: float = float("inf"),
    retry: bool = False,
    only: str = "",  # of their cells those that pytest -k would choose
    questions: Sequence[str] = QUESTIONS,
) -> Outcome:
    """Measures what is not in `out` yet, until all is there or the deadline (seconds since the epoch) comes."""
    store = Store(out, machine.facts(device))
    store.running.unlink(missing_ok=True)
    if retry:
        store.forget_errors()
    cells = all_cells(device, turns, questions)
    while time.time() < deadline and not all(store.done(cell) for cell in cells):
        reason, code = watch(start(device, out, turns, deadline, only, questions), store, deadline)
        store = Store(out, store.facts)
        died_in = store.interrupted()
        if died_in and reason != "deadline":
            store.finish(died_in[0], {"error": reason or f"the process died with exit code {code}"})
        elif code != BROKEN_DEVICE:
            # 1: a cell ended in an error, which is kept; past the deadline pytest is told to stop
            if reason is None and code not in (0, 1, NOTHING_TO_DO) and time.time() < deadline:
                sys.exit(f"pytest failed with exit code {code}; what was measured before is kept in {out}")
            break
    return Outcome(store, [cell for cell in cells if not store.done(cell)])


def start(device: str, out: Path, turns: int, deadline: float, only: str, questions: Sequence[str]) -> subprocess.Popen:
    # the project's own options want plugins of pytest, which may be missing where a GPU is
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        *(f"bench/test_{question}.py" for question in questions),
    ]
    command += ["-q", "-s", "-rN", "--no-header", "--disable-warnings", "-p", "no:cacheprovider"]
    command += [f"--device={device}", f"--out={out.resolve()}", f"--turns={turns}", f"--deadline={deadline}"]
    if importlib.util.find_spec("pytest_benchmark"):
        command.append("--benchmark-quiet")
    if only:
        command += ["-k", only]
    # a test of ours may be who calls, in a worker of pytest-xdist, where pytest-benchmark would measure nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # results are filed under the caller's threads: with others the child's would be found by nobody
    own = {"PYTEST_TIMEOUT": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=machine.ROOT, env={**inherited, **own})


def watch(process: subprocess.Popen, store: Store, deadline: float) -> tuple[str | None, int]:
    """Waits for the process; ends it, with the reason, where a cell takes too long or the deadline is long past."""
    try:
        while process.poll() is None:
            time.sleep(0.2)
            running = store.interrupted()
            if running and time.time() - running[1] > CELL_SECONDS:
                return end(process, f"took longer than {CELL_SECONDS} s")
            if time.time() > deadline + GRACE:
                return end(process, "deadline")
    except BaseException:
        end(process, "")
        raise
    return None, process.returncode


def end(process: subprocess.Popen, reason: str) -> tuple[str, int]:
    process.kill()
    return reason, process.wait()
