"""`pear score`: teacher-forced log-probs of each response under the policy that wrote it, for `pear sft`."""

import base64
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.fused_head import add_fused_head
from pear.io import (
    LOGPROB_COLUMNS,
    MAX_LOGPROB,
    TOP_K_COLUMNS,
    DataError,
    WriteError,
    atomic_writer,
    check_label,
    check_scored_row,
    read_jsonl,
    write_error,
)
from pear.models import load_model, load_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint
from pear.rows import TokenizedRow, check_same_tokens, prompt_and_completion, tokenize_row

DTYPES = ("auto", "float32", "bfloat16")
COLUMNS = (*LOGPROB_COLUMNS, "none")  # where log-probs may go
MODEL_OF = {"behavior_logprobs": "model", "ref_logprobs": "ref_model"}  # the key that names whose log-probs they are


class _Row(NamedTuple):
    line: int
    input_ids: np.ndarray  # (L,) int32
    start: int  # first token with a log-prob; everything from here on is completion


class _TopK(NamedTuple):
    k: int
    temperature: float


class _Scores(NamedTuple):
    """Of one row's completion, C tokens."""

    logprobs: np.ndarray  # (C,) float32
    top_k_ids: np.ndarray | None  # (C, K) int64
    top_k_logprobs: np.ndarray | None  # (C, K) float32, descending


def score(
    model: str | PreTrainedModel,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = True,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
    column: str = "behavior_logprobs",
    top_k: int | None = None,
    top_k_temperature: float = 1.0,
) -> dict[str, Any]:
    """Score every row of `data` (JSONL) with `model` and write the rows to `out` with their log-probs.

    An input row is `{"prompt", "completion"}`, strings or lists of chat messages, or `{"messages"}` that ends with the
    assistant's. An output row has, besides what it came with, `input_ids`, `completion_mask` and `behavior_logprobs`,
    lists of one length: `behavior_logprobs[t]` is log p(input_ids[t] | all before) where the mask is 1, else 0.0; and
    `tokenizer` (a fingerprint) and `model` (a name). Rows keep their order.

    With `column="ref_logprobs"` the log-probs are a reference's: they go to `ref_logprobs`, the name to `ref_model`,
    and a row that was scored before keeps everything else that it has. Token columns that stay must be about the
    tokens that this model's tokenizer makes. `out` may be `data` itself.

    With `top_k`, there are also `top_k_ids` and `top_k_logprobs`, for each completion token the K tokens that the model
    holds most likely in its place, and their log-probs, descending (an empty list at other positions), and
    `top_k_temperature`, `top_k_model` (a name), `top_k_vocabulary` (the size of that model's head) and
    `top_k_tokenizer` (a fingerprint of its vocabulary).

    With `column="none"` the top-k are all that is written: a teacher that did not write the responses leaves every
    log-prob that a row has, and `model` and `ref_model`.

    Finished batches go to a side file, `<out>.<hash>.partial`; after a kill, the same call (same data, model and
    settings) goes on from there. `out` appears whole at the end, and the side file goes.

    Args:
        model: a name for `load_model`, or a loaded model, which then needs `tokenizer`.
        batch_tokens: rows are sorted by length and padded in batches of at most this many tokens (a longer row alone).
        max_length: longer rows are left out of `out`; they are counted and listed in the result, never cut. None: the
            model's own context length, if its config tells.
        resume: False starts anew, whatever an earlier call left.
        dtype: "float32", "bfloat16", or "auto": float32 on a CPU, the checkpoint's dtype elsewhere. For names only.
        device: where to run; None takes the accelerator if there is one.
        column: where the log-probs go, "behavior_logprobs" or "ref_logprobs"; "none", with `top_k`: nowhere.
        top_k: K, at least 1 and less than the vocabulary; None for none of it.
        top_k_temperature: divides the logits that `top_k_logprobs` are taken of, and not those of `column`: that of the
            distillation they are for.

    Returns:
        `rows` read, `scored` (written to `out`), `resumed` (of these, taken from the side file), `too_long` and
        `too_long_lines`, `prompt_cut` (rows whose prompt changes at its end once the completion follows), `tokens`
        scored, `mean_logprob`, `seconds`, `max_length`, `column`, `top_k`, `top_k_temperature`, `out`.

    Raises:
        DataError: a row without completion, a line that is no JSON, a `label` that is no boolean, other tokens than
            those of the columns that stay (with file and line), no row that fits; rows that do not fit, where `out`
            is `data`, which would lose them.
        WriteError: the disk is full; the side file stays, so nothing scored is lost.
    """
    began = time.monotonic()
    if batch_tokens < 1:
        raise DataError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be at least 2 (one token to predict another from), got {max_length}")
    if column not in COLUMNS:
        raise DataError(f"column must be one of {', '.join(COLUMNS)}, got {column!r}")
    wanted = _check_top_k(top_k, top_k_temperature)
    if column == "none" and wanted is None:
        raise DataError(
            "column = 'none' without top_k: there would be nothing to write. Give top_k, or the column that the "
            f"log-probs go to: {' or '.join(LOGPROB_COLUMNS)}"
        )
    console = Console(stderr=True, quiet=not progress)
    model, name, tokenizer = _load(model, tokenizer, dtype, device)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if wanted is not None and wanted.k >= vocabulary:
        raise DataError(f"top_k must be less than the model's vocabulary of {vocabulary} tokens, got {top_k}")
    if max_length is None:
        max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    replaced = (column,) if wanted is None else (column, *TOP_K_COLUMNS)
    rows, too_long, prompt_cut, data_hash = _read_rows(data, tokenizer, max_length, replaced)
    if too_long and os.path.exists(out) and os.path.samefile(data, out):
        raise DataError(
            f"{_too_long_message(data, too_long, max_length)} They would be lost, since out is the same file: give "
            "another out, or a larger max_length."
        )
    if too_long:
        console.print(_too_long_message(data, too_long, max_length), style="yellow", markup=False, highlight=False)
    if prompt_cut:
        console.print(
            f"{prompt_cut} rows: the end of the prompt becomes other tokens once the completion follows; the "
            "completion was taken to start where they differ (as in TRL).",
            style="yellow",
        )
    if not rows:
        if too_long:
            raise DataError(_too_long_message(data, too_long, max_length) + " No row is left to score.")
        raise DataError(f"{data}: no rows in it")

    fingerprint = tokenizer_fingerprint(tokenizer)
    header = {
        "data": data_hash,
        "model": name,
        "weights": _weights_hash(model),
        "tokenizer": fingerprint,
        "dtype": str(model.dtype),
        "max_length": max_length,
    }
    if wanted is not None:
        header |= {"top_k": wanted.k, "top_k_temperature": wanted.temperature}
    partial = _Partial(Path(out), header, resume)
    partial.load(rows)
    logprobs = partial.logprobs
    resumed = len(logprobs)
    if resumed:
        console.print(
            f"Going on from {partial.path.name}: {resumed} of {len(rows)} rows are scored already.", markup=False
        )

    with partial.append() as file:
        with _progress(console, len(rows), resumed) as advance:
            for batch in _batches(rows, batch_tokens):
                todo = [i for i in batch if i not in logprobs]
                if not todo:
                    continue
                scored = _score_batch(model, [rows[i] for i in todo], data, wanted)
                partial.write(file, todo, scored)
                advance(len(todo))
        try:
            beside_top_k = {}
            if wanted is not None:
                beside_top_k = {
                    "top_k_temperature": wanted.temperature,
                    "top_k_model": name,
                    "top_k_vocabulary": vocabulary,
                    "top_k_tokenizer": vocabulary_fingerprint(tokenizer),
                }
            _write_out(out, data, data_hash, rows, partial, column, fingerprint, name, beside_top_k)
        except OSError as error:
            kept = f"The scores are kept in {partial.path}; the same command goes on from there."
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise write_error(out, cause, kept=kept) from error
    partial.path.unlink()

    tokens = sum(len(values) for values in logprobs.values())
    return {
        "rows": len(rows) + len(too_long),
        "scored": len(rows),
        "resumed": resumed,
        "too_long": len(too_long),
        "too_long_lines": too_long,
        "prompt_cut": prompt_cut,
        "tokens": tokens,
        "mean_logprob": float(sum(values.sum(dtype=np.float64) for values in logprobs.values()) / tokens),
        "seconds": time.monotonic() - began,
        "max_length": max_length,
        "column": column,
        "top_k": top_k,
        "top_k_temperature": top_k_temperature,
        "out": str(out),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


def _check_top_k(top_k: int | None, temperature: float) -> _TopK | None:
    """What is to be kept of each distribution, if anything."""
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise DataError(f"top_k_temperature must be a positive number, got {temperature!r}")
    if top_k is None:
        if temperature != 1:
            raise DataError(f"top_k_temperature = {temperature} does nothing without top_k; give top_k too")
        return None
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise DataError(f"top_k must be a whole number of tokens, at least 1, got {top_k!r}")
    return _TopK(top_k, float(temperature))


def _load(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: str, device: str | None
) -> tuple[PreTrainedModel, str, PreTrainedTokenizerBase]:
    if dtype not in DTYPES:
        raise DataError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(model, str):
        name = model
        tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = torch.device(device) if device else accelerator or torch.device("cpu")
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"
        model = load_model(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).to(device)
    else:
        name = model.config.name_or_path or type(model).__name__
        if tokenizer is None:
            raise DataError("tokenizer: a loaded model needs its tokenizer; pass tokenizer=load_tokenizer(name)")
        if device is not None:
            model = model.to(device)
    add_fused_head(model)
    return model, name, tokenizer


def _weights_hash(model: PreTrainedModel) -> str:
    """Tells models of one name apart: config, and 16 values spread over each parameter."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 16)][:16]
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_rows(
    data: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, max_length: int | None, replaced: tuple[str, ...]
) -> tuple[list[_Row], list[int], int, str]:
    """Rows that fit, line numbers of those that do not, how many have a cut prompt, and the file's hash.

    Whatever may be wrong with a row is found here, before the hours of scoring; `replaced` are the columns to come.
    """
    rows, too_long, prompt_cut, digest = [], [], 0, hashlib.sha256()
    for line, row in read_jsonl(data):
        where = f"{data}:{line}"
        tokenized = tokenize_row(prompt_and_completion(row, where), tokenizer, where)
        check_label(row, where)
        _check_what_stays(row, tokenized, tokenizer, where, replaced)
        digest.update(f"{line} {json.dumps(row, sort_keys=True)}\n".encode())
        if max_length is not None and len(tokenized.input_ids) > max_length:
            too_long.append(line)
            continue
        prompt_cut += tokenized.prompt_cut > 0
        rows.append(_Row(line, np.array(tokenized.input_ids, dtype=np.int32), tokenized.completion_mask.index(1)))
    return rows, too_long, prompt_cut, digest.hexdigest()


def _check_what_stays(
    row: dict[str, Any],
    tokenized: TokenizedRow,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    replaced: tuple[str, ...],
) -> None:
    """Token columns that a row keeps must be whole and about the very tokens that are scored now."""
    stays = {key: value for key, value in row.items() if key not in replaced}
    token_columns = (*LOGPROB_COLUMNS, *TOP_K_COLUMNS)
    if "behavior_logprobs" not in replaced:
        token_columns += ("input_ids", "completion_mask")  # what is written goes beside them
    if any(key in stays for key in token_columns):
        check_scored_row(stays, where, needs=())
        check_same_tokens(stays, tokenized, tokenizer, where, whose="this model")


def _too_long_message(data: str | os.PathLike, lines: list[int], max_length: int | None) -> str:
    listed = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
    return f"{data}: left out {len(lines)} rows longer than max_length = {max_length} tokens (lines {listed})."


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def _batches(rows: list[_Row], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest first (so that a batch too large for the memory fails at once), padded size in budget."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i)):
        longest = longest or len(rows[i].input_ids)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], len(rows[i].input_ids)
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def _score_batch(
    model: PreTrainedModel, rows: list[_Row], data: str | os.PathLike, top_k: _TopK | None = None
) -> list[_Scores]:
    """What each row's file line will hold of its completion."""
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # the id of the padding does not matter
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        input_ids[b, :n] = torch.from_numpy(row.input_ids)
        attention_mask[b, :n] = 1
        labels[b, row.start : n] = input_ids[b, row.start : n]
    was_training = model.training
    model.eval()
    try:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        inputs = {k: v.to(model.device) for k, v in inputs.items()}
        if top_k is None:
            found = (model(**inputs, pear={}),)
        else:
            logprobs, top = model(**inputs, pear={"top_k": top_k.k, "top_k_temperature": top_k.temperature})
            found = (logprobs, top.ids, top.logprobs)
    finally:
        model.train(was_training)
    arrays = [x.cpu().numpy() for x in found]
    scored = []
    for b, row in enumerate(rows):
        scores = [x[b, row.start : len(row.input_ids)].copy() for x in arrays]  # not a view that holds the padding
        scored.append(_Scores(*scores) if top_k is not None else _Scores(*scores, None, None))
    for row, (values, _, top_logprobs) in zip(rows, scored, strict=True):
        bad = ~(np.isfinite(values) & (values <= MAX_LOGPROB))
        if bad.any():
            t = int(bad.argmax())
            raise DataError(
                f"{data}:{row.line}: the model gives log-prob {values[t]} to token {row.start + t} (id "
                f"{row.input_ids[row.start + t]}). Its weights may be damaged, or its dtype too narrow: try "
                "dtype float32."
            )
        if top_logprobs is not None and not np.isfinite(top_logprobs).all():
            t = int((~np.isfinite(top_logprobs)).any(axis=1).argmax())
            raise DataError(
                f"{data}:{row.line}: at token {row.start + t} fewer than top_k = {top_logprobs.shape[1]} tokens have "
                "any probability. Lower top_k, or raise top_k_temperature."
            )
    return scored


@contextlib.contextmanager
def _progress(console: Console, total: int, done: int):
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console.quiet) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


# ---------------------------------------------------------------------------------------------------------------------
# Files


# In the side file; the same bytes on every machine.
_TOP_K_DTYPES = dict(zip(TOP_K_COLUMNS, ("<i4", "<f4"), strict=True))


class _Partial:
    """The side file: a header line, then one line a scored row, appended batch by batch.

    Kept in memory for every row scored are its log-probs, 4 bytes a token, and where its line starts. The top-k are
    not: they stand in the line as the bytes of their arrays, and are read back from there when the row is written out.
    """

    def __init__(self, out: Path, header: dict[str, Any], resume: bool):
        self.header = header
        key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
        self.path = out.with_name(f"{out.name}.{key}.partial")
        self.logprobs: dict[int, np.ndarray] = {}  # row number -> (C,) float32
        self.offsets: dict[int, int] = {}  # row number -> bytes before its line
        if not resume:
            self.path.unlink(missing_ok=True)

    def load(self, rows: list[_Row]) -> None:
        """Take over what an earlier call finished; a line torn by a kill is cut off the file."""
        if not self.path.exists():
            return
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                if number > 1:
                    try:
                        i, values = self._read(line, rows)
                    except (ValueError, KeyError, TypeError, IndexError) as error:
                        raise DataError(
                            f"{self.path}:{number}: damaged ({error}). Delete the file, or turn resume off, to start "
                            "anew."
                        ) from error
                    self.logprobs[i], self.offsets[i] = values, end
                elif json.loads(line) != self.header:
                    break
                end += len(line)
        if end == 0:  # torn in its very first line
            self.path.unlink()
        elif end < self.path.stat().st_size:
            os.truncate(self.path, end)

    def _read(self, line: bytes, rows: list[_Row]) -> tuple[int, np.ndarray]:
        record = json.loads(line)
        i, values = record["row"], np.array(record["logprobs"], dtype=np.float32)
        tokens = len(rows[i].input_ids) - rows[i].start
        if len(values) != tokens:
            raise ValueError(f"{len(values)} log-probs for row {i}")
        for key, array in self._top_k(record).items():
            if len(array) != tokens:
                raise ValueError(f"`{key}` of {len(array)} tokens for row {i}")
        return i, values

    def _top_k(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        """The (C, K) arrays of a line, if it has them."""
        return {
            key: np.frombuffer(base64.b64decode(record[key], validate=True), dtype).reshape(-1, self.header["top_k"])
            for key, dtype in _TOP_K_DTYPES.items()
            if "top_k" in self.header
        }

    @contextlib.contextmanager
    def append(self) -> Iterator[BinaryIO]:
        """The file, open at its end; only one process at a time has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                _lock(file, self.path)
                if file.tell() == 0:
                    file.write(json.dumps(self.header).encode() + b"\n")
                    file.flush()
                yield file
        except (DataError, WriteError):
            raise
        except OSError as error:
            kept = f"Rows scored so far are in {self.path}; the same command goes on from there."
            raise write_error(self.path, error, kept=kept) from error

    def write(self, file: BinaryIO, numbers: list[int], scored: list[_Scores]) -> None:
        for i, scores in zip(numbers, scored, strict=True):
            record = {"row": i, "logprobs": _floats(scores.logprobs)}
            if scores.top_k_ids is not None:
                for key, dtype in _TOP_K_DTYPES.items():
                    record[key] = base64.b64encode(getattr(scores, key).astype(dtype).tobytes()).decode()
            self.logprobs[i], self.offsets[i] = scores.logprobs, file.tell()
            file.write(json.dumps(record).encode() + b"\n")
        file.flush()  # out of this process: a kill cannot take it back

    def read_top_k(self, file: BinaryIO, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(C, K) ids and log-probs of row i, from its line in the side file, which is open as `file`."""
        file.seek(self.offsets[i])
        arrays = self._top_k(json.loads(file.readline()))
        return arrays["top_k_ids"], arrays["top_k_logprobs"]


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{path}: another process is scoring this very data now; wait for it, or stop it") from None


def _floats(values: np.ndarray) -> list:
    """float32 values, in an array of any shape, as the shortest decimal numbers that read back the same."""
    values = values + np.float32(0)  # turns -0.0 into 0.0
    floats = np.full(values.shape, np.nan)
    for decimals in range(9, -1, -1):  # rounding whole arrays takes a tenth of the time of str() of every number
        rounded = np.rint(values.astype(np.float64) * 10.0**decimals) / 10.0**decimals
        floats = np.where(rounded.astype(np.float32) == values, rounded, floats)
    rest = np.isnan(floats)  # so small that they need more decimals
    floats[rest] = [float(str(v)) for v in values[rest]]
    return floats.tolist()


def _write_out(
    out: str | os.PathLike,
    data: str | os.PathLike,
    data_hash: str,
    rows: list[_Row],
    partial: _Partial,
    column: str,
    fingerprint: str,
    name: str,
    beside_top_k: dict[str, Any],
) -> None:
    """Read `data` once more and write its rows with their scores; texts were not kept in memory meanwhile.

    `beside_top_k` is what tells of whom and at what the top-k are; empty without them.
    """
    by_line = {row.line: i for i, row in enumerate(rows)}
    digest = hashlib.sha256()
    with atomic_writer(out) as file, open(partial.path, "rb") as side:
        for line, row in read_jsonl(data):
            digest.update(f"{line} {json.dumps(row, sort_keys=True)}\n".encode())
            if line not in by_line:
                continue
            i = by_line[line]
            ids, start = rows[i].input_ids, rows[i].start
            row = prompt_and_completion(row, f"{data}:{line}")
            scored = row | {
                "input_ids": ids.tolist(),
                "completion_mask": [0] * start + [1] * (len(ids) - start),
            }
            if column != "none":
                scored |= {column: [0.0] * start + _floats(partial.logprobs[i]), MODEL_OF[column]: name}
            scored["tokenizer"] = fingerprint
            if column != "behavior_logprobs" and "input_ids" in row:  # the behaviour policy's words for the same tokens
                scored |= {key: row[key] for key in ("input_ids", "completion_mask", "tokenizer") if key in row}
            if beside_top_k:
                top_ids, top_logprobs = partial.read_top_k(side, i)
                scored |= {
                    "top_k_ids": [[]] * start + top_ids.tolist(),
                    "top_k_logprobs": [[]] * start + _floats(top_logprobs),
                    **beside_top_k,
                }
            file.write(json.dumps(scored, ensure_ascii=False) + "\n")
        if digest.hexdigest() != data_hash:
            raise DataError(f"{data}: the file changed while it was being scored; nothing was written. Score it again.")
