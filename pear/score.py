"""`pear score`: teacher-forced log-probs of each response under the policy that wrote it, for `pear sft`."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.fused_head import add_fused_head
from pear.io import MAX_LOGPROB, DataError, atomic_writer, read_jsonl, write_error
from pear.models import load_model, load_tokenizer, tokenizer_fingerprint
from pear.rows import prompt_and_completion, tokenize_row

DTYPES = ("auto", "float32", "bfloat16")


class _Row(NamedTuple):
    line: int
    input_ids: np.ndarray  # (L,) int32
    start: int  # first token with a log-prob; everything from here on is completion


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
) -> dict[str, Any]:
    """Score every row of `data` (JSONL) with `model` and write the rows to `out` with their log-probs.

    An input row is `{"prompt", "completion"}`, strings or lists of chat messages, or `{"messages"}` that ends with the
    assistant's. An output row has, besides what it came with, `input_ids`, `completion_mask` and `behavior_logprobs`,
    lists of one length: `behavior_logprobs[t]` is log p(input_ids[t] | all before) where the mask is 1, else 0.0; and
    `tokenizer` (a fingerprint) and `model` (a name). Rows keep their order.

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

    Returns:
        `rows` read, `scored` (written to `out`), `resumed` (of these, taken from the side file), `too_long` and
        `too_long_lines`, `prompt_cut` (rows whose prompt changes at its end once the completion follows), `tokens`
        scored, `mean_logprob`, `seconds`, `max_length`, `out`.

    Raises:
        DataError: a row without completion, a line that is no JSON (with file and line), no row that fits.
        WriteError: the disk is full; the side file stays, so nothing scored is lost.
    """
    began = time.monotonic()
    if batch_tokens < 1:
        raise DataError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be at least 2 (one token to predict another from), got {max_length}")
    console = Console(stderr=True, quiet=not progress)
    model, name, tokenizer = _load(model, tokenizer, dtype, device)
    if max_length is None:
        max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    rows, too_long, prompt_cut, data_hash = _read_rows(data, tokenizer, max_length)
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
    partial = _Partial(Path(out), header, resume)
    logprobs = partial.load(rows)
    resumed = len(logprobs)
    if resumed:
        console.print(
            f"Going on from {partial.path.name}: {resumed} of {len(rows)} rows are scored already.", markup=False
        )

    with partial.append() as file, _progress(console, len(rows), resumed) as advance:
        for batch in _batches(rows, batch_tokens):
            todo = [i for i in batch if i not in logprobs]
            if not todo:
                continue
            scored = _score_batch(model, [rows[i] for i in todo], data)
            for i, values in zip(todo, scored, strict=True):
                logprobs[i] = values
            partial.write(file, todo, scored)
            advance(len(todo))

    try:
        _write_out(out, data, data_hash, rows, logprobs, fingerprint, name)
    except OSError as error:
        kept = f"The scores are kept in {partial.path}; the same command goes on from there."
        raise write_error(out, error.__cause__ if isinstance(error.__cause__, OSError) else error, kept=kept) from error
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
        "out": str(out),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


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
    data: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[_Row], list[int], int, str]:
    """Rows that fit, line numbers of those that do not, how many have a cut prompt, and the file's hash."""
    rows, too_long, prompt_cut, digest = [], [], 0, hashlib.sha256()
    for line, row in read_jsonl(data):
        where = f"{data}:{line}"
        tokenized = tokenize_row(prompt_and_completion(row, where), tokenizer, where)
        digest.update(f"{line} {json.dumps(row, sort_keys=True)}\n".encode())
        if max_length is not None and len(tokenized.input_ids) > max_length:
            too_long.append(line)
            continue
        prompt_cut += tokenized.prompt_cut > 0
        rows.append(_Row(line, np.array(tokenized.input_ids, dtype=np.int32), tokenized.completion_mask.index(1)))
    return rows, too_long, prompt_cut, digest.hexdigest()


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
def _score_batch(model: PreTrainedModel, rows: list[_Row], data: str | os.PathLike) -> list[np.ndarray]:
    """Log-probs (float32) of each row's completion."""
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
        logprobs = model(**{k: v.to(model.device) for k, v in inputs.items()}, pear={}).cpu().numpy()
    finally:
        model.train(was_training)
    scored = [logprobs[b, row.start : len(row.input_ids)].copy() for b, row in enumerate(rows)]
    for row, values in zip(rows, scored, strict=True):
        bad = ~(np.isfinite(values) & (values <= MAX_LOGPROB))
        if bad.any():
            t = int(bad.argmax())
            raise DataError(
                f"{data}:{row.line}: the model gives log-prob {values[t]} to token {row.start + t} (id "
                f"{row.input_ids[row.start + t]}). Its weights may be damaged, or its dtype too narrow: try "
                "dtype float32."
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


class _Partial:
    """The side file: a header line, then one line a scored row, appended batch by batch."""

    def __init__(self, out: Path, header: dict[str, Any], resume: bool):
        self.header = header
        key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
        self.path = out.with_name(f"{out.name}.{key}.partial")
        if not resume:
            self.path.unlink(missing_ok=True)

    def load(self, rows: list[_Row]) -> dict[int, np.ndarray]:
        """Row number -> log-probs of what an earlier call finished; a line torn by a kill is cut off the file."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines or json.loads(lines[0]) != self.header:  # torn in its very first line
            self.path.unlink()
            return {}
        logprobs = {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = json.loads(line)
                i, values = record["row"], np.array(record["logprobs"], dtype=np.float32)
                if len(values) != len(rows[i].input_ids) - rows[i].start:
                    raise ValueError(f"{len(values)} log-probs for row {i}")
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(
                    f"{self.path}:{number}: damaged ({error}). Delete the file, or turn resume off, to start anew."
                ) from error
            logprobs[i] = values
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return logprobs

    @contextlib.contextmanager
    def append(self) -> Iterator[TextIO]:
        """The file, open at its end; only one process at a time has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                _lock(file, self.path)
                if file.tell() == 0:
                    file.write(json.dumps(self.header) + "\n")
                    file.flush()
                yield file
        except DataError:
            raise
        except OSError as error:
            kept = f"Rows scored so far are in {self.path}; the same command goes on from there."
            raise write_error(self.path, error, kept=kept) from error

    def write(self, file: TextIO, numbers: list[int], scored: list[np.ndarray]) -> None:
        for i, values in zip(numbers, scored, strict=True):
            file.write(f'{{"row": {i}, "logprobs": {json.dumps(_floats(values))}}}\n')
        file.flush()  # out of this process: a kill cannot take it back


def _lock(file: TextIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{path}: another process is scoring this very data now; wait for it, or stop it") from None


def _floats(values: np.ndarray) -> list[float]:
    """float32 values as the shortest decimal numbers that read back the same."""
    return [float(str(v)) for v in values + np.float32(0)]  # + 0 turns -0.0 into 0.0


def _write_out(
    out: str | os.PathLike,
    data: str | os.PathLike,
    data_hash: str,
    rows: list[_Row],
    logprobs: dict[int, np.ndarray],
    fingerprint: str,
    name: str,
) -> None:
    """Read `data` once more and write its rows with their scores; texts were not kept in memory meanwhile."""
    by_line = {row.line: i for i, row in enumerate(rows)}
    digest = hashlib.sha256()
    with atomic_writer(out) as file:
        for line, row in read_jsonl(data):
            digest.update(f"{line} {json.dumps(row, sort_keys=True)}\n".encode())
            if line not in by_line:
                continue
            ids, start = rows[by_line[line]].input_ids, rows[by_line[line]].start
            scored = prompt_and_completion(row, f"{data}:{line}") | {
                "input_ids": ids.tolist(),
                "completion_mask": [0] * start + [1] * (len(ids) - start),
                "behavior_logprobs": [0.0] * start + _floats(logprobs[by_line[line]]),
                "tokenizer": fingerprint,
                "model": name,
            }
            file.write(json.dumps(scored, ensure_ascii=False) + "\n")
        if digest.hexdigest() != data_hash:
            raise DataError(f"{data}: the file changed while it was being scored; nothing was written. Score it again.")
