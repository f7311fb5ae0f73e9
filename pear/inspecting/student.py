"""The student's log-probs of the rows, before any training: no logits are made."""

import os
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from pear.inspecting.data import Row
from pear.scoring.batches import batches, score_batch
from pear.scoring.rows import Row as ScoringRow


def logprobs(
    model: PreTrainedModel,  # of `Policy.loaded`
    rows: list[Row],
    data: str | os.PathLike,  # for messages
    batch_tokens: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[np.ndarray]:
    """(C,) float32 for each row: log pi of each completion token, in batches of at most `batch_tokens` padded tokens.

    Raises:
        DataError: a log-prob that is no number; the line is named.
    """
    scored = [ScoringRow(row.line, row.input_ids, row.mask, prompt_cut=0, estimated=False) for row in rows]
    found = [np.empty(0, np.float32)] * len(rows)
    for batch in batches(scored, batch_tokens):
        for i, scores in zip(batch, score_batch(model, [scored[i] for i in batch], data), strict=True):
            found[i] = scores.logprobs
        advance(len(batch))
    return found
