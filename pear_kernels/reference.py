"""The losses as their papers write them: full logits, one sequence at a time. Slow; for readers and for tests.

Shares no code with the rest of the package. Gradients come from autograd through `log_softmax`.
"""

import math

import torch
from torch import Tensor


def naive_weights(
    logprobs: Tensor,  # (T,), one sequence, response tokens only
    behavior_logprobs: Tensor,  # (T,)
    level: str = "token",
    block_size: int = 4,
    gamma: float = 0.999,
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3),
    log_weight_clip: tuple[float, float] = (-10.0, 5.0),
) -> Tensor:
    """G_1..G_T of arXiv 2602.01058, position by position (t counts from 1, as there)."""
    T = len(logprobs)
    delta = [
        min(max((p - q).item(), log_ratio_clip[0]), log_ratio_clip[1])
        for p, q in zip(logprobs, behavior_logprobs, strict=True)
    ]
    log_g = []
    for t in range(1, T + 1):
        if level == "token":
            value = (T - t) * math.log(gamma) + sum(delta[j - 1] for j in range(t + 1, T + 1))
        elif level == "block":
            e_k = min(-(-t // block_size) * block_size, T)  # the last position of t's block
            value = (T - e_k) * math.log(gamma) + sum(delta[j - 1] for j in range(e_k + 1, T + 1))
        else:
            value = sum(delta)
        log_g.append(min(max(value, log_weight_clip[0]), log_weight_clip[1]))
    return torch.tensor(log_g, dtype=torch.float64, device=logprobs.device).exp().to(logprobs.dtype)


def naive_logprobs(hidden, weight, target, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100) -> Tensor:
    """log pi of each target from the full logits (N, V); 0 at ignored tokens."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = target != ignore_index
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(-1, target.where(valid, 0).unsqueeze(-1)).squeeze(-1).where(valid, 0.0)


def naive_pear_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    cu_seqlens: list[int] | Tensor | None = None,  # (S+1,)
    level: str = "token",
    block_size: int = 4,
    gamma: float = 0.999,
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3),
    log_weight_clip: tuple[float, float] = (-10.0, 5.0),
    sequence_scale: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_pear_loss: L = sum_t stop_gradient(G_t) * -log pi(y_t) / divisor."""
    logprobs = naive_logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    bounds = [0, len(target)] if cu_seqlens is None else [int(b) for b in cu_seqlens]
    weights = torch.zeros_like(logprobs)
    total, sequences = logprobs.sum() * 0, 0
    for s, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        response = begin + (target[begin:end] != ignore_index).nonzero().squeeze(-1)
        if len(response) == 0:
            continue
        sequences += 1
        with torch.no_grad():
            weights[response] = naive_weights(
                logprobs[response], behavior_logprobs[response].to(logprobs.dtype), level, block_size, gamma,
                log_ratio_clip, log_weight_clip,
            )  # fmt: skip
        term = -(weights[response] * logprobs[response]).sum()
        if sequence_scale is not None:
            term = term * sequence_scale[s]
        total = total + (term / len(response) if reduction == "sequence_mean" else term)
    divisor = {"mean": int((target != ignore_index).sum()), "sum": 1, "sequence_mean": sequences}[reduction]
    return total / (denominator or max(divisor, 1)), logprobs.detach(), weights


def naive_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    old_logprobs: Tensor | None,  # (N,)
    advantages: Tensor,  # (S,) or (N,)
    *,
    bias: Tensor | None = None,
    cu_seqlens: list[int] | Tensor | None = None,  # (S+1,)
    objective: str = "grpo",
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    sampler_logprobs: Tensor | None = None,
    sampler_clip: float | None = None,
    sampler_level: str = "token",
    entropy_coef: float = 0.0,
    max_length: int | None = None,
    unbiased_kl: bool = False,
    sequence_scale: Tensor | None = None,
    reduction: str | None = None,
    denominator: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """`(loss, logprobs)` of linear_policy_loss, a sequence at a time; every gradient is autograd's."""
    logprobs = naive_logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.log_softmax(logits / temperature, dim=-1)  # (N, V)
    entropy = -(distribution.exp() * distribution.nan_to_num(neginf=0.0)).sum(-1)  # (N,)

    bounds = [0, len(target)] if cu_seqlens is None else [int(b) for b in cu_seqlens]
    total, sequences, tokens = logprobs.sum() * 0, 0, 0
    for s, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        response = begin + (target[begin:end] != ignore_index).nonzero().squeeze(-1)
        if len(response) == 0:
            continue
        sequences, tokens = sequences + 1, tokens + len(response)
        lp = logprobs[response]
        A = advantages[s].expand(len(response)) if len(advantages) == len(bounds) - 1 else advantages[response]
        old = lp.detach() if old_logprobs is None else old_logprobs[response]
        ratio = torch.exp(lp - old)
        if objective == "gspo":
            ratio = torch.exp((lp - old).mean()).expand(len(response))
        elif objective == "gspo_token":
            ratio = torch.exp((lp - old).mean()).detach() * torch.exp(lp - lp.detach())
        if objective == "cispo":
            loss = -ratio.detach().clamp(max=1 + clip_high) * A * lp
        elif objective == "sapo":
            tau = torch.tensor([sapo_temperatures[0] if a > 0 else sapo_temperatures[1] for a in A], dtype=lp.dtype)
            loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * A
        elif objective == "reinforce":
            loss = -A * lp
        else:
            counted = ratio if dual_clip is None else torch.where(A < 0, ratio.clamp(max=dual_clip), ratio)
            loss = -torch.minimum(counted * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
        if sampler_logprobs is not None:
            log_w = old - sampler_logprobs[response]
            w = torch.exp(log_w if sampler_level == "token" else log_w.sum())
            loss = loss * (w if sampler_clip is None else w.clamp(max=sampler_clip)).detach()
        if beta:
            log_r = ref_logprobs[response] - lp
            loss = loss + beta * (torch.exp(lp - old) if unbiased_kl else 1) * (torch.exp(log_r) - log_r - 1)
        loss = loss - entropy_coef * entropy[response]
        by_sequence = ("ppo", "grpo", "gspo", "gspo_token")
        how = reduction or ("sequence_mean" if objective in by_sequence else None)
        term = loss.mean() if how == "sequence_mean" else loss.sum()
        total = total + (term if sequence_scale is None else term * sequence_scale[s])
    how = how if sequences else "sum"
    if how is None:
        how = "constant_length" if objective == "dr_grpo" else "mean"
    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    divisor = {
        "mean": tokens,
        "sum": 1,
        "sequence_mean": sequences,
        "constant_length": (len(bounds) - 1) * (max_length or longest),
    }[how]
    return total / (denominator or divisor), logprobs.detach()
