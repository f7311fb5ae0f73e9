"""Rows that `pear score` wrote, as a dataset for training: checked, and in the very tokens the student would make."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from pear.io import LOGPROB_COLUMNS, TOP_K_COLUMNS, DataError, check_scored_row, read_jsonl
from pear.models import tokenizer_fingerprint, vocabulary_fingerprint
from pear.rows import check_same_tokens, prompt_and_completion, tokenize_row

logger = get_logger(__name__)

COLUMNS = ("input_ids", "completion_mask", "behavior_logprobs")  # what every objective needs
FEATURES = {  # of L tokens; the lists of K are empty at prompts
    "input_ids": ListOf(Value("int32")),
    "completion_mask": ListOf(Value("int8")),
    "behavior_logprobs": ListOf(Value("float32")),
    "ref_logprobs": ListOf(Value("float32")),
    "sequence_label": ListOf(Value("bool")),  # one answer, L times, so that packs can carry it
    "top_k_ids": ListOf(ListOf(Value("int32"))),
    "top_k_logprobs": ListOf(ListOf(Value("float32"))),
    "top_k_temperature": Value("float64"),
    "top_k_vocabulary": Value("int64"),  # null where the row does not tell, or tells its tokenizer, which is enough
}
# How a column comes into a file, {file} and {temperature} to be filled in.
WRITTEN_BY = {
    "ref_logprobs": "`pear score --column ref_logprobs --model <initial student> --data {file} --out {file}` writes it"
    "; or, with weighting asft, pass --teacher <initial student>, which is held in memory",
    "top_k_ids": "`pear score --column none --top-k K --top-k-temperature {temperature:g} --model <teacher> --data "
    "{file} --out {file}` writes it, and every log-prob stays as it is; or pass --teacher, which is held in memory",
}


def load_scored(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    strict: bool = False,
    columns: Sequence[str] = (),
    temperature: float = 1.0,
    head_size: int | None = None,
) -> Dataset:
    """Rows written by `pear score`, checked, as a dataset with `input_ids`, `completion_mask`, `behavior_logprobs`.

    `columns` are further keys of FEATURES that the objective needs (`PEARSFTConfig.more_columns`), of these the top-k
    ones at `temperature`, of a teacher with the student's vocabulary; where the two differ, the message names the
    `head_size` of the student, if given. Rows with `"label": false` are wrong answers: only with `sequence_label` among
    the columns are they no error.

    Rows longer than `max_length` are counted, logged with their line numbers and left out (with `strict`: an error);
    none is ever cut. The student's `tokenizer` must make the very ids that were scored: true if its fingerprint is
    the stored one, else each row's text is tokenised again and compared.

    Raises:
        DataError: with file and line: a damaged row, a column that is not there, or ids that are not the student's
            (first differing position and both tokens); wrong answers that nobody asked for; no row left.
    """
    fingerprint, vocabulary = tokenizer_fingerprint(tokenizer), vocabulary_fingerprint(tokenizer)
    table: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *columns)}
    needs = tuple(name for name in table if name in (*LOGPROB_COLUMNS, *TOP_K_COLUMNS))
    too_long, wrong = [], []
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        for name, how in WRITTEN_BY.items():
            if name in columns and name not in row:
                raise DataError(f"{where}: no `{name}`: {how.format(file=path, temperature=temperature)}")
        check_scored_row(row, where, needs)
        if row.get("tokenizer") != fingerprint:
            _check_ids(row, tokenizer, where)
        if "top_k_ids" in columns:
            _check_top_k_vocabulary(row, fingerprint, vocabulary, head_size, where)
            _check_top_k(row, temperature, table["top_k_ids"], where)
        if max_length is not None and len(row["input_ids"]) > max_length:
            if strict:
                raise DataError(
                    f"{where}: {len(row['input_ids'])} tokens, more than max_length = {max_length}. "
                    "Raise max_length, or leave strict_length off to train without such rows."
                )
            too_long.append(line)
            continue
        if not row.get("label", True):
            wrong.append(line)
        for name, values in table.items():
            values.append(_read(name, row))
    rows = len(table["input_ids"])
    if too_long:
        logger.warning(_too_long_message(path, too_long, rows, max_length))
    if not rows:
        raise DataError(f"{path}: no row to train on" + (f" within max_length = {max_length}" if too_long else ""))
    if wrong and "sequence_label" not in columns:
        raise DataError(
            f'{path}: {len(wrong)} of {rows} rows have "label": false ({_lines(wrong)}): wrong answers, which would be '
            "trained on like right ones. Pass --negatives to train away from them, or leave them out of the file."
        )
    return Dataset.from_dict(table, features=Features({name: FEATURES[name] for name in table}))


def _read(name: str, row: dict[str, Any]) -> Any:
    """A column of a checked row; nothing but zeros, or lists of nothing, where the mask is 0."""
    mask = np.array(row["completion_mask"], dtype=np.int8)
    if name == "completion_mask":
        return mask
    if name == "input_ids":
        return np.array(row[name], dtype=np.int32)
    if name == "sequence_label":
        return np.full(len(mask), row.get("label", True))
    if name == "top_k_temperature":
        return float(row.get(name, 1.0))
    if name == "top_k_vocabulary":
        return None if "top_k_tokenizer" in row else row.get(name)
    if name in TOP_K_COLUMNS:
        dtype = np.int32 if name == "top_k_ids" else np.float32
        return [np.array(values if bit else [], dtype=dtype) for values, bit in zip(row[name], mask, strict=True)]
    return np.where(mask == 1, np.array(row[name], dtype=np.float32), np.float32(0))


def _too_long_message(path: str | os.PathLike, lines: list[int], rows: int, max_length: int) -> str:
    return (
        f"{path}: left out {len(lines)} of {len(lines) + rows} rows, longer than max_length = {max_length} tokens "
        f"({_lines(lines)})"
    )


def _lines(numbers: list[int]) -> str:
    return "lines " + ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")


def _check_top_k_vocabulary(
    row: dict[str, Any], fingerprint: str, vocabulary: str, head_size: int | None, where: str
) -> None:
    """An id must mean one token to teacher and student, whose fingerprints these are."""
    if (found := row.get("top_k_tokenizer")) is not None:
        if found != vocabulary:
            raise DataError(
                f"{where}: teacher and student must have one vocabulary: the top-k log-probs are of the vocabulary "
                f"with fingerprint {found!r} and of a head with {row.get('top_k_vocabulary', 'unknown')} rows, the "
                f"student's vocabulary has {vocabulary!r} and its head {head_size or 'unknown'} rows: an id may mean "
                "another token. Give a teacher of the student's tokenizer."
            )
    elif row.get("tokenizer") != fingerprint:
        raise DataError(
            f"{where}: the top-k log-probs are of the tokenizer with fingerprint {row.get('tokenizer')!r}, the "
            f"student's is {fingerprint!r}: an id may mean another token. Give a teacher of the student's tokenizer; "
            "of one that differs in its chat template alone, score the top-k again (`top_k_tokenizer` then tells its "
            "vocabulary), or pass it as --teacher."
        )


def _check_top_k(row: dict[str, Any], temperature: float, earlier: list[list[np.ndarray]], where: str) -> None:
    """The teacher's temperature and K; `earlier` are the ids of the rows before."""
    if (found := row.get("top_k_temperature", 1.0)) != temperature:
        raise DataError(
            f"{where}: the top-k log-probs are at top_k_temperature = {found:g}, but distill_temperature = "
            f"{temperature:g}: pass --distill_temperature {found:g}, or score again with `pear score "
            f"--column none --top-k K --top-k-temperature {temperature:g}`"
        )
    k = len(row["top_k_ids"][row["completion_mask"].index(1)])
    if earlier and k != (first := max(map(len, earlier[0]))):
        raise DataError(f"{where}: the top-k log-probs are of K = {k} tokens, those of the first row of {first}")


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
