"""A cell: one thing to measure, and the smallest piece of work that is stored, skipped when done, and resumed."""

from typing import NamedTuple


class Cell(NamedTuple):
    question: str  # whose file it is: "sweeps", "overheads", "policy", ..., or its memory: "policy-memory"
    case: str
    peer: str
    turn: int = 1  # of the rounds around the peers of a case
    rank: int = 0  # what is asked first; not part of the identity

    def __str__(self) -> str:
        return f"{self.question}/{self.case}/{self.peer}/{self.turn}"


def interleaved(question: str, case: str, peers: list[str], turns: range, rank: int = 0) -> list[Cell]:
    """Round 1 of all peers, then round 2, ..., each in another order, so that a slow minute falls on everyone."""
    cells = []
    for turn in turns:
        shift = (5 * turn) % len(peers)
        cells += [Cell(question, case, peer, turn, rank) for peer in peers[shift:] + peers[:shift]]
    return cells
