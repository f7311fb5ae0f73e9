"""Losses beside PEAR's and a plain mean: other weights, wrong sequences, distillation. Ours, naive, and others' own.

All are means over the pack. Each function here goes from `Inputs` to a loss with a graph; `bench/peers.py` lists them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Inputs, lengths_of
from pear_kernels import linear_distill_loss, linear_pear_loss, linear_weighted_loss, pear_weights

Loss = Callable[[Inputs], Tensor]

BESIDE = {  # who has each objective, the naive version first; DFT's is that of all weights a token
    "none": ["naive-nll", "weighted-none"],
    "weights": ["naive-dft", "weighted-given"],
    "dft": ["naive-dft", "weighted-dft", "weighted-function", "trl-dft", "liger-dft"],
    "iw-sft": ["naive-dft", "weighted-iw-sft"],
    "psft": ["naive-dft", "weighted-psft"],
    "asft": ["naive-dft", "weighted-asft"],
    "idft": ["naive-idft", "weighted-idft"],
    "negatives": ["naive-negatives", "pear-negatives"],
    "forward": ["naive-forward", "distill-forward"],
    "reverse": ["naive-reverse", "distill-reverse"],
    "js": ["naive-js", "distill-js", "liger-js", "trl-gkd"],
    "top-k": ["naive-top-k", "distill-top-k"],
}
WITH_LOGITS = ("forward", "reverse", "js")  # those that need the teacher's product too

# A policy of before, where one is asked for, is the behaviour policy. Random targets have a log p near -log V, which is
# under the default floor of wrong sequences: with it no wrong token would count, and its products would be left out
FLOOR = -100.0
NEGATIVE_LAMBDA = 0.1


def weights_of(x: Inputs) -> Tensor:
    """(N,) weights a token, none of them 0."""
    return torch.linspace(0.1, 2.0, len(x.hidden), device=x.hidden.device)


def right_of(x: Inputs) -> Tensor:
    """(S,) bool: every fourth sequence is a wrong one."""
    return torch.arange(len(x.cu_seqlens) - 1, device=x.hidden.device) % 4 != 3


# ---- ours


def weighted(weights: str | Callable | None = None) -> Loss:
    """By name, by a function, or those given (None)."""

    def loss(x: Inputs) -> Tensor:
        given = weights_of(x) if weights is None else weights
        ref = x.behavior_logprobs if weights in ("iw-sft", "psft", "asft") else None
        inputs = x.hidden, x.weight, x.target, given
        return linear_weighted_loss(*inputs, ref_logprobs=ref, cu_seqlens=x.cu_seqlens).loss

    return loss


def negatives(x: Inputs) -> Tensor:
    inputs = x.hidden, x.weight, x.target, x.behavior_logprobs
    options = {"sequence_label": right_of(x), "negative_lambda": NEGATIVE_LAMBDA, "logprob_floor": FLOOR}
    return linear_pear_loss(*inputs, cu_seqlens=x.cu_seqlens, **options).loss


def distilled(divergence: str) -> Loss:
    """From the teacher in memory."""
    return lambda x: linear_distill_loss(x.hidden, x.weight, x.teacher, x.target, divergence=divergence).loss


def distilled_top_k(x: Inputs) -> Tensor:
    return linear_distill_loss(x.hidden, x.weight, x.top_k, x.target).loss


# ---- the usual way


def full_log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, V) float32, from full logits."""
    return torch.log_softmax(F.linear(hidden, weight).float(), dim=-1)


def of_target(log_p: Tensor, target: Tensor) -> Tensor:
    """(N,) from (N, V)."""
    return log_p.gather(1, target[:, None]).squeeze(1)


def naive_dft(x: Inputs) -> Tensor:
    logprobs = of_target(full_log_softmax(x.hidden, x.weight), x.target)
    return (logprobs.detach().exp() * -logprobs).mean()


def naive_idft(x: Inputs) -> Tensor:
    log_p = full_log_softmax(x.hidden, x.weight)
    logprobs = of_target(log_p, x.target)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
        weights = logprobs.exp() ** torch.exp(-(logprobs + entropy)).clamp(0.1, 2.0)
    return (weights * -logprobs).mean()


def naive_negatives(x: Inputs) -> Tensor:
    logprobs = of_target(full_log_softmax(x.hidden, x.weight), x.target)
    inputs = logprobs.detach(), x.behavior_logprobs
    of_token = pear_weights(*inputs, cu_seqlens=x.cu_seqlens)
    of_sequence = pear_weights(*inputs, cu_seqlens=x.cu_seqlens, level="sequence")
    repulsion = -NEGATIVE_LAMBDA * of_sequence * torch.clamp(-logprobs, max=-FLOOR)
    right = right_of(x)[lengths_of(x)[1]]
    return torch.where(right, of_token * -logprobs, repulsion).mean()


@torch.no_grad()
def teacher_log_softmax(x: Inputs) -> Tensor:
    return full_log_softmax(x.teacher.hidden, x.teacher.weight)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a, b), the mean over tokens, of (N, V) log-probs."""
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


def naive_forward(x: Inputs) -> Tensor:
    return kl(teacher_log_softmax(x), full_log_softmax(x.hidden, x.weight))


def naive_reverse(x: Inputs) -> Tensor:
    return kl(full_log_softmax(x.hidden, x.weight), teacher_log_softmax(x))


def naive_js(x: Inputs) -> Tensor:
    log_p, log_q = full_log_softmax(x.hidden, x.weight), teacher_log_softmax(x)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl(log_q, log_m) + kl(log_p, log_m))


def naive_top_k(x: Inputs) -> Tensor:
    """The teacher's K tokens, and one outcome for all others."""
    log_p, log_q = full_log_softmax(x.hidden, x.weight).gather(1, x.top_k.ids), x.top_k.logprobs
    rest_of_p, rest_of_q = 1 - log_p.exp().sum(1), 1 - log_q.exp().sum(1)
    others = rest_of_q * (rest_of_q.log() - rest_of_p.log())
    return ((log_q.exp() * (log_q - log_p)).sum(1) + others).mean()


# ---- other libraries


def trl_dft(x: Inputs) -> Tensor:
    """TRL's function with the tile and the outputs of its SFTTrainer, which logs two of them; its DFT on top."""
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy", "is_top1")
    logprobs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.target, 1.0, 32768, None, 1.0, outputs
    )
    entropy.detach().mean(), is_top1.sum()
    return (-logprobs * logprobs.exp().detach()).mean()


def trl_gkd(x: Inputs) -> Tensor:
    """The loss of TRL's GKDTrainer, on full logits of either model and in their dtype, as the trainer calls it."""
    from trl.experimental.gkd import GKDTrainer

    logits = F.linear(x.hidden, x.weight)[None]
    with torch.no_grad():
        teacher_logits = F.linear(x.teacher.hidden, x.teacher.weight)[None]
    return GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels=x.target[None], beta=0.5)


def liger_js(x: Inputs) -> Tensor:
    """Without its hard loss. The teacher's hidden size may be any, its vocabulary no smaller than the student's.

    What it compiles is all of a chunk but the loop: left eager on a CPU, as `peers.liger_grpo` is.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=x.hidden.is_cuda)
    return loss(x.hidden, x.weight, x.teacher.hidden, x.teacher.weight, x.target)
