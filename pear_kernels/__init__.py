"""Fused, chunked PEAR losses for PyTorch (arXiv 2602.01058): the logits of a batch are never held in full."""

from pear_kernels.losses import LossOutput, linear_logprobs, linear_pear_loss
from pear_kernels.modules import LinearPEARLoss
from pear_kernels.plan import Plan, plan
from pear_kernels.weights import pear_weights

__all__ = ["LinearPEARLoss", "LossOutput", "Plan", "linear_logprobs", "linear_pear_loss", "pear_weights", "plan"]
__version__ = "0.1.0"
