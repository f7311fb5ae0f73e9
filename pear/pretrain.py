"""A language model taught a task by worked solutions: small ones from nothing, in a minute on one core."""

import math
from collections.abc import Callable
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pear.generate import encode_prompt

Row = tuple[list[int], list[int]]  # the ids of a prompt and of its completion


def small_llama(tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    """A Llama with random weights; PyTorch's random state decides which."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[], tuple[str, str]],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Train `model` in place on `batch` new examples a step; loss on the solution's tokens only.

    Args:
        example: a prompt and its solution, another at each call
        learning_rate: at its height; a short warm-up, then a cosine to 0
        progress: is told (steps done, steps)

    Returns:
        mean loss of the last 50 steps, in nats a token; NaN for no steps
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    model.train()
    recent: list[float] = []
    for step in range(steps):
        warmup, cosine = min(1.0, 20 * (step + 1) / steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * cosine
        rows = _encode([example() for _ in range(batch)], tokenizer)
        tokens = sum(len(completion) for _, completion in rows)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        half = max(1, len(rows) // 2)  # short examples and long ones apart, or half of what is computed were padding
        for part in (rows[:half], rows[half:]):
            if part:
                share = model(**_pad(part, tokenizer, model.device), num_items_in_batch=tokens).loss
                share.backward()
                loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], loss]
        progress(step + 1, steps)
    return sum(recent) / len(recent) if recent else math.nan


def mixture(rng: Random, shares: dict[str, float]) -> str:
    """One of the names, with probabilities in proportion to their shares."""
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def _encode(examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Shortest first."""
    completions = tokenizer([completion for _, completion in examples], add_special_tokens=False)["input_ids"]
    rows = [
        (encode_prompt(tokenizer, prompt), [*completion, tokenizer.eos_token_id])
        for (prompt, _), completion in zip(examples, completions, strict=True)
    ]
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))


def _pad(rows: list[Row], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and labels (B, T), padded on the right: behind a causal mask, padding needs no mask of its own."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor(prompt + completion)
        labels[i, start:end] = input_ids[i, start:end]
    return {"input_ids": input_ids.to(device), "labels": labels.to(device)}
