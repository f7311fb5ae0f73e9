"""Rows of like length together through the model: log-probs, and no logits."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from pear.io import MAX_LOGPROB, DataError
from pear.scoring.rows import Row


class TopK(NamedTuple):
    """What is to be kept of each distribution."""

    k: int
    temperature: float


class Scores(NamedTuple):
    """Of one row's completion, C tokens."""

    logprobs: np.ndarray  # (C,) float32
    top_k_ids: np.ndarray | None = None  # (C, K) int64
    top_k_logprobs: np.ndarray | None = None  # (C, K) float32, descending


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest first (so that a batch too large for the memory fails at once), padded size in budget."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i)):
        longest = longest or len(rows[i].input_ids)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], len(rows[i].input_ids)
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def score_batch(
    model: PreTrainedModel, rows: Sequence[Row], data: str | os.PathLike, top_k: TopK | None = None
) -> list[Scores]:
    """The log-probs of each row's completion, in one forward pass; `data` is for messages.

    Raises:
        DataError: log-probs that are none, with file, line and token.
    """
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # the id of the padding does not matter
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        input_ids[b, :n] = torch.from_numpy(row.input_ids)
        attention_mask[b, :n] = 1
        labels[b, :n] = torch.where(torch.from_numpy(row.mask), input_ids[b, :n], -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    if top_k is None:
        found = (model(**inputs, pear={}),)
    else:
        logprobs, top = model(**inputs, pear={"top_k": top_k.k, "top_k_temperature": top_k.temperature})
        found = (logprobs, top.ids, top.logprobs)
    arrays = [x.cpu().numpy() for x in found]
    scored = []
    for b, row in enumerate(rows):
        # copies, not views that hold the padding
        scored.append(Scores(*(x[b, : len(row.input_ids)][row.mask] for x in arrays)))
        _check(scored[-1], row, data)
    return scored


def _check(scores: Scores, row: Row, data: str | os.PathLike) -> None:
    values, top_logprobs = scores.logprobs, scores.top_k_logprobs
    bad = ~(np.isfinite(values) & (values <= MAX_LOGPROB))
    if bad.any():
        t = int(bad.argmax())
        at = int(np.flatnonzero(row.mask)[t])
        raise DataError(
            f"{data}:{row.line}: the model gives log-prob {values[t]} to token {at} (id "
            f"{row.input_ids[at]}). Its weights may be damaged, or its dtype too narrow: try dtype float32."
        )
    if top_logprobs is not None and not np.isfinite(top_logprobs).all():
        t = int(np.flatnonzero(row.mask)[(~np.isfinite(top_logprobs)).any(axis=1).argmax()])
        raise DataError(
            f"{data}:{row.line}: at token {t} fewer than top_k = {top_logprobs.shape[1]} tokens have any "
            "probability. Lower top_k, or raise top_k_temperature."
        )
