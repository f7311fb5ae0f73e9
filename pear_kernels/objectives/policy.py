"""Policy losses: from log-probs to a loss and a coefficient. Every backend uses these.

With `r_t = pi(y_t) / pi_old(y_t)` and the advantage `A_t`, an objective is a function of (n,) float64 tensors

    (log p, log r, A, options)  ->  (L, c),        c_t = dL_t / d(-log p_t)

so that `c_t (softmax - onehot)` is the gradient of the logits. GSPO's ratio is that of a sequence; `PolicyObjective`
then passes its logarithm, the same for all tokens of the sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels.engine.objective import Finished, present
from pear_kernels.formulas.pear_weights import MAX_LOG_RATIO, capped_exp, compared
from pear_kernels.objectives.base import Problem, TokenObjective, as_statistic, at_least_one, largest, token_scale
from pear_kernels.options import UNCLIPPED, PolicyOptions, PolicyReduction

POLICY_STATS = (
    "nll",  # mean of -log pi
    "kl_old",  # mean of r - 1 - log r, which estimates KL(pi_old | pi) from pi_old's tokens and is never negative (k3)
    "kl_ref",  # mean of r_ref - 1 - log r_ref with r_ref = pi_ref / pi, an estimate of KL(pi | pi_ref); 0 without ref
    "clip_low",  # share of tokens whose ratio is below 1 - clip_low, with a negative advantage
    "clip_high",  # ... above 1 + clip_high, with a positive one
    "ratio_mean",  # of the objective's ratio (a sequence's in GSPO), before any cap
    "ratio_max",
    "sampler_ratio_mean",  # mean of pi_old / pi_sampler before its cap (a sequence's product at that level); 1 without
    "sampler_clipped",  # share of tokens where it is above sampler_clip
    "entropy",  # mean entropy of the policy, in nats
    "tokens",  # n, the tokens that count
)


# ---- one formula each


def clipped(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO (arXiv 1707.06347, equation 7), GRPO (2402.03300).

    With `dual_clip`, r counts for no more than that where A < 0 (arXiv 1912.09729, equation 5).
    """
    ratio = log_ratio.exp()
    free = ratio * advantages
    surrogate = torch.minimum(free, ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * advantages)
    if options.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, options.dual_clip * advantages), surrogate)
    return -surrogate, torch.where(surrogate == free, free, 0.0)  # no gradient where a bound is in force


def cispo(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """-stop_gradient(min(r, 1 + clip_high)) A log p: CISPO (arXiv 2506.13585, equation 4), without a lower bound."""
    coefficient = log_ratio.exp().clamp(max=1 + options.clip_high) * advantages
    return -coefficient * logprobs, coefficient


def sapo(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """-4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO (arXiv 2511.20347, equation 6)."""
    positive, negative = options.sapo_temperatures
    tau = torch.where(advantages > 0, advantages.new_full((), positive), advantages.new_full((), negative))
    ratio = log_ratio.exp()
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = 4 * gate * torch.sigmoid(-tau * (ratio - 1))
    return -4 / tau * gate * advantages, torch.where(slope > 0, slope * ratio, 0.0) * advantages


def reinforce(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """-A log p, the plain policy gradient (Williams 1992). Without a ratio: `old_logprobs` is for statistics alone."""
    return -advantages * logprobs, advantages


Formula = Callable[[Tensor, Tensor, Tensor, PolicyOptions], tuple[Tensor, Tensor]]


class PolicyKind(NamedTuple):
    formula: Formula
    reduction: str  # that of its paper
    sequence_ratio: bool = False  # the ratio is exp of the mean log-ratio of a sequence


KINDS = {
    "ppo": PolicyKind(clipped, "sequence_mean"),  # arXiv 1707.06347; the mean is that of GRPO
    "grpo": PolicyKind(clipped, "sequence_mean"),  # arXiv 2402.03300
    "dapo": PolicyKind(clipped, "mean"),  # arXiv 2503.14476, its clip_high is 0.28
    "bnpo": PolicyKind(clipped, "mean"),  # TRL's name: the tokens of the local batch
    "dr_grpo": PolicyKind(clipped, "constant_length"),  # arXiv 2503.20783
    "gspo": PolicyKind(clipped, "sequence_mean", True),  # arXiv 2507.18071, its clips are 3e-4 and 4e-4
    "gspo_token": PolicyKind(clipped, "sequence_mean", True),  # ... section 4.3: s_t = stop_gradient(s) pi / sg(pi)
    "cispo": PolicyKind(cispo, "mean"),
    "sapo": PolicyKind(sapo, "mean"),
    "reinforce": PolicyKind(reinforce, "mean"),
}


# Upper bound of log r_ref in r_ref, so that a loss and a gradient of this dtype stay finite, sums included
MAX_KL_LOG_RATIO = {torch.float32: 80.0, torch.float64: MAX_LOG_RATIO}


def k3(log_ratio: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """r - 1 - log r of log r (Schulman's k3, GRPO's equation 4, where r = pi_ref / pi), and d/d(log r) of it.

    r is at most exp of `MAX_KL_LOG_RATIO` for results of `dtype`, in both. (verl clamps log r to 20 and KL to 10, which
    leaves no gradient there; TRL clamps nothing, and a float32 loss is infinite from log r = 89 on.)
    """
    excess = log_ratio.clamp(max=MAX_KL_LOG_RATIO[dtype]).expm1()
    return excess - log_ratio, excess


# ---- the whole loss


class PolicyObjective(TokenObjective):
    """L = sum_t (policy loss_t * w_t + beta KL_t - entropy_coef H_t) * scale_t, with w_t the sampler's correction.

    With an entropy bonus it is neither separable nor scalable: the two coefficients of a token have no common factor.
    """

    needs_entropy = True

    def __init__(self, problem: Problem):
        super().__init__(problem, policy_scale(problem))
        self.dtype, self.make_weights = problem.dtype, problem.weights
        self.options: PolicyOptions = problem.options[PolicyOptions]
        self.kind = KINDS[self.options.objective]
        by_sequence = problem.columns.get("sequence_advantages")
        advantages = problem.take("advantages") if by_sequence is None else by_sequence[self.pack.sequence]
        self.raw_advantages = self.advantages = present(advantages).double()
        columns = (problem.take(name) for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"))
        self.old_logprobs, self.ref_logprobs, sampler_logprobs = (x if x is None else x.double() for x in columns)
        self.sampler_ratio: Tensor | None = None  # (n,) pi_old / pi_sampler, of a token or its sequence
        alike = by_sequence is not None  # whether the tokens of a sequence share one advantage
        if sampler_logprobs is not None and self.old_logprobs is not None:
            log_ratio = self.old_logprobs - sampler_logprobs
            if self.options.sampler_level == "token":
                alike = False
            else:
                log_ratio = self.sums_of_sequences(log_ratio)
            self.sampler_ratio = capped_exp(log_ratio)
            # a constant of at least 0 that multiplies the loss may as well multiply the advantage, in every objective
            cap = torch.inf if self.options.sampler_clip is None else self.options.sampler_clip
            self.advantages = self.advantages * self.sampler_ratio.clamp(max=cap)
        # without old_logprobs every ratio is 1, of a sequence too: the loss is not coupled
        if self.kind.sequence_ratio and self.old_logprobs is not None:
            self.coupled = True
            self.sequence_sums = problem.weights(self.old_logprobs, self.pack, UNCLIPPED)
        self.parts = [self.advantages]
        if self.options.objective == "gspo" and not alike:
            # s is one number, and min(s A, clip(s) A) is linear in A on either side of 0: only the means count
            signed = self.advantages.clamp(min=0), self.advantages.clamp(max=0)
            lengths = self.pack.stop - self.pack.start  # (n,) tokens of each token's sequence
            self.parts = [self.sums_of_sequences(part) / lengths for part in signed]
            alike = True
        self.on_logits, self.entropy_coef = self.options.entropy_coef != 0, -self.options.entropy_coef
        self.scalable = not self.on_logits
        self.separable = self.scalable and alike and self.options.beta == 0

    def sums_of_sequences(self, values: Tensor) -> Tensor:
        """(n,) sum of `values` (n,) over each token's sequence, in an order that repeats on every backend."""
        n = self.pack.tokens
        sums = self.make_weights(torch.zeros_like(values), self.pack, UNCLIPPED)
        sums.observe(0, n, values)
        return sums.log_weights(0, n)

    # ---- formulas, on any range of tokens

    def token_log_ratio(self, begin: int, end: int) -> Tensor:
        """(end - begin,) log pi / pi_old of each token."""
        if self.old_logprobs is None:
            return torch.zeros_like(self.logprobs[begin:end])
        return (self.logprobs[begin:end] - self.old_logprobs[begin:end]).clamp(max=MAX_LOG_RATIO)

    def log_ratio(self, begin: int, end: int) -> Tensor:
        """(end - begin,) log r: a token's own, or the mean of its sequence's."""
        if self.sequence_sums is None:
            return self.token_log_ratio(begin, end)
        return self.mean_log_ratio(begin, end).clamp(max=MAX_LOG_RATIO)

    def terms(self, begin: int, end: int, entropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(end - begin,) loss of each token without its entropy, and its coefficient, both before `token_scale`."""
        logprobs, log_ratio = self.logprobs[begin:end], self.log_ratio(begin, end)
        found = [self.kind.formula(logprobs, log_ratio, part[begin:end], self.options) for part in self.parts]
        if self.options.beta:
            ref_log_ratio = present(self.ref_logprobs)[begin:end] - logprobs
            kl, slope = k3(ref_log_ratio, self.dtype)
            if self.options.unbiased_kl:
                # the slope of r k3 is r (r_ref - 1 - k3) = r log r_ref; the difference would lose all digits
                ratio = self.token_log_ratio(begin, end).exp()
                kl, slope = ratio * kl, ratio * ref_log_ratio
            found.append((self.options.beta * kl, self.options.beta * slope))
        (loss, coefficient), *others = found
        for other in others:
            loss, coefficient = loss + other[0], coefficient + other[1]
        return loss, coefficient

    # ---- after the walk

    def finish(self, logprobs: Tensor, entropy: Tensor | None = None, divergence: Tensor | None = None) -> Finished:
        """Loss (), coefficients before `token_scale` (n,) and `POLICY_STATS` (11,), float64."""
        self.make_rest()
        options = self.options
        log_ratio = self.log_ratio(0, self.pack.tokens)
        ratio = log_ratio.exp()
        token_log_ratio = log_ratio if self.sequence_sums is None else self.token_log_ratio(0, self.pack.tokens)
        sampler = torch.ones_like(ratio) if self.sampler_ratio is None else self.sampler_ratio
        sampler_clip = torch.inf if options.sampler_clip is None else options.sampler_clip
        if self.ref_logprobs is None:
            kl_ref = torch.zeros_like(ratio)
        else:
            kl_ref = k3(self.ref_logprobs - self.logprobs, self.dtype)[0]
        below, above = ratio < 1 - options.clip_low, ratio > 1 + options.clip_high
        values = (
            -self.logprobs,
            k3(token_log_ratio, self.dtype)[0],
            kl_ref,
            torch.logical_and(below, self.raw_advantages < 0, out=torch.empty_like(ratio)),
            torch.logical_and(above, self.raw_advantages > 0, out=torch.empty_like(ratio)),
            ratio,
            sampler,
            compared(torch.gt, sampler, sampler_clip),
            present(entropy),
            (self.losses - options.entropy_coef * present(entropy)) * self.token_scale,
        )
        sums = self.pack.sums(values)
        means = sums[:-1] / at_least_one(self.pack.counted)
        ratio_max = largest(self.pack.zero_ghosts(ratio))[None]
        counted = as_statistic(self.pack.counted, sums)[None]
        return sums[-1], self.weights, torch.cat([means[:6], ratio_max, means[6:], counted])


def policy_scale(problem: Problem) -> Tensor:
    """(n,) float64: what multiplies each token's loss; the objective's own reduction where none is named."""
    options, columns = problem.options[PolicyOptions], problem.columns
    reduction = problem.options[PolicyReduction].reduction or KINDS[options.objective].reduction
    denominator = problem.denominator
    if reduction == "constant_length":
        if denominator is None:
            lengths = columns["cu_seqlens"].diff()
            # without a max_length, the longest sequence, which a batch is padded to
            longest = lengths.new_full((1,), options.max_length) if options.max_length else lengths
            denominator = (longest.amax() if len(longest) else longest.sum()).clamp(min=1) * max(len(lengths), 1)
        reduction = "sum"
    return token_scale(problem.pack, reduction, denominator, columns.get("sequence_scale"))
