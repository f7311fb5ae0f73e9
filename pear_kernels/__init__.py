"""Fused, chunked losses for PyTorch, PEAR's (arXiv 2602.01058) and RL's, that never hold the full logits of a batch."""

from pear_kernels.huggingface.causal_lm import patch_causal_lm, unpatch_causal_lm
from pear_kernels.losses import (
    LossOutput,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_policy_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
)
from pear_kernels.losses.weights import pear_weights
from pear_kernels.modules import LinearDistillLoss, LinearPEARLoss, LinearPolicyLoss, LinearWeightedLoss
from pear_kernels.objectives.teachers import Teacher, TopKTeacher
from pear_kernels.plan import Plan, plan

__all__ = [
    "LinearDistillLoss",
    "LinearPEARLoss",
    "LinearPolicyLoss",
    "LinearWeightedLoss",
    "LossOutput",
    "Plan",
    "Teacher",
    "TopKTeacher",
    "linear_distill_loss",
    "linear_logprobs",
    "linear_pear_loss",
    "linear_policy_loss",
    "linear_topk_logprobs",
    "linear_weighted_loss",
    "patch_causal_lm",
    "pear_weights",
    "plan",
    "unpatch_causal_lm",
]
__version__ = "0.1.0"
