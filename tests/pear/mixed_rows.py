"""Rows of every kind that one scored file may hold, without `pear.align`: bytes of byte-level tokens are counted."""

import math
import random

import torch
from tiny import make_tokenizer

from pear.models import tokenizer_fingerprint
from pear.rows import tokenize_row
from pear_kernels.options import PEAROptions

OTHER_CORPUS = ["Zebras wander quietly homeward. " * 5, "It is 12 and it is 14, so let us think. Why? Well."]
CLIP = (-0.8, 0.9)  # some spans inside and some outside
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PLAIN]
BYTES = {chr(byte): byte for byte in PLAIN} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}


def other_tokenizer():
    """Byte-level too, of other merges and other ids."""
    return make_tokenizer(OTHER_CORPUS, vocab_size=330)


def texts(count: int) -> list[dict]:
    """Prompts end in a line break, so that no token stands on both sides of the completion's start."""
    return [
        {
            "prompt": f"What is {n} plus {n}?\n",
            "completion": f"It is {2 * n}. " + "Zebras wander, step by step. " * (n % 4),
        }
        for n in range(1, count + 1)
    ]


def bytes_of(tokenizer, token: int) -> bytes:
    """Of a byte-level token: each character stands for one byte, as GPT-2 has it; nothing of a special token."""
    if token in tokenizer.all_special_ids:
        return b""
    return bytes(BYTES[character] for character in tokenizer.convert_ids_to_tokens(token))


def pieces(tokenizer, tokenized) -> list[bytes]:
    """Of the completion's tokens."""
    both = zip(tokenized.input_ids, tokenized.completion_mask, strict=True)
    return [bytes_of(tokenizer, token) for token, bit in both if bit]


def spans_json(parts: list[bytes]) -> dict:
    """`behavior_spans` of text tokens and an end of turn."""
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    return {
        "bytes": [[end - len(part), end] for end, part in zip(ends, parts, strict=True)],
        "marks": {str(i): "end_of_turn" for i, part in enumerate(parts) if not part},
    }


def blocks_by_hand(student: list[bytes], behavior: list[bytes]) -> list[int]:
    """The span of each of the student's tokens: a boundary of both ends one, and the end of turn is one of its own."""
    ends = [{sum(map(len, parts[: i + 1])) for i in range(len(parts))} for parts in (student, behavior)]
    common = sorted(ends[0] & ends[1])
    found, end = [], 0
    for part in student:
        end += len(part)
        found.append(next(k for k, boundary in enumerate(common) if boundary >= end) if part else len(common))
    return found


def token_row(text: dict, tokenizer, logprobs: list[float] | None = None, seed: int = 0) -> dict:
    """As `pear score` writes it; the log-probs of the completion's tokens are given, or of some size by their bytes."""
    made = tokenize_row(text, tokenizer, "here")
    parts = pieces(tokenizer, made)
    if logprobs is None:
        numbers = random.Random(seed)
        logprobs = [-2.2 * max(len(part), 1) * numbers.uniform(0.5, 1.5) for part in parts]
    given = iter(logprobs)
    return {
        **text,
        "input_ids": made.input_ids,
        "completion_mask": made.completion_mask,
        "behavior_logprobs": [next(given) if bit else 0.0 for bit in made.completion_mask],
        "behavior_spans": spans_json(parts),
        "behavior_policy": "someone",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": "someone",
    }


def byte_row(row: dict) -> dict:
    """What a server without ids would have told of this token row."""
    both = zip(row["behavior_logprobs"], row["completion_mask"], strict=True)
    spans = row["behavior_spans"] | {"logprobs": [value for value, bit in both if bit]}
    return {name: row[name] for name in ("prompt", "completion", "behavior_policy")} | {"behavior_spans": spans}


def without(row: dict, *dropped: int) -> dict:
    """A byte row whose policy did not tell of these of its tokens, counted from the end if below 0."""
    spans = row["behavior_spans"]
    count = len(spans["bytes"])
    kept = [i for i in range(count) if i not in dropped and i - count not in dropped]
    marks = {str(kept.index(int(i))): mark for i, mark in spans["marks"].items() if int(i) in kept}
    lists = {name: [spans[name][i] for i in kept] for name in ("bytes", "logprobs")}
    return row | {"behavior_spans": {**lists, "marks": marks}}


def nobodys_row(text: dict) -> dict:
    return {**text, "behavior_policy": "none"}


def rows_of_every_kind(tokenizer, count: int = 12) -> list[dict]:
    """By turns: the student's tokens, another tokenizer's, bytes alone, and no policy."""
    other, made = other_tokenizer(), []
    for i, text in enumerate(texts(count)):
        kind = i % 4
        if kind == 0:
            made.append(token_row(text, tokenizer, seed=i))
        elif kind == 3:
            made.append(nobodys_row(text))
        else:
            row = token_row(text, other, seed=i)
            made.append(row if kind == 1 else byte_row(row))
    return made


def weights_by_hand(
    logprobs: list[float], behavior: list[float], blocks: list[int], options: PEAROptions, clip_blocks: bool
) -> list[float]:
    """G of each of a response's tokens, by its definition."""
    low, high = options.log_ratio_clip
    sums, clipped, count = {}, {}, {}
    for p, b, k in zip(logprobs, behavior, blocks, strict=True):
        if k >= 0:
            sums[k] = sums.get(k, 0.0) + p - b
            clipped[k] = clipped.get(k, 0.0) + min(max(p - b, low), high)
            count[k] = count.get(k, 0) + 1
    rho = {k: min(max(sums[k], count[k] * low), count[k] * high) for k in sums} if clip_blocks else clipped
    weights, so_far = [], -1
    for k in blocks:
        so_far = max(so_far, k)
        later = [j for j in sums if options.level == "sequence" or j > so_far]
        log_g = sum(rho[j] for j in later)
        if options.level != "sequence":
            log_g += sum(count[j] for j in later) * math.log(options.gamma)
        weights.append(math.exp(min(max(log_g, options.log_weight_clip[0]), options.log_weight_clip[1])))
    return weights


def naive(model, rows, options: PEAROptions, clip_blocks: bool) -> tuple[torch.Tensor, dict]:
    """(sum of G_t NLL_t with its gradient, statistics), from full float64 logits; `rows` are those of `load_scored`."""
    total, seen = 0.0, {"nll": 0.0, "log_ratio": 0.0, "tokens": 0, "ratio_tokens": 0, "weights": []}
    for row in rows:
        logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        where = [t for t, bit in enumerate(row["completion_mask"]) if bit]
        picked = [logprobs[t - 1, row["input_ids"][t]] for t in where]
        blocks, behavior = ([row[name][t] for t in where] for name in ("block_ids", "behavior_logprobs"))
        values = [p.item() for p in picked]
        weights = weights_by_hand(values, behavior, blocks, options, clip_blocks)
        total = total - sum(w * p for w, p in zip(weights, picked, strict=True))
        seen["weights"] += weights
        seen["nll"] -= sum(values)
        seen["log_ratio"] += sum(p - b for p, b, k in zip(values, behavior, blocks, strict=True) if k >= 0)
        seen["tokens"] += len(where)
        seen["ratio_tokens"] += sum(k >= 0 for k in blocks)
    return total, seen
