"""RL: `linear_policy_loss`."""

from typing import Unpack

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.losses.shared import LossOutput, checked_inputs, run
from pear_kernels.options import HeadOptions, Objects, PolicyKeywords, PolicyOptions, PolicyReduction, gather, takes

CLASSES = PolicyOptions, PolicyReduction, HeadOptions


@takes(*CLASSES)
def linear_policy_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    old_logprobs: Tensor | None,  # (N,) or (B, T)
    advantages: Tensor,  # (S,), (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
    sampler_logprobs: Tensor | None = None,  # (N,) or (B, T)
    sequence_scale: Tensor | None = None,  # (S,)
    denominator: float | Tensor | None = None,
    valid_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    options: Objects = (),
    **keywords: Unpack[PolicyKeywords],
) -> LossOutput:
    """Policy-gradient loss of an LM head, head included, without ever holding the (N, V) logits.

    With r_t = pi(y_t) / pi_old(y_t), the advantage A_t and the sampler's correction w_t (1 without sampler_logprobs),

        L = sum_t (w_t policy_t + beta (r_ref - 1 - log r_ref)_t - entropy_coef H_t) / divisor,   r_ref = pi_ref / pi

    | objective | policy_t | reduction |
    | --- | --- | --- |
    | "ppo", "grpo" | -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) | "sequence_mean" |
    | "dapo", "bnpo" | the same | "mean" |
    | "dr_grpo" | the same | "constant_length" |
    | "gspo" | the same of s = exp(mean over the sequence of log r) | "sequence_mean" |
    | "gspo_token" | the same of sg(s) pi / sg(pi): its gradient is the token's own | "sequence_mean" |
    | "cispo" | -sg(min(r, 1 + clip_high)) A log pi | "mean" |
    | "sapo" | -4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A | "mean" |
    | "reinforce" | -A log pi | "mean" |

    with sg a stopped gradient, and the reduction the one that is used where none is named. PPO: arXiv 1707.06347; GRPO:
    2402.03300; DAPO: 2503.14476, its clip_high is 0.28; BNPO: TRL's name; Dr. GRPO: 2503.20783; GSPO: 2507.18071, its
    clips are 3e-4 and 4e-4, "gspo_token" its section 4.3; CISPO: 2506.13585; SAPO: 2511.20347; REINFORCE: Williams
    1992.

    As many matrix products as `linear_pear_loss`. ("gspo" and "gspo_token": as that at sequence level; with beta or an
    entropy bonus, or for "gspo_token" with advantages or corrections that differ within a sequence, the first sequence
    longer than a chunk costs up to a fourth product, too.)

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, denominator, valid_tokens, group: see
            `linear_pear_loss`. All log-probs are at the call's `temperature`.
        old_logprobs: like target, float32 or float64: log-probs under the policy before the update. None: the policy
            in training itself, so that every ratio is exactly 1 and the gradient is the policy gradient.
        advantages: (S,) or (B,), one per sequence, or like target, one per token. (Read as (S,) where a pack has as
            many sequences as tokens.)
        ref_logprobs: like target, under the reference policy. For statistics alone if beta is 0.
        sampler_logprobs: like target, under the engine that drew the tokens, where it is not pi_old to the last digit.
        options: objects of `PolicyOptions`, `PolicyReduction` and `HeadOptions`, as in `linear_pear_loss`.

    Returns:
        LossOutput. `weights` are the policy gradient's factors: d loss_t / d(-log pi) before the divisor, KL included.
        `stats` are `objectives.policy.POLICY_STATS`; they cause no host sync. All-ignored: loss 0 and zero gradients.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    given = gather("linear_policy_loss", CLASSES, options, keywords)
    policy: PolicyOptions = given[0]
    if policy.beta and ref_logprobs is None:
        raise ValueError(f"beta is {policy.beta!r}, but ref_logprobs is None: pass the reference policy's log-probs")
    if sampler_logprobs is not None and old_logprobs is None:
        raise ValueError("sampler_logprobs needs old_logprobs: its correction is pi_old / pi_sampler, got None")
    columns = {
        "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs,
        "sequence_scale": sequence_scale,
    }  # fmt: skip
    inputs = checked_inputs(hidden, weight, target, bias, group, valid_tokens, False, columns, cu_seqlens, denominator)
    checks.check_advantages(inputs.target, advantages, cu_seqlens)
    by_sequence = tuple(advantages.shape) == checks.sequence_count(inputs.target, cu_seqlens)
    inputs.add({"sequence_advantages" if by_sequence else "advantages": advantages})
    return run("linear_policy_loss", inputs, given)
