"""What a study looks at besides pass@k: how far SFT and RL moved the policy, and what the weights did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.eval import prompt_format
from pear.generate import encode_prompt, generate
from pear.io import read_jsonl
from pear.pipeline import Tick
from pear.replicate.results import POSITIONS
from pear.tasks import Problem
from pear_kernels import pear_weights
from pear_kernels.objectives.base import effective_sample_size
from pear_kernels.objectives.weighted import WEIGHTINGS, Tokens
from pear_kernels.options import DEFAULTS, WeightingOptions

SAMPLES = 4  # completions a problem for KL and entropy
ROWS = 16  # of logits at a time


# ---------------------------------------------------------------------------------------------------------------------
# Movement


def movement(
    student: PreTrainedModel,
    sft: PreTrainedModel,
    rl: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    tick: Tick = lambda done, total: None,
) -> dict[str, float]:
    """Distances between the student, the checkpoint after SFT and the one after RL.

    Returns:
        `sft_kl`, `rl_kl`: KL(sft, student) and KL(rl, sft) in nats a token, each exact over the vocabulary at every
        token of completions that the first of the two draws on `problems`; `entropy_before`, `entropy_after`: mean
        entropy of RL's start and end at the tokens of their own completions; `sft_distance`, `rl_distance`: Euclidean
        norms of the updates of all weights; `start_norm`: that of the student's weights; `update_cosine`: cosine of
        the two updates (0 where one of them is none).
    """
    style, found = prompt_format(tokenizer), {}
    prompts = [problem.prompt(style) for problem in problems]
    for i, (name, entropy, new, old) in enumerate(
        (("sft_kl", "entropy_before", sft, student), ("rl_kl", "entropy_after", rl, sft))
    ):
        drawn = generate(
            new, tokenizer, prompts, samples=SAMPLES, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size,
            progress=None,
        )  # fmt: skip
        rows = [
            (encode_prompt(tokenizer, prompt), completion.ids)
            for prompt, completions in zip(prompts, drawn, strict=True)
            for completion in completions
        ]
        found[name], found[entropy] = kl_and_entropy(new, old, rows)
        tick(i + 1, 3)
    first, second = update(sft, student), update(rl, sft)
    found |= {
        "sft_distance": norm(first),
        "rl_distance": norm(second),
        "start_norm": norm([p.detach().double() for p in student.parameters()]),
        "update_cosine": cosine(first, second),
    }
    tick(3, 3)
    return found


@torch.inference_mode()
def kl_and_entropy(
    new: PreTrainedModel, old: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]
) -> tuple[float, float]:
    """Mean over completion tokens of KL(new, old) over the vocabulary, and of the entropy of `new`, in nats.

    Args:
        rows: token ids of prompts and of their completions
    """
    kl = entropy = tokens = 0.0
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        width = max(len(prompt) + len(completion) for prompt, completion in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        counts = torch.zeros(len(part), width - 1, dtype=torch.bool)  # [b, t]: what position t predicts counts
        for i, (prompt, completion) in enumerate(part):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            counts[i, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
        log_p, log_q = (  # padding stands on the right, behind a causal mask
            model(ids.to(model.device)).logits[:, :-1][counts.to(model.device)].float().log_softmax(-1).cpu()
            for model in (new, old)
        )  # (n, V)
        p = log_p.exp()
        kl += (p * (log_p - log_q)).sum().item()
        entropy -= (p * log_p).sum().item()
        tokens += len(p)
    return kl / tokens, entropy / tokens


def update(after: PreTrainedModel, before: PreTrainedModel) -> list[Tensor]:
    """after - before, a float64 tensor for each weight; a tied one counts once."""
    old = dict(before.named_parameters())
    return [p.detach().double() - old[name].detach().double() for name, p in after.named_parameters()]


def norm(tensors: Sequence[Tensor]) -> float:
    return sum(t.square().sum().item() for t in tensors) ** 0.5


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Of two lists of tensors taken as one long vector each; 0 where one of them is 0."""
    length = norm(a) * norm(b)
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True)) / length if length else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def health(logprobs: Path, data: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The weights that an arm's `options` give the training data, under a model whose log-probs are known.

    Args:
        logprobs: rows of `data` in their order, with that model's log-probs as `ref_logprobs`
        data: scored rows; `behavior_logprobs`, and, as `ref_logprobs`, the log-probs of the model SFT started from

    Returns:
        `by_position`: POSITIONS mean weights over tokens by t / T, first to last; `mean`, `floor`, `ceiling` (shares of
        tokens at the ends of the clip; 0 of weightings without), `effective_sample_size` (a share),
        `log_ratio_mean` (log pi - log pi_b)
    """
    now, behavior, start, lengths = [], [], [], []
    for (_, row), (_, before) in zip(read_jsonl(logprobs), read_jsonl(data), strict=True):
        counted = [i for i, m in enumerate(row["completion_mask"]) if m]
        now += [row["ref_logprobs"][i] for i in counted]
        start += [before["ref_logprobs"][i] for i in counted]
        behavior += [before["behavior_logprobs"][i] for i in counted]
        lengths.append(len(counted))
    log_p, log_b, log_0 = (torch.tensor(each, dtype=torch.float64) for each in (now, behavior, start))  # (N,)
    sizes = torch.tensor(lengths)
    weights, floor, ceiling = weights_of(options, log_p, log_b, log_0, sizes)
    position = torch.cat([torch.arange(n) * POSITIONS // n for n in lengths])  # (N,) bin of each token
    counts = torch.bincount(position, minlength=POSITIONS)
    sums = torch.bincount(position, weights, minlength=POSITIONS)
    return {
        "by_position": [(s / n).item() if n else None for s, n in zip(sums, counts, strict=True)],
        "mean": weights.mean().item(),
        "floor": floor.double().mean().item(),
        "ceiling": ceiling.double().mean().item(),
        "effective_sample_size": effective_sample_size(
            weights.sum(), weights.square().sum(), torch.tensor(len(weights))
        ).item(),
        "log_ratio_mean": (log_p - log_b).mean().item(),
    }


def weights_of(
    options: dict[str, Any],
    log_p: Tensor,  # (N,) float64, responses one after another
    log_b: Tensor,  # (N,) of the behaviour policy
    log_0: Tensor,  # (N,) of the model SFT started from
    sizes: Tensor,  # (S,) tokens of each response
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) weights, and where they are at the floor and at the ceiling of their clip."""
    name = options.get("weighting", "pear")
    none = torch.zeros_like(log_p, dtype=torch.bool)
    if name == "pear":
        given = {key: options[key] for key in DEFAULTS.names() if key in options}
        bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        weights = pear_weights(log_p, log_b, cu_seqlens=bounds, **given)
        low, high = (torch.tensor(end).exp() for end in given.get("log_weight_clip", DEFAULTS.log_weight_clip))
        return weights, weights <= low * (1 + 1e-6), weights >= high * (1 - 1e-6)
    ratio = log_p - log_0
    if name == "iw-sft":  # the mean of its sequence
        which = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        means = torch.zeros(len(sizes), dtype=ratio.dtype).index_add_(0, which, ratio) / sizes
        ratio = means[which]
    own = WeightingOptions(**{key: options[key] for key in WeightingOptions.names() if key in options})
    _, weights = WEIGHTINGS[name].formula(Tokens(log_p, None, ratio, torch.arange(len(log_p))), own)
    return weights, none, weights >= own.iw_max if name == "iw-sft" else none
