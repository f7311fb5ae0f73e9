"""Files: JSONL read with errors that name file and line, written whole or not at all; the schema of a scored row."""

import contextlib
import errno
import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from pear.formats import HEAD, json_hint, other_format
from pear.strict_json import HALF_PAIR, find_half_pair, parse_json, unwritable

MAX_FLOAT32, MAX_INT32 = 3.4028234e38, 2**31 - 1  # log-probs become float32, token ids int32
MAX_LOGPROB = 1e-4  # a log-prob may exceed zero by rounding, never by more
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DataError(ValueError):
    """Something in the user's data or settings is wrong; the message says where, what was found and what to do."""


class WriteError(OSError):
    """A file could not be written. `errno` is the system's; what was there before is untouched."""


def _shorten(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def line_list(numbers: Sequence[int], most: int = 20) -> str:
    """Line numbers in a message, as many as a person reads."""
    many = "line " if len(numbers) == 1 else "lines "
    return many + ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_jsonl(path: str | os.PathLike, *, whole_text: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line_number, row)`, counting lines from 1. Lines of only white space are no rows.

    `whole_text` False also yields rows with half of a surrogate pair in a string, which UTF-8 cannot hold.

    Raises:
        DataError: no such file, a file of another format, or a line that is not UTF-8, not JSON or no JSON object; with
            file and line.
    """
    path = Path(path)
    with open_input(path, "JSONL, one JSON object a line") as file:
        if other := other_format(path, file.read(HEAD)):
            raise DataError(f"{path}: {other}")
        file.seek(0)
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if not line:
                continue
            try:
                row = parse_json(line)
            except json.JSONDecodeError as error:
                found, hint = _shorten(line), json_hint(path, line, error.pos, number)
                raise DataError(
                    f"{path}:{number}: not JSON: {error.msg} at column {error.colno}: {found}{hint}"
                ) from None
            except ValueError as error:
                raise DataError(f"{path}:{number}: cannot be read: {error}: {_shorten(line)}") from None
            if not isinstance(row, dict):
                hint = ""
                if isinstance(row, list) and number == 1:
                    hint = f". For a JSON array of rows: jq -c '.[]' {path} > rows.jsonl"
                raise DataError(
                    f"{path}:{number}: expected a JSON object with keys, got {type(row).__name__}: "
                    f"{_shorten(line)}{hint}"
                )
            if whole_text and HALF_PAIR.search(raw) and (place := find_half_pair(row)):
                raise DataError(
                    f"{path}:{number}: {place} holds half of a surrogate pair, which is no character and cannot be "
                    "written as UTF-8. A text was cut inside an emoji, say: take the half out."
                )
            yield number, row


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        DataError: no such file, or one that holds something else.
    """
    path = Path(path)
    try:
        value = parse_json(_text(path, "a JSON object"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object with keys, got {type(value).__name__}")
    return value


def read_yaml(path: str | os.PathLike, expected: str) -> Any:
    """What a YAML file holds; `expected` says what that is to be, for messages.

    Raises:
        DataError: no such file, no YAML, or YAML that nests or repeats itself without bound.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise yaml.YAMLError(f"key {twice!r:.60} is given twice, the first time at{node.start_mark}")
            return super().construct_mapping(node, deep)

    path = Path(path)
    try:
        value = yaml.load(_text(path, expected), Loader)
        size = _expanded(value, {})
    except RecursionError:
        raise DataError(f"{path}: nested too deep (expected {expected})") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())} (expected {expected})") from None
    except ValueError as error:  # a date that is none, an integer of 5000 digits
        raise error if isinstance(error, DataError) else DataError(f"{path}: not YAML: {error}") from None
    if size > MAX_YAML:
        raise DataError(f"{path}: its aliases stand for more than {MAX_YAML} values (expected {expected})")
    return value


def _text(path: Path, expected: str) -> str:
    with open_input(path, expected) as file:
        raw = file.read()
    if other := other_format(path, raw[:HEAD]):
        raise DataError(f"{path}: {other}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


MAX_YAML = 1_000_000  # values, each alias counted as all that it stands for


def _expanded(value: Any, sizes: dict[int, int]) -> int:
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = MAX_YAML + 1  # of a value that holds itself
        items = value if isinstance(value, list) else [item for pair in value.items() for item in pair]
        sizes[id(value)] = 1 + sum(_expanded(item, sizes) for item in items)
    return sizes[id(value)]


@contextlib.contextmanager
def open_input(path: Path, expected: str) -> Iterator[BinaryIO]:
    """A file of the user's, open for reading bytes. DataError: there is none, or it cannot be read."""
    try:
        if path.is_dir():
            raise DataError(f"{path}: a folder; give a file in it (expected {expected})")
        if not path.exists():
            raise DataError(f"{path}: no such file (expected {expected})")
        if not path.is_file():
            raise DataError(f"{path}: no regular file, and it is read more than once: give a file ({expected})")
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{_shorten(str(path))}: cannot be read: {error.strerror or error}") from None
    with file:
        yield file


def check_writable(row: dict[str, Any], where: str) -> None:
    """Raise where a row that is to be written again holds what JSON cannot: NaN (of pandas, say) or an infinity."""
    if reason := unwritable(row):
        raise DataError(f"{where}: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_error(path: str | os.PathLike, error: OSError, *, kept: str = "") -> WriteError:
    """The error to show for a failed write of `path`; `kept` says what of the work is still there."""
    reason = "the disk is full" if error.errno in DISK_FULL else (error.strerror or str(error))
    message = f"could not write {path}: {reason}. Nothing half-written is left there."
    if error.errno in DISK_FULL:
        message += " Free some space, or choose another folder, and run the same command again."
    return WriteError(error.errno, f"{message} {kept}".rstrip())


def disk_error(error: BaseException) -> OSError | None:
    """The OSError that `error` is about, if any: safetensors and torch.save wrap a full disk in types of their own."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    for number in DISK_FULL:
        if os.strerror(number) in text or f"os error {number}" in text:
            return OSError(number, os.strerror(number))
    return None


def sync_and_close(file: TextIO) -> None:
    """Push a file to the disk; a full disk can show only here."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


# What is written into as it is, since a rename would put a regular file in its place.
STREAMS = (stat.S_ISFIFO, stat.S_ISCHR)
_DESCRIPTORS = re.compile(r"(/dev/fd|/proc/(self|thread-self|\d+)(/task/\d+)?/fd)/\d+")


def is_stream(path: str | os.PathLike) -> bool:
    """Whether `path` is a FIFO, a character device or an open file descriptor (/dev/stdout, /dev/fd/3).

    Such a path is written into, and never replaced.

    Raises:
        DataError: it is a socket or a block device, which nothing here writes to.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing there yet; what is wrong with it shows when it is written
        return False
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        what = "a socket" if stat.S_ISSOCK(mode) else "a block device"
        raise DataError(f"{path} is {what}: nothing is written to it; give the name of a file, or of a FIFO")
    return any(kind(mode) for kind in STREAMS) or (not stat.S_ISDIR(mode) and _descriptor(path) is not None)


def _descriptor(path: str | os.PathLike) -> str | None:
    """`path`, or the link behind it, that names an open file descriptor; None if it does not."""
    name = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        name = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if _DESCRIPTORS.fullmatch(name):
            return name
        if not os.path.islink(name):
            return None
        name = os.path.normpath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def write_stream(path: str | os.PathLike, content: Iterable[bytes]) -> None:
    """Write into a path that `is_stream`; one of this process's own descriptors goes on where it is."""
    descriptor = _descriptor(path)
    own = descriptor is not None and descriptor.split("/")[2] in ("fd", "self", str(os.getpid()))
    try:
        if own:
            sys.stdout.flush()
            sys.stderr.flush()
        # O_APPEND: of another process's descriptor, which may be a regular file; nothing is truncated
        opened = os.dup(int(descriptor.rpartition("/")[2])) if own else os.open(path, os.O_WRONLY | os.O_APPEND)
        with open(opened, "wb") as file:
            for block in content:
                file.write(block)
    except OSError as error:
        raise write_error(path, error) from error


def check_output(path: str | os.PathLike, name: str = "out", *, streams: bool = True) -> None:
    """Raise now, before any work, where the file `path` cannot be written later; nothing is left behind.

    Args:
        name: of the argument, for the message
        streams: whether a FIFO, a device or a descriptor will do; not where side files go beside the output

    Raises:
        DataError: `path` is a folder, a socket or a block device, or a stream where none will do
        WriteError: no folder can be made there, or no file in it
    """
    if os.path.isdir(path):
        raise DataError(f"{name} is a folder, {path}: give the name of a file in it")
    if is_stream(path):
        if not streams:
            raise DataError(
                f"{name} is no regular file, {path}: what is done so far is kept in files beside it, so that a kill "
                "loses nothing; give the name of a regular file, and copy it from there"
            )
        if not os.access(path, os.W_OK):
            raise write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        return
    check_folder(Path(os.path.realpath(path)).parent, path)


def check_folder(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> None:
    """Raise now, before any work, where files in `folder`, which may not exist yet, cannot be written later.

    Raises:
        WriteError: names `path` (or the folder): no folder can be made, or no file in it
    """
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):  # of no name, where the system can; else gone at once
            pass
    except OSError as error:
        raise write_error(folder if path is None else path, error) from error


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file that appears under `path` when the block ends well, and never otherwise.

    The text goes to a temporary file in the same folder (made if missing), is synced to disk, and is then renamed. A
    path that `is_stream` is not replaced: the text is written into it when the block has ended well.

    Raises:
        DataError: `path` is a socket or a block device.
        WriteError: the disk is full, or the folder cannot be written; an older file at `path` is as it was.
    """
    if is_stream(path):
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            file.buffer.seek(0)
            write_stream(path, file.buffer)
        return
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
    """Indented JSON. NaN and infinities are refused (they are no JSON): write None instead.

    Names of files need not be UTF-8. Python makes halves of surrogate pairs of such bytes; they are spelled, `\\udcff`.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, re.sub("[\ud800-\udfff]", lambda half: rf"\\u{ord(half[0]):x}", text))


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


LOGPROB_COLUMNS = ("behavior_logprobs", "ref_logprobs")
TOP_K_COLUMNS = ("top_k_ids", "top_k_logprobs")


def check_scored_row(row: dict[str, Any], where: str, needs: tuple[str, ...] = ("behavior_logprobs",)) -> None:
    """Check the columns of a scored row; `where` is "file:line", `needs` what must be there besides ids and mask.

    `input_ids` are integers >= 0, `completion_mask` is 0 or 1 with at least one 1 and a 0 in front (the first token has
    nothing before it, so no probability). `behavior_logprobs` and `ref_logprobs` are finite and at most `MAX_LOGPROB`
    where the mask is 1. There `top_k_ids` and `top_k_logprobs` hold K tokens, no token twice, and their log-probs,
    descending; K is the same at all of them. What lists hold at other positions does not matter. Beside them may stand
    `top_k_temperature`, a positive number, `top_k_model` and `top_k_tokenizer`, strings, and `top_k_vocabulary`, an int
    above K. `label` is a boolean.

    Raises:
        DataError: says which field, at which position, what was found and what to do.
    """
    given = [name for name in (*LOGPROB_COLUMNS, *TOP_K_COLUMNS) if name in row and name not in needs]
    if len(half := [name for name in TOP_K_COLUMNS if name in (*needs, *given)]) == 1:
        given.extend(name for name in TOP_K_COLUMNS if name not in half)  # both or neither
    lists = {}
    for key in ("input_ids", "completion_mask", *needs, *given):
        if key not in row:
            raise DataError(f"{where}: no `{key}`; {_origin(key)} Keys found: {sorted(row)}")
        if not isinstance(row[key], list):
            raise DataError(f"{where}: `{key}` must be a list, got {type(row[key]).__name__}")
        lists[key] = row[key]
    if len({len(values) for values in lists.values()}) > 1:
        names = [f"`{key}`" for key in lists]
        lengths = [str(len(values)) for values in lists.values()]
        raise DataError(
            f"{where}: {', '.join(names[:-1])} and {names[-1]} must have one length, "
            f"got {', '.join(lengths[:-1])} and {lengths[-1]}"
        )
    ids, mask = lists["input_ids"], lists["completion_mask"]
    for t, token in enumerate(ids):
        if type(token) is not int or not 0 <= token <= MAX_INT32:
            raise DataError(f"{where}: `input_ids[{t}]` must be a token id >= 0, got {token!r:.100}")
    for t, bit in enumerate(mask):
        if type(bit) not in (int, bool) or bit not in (0, 1):
            raise DataError(f"{where}: `completion_mask[{t}]` must be 0 or 1, got {bit!r:.100}")
    if 1 not in mask:
        raise DataError(f"{where}: no completion: `completion_mask` has no 1 in {len(mask)} tokens")
    if mask[0]:
        raise DataError(f"{where}: `completion_mask[0]` must be 0: the first token has nothing before it to predict it")
    for key in LOGPROB_COLUMNS:
        if key in lists:
            _check_logprobs(lists[key], mask, key, where)
    if "top_k_ids" in lists:
        _check_top_k(row, where)
    check_label(row, where)


def check_label(row: dict[str, Any], where: str) -> None:
    """Raise unless the row's `label`, if it has one, is a JSON boolean."""
    if not isinstance(row.get("label", True), bool):
        found = _shorten(json.dumps(row["label"], ensure_ascii=False))
        raise DataError(
            f"{where}: `label` must be true or false, got {found}: write true where the completion is right, false "
            "where it is wrong (or another name, if the column is about something else)"
        )


def _origin(key: str) -> str:
    """What to do about a column that is missing."""
    if key == "ref_logprobs":
        return "`pear score --column ref_logprobs` writes it."
    if key in TOP_K_COLUMNS:
        return "`pear score --column none --top_k K` writes `top_k_ids` and `top_k_logprobs`."
    return "is this the output of `pear score`?"


def _check_logprobs(logprobs: list, mask: list, key: str, where: str) -> None:
    again = "`pear score`" if key == "behavior_logprobs" else f"`pear score --column {key}`"
    for t, value in enumerate(logprobs):
        if type(value) not in (int, float) or type(value) is int and abs(value) > MAX_FLOAT32:
            raise DataError(f"{where}: `{key}[{t}]` must be a number, got {value!r:.100}")
        if mask[t] and not -MAX_FLOAT32 <= value <= MAX_LOGPROB:  # False for NaN too
            raise DataError(
                f"{where}: `{key}[{t}]` is {value!r:.100}; a log-prob is finite and at most 0. Score the row again "
                f"with {again}."
            )


def _check_top_k(row: dict[str, Any], where: str) -> None:
    """Both columns at every completion token. The first check of a token is quick; the second finds what is wrong."""
    again = "Score the row again with `pear score --column none --top_k K`."
    k = None
    for t, bit in enumerate(row["completion_mask"]):
        if not bit:
            continue
        ids, logprobs = row["top_k_ids"][t], row["top_k_logprobs"][t]
        for key, values in (("top_k_ids", ids), ("top_k_logprobs", logprobs)):
            if not isinstance(values, list) or not values:
                raise DataError(f"{where}: `{key}[{t}]` must be a list of K entries, got {values!r:.100}. {again}")
            k = k or len(values)
            if len(values) != k:
                raise DataError(
                    f"{where}: `{key}[{t}]` must have K = {k} entries as the first completion token's ids have, got "
                    f"{len(values)}. {again}"
                )
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > MAX_INT32:
            j = next(j for j, token in enumerate(ids) if type(token) is not int or not 0 <= token <= MAX_INT32)
            raise DataError(f"{where}: `top_k_ids[{t}][{j}]` must be a token id >= 0, got {ids[j]!r:.100}. {again}")
        if len(set(ids)) != k:
            twice = next(token for token in ids if ids.count(token) > 1)
            raise DataError(f"{where}: `top_k_ids[{t}]` has token {twice} twice. {again}")
        if not set(map(type, logprobs)) <= {int, float} or not all(abs(value) <= MAX_FLOAT32 for value in logprobs):
            numbers = (type(value) in (int, float) and abs(value) <= MAX_FLOAT32 for value in logprobs)
            j = list(numbers).index(False)
            raise DataError(
                f"{where}: `top_k_logprobs[{t}][{j}]` must be a finite number, got {logprobs[j]!r:.100}. {again}"
            )
        if sorted(logprobs, reverse=True) != logprobs:
            j = next(j for j in range(1, k) if logprobs[j] > logprobs[j - 1])
            raise DataError(
                f"{where}: `top_k_logprobs[{t}]` must descend, got {logprobs[j]!r} after {logprobs[j - 1]!r} (entry "
                f"{j}). {again}"
            )
        total = sum(map(math.exp, logprobs)) if logprobs[0] < 1 else math.inf  # exp of a large one overflows
        if total > 1 + MAX_LOGPROB:
            raise DataError(
                f"{where}: `top_k_logprobs[{t}]`: the K probabilities sum to {total:.6g}, more than 1. {again}"
            )
    temperature = row.get("top_k_temperature", 1.0)
    if type(temperature) not in (int, float) or not 0 < temperature <= MAX_FLOAT32:
        raise DataError(f"{where}: `top_k_temperature` must be a positive number, got {temperature!r:.100}. {again}")
    for key, what in (("top_k_model", "a model's name"), ("top_k_tokenizer", "a vocabulary's fingerprint")):
        if not isinstance(found := row.get(key, ""), str):
            raise DataError(f"{where}: `{key}` must be a string, {what}, got {found!r:.100}. {again}")
    vocabulary = row.get("top_k_vocabulary", k + 1)
    if type(vocabulary) is not int or vocabulary <= k:
        raise DataError(
            f"{where}: `top_k_vocabulary` must be a whole number of tokens, at least K + 1 = {k + 1}, got "
            f"{vocabulary!r:.100}. {again}"
        )
