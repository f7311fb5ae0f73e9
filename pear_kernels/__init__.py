"""Fused, chunked losses for PyTorch, PEAR's (arXiv 2602.01058) and RL's, that never hold the full logits of a batch."""

from pear_kernels.losses import LossOutput, linear_logprobs, linear_pear_loss, linear_policy_loss
from pear_kernels.modules import LinearPEARLoss, LinearPolicyLoss
from pear_kernels.plan import Plan, plan
from pear_kernels.weights import pear_weights

__all__ = [
    "LinearPEARLoss",
    "LinearPolicyLoss",
    "LossOutput",
    "Plan",
    "linear_logprobs",
    "linear_pear_loss",
    "linear_policy_loss",
    "pear_weights",
    "plan",
]
__version__ = "0.1.0"
