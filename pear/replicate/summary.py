"""The figures of a study that tables and pictures share: pass@k, differences and order of arms, with intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pear.intervals import Interval
from pear.replicate.results import Results
from pear.replicate.statistics import crossed_bootstrap, pass_matrix, rank_correlation, sign_counts


class Difference(NamedTuple):
    """An arm minus another, paired by seed and problem, as shares; and how many seeds it won, tied and lost."""

    interval: Interval
    won: int
    tied: int
    lost: int


def passes(results: Results, arm: str, moment: str, k: int, seeds: Sequence[int] | None = None) -> np.ndarray:
    """(S, P) pass@k of an arm; a row for each of `seeds`, None for all of the arm."""
    return pass_matrix(results.counts(arm, moment, seeds), results.samples(arm, moment), k)


def rate(results: Results, arm: str, moment: str, k: int) -> Interval:
    """pass@k over the arm's seeds and all problems."""
    return crossed_bootstrap(passes(results, arm, moment, k), within=(0, 1))


def gain(results: Results, arm: str, k: int) -> Interval:
    """pass@k after RL minus that before, of one arm."""
    change = passes(results, arm, "after", k) - passes(results, arm, "before", k)
    return crossed_bootstrap(change, within=(-1, 1))


def difference(results: Results, arm: str, moment: str, k: int, seeds: Sequence[int] | None = None) -> Difference:
    """pass@k of an arm minus that of the baseline, on the arm's seeds or on `seeds`."""
    seeds = results.seeds_of(arm) if seeds is None else seeds
    values = passes(results, arm, moment, k, seeds) - passes(results, results.study["baseline"], moment, k, seeds)
    return Difference(crossed_bootstrap(values, within=(-1, 1)), *sign_counts(values))


def order(results: Results, k: int) -> Interval | None:
    """Rank correlation of the arms' pass@k before and after RL; None where all arms are alike."""
    before, after = (
        np.stack([passes(results, arm, moment, k) for arm in results.arms]) for moment in ("before", "after")
    )
    return rank_correlation(before, after)


def compared(results: Results) -> list[str]:
    """The arms that are compared with the baseline."""
    return [arm for arm in results.arms if arm != results.study["baseline"]]


def ablation_rows(results: Results) -> list[str]:
    """The arms that ablations started from, then the ablations; empty without ablations.

    That is the first arm of an ablation's weighting and level, or else the primary arm.
    """
    if not results.ablations:
        return []
    primary = results.study["primary"]["arm"]
    kinds = {_kind(options): arm for arm, options in reversed(results.study["arms"].items())}
    parents = [kinds.get(_kind(options), primary) for options in results.study["ablations"].values()]
    known = [arm for arm in dict.fromkeys(parents) if arm in results.arms and arm != results.study["baseline"]]
    return [*known, *results.ablations]


def _kind(options: dict[str, Any]) -> tuple[Any, Any]:
    return options.get("weighting"), options.get("level")
