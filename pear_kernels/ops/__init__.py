"""The custom ops: what autograd and `torch.compile` see of the engine, with their shapes (fakes) and gradients."""

from pear_kernels.ops.distill import linear_distill_loss
from pear_kernels.ops.logprobs import linear_logprobs, linear_logprobs_backward, linear_topk_logprobs
from pear_kernels.ops.pear import linear_pear_loss
from pear_kernels.ops.policy import linear_policy_loss
from pear_kernels.ops.shared import scaled
from pear_kernels.ops.weighted import function_keys, functions, linear_weighted_loss

__all__ = [
    "function_keys",
    "functions",
    "linear_distill_loss",
    "linear_logprobs",
    "linear_logprobs_backward",
    "linear_pear_loss",
    "linear_policy_loss",
    "linear_topk_logprobs",
    "linear_weighted_loss",
    "scaled",
]
