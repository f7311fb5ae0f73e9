"""What do the weights cost, the sequence level, packs of 1 to 1000 sequences, a frozen head, a pass without gradients?

And a gradient tolerance where nothing can be left out: the logits are random, and all columns count.

Each beside what it is an overhead over, in more rounds than the sweeps, since some are to be under a hundredth.
"""

from bench.cells import Cell, interleaved
from bench.shapes import CPU_BASE, GPU_BASE, PACKS

LEVELS = ["unweighted", "pear-token", "pear-token-0.01", "pear-block", "pear-sequence"]
FROZEN = ["bare-frozen", "pear-token-frozen"]
SCORE = ["bare-score", "score", "naive-score"]
PACKED = ["bare", "pear-token", "pear-sequence"]


def cells(device: str, turns: int) -> list[Cell]:
    of = {
        "cuda": (GPU_BASE, GPU_BASE, "pack-", PACKS, 6),
        "cpu": ("cpu-small-4n", CPU_BASE, "cpu-pack-", PACKS, turns),
        "tiny": ("tiny", "tiny", "tiny-pack-", (1, 10), 2),
    }
    levels_case, case, pack, packs, most = of[device]
    rounds, fewer = range(1, most + 1), range(1, max(most // 2, 1) + 1)
    return [
        *interleaved("overheads", levels_case, LEVELS, rounds, 1),
        *interleaved("overheads", case, FROZEN, fewer, 1),
        *interleaved("overheads", case, SCORE, fewer, 1),
        *(cell for s in packs for cell in interleaved("overheads", f"{pack}{s}", PACKED, fewer, 3)),
    ]


def test_overhead(cell, measured):
    measured(cell)
