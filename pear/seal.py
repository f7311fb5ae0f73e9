"""The seal of a scored row: a checksum over the text, the tokens and the log-probs that belong together.

A row carries `"scored": {"format": 3, "checksum": "16 hex"}`. Each row stands for itself, so any selection of scored
rows is a scored file: the first ones, a shuffled, filtered or concatenated file, rows with further keys. The seal finds
a text or a log-prob that was edited after the row was scored, and rows of an older version.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from pear.io import LOGPROB_COLUMNS, DataError, write_jsonl

FORMAT = 3
# pandas, and with it `Dataset.to_json`, writes no more decimals. float32 log-probs of nearly certain tokens have more;
# what is rounded away, at most 5e-11, is next to nothing in a log-ratio.
DECIMALS = 10
READABLE = (2, FORMAT)  # format 2 also numbered the rows of a file; the checksum is the same
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


def seal(row: dict[str, Any]) -> dict[str, Any]:
    """A new row with its seal, its log-probs rounded to DECIMALS."""
    row = {key: value for key, value in row.items() if key != "scored"}
    row |= {key: _rounded(row[key]) for key in (*LOGPROB_COLUMNS, "top_k_logprobs") if key in row}
    return row | {"scored": {"format": FORMAT, "checksum": checksum(row)}}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, DECIMALS) + 0.0 if type(value) is float else value  # + 0.0 turns -0.0 into 0.0


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
    if isinstance(found, dict) and found.get("format") not in READABLE:
        formats = " and ".join(map(str, READABLE))
        raise DataError(
            f"{where}: a scored row of format {found.get('format')!r:.100}, this version reads {formats}. {_AGAIN}"
        )
    if not isinstance(found, dict) or not isinstance(found.get("checksum"), str):
        raise DataError(f"{where}: a damaged seal: `scored` is {found!r:.100}. {_AGAIN}")
    if (own := checksum(row)) != found["checksum"]:
        raise DataError(
            f"{where}: edited after it was scored (checksum {own}, its seal says {found['checksum']}): its log-probs "
            "may no longer be those of its text. Undo the edit; or, if it is meant, take the key `scored` out of the "
            "row and score it again. Only `label` and keys of your own may change; the seal covers "
            f"{', '.join(key for key in SEALED if row.get(key) is not None)}."
        )


def write_scored(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> int:
    """Seal rows, write them as one file, whole or not at all, and return how many."""
    return write_jsonl(path, map(seal, rows))
