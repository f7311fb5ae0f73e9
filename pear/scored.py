"""Rows that `pear score` wrote, as a dataset for training: checked, and in the very tokens the student would make."""

import os
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from pear.io import DataError, check_scored_row, read_jsonl
from pear.models import tokenizer_fingerprint
from pear.rows import check_same_tokens, prompt_and_completion, tokenize_row

logger = get_logger(__name__)

COLUMNS = ("input_ids", "completion_mask", "behavior_logprobs")


def load_scored(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    strict: bool = False,
) -> Dataset:
    """Rows written by `pear score`, checked, as a dataset with `input_ids`, `completion_mask`, `behavior_logprobs`.

    Rows longer than `max_length` are counted, logged with their line numbers and left out (with `strict`: an error);
    none is ever cut. The student's `tokenizer` must make the very ids that were scored: true if its fingerprint is
    the stored one, else each row's text is tokenised again and compared.

    Raises:
        DataError: with file and line: a damaged row, or ids that are not the student's (first differing position and
            both tokens); no row left.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    too_long = []
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        check_scored_row(row, where)
        if row.get("tokenizer") != fingerprint:
            _check_ids(row, tokenizer, where)
        if max_length is not None and len(row["input_ids"]) > max_length:
            if strict:
                raise DataError(
                    f"{where}: {len(row['input_ids'])} tokens, more than max_length = {max_length}. "
                    "Raise max_length, or leave strict_length off to train without such rows."
                )
            too_long.append(line)
            continue
        mask = np.array(row["completion_mask"], dtype=np.int8)
        columns["input_ids"].append(np.array(row["input_ids"], dtype=np.int32))
        columns["completion_mask"].append(mask)
        logprobs = np.array(row["behavior_logprobs"], dtype=np.float32)
        columns["behavior_logprobs"].append(np.where(mask == 1, logprobs, np.float32(0)))
    rows = len(columns["input_ids"])
    if too_long:
        logger.warning(_too_long_message(path, too_long, rows, max_length))
    if not rows:
        raise DataError(f"{path}: no row to train on" + (f" within max_length = {max_length}" if too_long else ""))
    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "completion_mask": ListOf(Value("int8")),
            "behavior_logprobs": ListOf(Value("float32")),
        }
    )
    return Dataset.from_dict(columns, features=features)


def _too_long_message(path: str | os.PathLike, lines: list[int], rows: int, max_length: int) -> str:
    listed = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
    return (
        f"{path}: left out {len(lines)} of {len(lines) + rows} rows, longer than max_length = {max_length} tokens "
        f"(lines {listed})"
    )


def _check_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """The student's tokenizer is another one: raise unless its ids for this row's text agree with the scored ones."""
    if "prompt" not in row or "completion" not in row:
        raise DataError(
            f"{where}: scored with another tokenizer than the student's (fingerprint {row.get('tokenizer')!r}), and "
            "the row has no `prompt` and `completion` to compare the ids by. Score the data again with a behaviour "
            "policy of the student's tokenizer."
        )
    own = tokenize_row(prompt_and_completion(row, where), tokenizer, where)
    check_same_tokens(row, own, tokenizer, where, whose="the student")
