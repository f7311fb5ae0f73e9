"""How long do forward and backward take, and how much memory, over N, V and D, beside the peers and the bare products?

Ratios are taken within a round around the peers. The first call of each peer in a process warms up and counts for
nothing.
"""

from bench.cells import Cell, interleaved
from bench.peers import FULL_PASS
from bench.shapes import CPU_BASE, GPU_BASE, SHAPES, gpu

VARIANTS = ["pear-token-fused", "pear-token-plain"]
MAIN = [name for name in FULL_PASS if name not in ("pear-block", "logprobs", "naive-nll")]
TARGETS = ["bare", "naive", "pear-token", *VARIANTS]
LONG, PUBLISHED = "128k-4k-152k", ["16k-2k-248k", "8k-4k-128k"]
SWEPT = [name for name, shape in SHAPES.items() if shape == gpu(*shape[:3])]  # random inputs, of 128 to 1536 tokens
SWEPT = [name for name in SWEPT if name not in (GPU_BASE, LONG, *PUBLISHED)]
ON_CPU = [name for name in FULL_PASS if name != "torch-weighted"]  # several seconds a call; small shapes have it
SMALL = [name for name in SHAPES if name.startswith("cpu-small")]


def cells(device: str, turns: int) -> list[Cell]:
    several, once = range(1, turns + 1), range(1, 2)
    if device == "tiny":
        return interleaved("sweeps", "tiny", ["bare", "naive", "pear-token", "liger"], range(1, 3)) + interleaved(
            "sweeps", "tiny-2n", ["bare", "naive", "pear-token"], once, 1
        )
    if device == "cpu":
        base = interleaved("sweeps", CPU_BASE, ON_CPU, several)
        fewer = range(1, min(turns, 2) + 1)
        return base + [cell for case in SMALL for cell in interleaved("sweeps", case, MAIN, fewer, 2)]
    rest = [name for name in MAIN if name not in TARGETS]
    return [
        *interleaved("sweeps", GPU_BASE, FULL_PASS, range(1, 3), 0),
        *interleaved("sweeps", LONG, TARGETS, once, 2),
        *(cell for case in PUBLISHED for cell in interleaved("sweeps", case, FULL_PASS, once, 4)),
        *(cell for case in SWEPT for cell in interleaved("sweeps", case, MAIN, once, 5)),
        *interleaved("sweeps", LONG, rest, once, 6),
    ]


def test_forward_and_backward(cell, measured):
    measured(cell)
