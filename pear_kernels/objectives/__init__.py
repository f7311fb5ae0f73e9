"""Losses: from log-probs to coefficients. `LOSSES` has what the custom op can make, by name."""

from pear_kernels.objectives.base import Loss
from pear_kernels.objectives.custom import custom_objective, custom_stats
from pear_kernels.objectives.distill import DistillObjective
from pear_kernels.objectives.labelled import WRONG_STATS, pear_or_labelled
from pear_kernels.objectives.pear import STATS
from pear_kernels.objectives.policy import POLICY_STATS, PolicyObjective
from pear_kernels.objectives.weighted import WEIGHTED_STATS, weighted_objective

LOSSES = {
    "linear_pear_loss": Loss(
        pear_or_labelled, lambda given: STATS + WRONG_STATS if "sequence_label" in given else STATS
    ),
    "linear_weighted_loss": Loss(weighted_objective, lambda given: WEIGHTED_STATS),
    "linear_policy_loss": Loss(PolicyObjective, lambda given: POLICY_STATS),
    "linear_distill_loss": Loss(
        DistillObjective, lambda given: ("divergence", *(STATS if "behavior_logprobs" in given else WEIGHTED_STATS))
    ),
    "linear_objective_loss": Loss(custom_objective, custom_stats),
}
