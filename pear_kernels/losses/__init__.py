"""The public losses, each in a file of its own: check arguments, run one pass of the engine, shape the result."""

from pear_kernels.losses.distill import linear_distill_loss as linear_distill_loss
from pear_kernels.losses.logprobs import linear_logprobs as linear_logprobs
from pear_kernels.losses.logprobs import linear_topk_logprobs as linear_topk_logprobs
from pear_kernels.losses.objective import linear_objective_loss as linear_objective_loss
from pear_kernels.losses.pear import linear_pear_loss as linear_pear_loss
from pear_kernels.losses.policy import linear_policy_loss as linear_policy_loss
from pear_kernels.losses.shared import LossOutput as LossOutput
from pear_kernels.losses.weighted import linear_weighted_loss as linear_weighted_loss
from pear_kernels.losses.weights import pear_weights as pear_weights
