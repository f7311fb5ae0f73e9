"""The losses as their papers write them: full logits, one sequence at a time. Slow; for readers and for tests.

This module shares no code with the rest of the package. Gradients come from autograd through `log_softmax`.
Each loss also takes the fields of `Batch` by keyword.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    """G_1..G_T of arXiv 2602.01058, position by position (t counts from 1, as there).

    `normalize` "batch" needs all sequences: the losses below apply it.
    """
    T = len(logprobs)
    if block_ids is not None:
        places = [(t, int(block_ids[t - 1])) for t in range(1, T + 1) if block_ids[t - 1] != -1]
    else:
        places = [(t, t if level == "token" else (t - 1) // block_size) for t in range(1, T + 1)]
    members: dict[int, list[int]] = {}  # positions with a log-ratio, by block
    for t, block in places:
        members.setdefault(block, []).append(t)
    low, high = log_ratio_clip
    if clip_length is not None and len(places) > clip_length:
        low, high = low * clip_length / len(places), high * clip_length / len(places)
    rho = {}  # sum of a block's clipped log-ratios
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
            value = sum(rho.values(), 0.0)
        else:
            value = sum((rho[block] + len(members[block]) * math.log(gamma) for block in later), 0.0)
        log_g.append(min(max(value, log_weight_clip[0]), log_weight_clip[1]))
    G = torch.tensor(log_g, dtype=torch.float64, device=logprobs.device).exp()
    return (G / G.mean() if normalize == "sequence" and T else G).to(logprobs.dtype)


def naive_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    """(N, V): bounded by the softcap, and divided by the temperature."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def naive_logprobs(hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, **head: Any) -> Tensor:
    """(N,) log pi of each target from the full logits; 0 at ignored tokens. `head`: options of naive_logits."""
    valid = target != ignore_index
    logprobs = torch.log_softmax(naive_logits(hidden, weight, **head), dim=-1)
    return logprobs.gather(-1, target.where(valid, 0).unsqueeze(-1)).squeeze(-1).where(valid, 0.0)


def naive_entropy(log_p: Tensor) -> Tensor:
    """(N,) in nats, from log-probs (N, V); a token of probability 0 adds nothing."""
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)


class Batch(NamedTuple):
    """What every loss takes beside its own options: the rest of the head, the sequences and the reduction."""

    bias: Tensor | None = None  # (V,)
    temperature: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    cu_seqlens: list[int] | Tensor | None = None  # (S+1,)
    sequence_scale: Tensor | None = None  # (S,)
    reduction: str | None = "mean"
    denominator: float | None = None

    @property
    def head(self) -> dict[str, Any]:
        """Options of `naive_logits`."""
        return {"bias": self.bias, "temperature": self.temperature, "softcap": self.softcap}

    def logprobs(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return naive_logprobs(hidden, weight, target, ignore_index=self.ignore_index, **self.head)

    def bounds(self, target: Tensor) -> list[tuple[int, int]]:
        """Begin and end of each of the S sequences."""
        edges = [0, len(target)] if self.cu_seqlens is None else [int(edge) for edge in self.cu_seqlens]
        return list(itertools.pairwise(edges))

    def responses(self, target: Tensor) -> list[Tensor]:
        """Positions of the tokens that count, one tensor for each of the S sequences."""
        counts = target != self.ignore_index
        return [begin + counts[begin:end].nonzero().squeeze(-1) for begin, end in self.bounds(target)]

    def reduced(self, losses: list[Tensor]) -> Tensor:
        """(): losses of the tokens that count, one tensor per sequence, scaled by sequence, summed and divided."""
        total: Any = 0
        for s, term in enumerate(losses):
            mean = self.reduction == "sequence_mean" and len(term) > 0
            term = term.sum() / len(term) if mean else term.sum()
            total = total + (term if self.sequence_scale is None else term * self.sequence_scale[s])
        lengths = [len(term) for term in losses]
        divisor = {"mean": sum(lengths), "sum": 1, "sequence_mean": sum(length > 0 for length in lengths)}
        return total / (self.denominator or max(divisor[self.reduction or "mean"], 1))


def split(options: dict[str, Any]) -> tuple[Batch, dict[str, Any]]:
    """The fields of `Batch`, and the other options, which are those of naive_weights."""
    fields = {name: value for name, value in options.items() if name in Batch._fields}
    return Batch(**fields), {name: value for name, value in options.items() if name not in fields}


def naive_batch_weights(
    logprobs: Tensor, behavior_logprobs: Tensor, sequences: list[Tensor], block_ids: Tensor | None = None, **pear: Any
) -> Tensor:
    """(N,) G of all sequences from (N,) columns, 0 at ignored tokens; options of naive_weights."""
    weights, lp = torch.zeros_like(logprobs), logprobs.detach()
    for response in sequences:
        ids = None if block_ids is None else block_ids[response]
        behavior = behavior_logprobs[response].to(lp.dtype)
        weights[response] = naive_weights(lp[response], behavior, block_ids=ids, **pear)
    if pear.get("normalize") == "batch" and any(map(len, sequences)):
        weights = weights / weights[torch.cat(sequences)].mean()
    return weights


def naive_pear_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor,  # (N,)
    *,
    sequence_label: Tensor | None = None,  # (S,) bool
    negative_lambda: float = 0.1,
    logprob_floor: float = -5.0,
    level: str = "token",
    block_size: int = 4,
    **options: Any,  # of `Batch`; block_ids, gamma, normalize and the other options of naive_weights
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_pear_loss: L = sum_t stop_gradient(G_t) * -log pi(y_t) / divisor.

    A sequence labelled False is a wrong one: L_t = -negative_lambda * stop_gradient(G_seq) * min(-log pi, -floor).
    """
    batch, pear = split(options)
    logprobs, sequences = batch.logprobs(hidden, weight, target), batch.responses(target)
    pear["block_size"] = 1 if level == "token" else block_size
    weights = naive_batch_weights(logprobs, behavior_logprobs, sequences, level=level, **pear)
    bounded = torch.zeros_like(logprobs)  # loss of wrong tokens at or below the floor, a constant
    if sequence_label is not None:
        pear |= {"level": "sequence", "center": False, "normalize": None}
        wrong = [response for response, right in zip(sequences, sequence_label, strict=True) if not right]
        G = naive_batch_weights(logprobs, behavior_logprobs, wrong, **pear)
        for response in wrong:
            pushed = logprobs[response].detach() > logprob_floor
            weights[response] = -negative_lambda * G[response] * pushed
            bounded[response] = torch.where(pushed, 0.0, -negative_lambda * G[response] * -logprob_floor)
    losses = weights * -logprobs + bounded
    return batch.reduced([losses[response] for response in sequences]), logprobs.detach(), weights


def needs_index(weights: Callable[..., Tensor]) -> bool:
    """Whether a weight function takes the tokens' index: its second argument has no default, or is named so."""
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
    weights: Tensor | Callable[..., Tensor] | str | None = None,  # (N,), f(logprobs (n,)), f(logprobs, index) or a name
    *,
    weighting: str | None = None,
    ref_logprobs: Tensor | None = None,  # (N,)
    reference: Any = None,  # for "asft", in place of the above: a model in memory, as the `teacher` of naive_teacher
    iw_tau: float = 1.0,
    iw_max: float = 16.0,
    psft_clip: float = 0.28,
    asft_kl: float = 0.1,
    idft_clip: tuple[float, float] = (0.1, 2.0),
    **options: Any,  # of `Batch`
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_weighted_loss: L = sum_t (stop_gradient(w_t) * -log pi(y_t) + extra_t)."""
    batch = Batch(**options)
    log_p = torch.log_softmax(naive_logits(hidden, weight, **batch.head), dim=-1)  # (N, V)
    counts, sequences = target != batch.ignore_index, batch.responses(target)
    y = target.where(counts, 0)[:, None]
    logprobs = log_p.gather(1, y)[:, 0].where(counts, 0.0)
    lp, p = logprobs.detach(), logprobs.detach().exp()
    ref = torch.zeros_like(lp) if ref_logprobs is None else ref_logprobs.to(lp.dtype).where(counts, 0.0)
    name = weights if isinstance(weights, str) else weighting
    extra = torch.zeros_like(logprobs)
    factors = None  # d loss_t / d(-log pi), where it is more than w_t
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
    elif name == "asft" and reference is not None:  # KL of whole distributions, not of two outcomes
        w, counted = p, counts.nonzero()[:, 0]
        extra[counted] = asft_kl * naive_kl(naive_teacher(reference, counted, lp.dtype), log_p[counted])
    elif name == "asft":
        w, log_q = p, ref.clamp(max=0)
        log_not_p = torch.logsumexp(log_p.scatter(1, y, -math.inf), 1)  # a sum of its own, exact where p is near 1
        log_not_q = torch.log(-torch.expm1(log_q))  # -inf where q = 1
        extra = asft_kl * naive_kl(torch.stack([log_q, log_not_q], 1), torch.stack([logprobs, log_not_p], 1))
        factors = p + asft_kl * (log_q.exp() - p) / log_not_p.detach().exp()
    elif name == "idft":
        lo, hi = idft_clip
        w = p ** torch.exp(-(lp + naive_entropy(log_p.detach()))).clamp(lo, hi)
    else:
        raise ValueError(name)
    losses = w.where(counts, 0.0) * -logprobs + extra
    loss = batch.reduced([losses[response] for response in sequences])
    return loss, lp, (w if factors is None else factors).where(counts, 0.0)


def naive_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v log(a_v / b_v) over the last dimension; a term with a_v = 0 is 0."""
    there = log_a > -math.inf
    return (log_a.exp() * (log_a.where(there, 0.0) - log_b.where(there, 0.0))).sum(-1)


def naive_divergence(log_p: Tensor, log_q: Tensor, divergence: str = "forward", js_beta: float = 0.5) -> Tensor:
    """Of a student p from a teacher q, given as log-probs over the last dimension (arXiv 2306.13649)."""
    if divergence == "forward":
        return naive_kl(log_q, log_p)
    if divergence == "reverse":
        return naive_kl(log_p, log_q)
    m = js_beta * log_q.exp() + (1 - js_beta) * log_p.exp()
    # the floor is for outcomes of probability 0 in both, whose terms are 0
    log_m = torch.log(m.clamp(min=torch.finfo(m.dtype).tiny))
    return js_beta * naive_kl(log_q, log_m) + (1 - js_beta) * naive_kl(log_p, log_m)


@torch.no_grad()
def naive_teacher(teacher: Any, index: Tensor, dtype: torch.dtype, distill_temperature: float = 1.0) -> Tensor:
    """(n, V) log q at these tokens (n,) of a teacher in memory.

    It has hidden (N, D'), weight (V, D'), bias (V,) or None, temperature and softcap.
    """
    bias = None if teacher.bias is None else teacher.bias.to(dtype)
    logits = naive_logits(
        teacher.hidden.to(dtype)[index], teacher.weight.to(dtype), bias=bias, temperature=teacher.temperature,
        softcap=teacher.softcap,
    )  # fmt: skip
    return torch.log_softmax(logits / distill_temperature, dim=-1)


def naive_distill_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    teacher: Any,  # of naive_teacher; or with ids and logprobs (N, K)
    target: Tensor,  # (N,)
    behavior_logprobs: Tensor | None = None,  # (N,)
    *,
    divergence: str = "forward",
    js_beta: float = 0.5,
    distill_temperature: float = 1.0,
    nll_coef: float = 0.0,
    **options: Any,  # of `Batch`; level, block_size, block_ids, gamma and the other options of naive_weights
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, logprobs, weights)` of linear_distill_loss: L = sum_t stop_gradient(G_t) (D_t + nll_coef * -log pi)."""
    batch, pear = split(options)
    logprobs, sequences = batch.logprobs(hidden, weight, target), batch.responses(target)
    counts = target != batch.ignore_index
    counted = counts.nonzero().squeeze(-1)
    logits = naive_logits(hidden[counted], weight, **batch.head)
    log_p = torch.log_softmax(logits / distill_temperature, dim=-1)  # (n, V)
    if hasattr(teacher, "ids"):  # K + 1 outcomes: the last is any other token
        ids, log_q = teacher.ids[counted].long(), teacher.logprobs[counted].to(log_p.dtype)
        rounding = torch.finfo(teacher.logprobs.dtype).eps  # least probability of the last outcome
        rest_of_q = torch.log((1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=rounding))
        log_q = torch.cat([log_q, rest_of_q], -1)
        rest_of_p = torch.logsumexp(log_p.scatter(-1, ids, -math.inf), -1, keepdim=True)
        log_p = torch.cat([log_p.gather(-1, ids), rest_of_p], -1)
    else:
        log_q = naive_teacher(teacher, counted, log_p.dtype, distill_temperature)
    divergences = torch.zeros_like(logprobs)
    divergences[counted] = naive_divergence(log_p, log_q, divergence, js_beta)
    if behavior_logprobs is None:
        weights = torch.ones_like(logprobs).where(counts, 0.0)
    else:
        weights = naive_batch_weights(logprobs, behavior_logprobs, sequences, **pear)
    losses = weights * (divergences - nll_coef * logprobs)
    return batch.reduced([losses[response] for response in sequences]), logprobs.detach(), weights


OWN_REDUCTION = dict.fromkeys(("ppo", "grpo", "gspo", "gspo_token"), "sequence_mean") | {"dr_grpo": "constant_length"}


def naive_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    old_logprobs: Tensor | None,  # (N,)
    advantages: Tensor,  # (S,) or (N,)
    *,
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
    **options: Any,  # of `Batch`; without a reduction, the objective's own
) -> tuple[Tensor, Tensor]:
    """`(loss, logprobs)` of linear_policy_loss, one sequence at a time; all gradients come from autograd."""
    batch = Batch(**{"reduction": None, **options})
    logprobs, sequences = batch.logprobs(hidden, weight, target), batch.responses(target)
    entropy = naive_entropy(torch.log_softmax(naive_logits(hidden, weight, **batch.head), dim=-1))  # (N,)
    losses = []
    for s, response in enumerate(sequences):
        lp = logprobs[response]
        A = advantages[s].expand(len(response)) if len(advantages) == len(sequences) else advantages[response]
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
        if ref_logprobs is not None and beta:
            log_r = ref_logprobs[response] - lp
            loss = loss + beta * (torch.exp(lp - old) if unbiased_kl else 1) * (torch.exp(log_r) - log_r - 1)
        losses.append(loss - entropy_coef * entropy[response])
    reduction = batch.reduction or OWN_REDUCTION.get(objective, "mean")
    if reduction == "constant_length":
        longest = max(end - begin for begin, end in batch.bounds(target))
        denominator = batch.denominator or len(sequences) * (max_length or longest)
        batch = batch._replace(reduction="sum", denominator=denominator)
    else:
        batch = batch._replace(reduction=reduction)
    return batch.reduced(losses), logprobs.detach()
