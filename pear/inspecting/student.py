"""The student's log-probs of the rows, before any training: no logits are made."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from pear.inspecting.data import Row
from pear.io import MAX_LOGPROB, DataError


@torch.no_grad()
def logprobs(
    model: PreTrainedModel,  # with `pear.fused_head.add_fused_head`
    rows: list[Row],
    batch_tokens: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[np.ndarray]:
    """(C,) float32 for each row: log pi of each completion token.

    Rows are sorted by length and padded in batches of at most `batch_tokens` tokens (a longer row alone).

    Raises:
        DataError: a log-prob that is no number; the line is named.
    """
    was_training = model.training
    model.eval()
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    try:
        for batch in batches(rows, batch_tokens):
            for i, values in zip(batch, _of_batch(model, [rows[i] for i in batch]), strict=True):
                found[i] = values
            advance(len(batch))
    finally:
        model.train(was_training)
    return found


def batches(rows: list[Row], batch_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, so that a batch too large for the memory fails at once."""
    found: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i)):
        if not found or longest * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
            longest = len(rows[i].input_ids)
        found[-1].append(i)
    return found


def _of_batch(model: PreTrainedModel, rows: list[Row]) -> list[np.ndarray]:
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # the id of the padding does not matter
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        input_ids[b, :n] = torch.from_numpy(row.input_ids)
        attention_mask[b, :n] = 1
        labels[b, :n] = torch.where(torch.from_numpy(row.mask), input_ids[b, :n], -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    output = model(**{name: value.to(model.device) for name, value in inputs.items()}, pear={}).float().cpu().numpy()
    found = [output[b, : len(row.mask)][row.mask] for b, row in enumerate(rows)]
    for row, values in zip(rows, found, strict=True):
        if (bad := ~(np.isfinite(values) & (values <= MAX_LOGPROB))).any():
            t = int(bad.argmax())
            raise DataError(
                f"line {row.line}: the student gives log-prob {values[t]} to token {t} of the completion. Its weights "
                "may be damaged, or its dtype too narrow: try --dtype float32."
            )
    return found
