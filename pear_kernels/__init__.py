"""Fused, chunked losses for PyTorch that never hold a batch's full logits: PEAR (arXiv 2602.01058), SFT and RL."""

from pear_kernels.engine.objective import Coefficients, Objective
from pear_kernels.engine.packing import Pack
from pear_kernels.huggingface.causal_lm import patch_causal_lm, unpatch_causal_lm
from pear_kernels.losses import (
    LossOutput,
    linear_distill_loss,
    linear_logprobs,
    linear_objective_loss,
    linear_pear_loss,
    linear_policy_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels.modules import LinearDistillLoss, LinearPEARLoss, LinearPolicyLoss, LinearWeightedLoss
from pear_kernels.objectives.teachers import Teacher, TopKTeacher
from pear_kernels.plan import Plan, plan

__all__ = [
    "Coefficients",
    "LinearDistillLoss",
    "LinearPEARLoss",
    "LinearPolicyLoss",
    "LinearWeightedLoss",
    "LossOutput",
    "Objective",
    "Pack",
    "Plan",
    "Teacher",
    "TopKTeacher",
    "linear_distill_loss",
    "linear_logprobs",
    "linear_objective_loss",
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
