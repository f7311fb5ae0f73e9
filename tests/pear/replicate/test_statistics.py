"""Intervals over seeds and problems against loops, exact enumeration and simulated designs whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pear.eval import pass_at_k
from pear.replicate.statistics import (
    average_ranks,
    crossed_bootstrap,
    crossed_means,
    pass_matrix,
    rank_correlation,
    sign_counts,
    student_quantile,
)

VALUES = np.random.default_rng(5).normal(size=(4, 7)) + np.array([[0.0], [1.0], [-1.0], [0.5]])


def test_pass_matrix_is_pass_at_k_of_each_count():
    counts = np.random.default_rng(0).integers(0, 9, size=(3, 5))
    found = pass_matrix(counts, 8, 4)
    assert found.dtype == np.float64
    for place, count in np.ndenumerate(counts):
        assert found[place] == pass_at_k(8, int(count), 4)
        assert found[place] == pytest.approx(1 - math.comb(8 - count, 4) / math.comb(8, 4))


@pytest.mark.parametrize(
    "counts, k, message",
    [
        ([[9]], 1, "counts must lie between 0 and samples=8, got 9 to 9"),
        ([[-1]], 1, "counts must lie between 0 and samples=8, got -1 to -1"),
        ([[0.5]], 1, "counts must be whole numbers, got an array of float64"),
        ([[1]], 9, "k must lie between 1 and samples=8, got 9"),
    ],
)
def test_pass_matrix_refuses(counts, k, message):
    with pytest.raises(ValueError, match=message):
        pass_matrix(np.array(counts), 8, k)


# ---------------------------------------------------------------------------------------------------------------------
# The crossed bootstrap


def looped_means(values, draws, seed):
    """The bootstrap as words say it: draw seeds, draw problems, take the cells where they cross, take their mean."""
    random, means = np.random.default_rng(seed), []
    for _ in range(draws):
        rows = random.integers(0, values.shape[0], values.shape[0])
        columns = random.integers(0, values.shape[1], values.shape[1])
        means.append(sum(values[s, p] for s in rows for p in columns) / values.size)
    return np.array(means)


def test_resampled_means_are_distributed_as_those_of_a_loop():
    ours, theirs = crossed_means(VALUES, draws=40_000), looped_means(VALUES, 6000, seed=1)
    spread = theirs.std()
    shares = np.linspace(0.025, 0.975, 20)
    assert np.quantile(ours, shares) == pytest.approx(np.quantile(theirs, shares), abs=0.1 * spread)
    assert ours.std() == pytest.approx(spread, rel=0.04)


def test_resampled_means_are_distributed_as_all_resamples():
    """2^2 draws of seeds times 3^3 of problems: the distribution itself."""
    values = np.array([[0.0, 1.0, 5.0], [2.0, -3.0, 11.0]])
    every = [
        values[np.ix_(rows, columns)].mean()
        for rows in itertools.product(range(2), repeat=2)
        for columns in itertools.product(range(3), repeat=3)
    ]
    drawn = crossed_means(values, draws=60_000)
    for mean in set(np.round(every, 9)):
        share = np.isclose(every, mean).mean()
        assert np.isclose(drawn, mean).mean() == pytest.approx(share, abs=5 * math.sqrt(share / 60_000))


def test_variance_of_resampled_means_is_owens():
    """The variance over all resamples, in closed form.

    With centred row effects a, column effects b and residuals e, Var of w_s' V w_p is
    sum a^2 / S^2 + sum b^2 / P^2 + sum e^2 / (S P)^2, for multinomial weights have the covariance
    (I - 1/n) / n and the residuals are orthogonal to constants.
    """
    rows, columns = VALUES.mean(1) - VALUES.mean(), VALUES.mean(0) - VALUES.mean()
    rest = VALUES - VALUES.mean() - rows[:, None] - columns[None, :]
    seeds, problems = VALUES.shape
    expected = (rows**2).sum() / seeds**2 + (columns**2).sum() / problems**2 + (rest**2).sum() / VALUES.size**2
    assert crossed_means(VALUES, draws=200_000).var() == pytest.approx(expected, rel=0.02)


def test_interval_is_the_hull_of_percentiles_and_students_interval_of_seeds():
    of_seeds = VALUES.mean(1)
    half = 3.182446 * of_seeds.std(ddof=1) / 2  # t of 3 degrees of freedom, from a table
    low, high = np.quantile(crossed_means(VALUES), [0.025, 0.975])
    found = crossed_bootstrap(VALUES)
    assert found.mean == pytest.approx(VALUES.mean())
    assert found.low == pytest.approx(min(low, VALUES.mean() - half))
    assert found.high == pytest.approx(max(high, VALUES.mean() + half))
    alike = np.tile(VALUES[:1], (4, 1))  # seeds that agree: problems alone decide
    low, high = np.quantile(crossed_means(alike), [0.025, 0.975])
    assert crossed_bootstrap(alike) == pytest.approx((VALUES[0].mean(), low, high))


@pytest.mark.parametrize("of_seed, of_problem, of_cell", [(1, 0, 0.1), (0.1, 3, 0.3), (1, 2, 3), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("seeds", [3, 8])
def test_interval_covers_the_truth_of_a_two_way_design(seeds, of_seed, of_problem, of_cell):
    """The percentile bootstrap alone covers 74 % with three seeds that differ. It knows nothing of Student's t of
    problems either, but of a hundred of them that is half a percent."""
    random, covered, studies = np.random.default_rng(7), 0, 1000
    for _ in range(studies):
        values = of_seed * random.normal(size=(seeds, 1)) + of_problem * random.normal(size=(1, 100))
        _, low, high = crossed_bootstrap(values + of_cell * random.normal(size=(seeds, 100)), draws=2000)
        covered += low <= 0 <= high
    assert covered / studies >= 0.945 - 3 * math.sqrt(0.95 * 0.05 / studies)


def test_interval_of_paired_difference_loses_what_arms_share():
    random = np.random.default_rng(3)
    shared = 5 * random.normal(size=(6, 1)) + 5 * random.normal(size=(1, 30))
    a, b = (shared + 0.1 * random.normal(size=(6, 30)) for _ in range(2))
    paired, alone = crossed_bootstrap(b - a), crossed_bootstrap(a)
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


finite = st.floats(-1, 1, width=32)
matrices = arrays.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=finite)


@settings(max_examples=60)
@given(matrices)
def test_interval_properties(values):
    mean, low, high = found = crossed_bootstrap(values, draws=200)
    assert low <= mean <= high
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    assert found == crossed_bootstrap(values, draws=200)  # the same, whatever was drawn in between
    bounded = crossed_bootstrap(values, draws=200, within=(-1, 1))
    assert -1 <= bounded.low <= bounded.high <= 1
    turned = crossed_bootstrap(-3 * values + 1, draws=20_000)
    straight = crossed_bootstrap(values, draws=20_000)
    assert turned == pytest.approx((1 - 3 * mean, 1 - 3 * straight.high, 1 - 3 * straight.low), abs=1e-9)
    wide = crossed_bootstrap(values, draws=200, level=0.99)
    assert wide.low <= low + 1e-12 and high <= wide.high + 1e-12


def test_one_seed_or_one_problem():
    values = np.array([[0.0, 1.0, 1.0, 0.0]])
    assert crossed_bootstrap(values, draws=20_000) == pytest.approx((0.5, 0.0, 1.0))  # 1/16 of resamples at each end
    assert crossed_bootstrap(values[:, :1]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "values, options, message",
    [
        (np.zeros(3), {}, r"a row a seed and a column a problem, got the shape \(3,\)"),
        (np.zeros((0, 3)), {}, r"got the shape \(0, 3\)"),
        (np.array([[0.0, np.nan]]), {}, "values must be finite, got 1 that are not"),
        (np.zeros((2, 2)), {"draws": 0}, "draws must be at least 1, got 0"),
        (np.zeros((2, 2)), {"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
    ],
)
def test_interval_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        crossed_bootstrap(values, **options)


def test_sign_counts():
    difference = np.array([[1.0, -0.5], [0.1 + 0.2, -0.3], [-1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    assert sign_counts(difference) == (2, 2, 1)  # 0.1 + 0.2 - 0.3 is rounding


# ---------------------------------------------------------------------------------------------------------------------
# Student's t


@pytest.mark.parametrize(
    "probability, freedom, expected",
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.3026527),
        (0.975, 7, 2.3646243),
        (0.95, 4, 2.1318468),
        (0.995, 30, 2.7499957),
    ],
)
def test_quantiles_of_students_t_are_those_of_tables(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, abs=1e-7)


@settings(max_examples=30)
@given(st.integers(1, 40), st.floats(0.5, 0.999))
def test_quantiles_of_students_t_agree_with_its_density(freedom, probability):
    """The density's integral up to the quantile, by Simpson's rule, is the probability."""
    end = student_quantile(probability, freedom)
    x = np.linspace(0, end, 4001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
    area = end / 4000 / 3 * (density[0] + density[-1] + 4 * density[1:-1:2].sum() + 2 * density[2:-1:2].sum())
    assert 0.5 + area == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize("probability, freedom", [(0.975, 0), (0.4, 3), (1.0, 3)])
def test_quantiles_of_students_t_refuse(probability, freedom):
    with pytest.raises(ValueError, match="freedom must be at least 1 and probability in"):
        student_quantile(probability, freedom)


# ---------------------------------------------------------------------------------------------------------------------
# Rank correlation


def looped_ranks(values):
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_average_ranks(values):
    assert average_ranks(np.array(values, dtype=float)).tolist() == looped_ranks(values)


def textbook_spearman(a, b):
    """1 - 6 sum d^2 / (n (n^2 - 1)), for values without ties."""
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(looped_ranks(a), looped_ranks(b), strict=True)) / (n * (n**2 - 1))


def test_rank_correlation_is_spearmans_with_the_interval_of_a_loop():
    random = np.random.default_rng(11)
    skill = np.arange(5)[:, None, None] * 0.3
    before = skill + random.normal(size=(5, 4, 9))
    after = 0.5 * skill + random.normal(size=(5, 4, 9))
    found = rank_correlation(before, after, draws=20_000)
    assert found.mean == pytest.approx(textbook_spearman(before.mean((1, 2)), after.mean((1, 2))))
    drawn = []
    for _ in range(4000):
        rows, columns = random.integers(0, 4, 4), random.integers(0, 9, 9)  # the same for all arms, before and after
        a, b = (values[:, rows][:, :, columns].mean((1, 2)) for values in (before, after))
        drawn.append(textbook_spearman(a, b))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.11) and found.high == pytest.approx(high, abs=0.11)


def test_rank_correlation_of_orders_that_are_certain():
    step = np.tile(np.arange(6.0)[:, None, None], (1, 3, 5))
    noise = 1e-3 * np.random.default_rng(0).normal(size=(6, 3, 5))
    assert rank_correlation(step + noise, step**3) == pytest.approx((1, 1, 1))
    assert rank_correlation(step + noise, -step) == pytest.approx((-1, -1, -1))


def test_rank_correlation_with_ties():
    """Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: Pearson's formula by hand gives 4.5 / sqrt(4.5 * 5)."""
    before, after = (np.array(values)[:, None, None] for values in ([0.1 + 0.2, 0.3, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]))
    assert rank_correlation(before, after).mean == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_rank_correlation_that_is_not_defined():
    values = np.random.default_rng(0).normal(size=(3, 2, 4))
    assert rank_correlation(np.zeros((3, 2, 4)), values) is None
    assert rank_correlation(values, np.ones((3, 2, 4))) is None
    assert rank_correlation(values[:1], values[:1]) is None


def test_rank_correlation_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"one shape .*got \(2, 3, 4\) and \(2, 3, 5\)"):
        rank_correlation(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)))
    with pytest.raises(ValueError, match="level"):
        rank_correlation(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), level=0)
