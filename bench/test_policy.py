"""What does RL's loss cost beside SFT's and beside TRL's and Liger's, in time and memory?

All peers have the same inputs, the pack of an SFT step with an advantage a sequence. Ours and TRL's give the entropy,
which a trainer logs; the naive way and Liger's do not.
"""

from bench.cells import Cell, interleaved
from bench.memory import measure_apart
from bench.shapes import CPU_BASE, GPU_BASE

SFT = ["bare", "unweighted", "pear-token"]
OURS = ["policy-grpo", "policy-gspo", "policy-grpo-entropy"]
PEERS = [*SFT, "naive-grpo", *OURS, "trl-grpo", "liger-grpo"]
MEMORY = "policy-memory"  # on a CPU, where it takes a process of its own


def cells(device: str, turns: int) -> list[Cell]:
    if device == "cuda":
        return interleaved("policy", GPU_BASE, PEERS, range(1, 3), 3)
    case, peers, most = (CPU_BASE, PEERS, turns) if device == "cpu" else ("tiny", ["bare", "naive-grpo", *OURS], 2)
    memory = [Cell(MEMORY, case, peer, rank=2) for peer in (peers if device == "cpu" else OURS[:1])]
    return interleaved("policy", case, peers, range(1, most + 1), 2) + memory


def test_policy_loss(cell, measured, record):
    if cell.question != MEMORY:
        measured(cell)
        return
    with record(cell) as row:
        row["bytes"] = measure_apart(cell.case, cell.peer)
