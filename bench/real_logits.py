"""Inputs whose logits a trained model makes: hidden states of SmolLM2-135M, its head, and the text that it read.

Random logits of variance 1 have a mean NLL of ln V and no unlikely tokens; a method that skips work skips half of the
gradient there. `python -m bench.real_logits` makes and caches 2,048 tokens of two kinds, out of packages alone:

    samples   answers that the model itself writes, at temperature 1
    code      Python source of the standard library

The behaviour policy is the same model at temperature 1.3.
"""

import argparse
import inspect
import textwrap
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.shapes import BEHAVIOR_TEMPERATURE, SHAPES, TEXTS, Inputs
from pear.models import cache_folder, load_model, load_tokenizer
from pear_kernels import linear_logprobs

VERSION = 3  # of the cached files
MODEL = "smollm2"
LONGEST = 512  # tokens of a sequence
SUBJECTS = (
    "rivers", "bread", "the moon", "cities", "prime numbers", "bees", "a long journey", "music",
    "glass", "winter", "trade", "maps", "sleep", "iron", "gardens", "clocks",
)  # fmt: skip


def real_inputs(text: str) -> Inputs:
    """The cached inputs of one of `TEXTS`, made first where there are none."""
    path = cache_folder() / f"real-logits-{text}-v{VERSION}.safetensors"
    if not path.is_file():
        make(text, path)
    found = load_file(str(path))
    for name in ("hidden", "weight"):
        found[name].requires_grad_()
    return Inputs(**found)


@torch.no_grad()
def make(text: str, path: Path) -> None:
    """Runs the model over sequences of the text and keeps the last hidden states of the tokens that count."""
    model = load_model(MODEL).eval()
    hidden, target, left = [], [], SHAPES[f"real-{text}"].tokens
    for ids, counted in answers(model) if text == "samples" else sources():
        begin = len(ids) - min(counted, left)
        hidden.append(model.model(ids[None, :-1]).last_hidden_state[0, begin - 1 :])
        target.append(ids[begin:])
        left -= len(target[-1])
        if not left:
            break
    assert not left, f"too little text of kind {text}"
    weight = model.lm_head.weight
    tensors = {"hidden": torch.cat(hidden), "weight": weight.clone(), "target": torch.cat(target)}
    behavior_logprobs = linear_logprobs(*tensors.values(), temperature=BEHAVIOR_TEMPERATURE)
    tensors["behavior_logprobs"] = behavior_logprobs.float()
    tensors["cu_seqlens"] = torch.tensor([0, *accumulate(map(len, target))], dtype=torch.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, str(temporary))
    temporary.replace(path)


def answers(model: torch.nn.Module) -> list[tuple[Tensor, int]]:
    """Token ids (L,) of a prompt and the model's answer, and how many of them are the answer's."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODEL)
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": f"Tell me about {subject}."}] for subject in SUBJECTS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 256}
    width = prompts["input_ids"].shape[1]
    found = []
    for ids, mask in zip(model.generate(**prompts, **options), prompts["attention_mask"], strict=True):
        answer = ids[width:]
        stop = (answer == tokenizer.eos_token_id).nonzero()[:1].flatten().tolist()
        answer = answer[: stop[0] + 1] if stop else answer
        found.append((torch.cat([ids[:width][mask.bool()], answer]), len(answer)))
    return found


def sources() -> list[tuple[Tensor, int]]:
    """Token ids of pieces of Python source, of which all but the first count."""
    ids = torch.tensor(load_tokenizer(MODEL)("\n".join(map(inspect.getsource, (textwrap, argparse))))["input_ids"])
    return [(piece, len(piece) - 1) for piece in ids.split(LONGEST + 1)]


if __name__ == "__main__":
    for name in TEXTS:
        x = real_inputs(name)
        nll = -linear_logprobs(x.hidden.detach(), x.weight.detach(), x.target)
        print(f"{name}: {len(x.target)} tokens in {len(x.cu_seqlens) - 1} sequences, mean NLL {nll.mean():.3f} nats")
