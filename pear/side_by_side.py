"""Jobs side by side, each in a process with one thread, with a progress bar for each."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pear.workers import Job, Outcome, Workers, cores


class Team:
    """Runs jobs in `workers` processes, or one after the other in this one if `workers` is 1 (see `pear.workers`).

    Args:
        workers: None for two, or one where there is a single core
        console: where the bars are drawn
    """

    def __init__(self, workers: int | None = None, console: Console | None = None):
        self._workers = Workers(min(2, cores()) if workers is None else workers)
        self.workers, self.console = self._workers.count, console or Console()

    def __enter__(self) -> "Team":
        self._workers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def run(self, jobs: dict[str, Job]) -> dict[str, Any]:
        """Results by name. The first error ends the call; jobs that have not started by then never do."""
        columns = [TextColumn("      {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
        columns += [TextColumn("left:"), TimeRemainingColumn()]
        shown = self.console.is_terminal  # into a file or a pipe, bars would be so many empty lines
        waiting = iter(jobs.items())
        results: dict[str, Any] = {}
        with Progress(*columns, transient=True, console=self.console, disable=not shown) as bars:
            tasks = {name: bars.add_task(name, total=1.0, start=False) for name in jobs}

            def take() -> tuple[str, Job] | None:
                name, job = next(waiting, (None, None))
                return None if job is None else (name, Job(_quietly, dict(job=job)))

            def ticked(name: str | None, share: float) -> None:
                if name is not None:
                    bars.start_task(tasks[name])
                    bars.update(tasks[name], completed=share)

            def finished(outcome: Outcome) -> None:
                bars.update(tasks[outcome.name], completed=1.0)
                results[outcome.name] = outcome.get()

            for error in self._workers.run(take, ticked, finished).values():
                raise error
        return {name: results[name] for name in jobs}


def _quietly(tick: Any, job: Job) -> Any:
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
