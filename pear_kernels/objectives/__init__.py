"""Losses: from log-probs to coefficients. `LOSSES` has what the custom op can make, by name."""

from pear_kernels.objectives.base import Loss
from pear_kernels.objectives.custom import CustomLoss
from pear_kernels.objectives.distill import DistillLoss
from pear_kernels.objectives.labelled import PEARLoss
from pear_kernels.objectives.policy import PolicyLoss
from pear_kernels.objectives.weighted import WeightedLoss

LOSSES: dict[str, Loss] = {
    "linear_pear_loss": PEARLoss(),
    "linear_weighted_loss": WeightedLoss(),
    "linear_policy_loss": PolicyLoss(),
    "linear_distill_loss": DistillLoss(),
    "linear_objective_loss": CustomLoss(),
}
