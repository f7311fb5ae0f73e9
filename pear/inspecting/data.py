"""The rows of a scored file as the student sees them, and what is left out of it and why."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from pear.align import ROLES, Roles
from pear.inspecting.tokens import Tokens
from pear.io import DataError, check_label, line_list, read_jsonl
from pear.long_rows import check_long_rows, rows_in_words, too_long
from pear.notes import Notes
from pear.scored_rows import Reader, check_kind, has_policy, without_nulls
from pear.seal import check_seal

UNNAMED = "(unnamed)"


class Row(NamedTuple):
    """L tokens of the student's, C of them of the completion."""

    line: int
    input_ids: np.ndarray  # (L,) int32
    mask: np.ndarray  # (L,) bool: tokens of the completion
    behavior_logprobs: np.ndarray  # (C,) float32, a span's total at its first token
    spans: np.ndarray | None  # (C,) int32, -1 where there is none; None: a log-prob a token
    aligned: bool  # of another tokenizer, by bytes
    policy: str | None  # who wrote it; None: nobody that could be scored
    estimated: bool  # the policy is an estimate of who wrote it
    sampling: dict[str, Any]  # settings it was drawn with, as `pear.importing.sampling`
    right: bool  # False: a wrong answer


class Data(NamedTuple):
    rows: list[Row]
    total: int  # in the file
    too_long: list[int]  # lines left out
    unaligned: dict[int, str]  # lines left out, and why
    in_words: str = ""  # how many rows, and what was left out
    notes: Sequence[str] = ()  # what one may not expect of the rows' tokens, see `pear.notes`

    def tokens(self, logprobs: list[np.ndarray]) -> Tokens:
        """All rows' tokens, with the student's log-probs (C,) of each row."""
        starts = np.cumsum([0, *(len(row.behavior_logprobs) for row in self.rows)])
        aligned = np.array([row.aligned for row in self.rows])
        spans = None
        if any(row.spans is not None for row in self.rows):
            every = [np.arange(len(row.behavior_logprobs)) if row.spans is None else row.spans for row in self.rows]
            spans = np.concatenate(every).astype(np.int32)
        behavior = np.concatenate([row.behavior_logprobs for row in self.rows]).astype(np.float64)
        return Tokens(np.concatenate(logprobs).astype(np.float64), behavior, starts, spans, aligned)


def read(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    drop_long_rows: bool = False,
    sample: int | None = None,
    seed: int = 0,
    roles: Roles = ROLES,
    unchanged: PreTrainedTokenizerBase | None = None,
) -> Data:
    """Rows that `pear score` or `pear import` wrote, checked as `pear sft` checks them.

    Rows longer than `max_length` student tokens, and rows that cannot be aligned, are left out and counted. More than
    1 % of rows that are too long are an error without `drop_long_rows`. With `sample`, so many rows are looked at,
    drawn by `seed`; the seals of all are checked.

    Raises:
        DataError: a damaged, edited or older row, no row left.
    """
    total = _checked(path)
    chosen = _choose(total, sample, seed)
    reader, notes = Reader(tokenizer, roles, unchanged=unchanged), Notes()
    rows, long, unaligned = [], [], {}
    for number, (line, row) in enumerate(read_jsonl(path)):
        if chosen is not None and number not in chosen:
            continue
        found = _read(reader, without_nulls(row), line, f"{path}:{line}", max_length, notes)
        if found is None:
            long.append(line)
        elif isinstance(found, str):
            unaligned[line] = found
        else:
            rows.append(found)
    looked_at = len(rows) + len(long) + len(unaligned)
    check_long_rows(str(path), long, looked_at, max_length or 0, drop=drop_long_rows)
    if not total:
        raise DataError(f"{path}: no rows in it")
    if not rows:
        raise DataError(
            f"{path}: no row to look at: of {total}, {len(long)} are longer than max_length = {max_length}, "
            f"{len(unaligned)} cannot be aligned" + (f" ({next(iter(unaligned.values()))})" if unaligned else "")
        )
    left_out = {}
    if long:
        left_out[too_long(long, max_length or 0)] = len(long)
    if unaligned:
        left_out[f"not aligned with the student's tokens ({line_list(list(unaligned))})"] = len(unaligned)
    done = "Inspected" if chosen is None else f"Drew {len(chosen)} of {total} rows; inspected"
    return Data(rows, total, long, unaligned, rows_in_words(done, len(rows), left_out), notes.in_words())


def _read(
    reader: Reader, row: dict[str, Any], line: int, where: str, max_length: int | None, notes: Notes
) -> Row | str | None:
    """The row; or, in words, why it cannot be aligned; None if it is too long."""
    check_kind(row, where)
    check_label(row, where)
    tokens, own = reader.tokens(row, where, ("behavior_logprobs",))
    if max_length is not None and len(tokens.input_ids) > max_length:
        return None
    behavior = reader.behavior(row, where, tokens, own)
    if isinstance(behavior, str):
        return behavior
    notes.add(line, tokens.notes, tokens.completion_mask)
    mask = np.array(tokens.completion_mask, dtype=bool)
    return Row(
        line=line,
        input_ids=np.array(tokens.input_ids, dtype=np.int32),
        mask=mask,
        behavior_logprobs=behavior.logprobs,
        spans=behavior.block_ids,
        aligned=has_policy(row) and behavior.block_ids is not None,
        policy=(row.get("behavior_policy") or row.get("model") or UNNAMED) if has_policy(row) else None,
        estimated=bool(row.get("behavior_estimated")),
        sampling=sampling if isinstance(sampling := row.get("behavior_sampling"), dict) else {},
        right=row.get("label", True),
    )


def _checked(path: str | os.PathLike) -> int:
    """How many rows there are; their seals hold."""
    count = 0
    for line, row in read_jsonl(path):
        check_kind(without_nulls(row), f"{path}:{line}")  # first, for rows that were never scored have no seal either
        check_seal(row, f"{path}:{line}")
        count += 1
    return count


def _choose(count: int, sample: int | None, seed: int) -> set[int] | None:
    if sample is None or sample >= count:
        return None
    return set(np.random.default_rng(seed).choice(count, sample, replace=False).tolist())
