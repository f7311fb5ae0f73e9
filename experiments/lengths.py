"""Do PEAR's arms gain by shorter answers? `python -m experiments.lengths experiments/results/countdown`, in a second.

From the rows of a study alone: for each arm, how much shorter its answers are than the baseline's of the same seed
before RL, and how much higher its pass@1; and, over all pairs of a PEAR arm and a seed, the two's rank correlation.
"""

import argparse
from pathlib import Path

import numpy as np

from pear.replicate.results import Results, read_results
from pear.replicate.statistics import average_ranks
from pear.replicate.summary import passes


def differences(results: Results, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """(S,) tokens and (S,) points of pass@1 of an arm minus the baseline's, before RL, on the arm's seeds."""
    seeds = results.seeds_of(arm)
    tokens = {(row["arm"], row["seed"]): row["mean_tokens"] for row in results.evaluations if row["moment"] == "before"}
    baseline = results.study["baseline"]
    longer = np.array([tokens[arm, seed] - tokens[baseline, seed] for seed in seeds])
    better = passes(results, arm, "before", 1) - passes(results, baseline, "before", 1, seeds)
    return longer, 100 * better.mean(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder that `pear replicate` wrote")
    results = read_results(parser.parse_args().results)
    pairs = []
    for arm in [*results.arms, *results.ablations]:
        if arm == results.study["baseline"]:
            continue
        longer, better = differences(results, arm)
        print(f"{arm:16s} {longer.mean():+6.1f} tokens  {better.mean():+5.1f} points of pass@1  ({len(longer)} seeds)")
        if (results.study["arms"] | results.study["ablations"])[arm]["weighting"] == "pear":
            pairs += zip(longer, better, strict=True)
    longer, better = np.array(pairs).T
    ranks = np.corrcoef(average_ranks(longer), average_ranks(better))[0, 1]
    print(f"rank correlation of the two over {len(pairs)} pairs of a PEAR arm and a seed: {ranks:+.2f}")


if __name__ == "__main__":
    main()
