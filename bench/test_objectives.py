"""What do other weights, wrong sequences and distillation cost beside our unweighted pass and beside naive versions?

All have the pack of an SFT step. The teacher has half the student's hidden size; from its 32 most likely tokens comes
the offline one. The bare products of the former are one more: its logits.
"""

from bench.cells import Cell, interleaved
from bench.memory import measure_apart
from bench.objectives import BESIDE
from bench.peers import OURS, PEERS
from bench.shapes import CPU_BASE, GPU_BASE

MEASURED = ["bare", "bare-teacher", "unweighted", *dict.fromkeys(peer for peers in BESIDE.values() for peer in peers)]
OWN = [name for name in MEASURED if PEERS[name].package in (OURS, "torch")]
MEMORY = "objectives-memory"  # on a CPU, where it takes a process of its own


def cells(device: str, turns: int) -> list[Cell]:
    if device == "cuda":
        return interleaved("objectives", GPU_BASE, MEASURED, range(1, 3), 3)
    case, peers, most = (CPU_BASE, MEASURED, turns) if device == "cpu" else ("tiny", OWN, 2)
    memory = [Cell(MEMORY, case, peer, rank=2) for peer in (peers if device == "cpu" else ["distill-top-k"])]
    return interleaved("objectives", case, peers, range(1, most + 1), 2) + memory


def test_objective(cell, measured, record):
    if cell.question != MEMORY:
        measured(cell)
        return
    with record(cell) as row:
        row["bytes"] = measure_apart(cell.case, cell.peer)
