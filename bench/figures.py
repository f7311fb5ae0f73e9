"""From rows to figures: quantiles over all rounds, ratios within a round. Pure functions of what was stored."""

from statistics import median, quantiles
from typing import NamedTuple

# the questions that measure memory
BYTES = ("memory", "policy-memory", "objectives-memory", "real-memory")
BYTES += ("sweeps", "overheads", "policy", "objectives", "real")


class Quantiles(NamedTuple):
    low: float  # 20 %
    middle: float
    high: float  # 80 %
    samples: int


def spread(samples: list[float]) -> Quantiles:
    """20, 50 and 80 % quantiles, each within the samples."""
    if len(samples) == 1:
        return Quantiles(samples[0], samples[0], samples[0], 1)
    tenths = quantiles(samples, n=10, method="inclusive")
    return Quantiles(tenths[1], median(samples), tenths[7], len(samples))


class Figures:
    """Of one machine, by question, case and peer. What was not measured is None."""

    def __init__(self, rows: dict[str, dict]):
        self.rows = list(rows.values())
        self.turns: dict[tuple[str, str, str], dict[int, dict]] = {}
        for row in self.rows:
            self.turns.setdefault((row["question"], row["case"], row["peer"]), {})[row["turn"]] = row

    def cases(self, question: str) -> list[str]:
        return list(dict.fromkeys(row["case"] for row in self.rows if row["question"] == question))

    def peers(self, question: str, case: str) -> list[str]:
        found = (row["peer"] for row in self.rows if (row["question"], row["case"]) == (question, case))
        return list(dict.fromkeys(found))

    def seconds(self, question: str, case: str, peer: str) -> Quantiles | None:
        turns = self.turns.get((question, case, peer), {}).values()
        samples = [sample for row in turns for sample in row.get("seconds", [])]
        return spread(samples) if samples else None

    def ratio(self, question: str, case: str, peer: str, to: str, of: str = "seconds") -> float | None:
        """The median over rounds around the peers of (median of peer / median of `to`), taken within a round."""
        mine, other = (self.turns.get((question, case, name), {}) for name in (peer, to))
        both = [turn for turn in mine if turn in other and mine[turn].get(of) and other[turn].get(of)]
        return median(median(mine[turn][of]) / median(other[turn][of]) for turn in both) if both else None

    def value(self, question: str, case: str, peer: str, key: str) -> float | None:
        """What round 1 alone has: bytes, errors, tokens."""
        return self.turns.get((question, case, peer), {}).get(1, {}).get(key)

    def bytes(self, case: str, peer: str) -> int | None:
        """Extra memory, by whichever question measured it."""
        found = (self.value(question, case, peer, "bytes") for question in BYTES)
        return next((value for value in found if value is not None), None)

    def not_run(self, question: str, case: str) -> dict[str, str]:
        """Peers without a figure, and why."""
        reasons = {peer: self.turns[question, case, peer] for peer in self.peers(question, case)}
        return {
            peer: next((row[key] for row in turns.values() for key in ("skipped", "error") if key in row), "")
            for peer, turns in reasons.items()
            if any("skipped" in row or "error" in row for row in turns.values())
        }
