"""Checks of the top-k log-probs that a teacher left in a scored file, for distillation."""

from typing import Any

import numpy as np

from pear.io import DataError


def check_top_k_vocabulary(
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


def check_top_k(row: dict[str, Any], temperature: float, earlier: list[list[np.ndarray]], where: str) -> None:
    """The teacher's temperature and K; `earlier` are the ids of the rows before."""
    if (found := row.get("top_k_temperature", 1.0)) != temperature:
        raise DataError(
            f"{where}: the top-k log-probs are at top_k_temperature = {found:g}, but distill_temperature = "
            f"{temperature:g}: pass --distill_temperature {found:g}, or score again with `pear score "
            f"--column none --top_k K --top_k_temperature {temperature:g}`"
        )
    k = len(row["top_k_ids"][row["completion_mask"].index(1)])
    if earlier and k != (first := max(map(len, earlier[0]))):
        raise DataError(f"{where}: the top-k log-probs are of K = {k} tokens, those of the first row of {first}")
