"""Cells as pytest cases: in order of importance, what is done left out, stopped in time, each result stored at once.

`python -m bench` and `python -m bench.gpu` call this; by hand: `pytest bench --device cpu --out runs/bench -k sweeps`.
"""

import contextlib
import functools
import gc
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from bench import machine, measure
from bench.accuracy import Exact
from bench.cells import Cell
from bench.peers import PEERS, Peer
from bench.runner import BROKEN_DEVICE
from bench.shapes import SHAPES, Inputs, rotating
from bench.store import Store


class Unavailable(Exception):
    """Why a peer is not measured."""


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cuda", "cpu", "tiny"), default="cpu", help="whose cells; tiny: a trial run")
    parser.addoption("--out", type=Path, default=Path("runs/bench"), help="where results are kept, and resumed from")
    parser.addoption("--turns", type=int, default=5, help="rounds around the peers on a CPU")
    parser.addoption("--deadline", type=float, default=float("inf"), help="no cell starts after this time (epoch)")


def pytest_configure(config):
    config.addinivalue_line("markers", "benchmark: options of pytest-benchmark, which need not be installed")
    config.pear_store = Store(config.getoption("out"), machine.facts(config.getoption("device")))


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = metafunc.module.cells(metafunc.config.getoption("device"), metafunc.config.getoption("turns"))
        metafunc.parametrize("cell", cells, ids=str)


def pytest_collection_modifyitems(config, items):
    # pytest has an item for a question without cells too; its parameter is no cell
    left = [item for item in items if isinstance(cell_of(item), Cell) and not config.pear_store.done(cell_of(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = sorted(left, key=lambda item: cell_of(item).rank)
    timer = measure.clock(config.getoption("device"))
    for item in items:
        item.add_marker(pytest.mark.benchmark(group=cell_of(item).case, timer=timer))


def cell_of(item) -> Cell:
    return item.callspec.params["cell"]


def pytest_runtest_setup(item):
    if time.time() > item.config.getoption("deadline"):
        item.session.shouldstop = "out of time"
        pytest.skip("out of time")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["pear"] = config.pear_store.facts


@pytest.fixture
def record(request):
    """`with record(cell) as row:` keeps what is put into `row`, or why there is nothing to put."""
    return lambda cell: recording(request.config.pear_store, cell)


@contextlib.contextmanager
def recording(store: Store, cell: Cell):
    row: dict = {}
    store.start(cell)
    try:
        check_available(store, cell)
        yield row
    except Unavailable as reason:
        row["skipped"] = str(reason)
    except Exception as error:  # a peer's, of whatever kind: the table says so, and the next cell has its turn
        if out_of_memory(error):
            row["skipped"] = "out of memory"
        else:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    store.finish(cell, row)
    print(f"\n{cell}: {in_short(row)} ", end="", flush=True)
    free()
    if "error" in row:
        leave_broken_device()
        pytest.fail(f"{cell}: {row['error']}", pytrace=False)
    if "skipped" in row:
        pytest.skip(row["skipped"])


def in_short(row: dict) -> str:
    """A line to see progress by."""
    if "seconds" in row:
        memory = f", {row['bytes'] / 2**20:.0f} MiB" if "bytes" in row else ""
        return f"{1e3 * median(row['seconds']):.2f} ms{memory}"
    return ", ".join(f"{key} {row[key]}" for key in ("skipped", "error", "bytes", "tokens", "dX", "dW") if key in row)


def check_available(store: Store, cell: Cell) -> None:
    reason = PEERS[cell.peer].unavailable(SHAPES[cell.case]) if cell.case in SHAPES else None
    before = store.rows.get(str(cell._replace(turn=1)), {}) if cell.turn > 1 else {}
    if reason or "skipped" in before:
        raise Unavailable(reason or before["skipped"])
    if "error" in before:
        raise Unavailable(f"round 1: {before['error']}")


def out_of_memory(error: BaseException | None) -> bool:
    """Also where a library wraps the error in one of its own."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def leave_broken_device() -> None:
    """After an illegal access every later call fails too: who started us starts a new process for what is left."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(BROKEN_DEVICE)


class HeldInputs(dict[str, list[Inputs]]):
    """Input sets of one case at a time; the previous ones go when the case changes."""

    exact: Callable | None = None

    def __missing__(self, case: str) -> list[Inputs]:
        self.clear()
        self.exact = None
        free()
        self[case] = rotating(SHAPES[case])
        return self[case]

    def of(self, case: str, peer: Peer) -> list[Inputs]:
        """With a teacher from the first peer on that wants one."""
        if peer.taught and self[case][0].teacher is None:
            self[case] = [x.taught(seed) for seed, x in enumerate(self[case])]
        return self[case]

    def exact_at(self, case: str, level: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dX and dW for the first set, in float64. Kept for one level at a time."""
        x = self[case][0]
        if self.exact is None:
            self.exact = functools.lru_cache(maxsize=1)(Exact(x).at)
        return self.exact(level)


@pytest.fixture(scope="session")
def inputs() -> HeldInputs:
    return HeldInputs()


@pytest.fixture(scope="session")
def warm() -> dict[tuple[str, str], float]:
    """Seconds of a call, of each (case, peer) that is loaded and compiled in this process."""
    return {}


@pytest.fixture
def measured(benchmark, record, inputs, warm):
    """`measured(cell)`: the time of one peer on one case in one turn and, on a GPU, its memory."""

    def of(cell: Cell) -> None:
        with record(cell) as row:
            peer, shape = PEERS[cell.peer], SHAPES[cell.case]
            sets = inputs.of(cell.case, peer)
            call = measure.rotate(peer, sets)
            try:
                if (cell.case, cell.peer) not in warm:
                    warm[cell.case, cell.peer] = measure.warm_up(call, shape.device)
                row.update(measure.time_turn(benchmark, call, warm[cell.case, cell.peer], shape.device))
                if shape.device == "cuda" and cell.turn == 1:
                    row["bytes"] = measure.extra_memory(peer, sets[0], shape)
            finally:
                for x in sets:
                    x.clear()

    return of


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark(request):
        return measure.Benchmark(request.node.get_closest_marker("benchmark").kwargs["timer"])
