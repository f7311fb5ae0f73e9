"""One row's softmax from sums over its logits, in PyTorch (Triton has its own), and from the parts of several ranks.

Logits are relative to an anchor: E_v = exp(z_v - anchor). With `below` the target's logit less the anchor, so that
e_y = exp(below), and S = sum_{v != y} E_v,

    Z = e_y + S        -log p = log(1 + S / e_y)        H = log Z - sum_v E_v log E_v / Z

The target is kept out of S, so that -log p has its last digits for p near 1 and for p near 0 alike. Per-row scalars are
float64.
"""

import torch
from torch import Tensor

# Rows are anchored such that z_v - anchor stays below this: exp stays finite, and 1 / Z a normal number with room for
# coefficients.
MAX_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
# Floor for log-probabilities. exp(MIN_LOG) underflows to 0 in every dtype, and 0 * MIN_LOG is 0, whereas 0 * -inf would
# be NaN.
MIN_LOG = -1e4


def nll(S: Tensor, below: Tensor) -> Tensor:
    """(R,) -log p = log(1 + S / e_y), exact to the last digits for S near 0 and for e_y near 0."""
    return nll_of_odds(S.log() - below)


def nll_of_odds(log_odds: Tensor) -> Tensor:
    """(R,) -log p from log((1 - p) / p)."""
    return torch.logaddexp(torch.zeros_like(log_odds), log_odds)


def entropy(log_z: Tensor, exp_log: Tensor, Z: Tensor) -> Tensor:
    """(R,) H in nats, from log Z, sum_v E_v log E_v (the target's term included) and Z."""
    return log_z - exp_log / Z


def joint_nll(nll: Tensor) -> Tensor:
    """(R,) n from the ranks' n_r (ranks, R), as in `sharding`: exact to the last digits for p near 1 and near 0."""
    return nll_of_odds((nll + (-torch.expm1(-nll)).log()).logsumexp(0))


def joint_entropy(nll: Tensor, own_nll: Tensor, own_entropy: Tensor) -> Tensor:
    """(R,) H from n (R,) and the ranks' n_r and H_r (ranks, R), as in `sharding`."""
    shares = (own_nll - nll).exp() * (-torch.expm1(-own_nll) * nll - own_nll + own_entropy)
    return (-nll).exp() * nll + shares.sum(0)
