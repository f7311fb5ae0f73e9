"""RL: `linear_policy_loss`."""

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.losses.shared import LossOutput, checked_head, divisor, flat, loss_output, wanted_gradients
from pear_kernels.policy import OBJECTIVES, POLICY_DEFAULTS, POLICY_STATS, PolicyOptions
from pear_kernels.scalars import call
from pear_kernels.shards import local_head


def linear_policy_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    old_logprobs: Tensor | None,  # (N,) or (B, T)
    advantages: Tensor,  # (S,), (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    objective: str = POLICY_DEFAULTS.objective,
    ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
    beta: float = POLICY_DEFAULTS.beta,
    clip_low: float = POLICY_DEFAULTS.clip_low,
    clip_high: float = POLICY_DEFAULTS.clip_high,
    dual_clip: float | None = POLICY_DEFAULTS.dual_clip,
    sapo_temperatures: tuple[float, float] = POLICY_DEFAULTS.sapo_temperatures,
    sampler_logprobs: Tensor | None = None,  # (N,) or (B, T)
    sampler_clip: float | None = POLICY_DEFAULTS.sampler_clip,
    sampler_level: str = POLICY_DEFAULTS.sampler_level,
    entropy_coef: float = POLICY_DEFAULTS.entropy_coef,
    max_length: int | None = POLICY_DEFAULTS.max_length,
    unbiased_kl: bool = POLICY_DEFAULTS.unbiased_kl,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str | None = None,
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
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

    Gradients are made in the forward pass: three matrix products with a trained head, two when `weight` needs no
    gradient, one without gradients. ("gspo" and "gspo_token": of sequences longer than a chunk, those after the first
    cost up to a fourth product if the workspace has no room for a second (V, D) buffer; with beta or an entropy bonus,
    or for "gspo_token" with numbers that differ within a sequence, so does the first.)

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, denominator, temperature, softcap, ignore_index,
            workspace_bytes, backend, group: see `linear_pear_loss`. All log-probs are at this `temperature`.
        old_logprobs: like target, float32 or float64: log-probs under the policy before the update. None: the policy
            in training itself, so that every ratio is exactly 1 and the gradient is the policy gradient.
        advantages: (S,) or (B,), one of each sequence, or like target, one of each token. (Read as (S,) where a pack
            has as many sequences as tokens.)
        objective: a row of the table.
        ref_logprobs: like target, under the reference policy. For statistics alone if beta is 0.
        beta: factor of the KL to the reference policy, estimated by Schulman's k3. r_ref counts for exp(80) at most
            (exp(700) in float64), in the loss and in the gradient, so that a token far from the reference leaves both
            finite.
        clip_low, clip_high: a ratio counts for no less than 1 - clip_low and no more than 1 + clip_high, by objective.
        dual_clip: what a clipped ratio counts for at most where A < 0 (arXiv 1912.09729); None: no such bound.
        sapo_temperatures: tau of "sapo" for A > 0 and for other A.
        sampler_logprobs: like target, under the engine that drew the tokens, where it is not pi_old to the last digit.
        sampler_clip: cap of w = pi_old / pi_sampler, which has no gradient; None: no cap.
        sampler_level: "token", or "sequence": w is the product over the sequence.
        entropy_coef: factor of the entropy H_t.
        max_length: the length of "constant_length"; None: that of the longest sequence here (of (B, T) rows: T).
            Dr. GRPO wants one that is the same in every call.
        unbiased_kl: multiply the KL term by the token's r = pi / pi_old, gradient included, which makes its gradient
            that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556): r log(pi / pi_ref) in log pi, for any log-ratio.
        reduction: "mean", "sum", "sequence_mean" (as in `linear_pear_loss`), or "constant_length", all sequences (empty
            ones too) times `max_length`; None: the objective's.

    Returns:
        LossOutput. `weights` are the policy gradient's factors: d loss_t / d(-log pi) before the divisor, KL included.
        `stats` (`policy.POLICY_STATS`) wait for nothing on the device. All-ignored: loss 0 and zero gradients.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    options = PolicyOptions(
        objective, beta, clip_low, clip_high, dual_clip, sapo_temperatures, sampler_clip, sampler_level, entropy_coef,
        max_length, unbiased_kl,
    )  # fmt: skip
    checks.check_policy_options(options, OBJECTIVES)
    checks.check_reduction(reduction or "sum", denominator, checks.POLICY_REDUCTIONS)
    if beta and ref_logprobs is None:
        raise ValueError(f"beta is {beta!r}, but ref_logprobs is None: pass the reference policy's log-probs")
    if sampler_logprobs is not None and old_logprobs is None:
        raise ValueError("sampler_logprobs needs old_logprobs: its correction is pi_old / pi_sampler, got None")
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared)
    columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
    checks.check_loss_arguments(hidden, target, columns, cu_seqlens, sequence_scale, denominator)
    checks.check_policy_arguments(hidden, target, advantages, cu_seqlens)
    found = call(
        ops.linear_policy_loss,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        flat(old_logprobs),
        flat(advantages),
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        flat(ref_logprobs),
        flat(sampler_logprobs),
        flat(sequence_scale),
        divisor(denominator, hidden.device),
        tuple(advantages.shape) == checks.sequence_count(target, cu_seqlens),
        *options._replace(sapo_temperatures=[float(tau) for tau in sapo_temperatures]),
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        shared,
        compute_dtype,
        wanted_gradients(hidden, weight, bias),
    )
    return loss_output(found, target, POLICY_STATS)
