"""The seal of a scored row: which file it stood in, and a checksum over what its log-probs are about.

A row carries `"scored": {"format": 2, "file": "8 hex", "row": i, "rows": n, "checksum": "16 hex"}`: it was row i of
the n (counted from 1) of the file that `pear score` or `pear import` wrote. Rows may be mixed with those of other
files, shuffled and filtered, and given keys of one's own. What the seal finds is a text or a log-prob that was changed
later, a file whose end was cut off, and rows of an older version.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from pear.io import DataError, write_jsonl

FORMAT = 2
SEALED = (
    "prompt",
    "completion",
    "tools",
    "chat_template_kwargs",
    "input_ids",
    "completion_mask",
    "behavior_logprobs",
    "behavior_spans",
    "behavior_policy",
    "behavior_estimated",
    "behavior_sampling",
    "tokenizer",
    "model",
    "ref_logprobs",
    "ref_model",
    "top_k_ids",
    "top_k_logprobs",
    "top_k_temperature",
    "top_k_model",
    "top_k_vocabulary",
    "top_k_tokenizer",
)
_AGAIN = "Score it again with `pear score`, or import it again with `pear import`."


def checksum(row: dict[str, Any]) -> str:
    """16 hex digits over the keys of SEALED that the row has; all other keys are the user's to change.

    What other programs do to JSON changes nothing: the order of keys, `null` for a key that is not there (as `datasets`
    fills it in), -1 for -1.0, a number that went through float32. Whole numbers count exactly, others as float32.
    """
    digest = hashlib.sha256()
    _add({key: row[key] for key in SEALED if key in row}, digest)
    return digest.hexdigest()[:16]


def _add(value: Any, digest) -> None:
    """Every value starts with its kind and its length, so that no two values give the same bytes."""
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")  # JSON may hold half of a surrogate pair
        digest.update(b"s%d:" % len(text) + text)
    elif isinstance(value, dict):
        items = sorted((key, item) for key, item in value.items() if item is not None)
        digest.update(b"d%d:" % len(items))
        for key, item in items:
            _add(key, digest)
            _add(item, digest)
    elif isinstance(value, (list, tuple)):
        if _are_numbers(value):
            digest.update(b"l%d:" % len(value) + _numbers(value))
        elif all(isinstance(item, (list, tuple)) and _are_numbers(item) for item in value):  # the top-k
            lengths = [len(item) for item in value]
            flat = [number for item in value for number in item]
            digest.update(b"m%d:" % len(value) + _numbers(lengths) + _numbers(flat))
        else:
            digest.update(b"v%d:" % len(value))
            for item in value:
                _add(item, digest)
    elif value is None:
        digest.update(b"n")
    else:
        digest.update(b"x" + _numbers([value]))


def _are_numbers(values: list | tuple) -> bool:
    return set(map(type, values)) <= {int, float, bool}


def _numbers(values: list) -> bytes:
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer beyond float64; no such thing belongs there, but a check must not crash
        return repr(values).encode()
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = numbers.astype(np.float32).astype(np.float64)
        numbers = np.where(numbers == np.rint(numbers), numbers, narrow)
    numbers[np.isnan(numbers)] = np.nan  # one of the many
    return (numbers + 0.0).astype("<f8").tobytes()  # + 0.0 turns -0.0 into 0.0


def file_id(text: str) -> str:
    """8 hex digits that name a scored file in its seals, made of whatever determines it."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def seal(row: dict[str, Any], *, file: str, number: int, rows: int) -> dict[str, Any]:
    """A new row, with the seal that it is number `number` (from 1) of the `rows` of `file` (see `file_id`)."""
    place = {"format": FORMAT, "file": file, "row": number, "rows": rows, "checksum": checksum(row)}
    return {key: value for key, value in row.items() if key != "scored"} | {"scored": place}


def check_seal(row: dict[str, Any], where: str) -> None:
    """Raise unless the row is as it was when it was sealed; `where` is "file:line".

    Raises:
        DataError: no seal, one of another format, a damaged one, or a checksum that is not the row's.
    """
    found = row.get("scored")
    if found is None:
        raise DataError(
            f"{where}: no seal (`scored`): an older version of pear or another program wrote this row, so nothing "
            f"tells whether its log-probs are still those of its text. {_AGAIN}"
        )
    if isinstance(found, dict) and found.get("format") != FORMAT:
        raise DataError(
            f"{where}: a scored row of format {found.get('format')!r}, this version reads format {FORMAT}. {_AGAIN}"
        )
    if not _is_seal(found):
        raise DataError(f"{where}: a damaged seal: `scored` is {found!r:.100}. {_AGAIN}")
    if (own := checksum(row)) != found["checksum"]:
        raise DataError(
            f"{where}: edited after it was scored (checksum {own}, its seal says {found['checksum']}): its log-probs "
            "may no longer be those of its text. Undo the edit; or, if it is meant, take the key `scored` out of the "
            "row and score it again. Only `label` and keys of your own may change; the seal covers "
            f"{', '.join(key for key in SEALED if row.get(key) is not None)}."
        )


def _is_seal(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    strings = all(isinstance(found.get(key), str) for key in ("file", "checksum"))
    numbers = all(type(found.get(key)) is int for key in ("row", "rows"))
    return strings and numbers and 1 <= found["row"] <= found["rows"]


class Whole:
    """Whether the end of a scored file is missing. `add` every row, checked by `check_seal`; then `finish`.

    Of each file that rows came from: rows 1, 2, ..., k in order, of more than k, are what a copy or a disk that stopped
    leaves. Any other choice of rows (filtered, shuffled, some twice) was made on purpose.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], int] = {}  # (file, rows) -> rows 1..k so far, or -1: no plain beginning
        self._last: dict[tuple[str, int], str] = {}

    def add(self, row: dict[str, Any], where: str) -> None:
        found = row["scored"]
        key = found["file"], found["rows"]
        before = self._seen.get(key, 0)
        self._seen[key] = before + 1 if found["row"] == before + 1 else -1
        self._last[key] = where

    def finish(self, path: str | os.PathLike) -> None:
        """
        Raises:
            DataError: the rows of one file are the first k of n alone.
        """
        for (file, rows), seen in self._seen.items():
            if 0 < seen < rows:
                raise DataError(
                    f"{path}: cut off after {self._last[file, rows]}: there are the first {seen} of {rows} rows that "
                    f"were scored together (file {file}), and nothing of the rest. Copy the file again, or score the "
                    "data again. If you left out the rest on purpose, take the rows in another order (such as `shuf`), "
                    "or any others than the first."
                )


def write_scored(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> int:
    """Seal rows as one file, write them whole or not at all, and return how many. All are held in memory."""
    rows = list(rows)
    file = file_id("".join(map(checksum, rows)))
    return write_jsonl(path, (seal(row, file=file, number=i, rows=len(rows)) for i, row in enumerate(rows, start=1)))
