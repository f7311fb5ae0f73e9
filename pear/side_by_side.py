"""Jobs side by side, each in a process with one thread, with a progress bar for each."""

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MAX_JOBS = 16  # bars that one call can show
_shares: Any = None  # in a worker: how far each job is, 0 to 1


class Job(NamedTuple):
    function: Callable[..., Any]  # of a module's top level; called as function(tick, **arguments), tick(done, total)
    arguments: dict[str, Any]


class Team:
    """Runs jobs in `workers` processes, or one after the other in this one if `workers` is 1.

    Two processes of one thread each do more on two cores than one of two threads: the tensors of small models are too
    small to share out. And what a job computes is the same either way, since it has one thread both times.

    Args:
        workers: None for two, or one where there is a single core
        console: where the bars are drawn
    """

    def __init__(self, workers: int | None = None, console: Console | None = None):
        if workers is None:
            workers = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers, self.console = workers, console or Console()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Team":
        if self.workers > 1:
            context = multiprocessing.get_context("spawn")  # a fork of a process that has used threads may hang
            self._progress = context.Array("d", MAX_JOBS)
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start, initargs=(self._progress,))
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, jobs: dict[str, Job]) -> dict[str, Any]:
        """Results by name. The first error ends the call; jobs that have not started by then never do."""
        if len(jobs) > MAX_JOBS:
            raise ValueError(f"jobs: at most {MAX_JOBS} at a time, got {len(jobs)}")
        columns = [TextColumn("      {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
        columns += [TextColumn("left:"), TimeRemainingColumn()]
        shown = self.console.is_terminal  # into a file or a pipe, bars would be so many empty lines
        with Progress(*columns, transient=True, console=self.console, disable=not shown) as bars:
            tasks = {name: bars.add_task(name, total=1.0, start=False) for name in jobs}
            if self._pool is None:
                return {name: _run_here(job, bars, tasks[name]) for name, job in jobs.items()}
            return self._run_in_pool(jobs, bars, tasks)

    def _run_in_pool(self, jobs: dict[str, Job], bars: Progress, tasks: dict[str, Any]) -> dict[str, Any]:
        futures: dict[str, Future] = {}
        for slot, (name, job) in enumerate(jobs.items()):
            self._progress[slot] = 0.0
            futures[name] = self._pool.submit(_run_there, slot, job)
        try:
            while True:
                for slot, name in enumerate(jobs):
                    if self._progress[slot] > 0 and not bars.tasks[slot].started:
                        bars.start_task(tasks[name])
                    bars.update(tasks[name], completed=self._progress[slot])
                if (failed := next((f for f in futures.values() if f.done() and f.exception()), None)) is not None:
                    failed.result()
                if all(future.done() for future in futures.values()):
                    return {name: future.result() for name, future in futures.items()}
                time.sleep(0.1)
        finally:
            for future in futures.values():
                future.cancel()


def _run_here(job: Job, bars: Progress, task: Any) -> Any:
    bars.start_task(task)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet():
            return job.function(lambda done, total: bars.update(task, completed=done / total), **job.arguments)
    finally:
        torch.set_num_threads(threads)
        bars.update(task, completed=1.0)


def _start(shares: Any) -> None:
    global _shares
    _shares = shares
    torch.set_num_threads(1)


def _run_there(slot: int, job: Job) -> Any:
    def tick(done: int, total: int) -> None:
        _shares[slot] = done / total

    with quiet():
        return job.function(tick, **job.arguments)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the chatter and the bars of transformers and datasets; errors still show."""
    import datasets
    import transformers

    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
        datasets.enable_progress_bars()
