"""Files: JSONL read with errors that name file and line, written whole or not at all; the schema of a scored row."""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

MAX_LOGPROB = 1e-4  # a log-prob may exceed zero by rounding, never by more
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DataError(ValueError):
    """Something in the user's data or settings is wrong; the message says where, what was found and what to do."""


class WriteError(OSError):
    """A file could not be written. `errno` is the system's; what was there before is untouched."""


def _shorten(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line_number, row)`, counting lines from 1. Lines of only white space are no rows.

    Raises:
        DataError: no such file, or a line that is not UTF-8, not JSON or no JSON object; with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file (expected JSONL, one JSON object a line)")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                found = _shorten(line)
                raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}: {found}") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{number}: expected a JSON object with keys, got {type(row).__name__}: {_shorten(line)}"
                )
            yield number, row


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_error(path: str | os.PathLike, error: OSError, *, kept: str = "") -> WriteError:
    """The error to show for a failed write of `path`; `kept` says what of the work is still there."""
    reason = "the disk is full" if error.errno in _DISK_FULL else (error.strerror or str(error))
    message = f"could not write {path}: {reason}. Nothing half-written is left there."
    if error.errno in _DISK_FULL:
        message += " Free some space, or choose another folder, and run the same command again."
    return WriteError(error.errno, f"{message} {kept}".rstrip())


def disk_error(error: BaseException) -> OSError | None:
    """The OSError that `error` is about, if any: safetensors and torch.save wrap a full disk in types of their own."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    for number in _DISK_FULL:
        if os.strerror(number) in text or f"os error {number}" in text:
            return OSError(number, os.strerror(number))
    return None


def sync_and_close(file: TextIO) -> None:
    """Push a file to the disk; a full disk can show only here."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file that appears under `path` when the block ends well, and never otherwise.

    The text goes to a temporary file in the same folder (made if missing), is synced to disk, and is then renamed.

    Raises:
        WriteError: the disk is full, or the folder cannot be written; an older file at `path` is as it was.
    """
    path = Path(os.path.realpath(path))  # follow a link, or the rename would replace the link itself
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
            sync_and_close(file)
        _copy_mode(path, temporary)
        os.replace(temporary, path)
        temporary = None
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _copy_mode(path: Path, temporary: str) -> None:
    """mkstemp makes files private; give the file the mode the old one had, or what open() would have given it."""
    if path.exists():
        mode = path.stat().st_mode & 0o777
    else:
        umask = os.umask(0)
        os.umask(umask)
        mode = 0o666 & ~umask
    os.chmod(temporary, mode)


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_writer(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Indented JSON. NaN and infinities are refused (they are no JSON): write None instead."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line and return how many."""
    count = 0
    with atomic_writer(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


# ---------------------------------------------------------------------------------------------------------------------
# The scored row


def check_scored_row(row: dict[str, Any], where: str) -> None:
    """Check the three lists of a scored row; `where` is "file:line".

    `input_ids` are integers >= 0, `completion_mask` is 0 or 1 with at least one 1 and a 0 in front (the first token has
    nothing before it, so no probability), `behavior_logprobs` are finite and at most `MAX_LOGPROB` where the mask is 1.

    Raises:
        DataError: says which field, at which position, and what was found.
    """
    for key in ("input_ids", "completion_mask", "behavior_logprobs"):
        if key not in row:
            raise DataError(f"{where}: no `{key}`; is this the output of `pear score`? Keys found: {sorted(row)}")
        if not isinstance(row[key], list):
            raise DataError(f"{where}: `{key}` must be a list, got {type(row[key]).__name__}")
    ids, mask, logprobs = row["input_ids"], row["completion_mask"], row["behavior_logprobs"]
    if not len(ids) == len(mask) == len(logprobs):
        raise DataError(
            f"{where}: `input_ids`, `completion_mask` and `behavior_logprobs` must have one length, "
            f"got {len(ids)}, {len(mask)} and {len(logprobs)}"
        )
    for t, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise DataError(f"{where}: `input_ids[{t}]` must be a token id >= 0, got {token!r}")
    for t, bit in enumerate(mask):
        if type(bit) not in (int, bool) or bit not in (0, 1):
            raise DataError(f"{where}: `completion_mask[{t}]` must be 0 or 1, got {bit!r}")
    if 1 not in mask:
        raise DataError(f"{where}: no completion: `completion_mask` has no 1 in {len(mask)} tokens")
    if mask[0]:
        raise DataError(f"{where}: `completion_mask[0]` must be 0: the first token has nothing before it to predict it")
    for t, value in enumerate(logprobs):
        if type(value) not in (int, float):
            raise DataError(f"{where}: `behavior_logprobs[{t}]` must be a number, got {value!r}")
        if mask[t] and not -math.inf < value <= MAX_LOGPROB:  # False for NaN too
            raise DataError(
                f"{where}: `behavior_logprobs[{t}]` is {value!r}; a log-prob is finite and at most 0. "
                "Score the row again with `pear score`."
            )
