"""`pear import`: log-probs that came with a generation, or that a server gives, to scored rows."""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from pear.appending import holding, output_file
from pear.importing import checks, columns, openai, sglang, vllm
from pear.importing.client import Client, Failed
from pear.importing.generation import STAGES, Reject, read_all
from pear.importing.journal import Journal
from pear.importing.live import Live
from pear.importing.report import report
from pear.importing.rows import Converter
from pear.importing.sampling import KEYS
from pear.io import DataError, atomic_writer, check_output, is_stream, read_jsonl, write_error, write_json, write_jsonl
from pear.models import load_tokenizer
from pear.progress import progress as progress_of
from pear.seal import seal

SOURCES = ("vllm", "sglang", "openai", "jsonl")
REJECTS, REPORT = ".rejects.jsonl", ".report.json"  # behind the name of `out`
GIVE_UP = 30  # rows in a row to which there was no answer at all: the server is gone


@holding(output_file, "out", streams=False)
def import_logprobs(
    source: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: str | None = None,
    policy: str | None = None,
    columns_named: dict[str, str] | None = None,
    settings: dict[str, float] | None = None,
    logprobs_of: str | None = None,
    strict: bool = False,
    resume: bool = True,
    client: Client | None = None,
    server_model: str | None = None,
    request: dict[str, Any] | None = None,
    n: int = 1,
    jobs: int = 8,
    extra_body: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Read records of `source` (JSONL at `data`), check them, and write scored rows to `out`, sealed, in their order.

    A record that fails a check is set aside in `<out>.rejects.jsonl` with its reason; `<out>.report.json` says what was
    checked, what could not be, and what to be careful about. `out` appears whole or not at all. What is done goes to
    a side file as it comes, and the same call goes on from there after a kill; rejects are tried again by it.

    Args:
        source: one of SOURCES.
        tokenizer: the behaviour policy's, a name for `load_tokenizer`: rows with ids become token rows.
        policy: the behaviour policy's name where the data has none.
        columns_named: of source "jsonl": `prompt`, `completion`, `logprobs`, `ids`, `tokens`, `policy` (columns.py).
        settings: sampling settings (sampling.KEYS) that the data does not tell.
        logprobs_of: one of generation.STAGES, if the source's own is not right.
        strict: the first record that fails a check is an error.
        resume: False starts anew.
        client: ask this server for each row of `data`, which has `prompt` or `messages`, instead of reading answers;
            rows with a completion are scored. `server_model`, `request` (temperature, top_p, max_tokens, seed), `n`,
            `jobs` and `extra_body` are about that: see `live.Live`.

    Returns:
        The report: `written`, `rejected` (records and choices set aside), `resumed`, `rejects` (the file, or None),
        `out` (None: no row was left to write), `warnings`, `checks`, `seconds` and more.

    Raises:
        DataError: a wrong setting; a line that is no JSON; no row in `data`; a server that refuses; with `strict` a bad
            record.
        WriteError: the disk is full; the side file stays.
    """
    began = time.monotonic()
    out = Path(out)
    _check_settings(source, data, out, client, logprobs_of, jobs, settings)
    console = Console(stderr=True, quiet=not progress)
    records, digest = _look(data), _digest(data)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    converter = Converter(loaded, policy, settings, logprobs_of)
    live = None
    if client is not None:
        live = Live(client, server_model, loaded, sampling=request or {}, n=n, extra=extra_body)
        converter.policy = policy or live.model
        reader = None
    elif source == "jsonl":
        reader = columns.reader(**(columns_named or {}))
    else:
        reader = {"vllm": vllm, "sglang": sglang, "openai": openai}[source].generations

    header = {
        "source": source,
        "data": digest,
        "tokenizer": converter.fingerprint,
        "policy": policy,
        "columns": columns_named,
        "settings": settings,
        "logprobs_of": logprobs_of,
        "server": None if live is None else live.settings(),
    }
    journal = Journal(out, header, resume)

    def work(line: int, record: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        where = f"{data}:{line}"
        found = (
            live.rows(record, line, converter, where) if live is not None else _read(reader, record, converter, where)
        )
        return _entry(line, found), any(isinstance(item, Failed) and item.gone for item in found)

    with journal.open():
        again = journal.forget_rejected()
        resumed = len(journal.done)
        if live is not None:
            live.seen = any(journal.rows.values())
        if resumed or again:
            console.print(
                f"Going on from {journal.path.name}: {resumed} of {records} records are done"
                + (f", {again} that were set aside are tried again." if again else "."),
                markup=False,
            )
        todo = ((line, record) for line, record in read_jsonl(data, whole_text=False) if line not in journal.done)
        missing = 0
        with (
            progress_of("importing", records, "records", done=resumed, console=console) as advance,
            contextlib.closing(_done(todo, work, None if live is None else client, jobs)) as done,
        ):
            for entry, gone in done:
                if strict and entry["rejects"]:
                    raise DataError(f"{data}:{entry['record']}: {entry['rejects'][0]['reason']}")
                journal.add(entry)
                advance(1)
                missing = missing + 1 if gone else 0
                if missing >= GIVE_UP:
                    raise DataError(
                        f"{client.url}: no answer to {missing} rows one after another: "
                        f"{entry['rejects'][0]['reason']}. What was imported so far is in {journal.path}; the same "
                        "command goes on from there."
                    )
        if _digest(data) != digest:
            raise DataError(
                f"{data}: the file changed while it was being imported; nothing was written. Import it again."
            )
        found = _write(out, data, journal, console)
        facts = {
            "source": source,
            "data": str(data),
            "server": None if live is None else {"url": client.url, "model": live.model, "kind": live.kind},
            "records": records,
            "resumed": resumed,
            **found["files"],
        }
        result = report(found["counts"], facts)
        write_json(f"{out}{REPORT}", result)
        if live is None or not result["rejected"]:
            journal.remove()
    return result | {
        "report": f"{out}{REPORT}",
        "partial": str(journal.path) if journal.path.exists() else None,
        "seconds": time.monotonic() - began,
    }


def _check_settings(
    source: str,
    data: str | os.PathLike,
    out: Path,
    client: Client | None,
    logprobs_of: str | None,
    jobs: int,
    settings: dict[str, float] | None,
) -> None:
    if source not in SOURCES:
        raise DataError(f"--source must be one of {', '.join(SOURCES)}, got {source!r}")
    if client is not None and source != "openai":
        raise DataError(f"--url goes with --source openai, got {source}")
    if logprobs_of not in (None, *STAGES):
        raise DataError(f"--logprobs_of must be one of {', '.join(STAGES)}, got {logprobs_of!r}")
    if jobs < 1:
        raise DataError(f"--jobs must be at least 1, got {jobs}")
    if unknown := sorted(set(settings or {}) - set(KEYS)):
        raise DataError(f"sampling settings must be of {', '.join(KEYS)}, got {', '.join(unknown)}")
    if out.exists() and Path(data).exists() and os.path.samefile(data, out):
        raise DataError(f"{out}: out is the data itself, which holds more than scored rows do; give another out")
    for name in REJECTS, REPORT:
        check_output(f"{out}{name}")


def _look(data: str | os.PathLike) -> int:
    """How many records a file has; a line that is no JSON object is found here, before anything else."""
    count = sum(1 for _ in read_jsonl(data, whole_text=False))
    if not count:
        raise DataError(f"{data}: no rows in it")
    return count


def _digest(data: str | os.PathLike) -> str:
    with open(data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(reader: Callable, record: dict[str, Any], converter: Converter, where: str) -> list[Any]:
    found = []
    for item in read_all(reader(record)):
        try:
            found.append(item if isinstance(item, Reject) else converter.row(item, where))
        except Reject as reason:
            found.append(reason)
    return found or [Reject("the record has no responses")]


def _entry(line: int, found: list[Any]) -> dict[str, Any]:
    """What the side file keeps of a record; `found` is a row with its counts, or a Reject, for each response."""
    entry: dict[str, Any] = {"record": line, "rows": [], "rejects": [], "counts": {}}
    for choice, item in enumerate(found):
        if isinstance(item, Reject):
            entry["rejects"].append({"reason": str(item)} | ({"choice": choice} if len(found) > 1 else {}))
        else:
            row, counts = item
            entry["rows"].append(row)
            checks.add(entry["counts"], counts)
    return entry


def _done(todo: Iterator, work: Callable, client: Client | None, jobs: int) -> Iterator[Any]:
    """`work(*item)` of each, as it comes: one by one, or of `jobs` at once where a server is asked."""
    if client is None:
        for item in todo:
            yield work(*item)
        return
    with ThreadPoolExecutor(jobs) as pool:
        running: set[Future] = set()
        try:
            for item in todo:
                running.add(pool.submit(work, *item))
                if len(running) >= 2 * jobs:  # rows are not all read at once
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from _results(finished)
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from _results(finished)
        except BaseException:
            client.stop()  # or leaving the pool would wait for every answer
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _results(finished: set[Future]) -> Iterator[Any]:
    """What came, before an error that came with it ends the run."""
    for future in sorted(finished, key=lambda future: future.exception() is not None):
        yield future.result()


def _write(out: Path, data: str | os.PathLike, journal: Journal, console: Console) -> dict[str, Any]:
    """The scored file and the rejects, from the side file; and every record's counts joined."""
    rows, counts, rejects = sum(journal.rows.values()), {}, {}
    for entry in journal.entries():
        checks.add(counts, entry["counts"])
        if entry["rejects"]:
            rejects[entry["record"]] = entry["rejects"]
    aside = Path(f"{out}{REJECTS}")
    try:
        if rows:
            with atomic_writer(out) as written:
                for entry in journal.entries():
                    for row in entry["rows"]:
                        written.write(json.dumps(seal(row), ensure_ascii=False, allow_nan=False) + "\n")
        if rejects:
            write_jsonl(aside, _rejected(data, rejects))
        elif not is_stream(aside):
            aside.unlink(missing_ok=True)
    except OSError as error:
        kept = f"What was imported is kept in {journal.path}; the same command goes on from there."
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise write_error(out, cause, kept=kept) from error
    if not rows:
        console.print(f"No row is left to write: {out} is as it was.", style="yellow", markup=False)
    files = {
        "out": str(out) if rows else None,
        "written": rows,
        "rejected": sum(map(len, rejects.values())),
        "rejects": str(aside) if rejects else None,
    }
    return {"counts": counts, "files": files}


def _rejected(data: str | os.PathLike, rejects: dict[int, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for line, record in read_jsonl(data, whole_text=False):
        for reject in rejects.get(line, ()):
            yield {"line": line, **_writable(reject), "row": _writable(record)}


def _writable(value: Any) -> Any:
    """NaN, infinities and halves of surrogate pairs as words: a file of JSON cannot hold what was read from one."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, list) else value
