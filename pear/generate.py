"""Batched sampling with a KV cache from a transformers model, repeatable by seed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pear.chat import Renderer
from pear.decode import decode, finite_logits
from pear.models import check_ids
from pear.progress import progress as progress_of
from pear_kernels.huggingface.positions import position_limit


class Completion(NamedTuple):
    text: str  # without special tokens
    ids: list[int]  # as sampled; the end-of-sequence token is the last one if there was one
    finished: bool  # False: cut at max_new_tokens


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    where: str = "prompt",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt, ready to be continued.

    A list of chat messages goes through the chat template; so does a string, as the user's message, when the tokenizer
    has a template. Otherwise the string is tokenised as it is.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chat = Renderer({"chat_template_kwargs": chat_template_kwargs}, tokenizer, where)
    return chat.ids(chat.text(messages, add_generation_prompt=True))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: str | Callable[[int, int], None] | None = "sampling",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[Completion]]:
    """Draw `samples` completions of each prompt.

    Tokens come from the model's own distribution at `temperature`: top-k, top-p and penalties that a model folder
    recommends are not applied, so the completions are draws from the policy that `pear score` scores.

    Args:
        model: any decoder of transformers; its mode and PyTorch's random state are left as they were
        prompts: strings or lists of chat messages (see `encode_prompt`)
        samples: completions a prompt, at least 1
        max_new_tokens: tokens after which a completion is cut
        temperature: 0 is greedy
        seed: the same seed, batch size and machine give the same completions
        batch_size: rows sampled together; prompts are padded on the left
        chat_template_kwargs: what the chat template is given besides the messages
        progress: what the progress bar is called, or a function that is told (rows done, rows); None for neither

    Returns:
        one list of `samples` completions for each prompt, in the order of `prompts`

    Raises:
        ValueError: an argument out of range, an empty prompt, a prompt with no room for max_new_tokens or of
            ids that the model has no embedding for
    """
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")

    encoded = [
        encode_prompt(tokenizer, prompt, f"prompts[{i}]", chat_template_kwargs) for i, prompt in enumerate(prompts)
    ]
    room = position_limit(model.config)
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{i}] has no tokens: {prompts[i]!r}")
        check_ids(ids, model.get_input_embeddings().weight.shape[0], f"prompts[{i}]", model.name_or_path, tokenizer)
        if room and len(ids) + max_new_tokens > room:
            raise ValueError(
                f"prompts[{i}] has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                f"model's {room} positions; lower max_new_tokens"
            )

    stop = _stop_ids(model, tokenizer)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        top_k=0,  # left to itself, transformers keeps the 50 likeliest tokens
        eos_token_id=stop or None,
        pad_token_id=pad,
        use_cache=True,
        **({"temperature": float(temperature)} if temperature > 0 else {}),
    )
    # Rows of one length together: little padding. The sort is stable, so the order, and with it the draws, are fixed.
    rows = sorted((i for i in range(len(encoded)) for _ in range(samples)), key=lambda i: len(encoded[i]))
    completions: list[list[Completion]] = [[] for _ in encoded]
    with finite_logits(), _own_settings(model, config, seed), _bar(progress, len(rows)) as show, torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(len(encoded[i]) for i in batch)
            input_ids = torch.full((len(batch), width), pad, dtype=torch.long)  # (rows, width), padded on the left
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                input_ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
                attention_mask[row, width - len(encoded[i]) :] = 1
            output = decode(
                model, input_ids.to(model.device), attention_mask.to(model.device), generation_config=config
            )
            for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((t + 1 for t, token in enumerate(ids) if token in stop), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                completions[i].append(Completion(text, ids[:end], end is not None))
            show(start + len(batch))
    return completions


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the tokenizer's end of sequence and the model's (chat models may have several)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


@contextmanager
def _own_settings(model: PreTrainedModel, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Evaluation mode, our seed, and nothing merged in from the folder's generation config; all put back at the end."""
    training, recommended = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            model.eval()
            model.generation_config = config
            yield
        finally:
            model.generation_config = recommended
            model.train(training)


@contextmanager
def _bar(progress: str | Callable[[int, int], None] | None, total: int) -> Iterator[Callable[[int], None]]:
    if callable(progress):
        yield lambda done: progress(done, total)
        return
    console = Console(stderr=True, quiet=progress is None)
    with progress_of(progress or "", total, "completions", console=console, transient=True) as advance:
        before = 0

        def show(done: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        yield show
