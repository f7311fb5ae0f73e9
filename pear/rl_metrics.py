"""What TRL's GRPOTrainer logs of its loss (`_compute_loss` of trl 1.16), made from the log-probs of our pass.

TRL reads each figure back from the device in each micro-batch. Here a micro-batch leaves one row of numbers on the
device, and the rows are read when they are logged. The values are TRL's: a mean is over the tokens of one micro-batch
in all processes, then over micro-batches; an extreme is over sequences, then the mean over micro-batches.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")  # TRL's loss types that clip the ratio on both sides
LOWEST, HIGHEST = "clip_ratio/low_min", "clip_ratio/high_max"


def names(loss_type: str, beta: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """TRL's names of the means and of the extremes that it logs with these options."""
    means: tuple[str, ...] = ("entropy",) + (("kl",) if beta else ())
    if loss_type in CLIPPED:
        return (*means, *(f"clip_ratio/{side}_mean" for side in ("low", "high", "region"))), (LOWEST, HIGHEST)
    return (*means, "cispo_clip_ratio") if loss_type == "cispo" else means, ()


def micro_batch(
    logprobs: Tensor,  # (B, C) of the policy
    entropy: Tensor,  # () mean over the tokens that count
    mask: Tensor,  # (B, C) tokens that count
    inputs: dict[str, Any],  # TRL's: advantages (B,) or (B, C), old and reference log-probs (B, C)
    *,
    loss_type: str,
    of_sequences: bool,  # importance_sampling_level = "sequence"
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    unbiased_kl: bool,
) -> Tensor:
    """(2 M + E,) float32: sum and count of each of the M means of `names`, then the E extremes."""
    kept = mask.bool()

    def away_from(name: str) -> Tensor:
        """(B, C) log-probs minus those of `inputs`, 0 where there are none."""
        other = inputs.get(name)
        return torch.zeros_like(logprobs) if other is None else torch.where(kept, logprobs - other, 0)

    log_ratio = away_from("old_per_token_logps")
    if of_sequences:
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()  # (B, C), or (B, 1) of sequences
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages

    def over(values: Tensor) -> Tensor:
        """(2,) sum and count: over tokens, or over sequences where each has one value."""
        if values.shape[1] == 1:
            return torch.stack([values.sum(), values.new_full((), len(values))])
        return torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)])

    def share(values: Tensor) -> Tensor:
        """(B,) mean over each sequence; NaN of one in which no token counts."""
        return values[:, 0] if values.shape[1] == 1 else (values * mask).sum(-1) / mask.sum(-1)

    tokens = mask.sum().to(logprobs.dtype)
    found = [torch.stack([entropy.to(tokens) * tokens, tokens])]
    if beta:
        from_ref = -away_from("ref_per_token_logps")
        kl = from_ref.expm1() - from_ref
        found.append(over(kl * ratio if unbiased_kl else kl))
    if loss_type in CLIPPED:
        ratio = ratio if delta is None else ratio.clamp(max=delta)
        low = ((ratio < 1 - epsilon_low) & (advantages < 0)).to(logprobs.dtype)
        high = ((ratio > 1 + epsilon_high) & (advantages > 0)).to(logprobs.dtype)
        found += [over(low), over(high), over(low + high)]  # one has a sign of the advantage that the other has not
        low, high = share(low), share(high)
        least = low.nan_to_num(nan=torch.inf).amin()
        most = high.nan_to_num(nan=-torch.inf).amax()
        found.append(torch.stack([least, most]))
    elif loss_type == "cispo":
        found.append(over(((ratio > epsilon_high) & (advantages > 0)).to(logprobs.dtype)))
    return torch.cat(found).detach().float()


def read(
    rows: Tensor,  # (R, 2 M + E) of `micro_batch`
    means: tuple[str, ...],
    extremes: tuple[str, ...],
    accelerator: Accelerator,
) -> dict[str, list[float]]:
    """The value of each micro-batch by TRL's names. NaN, which TRL leaves out: no sequence has a token that counts."""
    found = accelerator.gather(rows).view(-1, *rows.shape).cpu().double()  # (processes, R, 2 M + E)
    values = {}
    for i, name in enumerate(means):
        total, count = found[:, :, 2 * i].sum(0), found[:, :, 2 * i + 1].sum(0)
        values[name] = total / count.clamp(min=1)
    for i, name in enumerate(extremes, 2 * len(means)):
        value = found[:, :, i].amin(0) if name == LOWEST else found[:, :, i].amax(0)
        values[name] = torch.where(value.isinf(), torch.nan, value)
    return {name: value.tolist() for name, value in values.items()}
