"""How long do forward and backward take on a trained model's logits, and how far off are the gradients that come of it?

SmolLM2's hidden states and head, and for the shapes that were published inputs fitted to them (`bench/fitted.py`). The
error of dX and dW is each peer's own, on the inputs that are timed, against what is exact for its loss in float64.
"""

from bench.accuracy import relative
from bench.cells import Cell, interleaved
from bench.memory import measure_apart
from bench.peers import FULL_PASS, PEERS, TOLERANT
from bench.shapes import TEXTS
from pear_kernels import linear_pear_loss

VARIANTS = ["pear-token-fused", "pear-token-plain"]
MEASURED = [name for name in FULL_PASS if name not in VARIANTS] + TOLERANT
ON_CPU = [name for name in MEASURED if name != "torch-weighted"]  # a minute a call
FIRST = ["bare", "naive", "naive-nll", "pear-token", *TOLERANT, "cce", "cce-weighted", "liger", "liger-tuned"]
ROUNDED = ["naive", "naive-nll", "pear-token", *TOLERANT]  # in bf16 on a CPU
ERRORS, MEMORY = "real-errors", "real-memory"
FITTED = ["fitted-8k-4k-152k", "fitted-16k-2k-248k", "fitted-8k-4k-128k", "fitted-samples-8k-4k-152k"]


def cells(device: str, turns: int) -> list[Cell]:
    if device == "tiny":
        peers = ["bare", "naive", "pear-token"]
        return interleaved("real", "fitted-tiny", peers, range(1, 3), 2) + errors("fitted-tiny", peers, 2)
    if device == "cpu":
        memory = ["bare", "naive", "pear-token", *TOLERANT]
        cases = [f"real-{text}" for text in TEXTS]
        return [  # what a busy machine does not change comes first
            *(cell for case in cases for cell in errors(case, ON_CPU, 3)),
            *errors("real-code-bf16", ROUNDED, 3),
            *(Cell(MEMORY, "real-code", peer, rank=3) for peer in memory),
            *(cell for case in cases for cell in interleaved("real", case, ON_CPU, range(1, turns + 1), 4)),
        ]
    rest = [name for name in MEASURED if name not in FIRST]
    base, *others = [*FITTED, *(f"real-{text}-cuda" for text in TEXTS)]
    plan = [(base, FIRST, 2, 0), *((case, FIRST, 1, 1) for case in others)]
    plan += [(case, rest, 1, 4) for case in (base, *others)]
    return [
        cell
        for case, peers, most, rank in plan
        for cell in interleaved("real", case, peers, range(1, most + 1), rank) + errors(case, peers, rank)
    ]


def errors(case: str, peers: list[str], rank: int) -> list[Cell]:
    """Peers of one level after each other: what is exact is computed once for each."""
    ordered = sorted(peers, key=lambda name: str(PEERS[name].level))
    return [Cell(ERRORS, case, name, rank=rank) for name in ordered if name != "bare"]


def test_real(cell, measured, record, inputs):
    if cell.question == "real":
        measured(cell)
        return
    with record(cell) as row:
        if cell.question == MEMORY:
            row["bytes"] = measure_apart(cell.case, cell.peer)
            return
        peer, x = PEERS[cell.peer], inputs[cell.case][0]
        _, dx, dw = inputs.exact_at(cell.case, peer.level)
        x.clear()
        peer.run(x)
        row.update(dX=relative(x.hidden.grad, dx), dW=relative(x.weight.grad, dw))
        x.clear()
        if peer.tolerance:
            given = x.hidden, x.weight, x.target, x.behavior_logprobs
            stats = linear_pear_loss(*given, cu_seqlens=x.cu_seqlens, gradient_tolerance=peer.tolerance).stats
            row.update(kept=float(stats["gradient_kept"]), left_out=float(stats["gradient_left_out"]))
