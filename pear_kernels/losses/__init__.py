"""The public losses, each in a file of its own: check arguments, run one pass of the engine, shape the result."""

from pear_kernels.losses.distill import linear_distill_loss
from pear_kernels.losses.logprobs import linear_logprobs, linear_topk_logprobs
from pear_kernels.losses.objective import linear_objective_loss
from pear_kernels.losses.pear import linear_pear_loss
from pear_kernels.losses.policy import linear_policy_loss
from pear_kernels.losses.shared import LossOutput
from pear_kernels.losses.weighted import linear_weighted_loss
from pear_kernels.losses.weights import pear_weights

__all__ = [
    "LossOutput",
    "linear_distill_loss",
    "linear_logprobs",
    "linear_objective_loss",
    "linear_pear_loss",
    "linear_policy_loss",
    "linear_topk_logprobs",
    "linear_weighted_loss",
    "pear_weights",
]
