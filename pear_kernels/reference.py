"""The losses as their papers write them: full logits, one sequence at a time. Slow; for readers and for tests.

Shares no code with the rest of the package. Gradients come from autograd through `log_softmax`.
"""

import inspect
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
    block_ids: Tensor | None = None,  # (T,)
    clip_blocks: bool = False,
    center: bool = False,
    clip_length: int | None = None,
    normalize: str | None = None,
) -> Tensor:
    """G_1..G_T of arXiv 2602.01058, position by position (t counts from 1, as there); "batch" is the caller's."""
    T = len(logprobs)
    if block_ids is not None:
        places = [(t, block_ids[t - 1].item()) for t in range(1, T + 1) if block_ids[t - 1] != -1]
    else:
        places = [(t, t if level == "token" else (t - 1) // block_size) for t in range(1, T + 1)]
    members = {}  # of each block, the positions of its log-ratios
    for t, block in places:
        members.setdefault(block, []).append(t)
    low, high = log_ratio_clip
    if clip_length is not None and len(places) > clip_length:
        low, high = low * clip_length / len(places), high * clip_length / len(places)
    rho = {}
    for block, positions in members.items():
        ratios = [(logprobs[t - 1] - behavior_logprobs[t - 1]).item() for t in positions]
        if clip_blocks:
            rho[block] = min(max(sum(ratios), len(ratios) * low), len(ratios) * high)
        else:
            rho[block] = sum(min(max(ratio, low), high) for ratio in ratios)
    if center:
        mean = sum(rho.values()) / max(len(places), 1)
        rho = {block: rho[block] - len(positions) * mean for block, positions in members.items()}
    log_g = []
    for t in range(1, T + 1):
        later = [block for block, positions in members.items() if min(positions) > t]
        if level == "sequence":
            value = sum(rho.values())
        else:
            value = sum(rho[block] + len(members[block]) * math.log(gamma) for block in later)
        log_g.append(min(max(value, log_weight_clip[0]), log_weight_clip[1]))
    G = torch.tensor(log_g, dtype=torch.float64, device=logprobs.device).exp()
    return (G / G.mean() if normalize == "sequence" and T else G).to(logprobs.dtype)


def naive_logits(hidden, weight, *, bias=None, temperature=1.0, softcap=None) -> Tensor:
    """(N, V): capped, and divided by the temperature."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def naive_logprobs(hidden, weight, target, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100) -> Tensor:
    """log pi of each target from the full logits (N, V); 0 at ignored tokens."""
    logits = naive_logits(hidden, weight, bias=bias, temperature=temperature, softcap=softcap)
    valid = target != ignore_index
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, target.where(valid, 0).unsqueeze(-1)).squeeze(-1).where(valid, 0.0)


def naive_entropy(log_p: Tensor) -> Tensor:
    """(N,) in nats, of log-probs (N, V); a token of probability 0 adds nothing."""
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)


def responses(target: Tensor, cu_seqlens: list[int] | Tensor | None, ignore_index: int) -> list[Tensor]:
    """Where the tokens that count stand, one tensor for each of the S sequences."""
    bounds = [0, len(target)] if cu_seqlens is None else [int(b) for b in cu_seqlens]
    edges = zip(bounds[:-1], bounds[1:], strict=True)
    return [begin + (target[begin:end] != ignore_index).nonzero().squeeze(-1) for begin, end in edges]


def reduced(losses: Tensor, sequences: list[Tensor], sequence_scale, reduction: str, denominator) -> Tensor:
    """Losses (N,) of tokens to that of the batch: scaled by sequence, summed, and divided."""
    total = losses.sum() * 0
    for s, response in enumerate(sequences):
        term = losses[response].sum()
        if reduction == "sequence_mean" and len(response):
            term = term / len(response)
        total = total + (term if sequence_scale is None else term * sequence_scale[s])
    divisor = {"mean": sum(map(len, sequences)), "sum": 1, "sequence_mean": sum(len(r) > 0 for r in sequences)}
    return total / (denominator or max(divisor[reduction], 1))


def naive_pear_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    cu_seqlens: list[int] | Tensor | None = None,  # (S+1,)
    sequence_label: Tensor | None = None,  # (S,) bool
    negative_lambda: float = 0.1,
    logprob_floor: float = -5.0,
    level: str = "token",
    block_size: int = 4,
    gamma: float = 0.999,
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3),
    log_weight_clip: tuple[float, float] = (-10.0, 5.0),
    block_ids: Tensor | None = None,  # (N,)
    clip_blocks: bool = False,
    center: bool = False,
    clip_length: int | None = None,
    normalize: str | None = None,
    sequence_scale: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_pear_loss: L = sum_t stop_gradient(G_t) * -log pi(y_t) / divisor.

    A sequence labelled False is a wrong one: L_t = -negative_lambda * stop_gradient(G_seq) * min(-log pi, -floor).
    """
    logprobs = naive_logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    weights, losses = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    sequences = responses(target, cu_seqlens, ignore_index)
    for s, response in enumerate(sequences):
        right = sequence_label is None or bool(sequence_label[s])
        lp = logprobs[response]
        ids = None if block_ids is None else block_ids[response]
        G = naive_weights(
            lp.detach(), behavior_logprobs[response].to(lp.dtype), level if right else "sequence",
            1 if level == "token" else block_size, gamma, log_ratio_clip, log_weight_clip, ids, clip_blocks,
            center and right, clip_length, normalize if right else None,
        )  # fmt: skip
        if right:
            weights[response] = G
            losses[response] = G * -lp
        else:
            pushed = lp.detach() > logprob_floor
            weights[response] = -negative_lambda * G * pushed
            losses[response] = -negative_lambda * G * torch.where(pushed, -lp, -logprob_floor)
    if normalize == "batch" and sum(map(len, sequences)):
        mean = torch.cat([weights[response] for response in sequences]).mean()
        weights, losses = weights / mean, losses / mean
    loss = reduced(losses, sequences, sequence_scale, reduction, denominator)
    return loss, logprobs.detach(), weights


def needs_index(weights) -> bool:
    """Whether a function of weights takes the tokens' places too: its second argument has no default, or that name."""
    try:
        parameters = inspect.signature(getattr(weights, "forward", weights)).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is positional[1].empty or positional[1].name == "index")


def naive_weighted_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    weights=None,  # (N,), a function of log-probs (n,) and perhaps of their places (n,), or a name
    *,
    weighting: str | None = None,
    ref_logprobs: Tensor | None = None,  # (N,)
    reference=None,  # of hidden (N, D'), weight (V, D'), bias, temperature, softcap: for "asft", in place of the above
    iw_tau: float = 1.0,
    iw_max: float = 16.0,
    psft_clip: float = 0.28,
    asft_kl: float = 0.1,
    idft_clip: tuple[float, float] = (0.1, 2.0),
    bias: Tensor | None = None,
    cu_seqlens: list[int] | Tensor | None = None,  # (S+1,)
    sequence_scale: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_weighted_loss: L = sum_t (stop_gradient(w_t) * -log pi(y_t) + extra_t)."""
    logits = naive_logits(hidden, weight, bias=bias, temperature=temperature, softcap=softcap)
    log_p = torch.log_softmax(logits, dim=-1)  # (N, V)
    counts = target != ignore_index
    y = target.where(counts, 0)[:, None]
    logprobs = log_p.gather(1, y)[:, 0].where(counts, 0.0)
    lp, p = logprobs.detach(), logprobs.detach().exp()
    ref = None if ref_logprobs is None else ref_logprobs.to(lp.dtype).where(counts, 0.0)
    name = weights if isinstance(weights, str) else weighting
    sequences = responses(target, cu_seqlens, ignore_index)
    extra = torch.zeros_like(logprobs)
    factors = None  # d loss_t / d(-log pi), where that is more than w_t
    if isinstance(weights, Tensor):
        w = weights.to(lp.dtype)
    elif callable(weights):
        index = counts.nonzero()[:, 0]
        w = torch.zeros_like(lp)
        w[index] = (weights(lp[index], index) if needs_index(weights) else weights(lp[index])).to(lp.dtype)
    elif name == "none":
        w = torch.ones_like(lp)
    elif name == "dft":
        w = p
    elif name == "iw-sft":
        w = torch.zeros_like(lp)
        for response in sequences:
            w[response] = torch.exp(iw_tau * (lp - ref)[response].mean()).clamp(0, iw_max)
    elif name == "psft":
        r = torch.exp(lp - ref)
        w = torch.where(r <= 1 + psft_clip, r, 0.0)
    elif name == "asft" and reference is not None:  # its whole distribution, not that of two outcomes
        w, counted = p, counts.nonzero()[:, 0]
        extra[counted] = asft_kl * naive_kl(naive_teacher(reference, counted, lp.dtype), log_p[counted])
    elif name == "asft":
        w, log_q = p, ref.clamp(max=0)
        log_not_p = torch.logsumexp(log_p.scatter(1, y, -math.inf), 1)  # its own sum, right where p is near 1
        log_not_q = torch.log(-torch.expm1(log_q))  # -inf where q = 1
        extra = asft_kl * naive_kl(torch.stack([log_q, log_not_q], 1), torch.stack([logprobs, log_not_p], 1))
        factors = p + asft_kl * (log_q.exp() - p) / log_not_p.detach().exp()
    elif name == "idft":
        lo, hi = idft_clip
        w = p ** torch.exp(-(lp + naive_entropy(log_p.detach()))).clamp(lo, hi)
    else:
        raise ValueError(name)
    losses = w.where(counts, 0.0) * -logprobs + extra
    loss = reduced(losses, sequences, sequence_scale, reduction, denominator)
    return loss, lp, (w if factors is None else factors).where(counts, 0.0)


def naive_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v log(a_v / b_v) over the last dimension; where a_v is 0, so is the term."""
    there = log_a > -math.inf
    return (log_a.exp() * (log_a.where(there, 0.0) - log_b.where(there, 0.0))).sum(-1)


def naive_divergence(log_p: Tensor, log_q: Tensor, divergence: str = "forward", js_beta: float = 0.5) -> Tensor:
    """Of a student p from a teacher q, both log-probs of all outcomes in the last dimension (arXiv 2306.13649)."""
    if divergence == "forward":
        return naive_kl(log_q, log_p)
    if divergence == "reverse":
        return naive_kl(log_p, log_q)
    m = js_beta * log_q.exp() + (1 - js_beta) * log_p.exp()
    # the floor is for outcomes that neither has, whose terms are 0
    log_m = torch.log(m.clamp(min=torch.finfo(m.dtype).tiny))
    return js_beta * naive_kl(log_q, log_m) + (1 - js_beta) * naive_kl(log_p, log_m)


@torch.no_grad()
def naive_teacher(teacher, index: Tensor, dtype: torch.dtype, distill_temperature: float = 1.0) -> Tensor:
    """(n, V) log q of a teacher with a head of its own, at these tokens (n,)."""
    hidden, weight, bias = (x if x is None else x.to(dtype) for x in (teacher.hidden, teacher.weight, teacher.bias))
    head = dict(bias=bias, temperature=teacher.temperature, softcap=teacher.softcap)
    return torch.log_softmax(naive_logits(hidden[index], weight, **head) / distill_temperature, dim=-1)


def naive_distill_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    teacher,  # of hidden (N, D'), weight (V, D'), bias, temperature, softcap; or of ids and logprobs (N, K)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor | None = None,  # (N,)
    *,
    divergence: str = "forward",
    js_beta: float = 0.5,
    distill_temperature: float = 1.0,
    nll_coef: float = 0.0,
    level: str = "token",
    block_size: int = 4,
    gamma: float = 0.999,
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3),
    log_weight_clip: tuple[float, float] = (-10.0, 5.0),
    block_ids: Tensor | None = None,  # (N,)
    clip_blocks: bool = False,
    center: bool = False,
    clip_length: int | None = None,
    normalize: str | None = None,
    bias: Tensor | None = None,
    cu_seqlens: list[int] | Tensor | None = None,  # (S+1,)
    sequence_scale: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_distill_loss: L = sum_t stop_gradient(G_t) (D_t + nll_coef * -log pi)."""
    logprobs = naive_logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    counted = (target != ignore_index).nonzero().squeeze(-1)
    logits = naive_logits(hidden[counted], weight, bias=bias, temperature=temperature, softcap=softcap)
    log_p = torch.log_softmax(logits / distill_temperature, dim=-1)  # (n, V)
    if hasattr(teacher, "ids"):  # K + 1 outcomes: the last is any other id
        ids, log_q = teacher.ids[counted].long(), teacher.logprobs[counted].to(log_p.dtype)
        rounding = torch.finfo(teacher.logprobs.dtype).eps  # what the last outcome's probability is at least
        rest_of_q = torch.log((1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=rounding))
        log_q = torch.cat([log_q, rest_of_q], -1)
        rest_of_p = torch.logsumexp(log_p.scatter(-1, ids, -math.inf), -1, keepdim=True)
        log_p = torch.cat([log_p.gather(-1, ids), rest_of_p], -1)
    else:
        log_q = naive_teacher(teacher, counted, log_p.dtype, distill_temperature)
    divergences = torch.zeros_like(logprobs)
    divergences[counted] = naive_divergence(log_p, log_q, divergence, js_beta)
    weights = torch.zeros_like(logprobs)
    sequences = responses(target, cu_seqlens, ignore_index)
    for response in sequences:
        weights[response] = 1.0
        if behavior_logprobs is not None:
            weights[response] = naive_weights(
                logprobs[response].detach(), behavior_logprobs[response].to(logprobs.dtype), level, block_size, gamma,
                log_ratio_clip, log_weight_clip, None if block_ids is None else block_ids[response], clip_blocks,
                center, clip_length, normalize,
            )  # fmt: skip
    if normalize == "batch" and behavior_logprobs is not None and sum(map(len, sequences)):
        weights = weights / torch.cat([weights[response] for response in sequences]).mean()
    losses = weights * (divergences - nll_coef * logprobs)
    return reduced(losses, sequences, sequence_scale, reduction, denominator), logprobs.detach(), weights


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
    logits = naive_logits(hidden, weight, bias=bias, temperature=temperature, softcap=softcap)
    entropy = naive_entropy(torch.log_softmax(logits, dim=-1))  # (N,)

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
