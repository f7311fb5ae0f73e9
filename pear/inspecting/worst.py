"""Which rows a person should look at."""

from typing import NamedTuple

import numpy as np

from pear.inspecting.statistics import trains
from pear.inspecting.tokens import Tokens, log_ratios


class Judged(NamedTuple):
    """(S,) each."""

    mean_weight: np.ndarray
    mean_log_ratio: np.ndarray  # NaN where no token has a ratio
    trains: np.ndarray  # share of the row's tokens


REASONS = (
    "lowest mean weight",
    "largest mean |log-ratio|",
    "highest mean weight",
    "largest |log-ratio| of a token",
)
TOLD = 3  # ranks from which a row's second reason is left out
TYPICAL = "an ordinary row: the median mean weight"


def judge(tokens: Tokens, g: np.ndarray) -> Judged:
    """Each row by its weights `g` (N,) and its log-ratios."""
    has, begins = tokens.has_ratio, tokens.starts[:-1]
    sums = np.add.reduceat(np.where(has, np.nan_to_num(log_ratios(tokens)), 0.0), begins)
    counts = np.add.reduceat(has.astype(np.int64), begins)
    return Judged(
        np.add.reduceat(g, begins) / tokens.lengths,
        np.where(counts > 0, sums / np.maximum(counts, 1), np.nan),
        np.add.reduceat(trains(g).astype(np.int64), begins) / tokens.lengths,
    )


def choose(tokens: Tokens, judged: Judged, rows: int) -> dict[int, list[str]]:
    """At most `rows` rows and why each was chosen: the worst by each reason in turn, and last an ordinary one."""
    if rows < 1:
        return {}
    sizes = np.abs(np.nan_to_num(log_ratios(tokens)))
    largest = np.maximum.reduceat(sizes, tokens.starts[:-1])
    by_reason = [
        judged.mean_weight,
        -np.abs(np.nan_to_num(judged.mean_log_ratio)),
        -judged.mean_weight,
        -largest,
    ]
    orders = [np.argsort(values, kind="stable").tolist() for values in by_reason]
    places = min(rows, len(orders[0]))
    chosen: dict[int, list[str]] = {}
    for rank in range(places):
        for reason, order in zip(REASONS, orders, strict=True):
            row = order[rank]
            if row in chosen or len(chosen) < max(1, places - 1):
                chosen.setdefault(row, [])
                if rank < TOLD or not chosen[row]:
                    chosen[row].append(f"{reason} (no. {rank + 1})" if rank else reason)
    middle = len(orders[0]) // 2
    ordinary = sorted(range(len(orders[0])), key=lambda rank: abs(rank - middle))
    if len(chosen) < places:
        chosen[next(row for rank in ordinary if (row := orders[0][rank]) not in chosen)] = [TYPICAL]
    return chosen
