"""Units of work that need each other: each has a folder, is done once, and is kept until something it rests on changes.

A unit's folder is filled under `out/.running` and moved to `out/jobs/NAME` when it is complete, by the one process that
holds the lock on `out`. So a folder under `out/jobs` is whole, whenever and however a run is ended.
"""

import contextlib
import copy
import graphlib
import hashlib
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pear.appending import output_folder
from pear.folders import sync_files
from pear.io import DISK_FULL, DataError, WriteError, disk_error, write_error, write_json
from pear.side_by_side import quiet
from pear.workers import Job, Outcome, Workers, cores

RECORD = "job.json"  # in each unit's folder
NAME = re.compile(r"[^/.\x00-\x1f][^/\x00-\x1f]*(/[^/.\x00-\x1f][^/\x00-\x1f]*)*")  # a path without hidden folders


class UnitError(RuntimeError):
    """A unit failed, by an error that is the cause of this one; the message names the unit."""


@dataclass(frozen=True)
class Unit:
    """A piece of work whose result depends on its arguments and on the folders of the units it needs.

    `function(tick, folder, needs, **arguments)` fills `folder`, reports by `tick(done, total)` and returns what is to
    stand in job.json: JSON, or None. `needs` are the folders of the units it needs, by name.
    """

    name: str  # "rl/pear-token/3": its folder below out/jobs too
    function: Callable[..., dict | None]  # of a module's top level
    arguments: dict[str, Any] = field(default_factory=dict)  # JSON or dataclasses of it; picklable
    needs: tuple[str, ...] = ()  # names of other units
    phase: str = ""  # units of one phase take about as long
    labels: dict[str, Any] = field(default_factory=dict)  # JSON; recorded in job.json


def run_units(
    units: Sequence[Unit], out: str | Path, *, workers: int | None = None, code: str, console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Do what has not been done, in the given order, each unit as soon as what it needs is whole.

    A unit is kept if its folder carries the key that it has now: a hash of its name, function, arguments, the keys of
    what it needs, and `code`. Units start with random numbers seeded by their name and compute with one thread, so
    `workers` changes no result.

    Args:
        out: a folder, made if missing; units are below `out/jobs`. One run at a time.
        workers: processes; 1 for none beside this one, None for one a core
        code: a hash of all else that results depend on, such as our files and the versions of libraries
        console: where progress is shown: bars on a terminal, else a line a finished unit

    Returns:
        By unit, what its job.json holds: name, phase, labels, key, needs, seconds and result.

    Raises:
        ValueError: a name twice, a need that is no unit, a cycle, arguments that are no JSON, fewer than one worker
        DataError: `out` is a file, another run is at work in it, or a unit raised it
        WriteError: the disk is full, or `out` cannot be written
        UnitError: another error of a unit. In all three cases units that were running have been finished and kept.
    """
    keys = unit_keys(units, code)
    team = Workers(cores() if workers is None else workers)
    out = Path(out)
    with output_folder(out):
        running = out / ".running"
        shutil.rmtree(running, ignore_errors=True)  # of a run that was killed
        records = {unit.name: record for unit in units if (record := _kept(unit, out, keys[unit.name])) is not None}
        if len(records) < len(units):
            try:
                with _disk(running):
                    running.mkdir(exist_ok=True)
                    # of this run alone: what a dying process of a killed one may still write is elsewhere
                    temporary = Path(tempfile.mkdtemp(dir=running))
                _run(units, out, temporary, keys, records, team, console or Console())
            finally:
                shutil.rmtree(running, ignore_errors=True)
    return {unit.name: records[unit.name] for unit in units}


def _run(
    units: Sequence[Unit],
    out: Path,
    temporary: Path,
    keys: Mapping[str, str],
    records: dict[str, dict[str, Any]],
    team: Workers,
    console: Console,
) -> None:
    """Do the units that `records` lacks, and add them to it."""
    by_name = {unit.name: unit for unit in units}
    waiting = {unit.name: unit for unit in units if unit.name not in records}
    folders = {unit.name: temporary / str(i) for i, unit in enumerate(units)}  # short: names may be long
    display = _Display(console, by_name, records, team.count)

    def take() -> tuple[str, Job] | None:
        ready = next((unit for unit in waiting.values() if all(need in records for need in unit.needs)), None)
        if ready is None:
            return None
        del waiting[ready.name]
        needs = {need: out / "jobs" / need for need in ready.needs}
        return ready.name, Job(_do, dict(unit=ready, folder=folders[ready.name], needs=needs))

    def finished(outcome: Outcome) -> None:
        name = outcome.name
        try:
            result, seconds = outcome.get()
            record = {"name": name, "phase": by_name[name].phase, "labels": by_name[name].labels, "key": keys[name]}
            record |= {"needs": list(by_name[name].needs), "seconds": round(seconds, 3), "result": result}
            _keep(folders[name], out / "jobs" / name, record)
        except Exception as error:
            display.failed(name, error)
            raise
        records[name] = json.loads(json.dumps(record))  # as it will be read
        display.finished(name)

    with team, display:
        errors = team.run(take, display.ticked, finished)
    if errors:
        raise _named(errors, out) from next(iter(errors.values()))


def _named(errors: Mapping[str, Exception], out: Path) -> Exception:
    """The first error, in words that name its unit, and in its class if it is one that the command line shows."""
    (name, error), *others = errors.items()
    more = f" Failed too: {', '.join(other for other, _ in others)}." if others else ""
    more += " Finished jobs are kept: once this is repaired, the same command goes on from there."
    cause = disk_error(error)
    if cause is not None and cause.errno in DISK_FULL and not isinstance(error, WriteError):
        error = write_error(out / "jobs" / name, cause)
    kind = "" if isinstance(error, DataError | WriteError) else f"{type(error).__name__}: "
    said = (error.strerror if isinstance(error, WriteError) else None) or str(error)
    text = f"{name}: {kind}{said.rstrip('.')}.{more}"
    if isinstance(error, WriteError):
        return WriteError(error.errno, text)
    return DataError(text) if isinstance(error, DataError) else UnitError(text)


def _do(tick: Callable[[int, int], None], unit: Unit, folder: Path, needs: dict[str, Path]) -> tuple[Any, float]:
    """In a worker: a unit's result, and how many seconds it took."""
    seed = int(hashlib.sha256(unit.name.encode()).hexdigest()[:8], 16)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with quiet():
        began = time.monotonic()
        folder.mkdir()
        # a copy, as another process would have: units may share arguments
        result = unit.function(tick, folder, needs, **copy.deepcopy(unit.arguments))
        return result, time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------------------
# Names and keys


def unit_keys(units: Sequence[Unit], code: str) -> dict[str, str]:
    """Each unit's key by name (64 hex digits); see `run_units`."""
    by_name: dict[str, Unit] = {}
    for unit in units:
        if not NAME.fullmatch(unit.name):
            raise ValueError(f"unit {unit.name!r}: a name must be a path of plain folders, such as rl/sft/3")
        if unit.name in by_name:
            raise ValueError(f"unit {unit.name!r} is there twice; give each a name of its own")
        by_name[unit.name] = unit
    for unit in units:
        for folder in map(str, PurePosixPath(unit.name).parents):
            if folder in by_name:
                raise ValueError(f"unit {unit.name!r} would be inside the folder of {folder!r}; rename one of them")
        for need in unit.needs:
            if need not in by_name:
                raise ValueError(f"unit {unit.name!r} needs {need!r}, which is no unit")
    try:
        order = list(graphlib.TopologicalSorter({unit.name: unit.needs for unit in units}).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"units need each other in a circle: {' <- '.join(error.args[1])}") from None
    keys: dict[str, str] = {}
    for name in order:
        unit = by_name[name]
        function = getattr(unit.function, "__qualname__", "<")
        if "<" in function:
            raise ValueError(f"unit {name!r}: its function must be of a module's top level, got {unit.function!r}")
        content = [name, f"{unit.function.__module__}.{function}", unit.arguments, code]
        content.append({need: keys[need] for need in unit.needs})
        try:
            json.dumps(unit.labels, allow_nan=False)
            text = json.dumps(content, sort_keys=True, allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"unit {name!r}: arguments and labels must be JSON or dataclasses of it: {error}"
            ) from None
        keys[name] = hashlib.sha256(text.encode()).hexdigest()
    return keys


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"got {value!r:.100} of type {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _kept(unit: Unit, out: Path, key: str) -> dict[str, Any] | None:
    """The unit's record if its folder is whole and has this key."""
    path = out / "jobs" / unit.name / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    names = {"phase": unit.phase, "labels": json.loads(json.dumps(unit.labels))}
    if any(record.get(name) != value for name, value in names.items()):  # no part of the key: nothing depends on them
        record |= names
        write_json(path, record)
    return record


def _keep(temporary: Path, folder: Path, record: dict[str, Any]) -> None:
    """Move a complete folder to its place; one that was there leaves it whole, so that no half of it can be read."""
    try:
        write_json(temporary / RECORD, record)
    except (TypeError, ValueError) as error:
        raise TypeError(f"its result must be JSON, with finite numbers: {error}") from None
    with _disk(folder):
        sync_files(temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        old = temporary.with_name(f"{temporary.name}.old")
        if folder.exists():
            folder.replace(old)
        temporary.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error) from error


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def seconds_left(
    todo: Iterable[tuple[str, float]], finished: Iterable[tuple[str, float]], workers: int
) -> float | None:
    """An estimate, by the mean of finished units of the same phase (of all, for a phase without any).

    Args:
        todo: phase and seconds spent so far of each unit that is not finished
        finished: phase and seconds of those that are; if there are none, the estimate is None

    Returns:
        The sum of what is left over the workers, but no less than the longest unit.
    """
    times: dict[str, list[float]] = {}
    for phase, seconds in finished:
        times.setdefault(phase, []).append(seconds)
    if not times:
        return None
    total = [seconds for each in times.values() for seconds in each]
    left = [max(0.0, np.mean(times.get(phase, total)) - spent) for phase, spent in todo]
    return float(max(sum(left) / workers, max(left, default=0.0)))


def left_text(seconds: float | None) -> str:
    if seconds is None:
        return "? left"
    if seconds < 100:
        return f"about {seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes < 100 else f"about {minutes // 60} h {minutes % 60:02d} min left"


class _Display:
    """Bars on a terminal: one for all and one for each running unit. Elsewhere a line for each finished unit."""

    def __init__(
        self, console: Console, units: Mapping[str, Unit], records: Mapping[str, Mapping[str, Any]], workers: int
    ):
        self.console, self.units, self.records, self.workers = console, units, records, workers
        self.started: dict[str, float] = {}  # running units: when
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
        columns += [TimeElapsedColumn(), TextColumn("{task.fields[note]}")]
        self.bars = Progress(*columns, transient=True, console=console, disable=not console.is_terminal)
        self.all = self.bars.add_task("", total=len(units), completed=len(records), note="")
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Display":
        if self.records:
            self._print(f"{len(self.records)} of {len(self.units)} jobs kept from an earlier run")
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def ticked(self, name: str | None, share: float) -> None:
        if name is not None:
            if name not in self.started:
                self.started[name] = time.monotonic()
                self.tasks[name] = self.bars.add_task(f"  {name}", total=1.0, note="")
            self.bars.update(self.tasks[name], completed=share)
        self._update()

    def failed(self, name: str, error: Exception) -> None:
        self._remove(name)
        text = f"{name} failed: {type(error).__name__}: {error}"
        if self.started:
            text += f"\nwaiting for the end of {', '.join(self.started)}; nothing new starts"
        self._print(text, style="red")

    def _remove(self, name: str) -> None:
        del self.started[name]
        self.bars.remove_task(self.tasks.pop(name))

    def finished(self, name: str) -> None:
        self._remove(name)
        self._update()
        if not self.console.is_terminal:
            width = len(str(len(self.units)))
            head = f"[{len(self.records):{width}}/{len(self.units)}] {name}  {self.records[name]['seconds']:.0f} s"
            self._print(f"{head}   {self._left()}")

    def _update(self) -> None:
        if self.console.is_terminal:
            done = f"{len(self.records)} of {len(self.units)} jobs"
            self.bars.update(self.all, description=done, completed=len(self.records), note=self._left())

    def _left(self) -> str:
        now = time.monotonic()
        todo = [
            (unit.phase, now - self.started.get(name, now))
            for name, unit in self.units.items()
            if name not in self.records
        ]
        finished = [(self.units[name].phase, record["seconds"]) for name, record in self.records.items()]
        return left_text(seconds_left(todo, finished, self.workers))

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
