"""How much memory do forward and backward take on a CPU? (On a GPU the sweeps and the overheads say so.)"""

from bench.cells import Cell
from bench.memory import measure_apart
from bench.shapes import CPU_BASE
from bench.test_sweeps import ON_CPU

LONG = ["pear-token", "pear-block", "pear-sequence"]  # the naive way would take 6 GB and more


def cells(device: str, turns: int) -> list[Cell]:
    if device == "tiny":
        return [Cell("memory", "tiny", "pear-token", rank=4)]
    if device == "cuda":
        return []
    cases = {CPU_BASE: ON_CPU, "cpu-16k": LONG}
    return [Cell("memory", case, peer, rank=1) for case, peers in cases.items() for peer in peers]


def test_peak(cell, record):
    with record(cell) as row:
        row["bytes"] = measure_apart(cell.case, cell.peer)
