"""From a scored file and a student to the report: on the terminal, as JSON and as a page."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.align import ROLES, Roles
from pear.inspecting import terminal
from pear.inspecting.data import Data, read
from pear.inspecting.page import page
from pear.inspecting.report import make_report
from pear.inspecting.student import logprobs
from pear.io import DataError, check_output
from pear.models import load_tokenizer
from pear.pictures import write_whole
from pear.progress import progress as progress_of
from pear.scoring.policies import Policy
from pear.scoring.processes import device_named
from pear.tokenizer_options import changed_tokenizer
from pear_kernels.options import DEFAULTS, PEAROptions


def inspect(
    data: str | os.PathLike,
    model: str | PreTrainedModel,
    *,
    options: PEAROptions = DEFAULTS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    html: str | os.PathLike | None = None,
    json_report: str | os.PathLike | None = None,
    rows: int = 12,
    max_length: int | None = None,
    drop_long_rows: bool = False,
    sample: int | None = None,
    seed: int = 0,
    roles: Roles = ROLES,
    batch_tokens: int = 8192,
    dtype: str = "auto",
    device: str | None = None,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score `data` (JSONL of `pear score` or `pear import`) with the student and say what the weights will do.

    Nothing is trained, and no logits are made: the student's log-probs cost one product a token for the head.

    Args:
        model: the student, a name for `load_model`, or a loaded model, which then needs `tokenizer`.
        options: as `pear sft` would be given them.
        html: where a page with pictures and coloured text goes; None: nowhere.
        json_report: where the returned report goes as JSON; None: nowhere. Both are written, or none.
        rows: how many rows to show with their text, the worst ones and an ordinary one.
        max_length: longer rows are left out and counted, as `pear sft` does; more than 1 % of such rows are an error.
            None: the model's own positions, if its config tells.
        drop_long_rows: leave out any number of them.
        sample: look at so many rows only, drawn by `seed`.
        roles: `pear.align`'s rule for structural tokens.
        batch_tokens: rows are padded in batches of at most this many tokens.
        dtype: of the student: "float32", "bfloat16", or "auto": float32 on a CPU, as stored elsewhere. For names only.
        device: where to run; None takes the accelerator if there is one.
        chat_template_path, eos_token: of the student's tokenizer, as in `pear score` and `pear sft`.
        console: where tables go; None prints nothing.

    Returns:
        The report, plain JSON: see `pear.inspecting.report`.

    Raises:
        DataError: damaged, edited or older rows, no row to look at; options out of range.
        WriteError: a file cannot be written.
    """
    bounds = (("rows", rows, 0), ("sample", sample, 1), ("seed", seed, 0), ("batch_tokens", batch_tokens, 1))
    for name, value, least in bounds:
        if value is not None and value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be at least 2 (one token to predict another from), got {max_length}")
    _check_outputs({"data": data, "html": html, "json": json_report})
    place = device_named(device or None)
    options_of_tokenizer = {"chat_template_path": chat_template_path, "eos_token": eos_token}
    unchanged = None
    if any(value is not None for value in options_of_tokenizer.values()):
        unchanged = load_tokenizer(model) if tokenizer is None and isinstance(model, str) else tokenizer
        tokenizer = unchanged and changed_tokenizer(unchanged, **options_of_tokenizer)
    student = Policy(model, tokenizer, max_length, dtype, place if isinstance(model, str) or device else None)
    found = read(
        data,
        student.tokenizer,
        max_length=student.max_length,
        drop_long_rows=drop_long_rows,
        sample=sample,
        seed=seed,
        roles=roles,
        unchanged=unchanged,
    )
    _check_ids(student, found, data)  # by the config
    bars = Console(stderr=True, quiet=console is None)
    counted = progress_of("student's log-probs", len(found.rows), "rows", console=bars, transient=True)
    with student.loaded() as loaded, counted as advance:
        _check_ids(student, found, data)  # by the weights
        scored = logprobs(loaded, found.rows, data, batch_tokens, advance)
        half = loaded.dtype in (torch.bfloat16, torch.float16)
    names = {"file": Path(data).name, "student": student.name}
    report = make_report(found, scored, options, student.tokenizer, names=names, rows=rows, half=half)
    write_outputs(report, html, json_report)
    if console is not None:
        terminal.show(report, console)
    return report


def _check_ids(student: Policy, found: Data, data: str | os.PathLike) -> None:
    for row in found.rows:
        student.check_ids(row.input_ids, f"{data}:{row.line}")


def write_outputs(
    report: dict[str, Any], html: str | os.PathLike | None = None, json_report: str | os.PathLike | None = None
) -> None:
    """Write the report as a page and as JSON, both or none.

    Raises:
        WriteError: names the file that failed; older files are as they were.
    """
    files = {}
    if html is not None:
        files[Path(html)] = page(report).encode()
    if json_report is not None:  # ASCII, since a name may hold half of a surrogate pair
        files[Path(json_report)] = (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    write_whole(files)


def _check_outputs(files: dict[str, str | os.PathLike | None]) -> None:
    """Raise where two of them are one file: nothing that is written may take the place of the data, or of the other.

    Or where one cannot be written, which would show when the student's work is done and lost.
    """
    seen: dict[str, str] = {}
    for name, path in files.items():
        if path is not None and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise DataError(f"{name} and {other} are the same file, {path}: give another name to one of them")
        if name != "data" and path is not None:
            check_output(path, name)
