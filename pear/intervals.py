"""Evaluations of `pear.eval`, compared: bootstrap intervals over problems, and paired differences."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pear.eval import pass_at_k
from pear.runs import MOMENTS, Run


class Interval(NamedTuple):
    """A mean over problems, and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    counts: Sequence[int], samples: int, k: int, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """Mean unbiased pass@k over problems, with the percentile bootstrap's interval over problems.

    It speaks of other problems of the same kind, not of other seeds of training. Where all problems have one pass@k
    (all right, all wrong, a single problem) it has no width, which is no certainty.

    Args:
        counts: (P,) right completions of each problem, each of 0..samples
        samples: completions drawn of each problem
        k: of 1..samples
        seed, draws: of the resampling
        level: share of resamples between the ends, in (0, 1)

    Raises:
        ValueError: no problems, counts or k out of range, draws < 1, level outside (0, 1)
    """
    return _bootstrap(_passes(counts, samples, k), seed, draws, level)


def paired_difference(
    counts_a: Sequence[int],
    counts_b: Sequence[int],
    samples_a: int,
    samples_b: int,
    k: int,
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """pass@k of b minus that of a on the same problems, resampled together: what problems they share cancels.

    Args:
        counts_a, counts_b: (P,) right completions; place i of both is one problem
        samples_a, samples_b: completions of each problem; they may differ
        k, seed, draws, level: as in `bootstrap_interval`

    Raises:
        ValueError: as `bootstrap_interval`, or the two have not the same number of problems
    """
    if len(counts_a) != len(counts_b):
        raise ValueError(f"counts_a and counts_b must be of the same problems, got {len(counts_a)} and {len(counts_b)}")
    return _bootstrap(_passes(counts_b, samples_b, k) - _passes(counts_a, samples_a, k), seed, draws, level)


def _passes(counts: Sequence[int], samples: int, k: int) -> np.ndarray:
    """(P,) pass@k of each problem."""
    values = {count: pass_at_k(samples, count, k) for count in set(counts)}
    return np.array([values[count] for count in counts], dtype=np.float64)


def _bootstrap(values: np.ndarray, seed: int, draws: int, level: float) -> Interval:
    """Interval of the mean of `values` (P,).

    A resample's mean depends only on how often it holds each different value, which is multinomial: so one draw of
    these numbers stands for P draws of problems, and the result does not depend on the problems' order.
    """
    if not len(values):
        raise ValueError("counts: no problems given")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    different, times = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), times / len(values), size=draws)  # (draws, different)
    low, high = np.quantile(drawn @ different / len(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(times @ different / len(values)), float(low), float(high))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations


def _counts(result: dict[str, Any]) -> list[int]:
    return [problem["correct"] for problem in result["problems"]]


def interval_of(result: dict[str, Any] | None, k: int) -> Interval | None:
    """pass@k of an evaluation; None where there is none, or it drew fewer than k samples."""
    if result is None or k > result["samples"]:
        return None
    return bootstrap_interval(_counts(result), result["samples"], k)


def paired_counts(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """Counts (P,) of two evaluations, problem beside problem; None if they were not asked the same prompts."""
    prompts_a, prompts_b = ([problem["prompt"] for problem in each["problems"]] for each in (a, b))
    counts_a, counts_b = _counts(a), _counts(b)
    if prompts_a == prompts_b:
        return counts_a, counts_b
    if Counter(prompts_a) != Counter(prompts_b) or len(set(prompts_a)) < len(prompts_a):
        return None  # with a prompt twice in another order, nothing says which is which
    by_prompt = dict(zip(prompts_b, counts_b, strict=True))
    return counts_a, [by_prompt[prompt] for prompt in prompts_a]


def difference(a: dict[str, Any], b: dict[str, Any], k: int) -> Interval | None:
    """pass@k of evaluation b minus that of a; None if their prompts disagree, or one drew fewer than k samples."""
    paired = paired_counts(a, b)
    if paired is None or k > min(a["samples"], b["samples"]):
        return None
    return paired_difference(*paired, a["samples"], b["samples"], k)


def evaluations_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = [getattr(run, moment) for run in runs for moment in MOMENTS]
    return [each for each in found if each is not None]


def all_ks(runs: Sequence[Run]) -> list[int]:
    """1 and every k that an evaluation was made for: all runs show all of these, since counts give any k."""
    return sorted({1} | {each["k"] for each in evaluations_of(runs)})
