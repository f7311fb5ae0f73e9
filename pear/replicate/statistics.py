"""Intervals over seeds and problems together: both are samples of what might have been, and neither may be ignored.

A value for each seed and problem, (S, P), has two factors that are crossed: every seed meets every problem. The
"pigeonhole" bootstrap (Owen 2007, doi 10.1214/07-AOAS122) draws seeds and problems anew, each with replacement and each
without regard to the other. What it says of the variance of the mean is too much rather than too little, by up to
three times where cells differ more than their seeds and problems do.

But with few seeds it is too narrow where seeds are what differs: of S values the percentile bootstrap knows a
variance that is (S - 1) / S of the right one, and nothing of Student's t. In simulations its 95 % interval covers
88 % with 8 seeds and 74 % with 3. So the interval here also spans Student's t interval of the seeds' means, at each
end whichever is further out; with a hundred problems it then covers 95 % or more, whichever factor it is that differs.
"""

import functools
import math

import numpy as np

from pear.eval import pass_at_k
from pear.intervals import Interval

DRAWS = 4000
_DECIMALS = 12  # what differs by less is rounding: equal means, summed in another order


def pass_matrix(counts: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased pass@k, float64, of counts of right completions, of any shape.

    Raises:
        ValueError: counts that are no whole numbers of 0..samples, or k outside 1..samples
    """
    counts = np.asarray(counts)
    if not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"counts must be whole numbers, got an array of {counts.dtype}")
    values = np.array([pass_at_k(samples, count, k) for count in range(samples + 1)])
    if counts.size and not 0 <= counts.min() <= counts.max() <= samples:
        raise ValueError(f"counts must lie between 0 and samples={samples}, got {counts.min()} to {counts.max()}")
    return values[counts]


# ---------------------------------------------------------------------------------------------------------------------
# Means


def crossed_bootstrap(
    values: np.ndarray,  # (S, P)
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = 0.95,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The mean of `values`, with an interval for other seeds and other problems of the same kind.

    The percentile interval of the crossed bootstrap, widened to span Student's t interval of the seeds' means (see
    the top of this file). For two arms on the same seeds and problems, give the difference of their values. With one
    seed it speaks of problems alone; of one seed and one problem it has no width, which is no certainty.

    Args:
        values: (S, P), finite; row a seed, column a problem
        seed, draws: of the resampling
        level: share of resamples between the ends, in (0, 1)
        within: what a mean can be, which no end exceeds: (0, 1) for a pass@k

    Raises:
        ValueError: not two-dimensional, empty or not finite; draws < 1; level outside (0, 1)
    """
    means = crossed_means(values, seed=seed, draws=draws)
    _check_level(level)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    of_seeds = np.mean(values, axis=1)  # (S,)
    mean = float(of_seeds.mean())
    half, seeds = 0.0, len(of_seeds)
    if seeds > 1:
        half = student_quantile((1 + level) / 2, seeds - 1) * float(of_seeds.std(ddof=1)) / math.sqrt(seeds)
    low, high = min(low, mean - half), max(high, mean + half)
    low, high = (min(max(float(end), within[0]), within[1]) for end in (low, high))
    return Interval(mean, low, high)


def crossed_means(values: np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """(draws,) means of `values` (S, P) over seeds and problems drawn anew, each with replacement.

    Args and errors as of `crossed_bootstrap`.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must have a row a seed and a column a problem, got the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {np.count_nonzero(~np.isfinite(values))} that are not")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    of_seeds, of_problems = _shares(*values.shape, seed, draws)
    return np.einsum("dp,dp->d", of_seeds @ values, of_problems)


@functools.lru_cache(maxsize=4)
def _shares(seeds: int, problems: int, seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares (draws, S) and (draws, P) of seeds and of problems in each resample.

    How often each is drawn is multinomial. All intervals of one study share their resamples, so that what they say
    differs by the values alone.
    """
    random = np.random.default_rng(seed)
    return tuple(random.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in (seeds, problems))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def sign_counts(difference: np.ndarray) -> tuple[int, int, int]:
    """Seeds won, tied and lost, by the sign of each seed's mean over problems of `difference` (S, P)."""
    means = np.round(np.mean(difference, axis=1), _DECIMALS)
    return int((means > 0).sum()), int((means == 0).sum()), int((means < 0).sum())


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, for a probability of 0.5 or more and whole degrees of freedom, to 1e-9 or better.

    By bisection: for whole degrees of freedom the distribution function is a finite sum.
    """
    if freedom < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"freedom must be at least 1 and probability in [0.5, 1), got {freedom} and {probability}")
    low, high = 0.0, 1.0
    while _student_below(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_below(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for n in range(1 + odd, freedom, 2):  # term: cos^(n - 1), times 1/2 . 3/4 ... if even, 2/3 . 4/5 ... if odd
        total += term
        term *= math.cos(angle) ** 2 * n / (n + 1)
    inside = math.sin(angle) * total  # P(|T| <= t)
    return 0.5 + ((angle + inside) / math.pi if odd else inside / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The order of arms


def rank_correlation(
    before: np.ndarray,  # (A, S, P)
    after: np.ndarray,  # (A, S, P)
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Interval | None:
    """Spearman's correlation, over A arms, of their means before and after; None where it is not defined.

    The interval is the percentile interval of the crossed bootstrap: seeds and problems are drawn anew, the same for
    all arms, before and after. Resamples without a defined correlation are left out. It contains the correlation
    itself, which resampling, since it adds noise to the means, draws towards 0. The arms are those of the study, not
    a sample of arms.

    Raises:
        ValueError: shapes that disagree, and as `crossed_bootstrap`
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.ndim != 3 or before.shape != after.shape:
        raise ValueError(
            "before and after must have one shape (arms, seeds, problems), "
            f"got {before.shape} and {after.shape}: give the same arms, seeds and problems"
        )
    _check_level(level)
    correlation = _spearman(before.mean((1, 2))[None], after.mean((1, 2))[None])[0]
    if np.isnan(correlation):
        return None
    drawn_before, drawn_after = (
        np.stack([crossed_means(arm, seed=seed, draws=draws) for arm in values], axis=1) for values in (before, after)
    )
    drawn = _spearman(drawn_before, drawn_after)
    drawn = np.append(drawn[~np.isnan(drawn)], correlation)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(correlation), min(float(low), float(correlation)), max(float(high), float(correlation)))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(D,) Pearson's correlation of the ranks in each row of a and b (D, A); NaN where all of a row are tied."""
    ranks_a, ranks_b = (ranks - ranks.mean(1, keepdims=True) for ranks in (average_ranks(a), average_ranks(b)))
    scale = np.sqrt((ranks_a**2).sum(1) * (ranks_b**2).sum(1))
    product = (ranks_a * ranks_b).sum(1)
    return np.divide(product, scale, out=np.full(len(scale), np.nan), where=scale > 0).clip(-1, 1)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, smallest first; what is equal shares the mean of its ranks."""
    values = np.round(values, _DECIMALS)
    mine, others = values[..., :, None], values[..., None, :]
    return (others < mine).sum(-1) + ((others == mine).sum(-1) + 1) / 2
