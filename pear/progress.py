"""How far long work is: a bar on a terminal, and elsewhere, as in a log file, a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between two lines


@contextlib.contextmanager
def progress(
    what: str, total: int, unit: str, *, done: int = 0, console: Console | None = None, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done. `done`: those of an earlier call. A quiet console shows nothing.

    Args:
        console: where to; None is stderr.
        transient: the bar goes when all is done.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or console.quiet:
        lines = _Lines(what, total, unit, done, console)
        yield lines.advance
        if not transient:
            lines.finish()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    last = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, *last, console=console, transient=transient) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, what: str, total: int, unit: str, done: int, console: Console):
        self.what, self.total, self.unit, self.console = what, total, unit, console
        self.before = self.done = self.printed = done
        self.began = self.latest = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.latest >= EVERY:
            self.print()

    def finish(self) -> None:
        """The last line, unless it is there already or nothing was to do."""
        if self.printed != self.done and self.done > self.before:
            self.print()

    def print(self) -> None:
        now = self.latest = time.monotonic()
        self.printed = self.done
        each = (now - self.began) / max(self.done - self.before, 1)
        left = each * max(self.total - self.done, 0)
        self.console.print(
            f"{self.what}: {self.done} of {self.total} {self.unit} ({self.done / max(self.total, 1):.0%}), "
            f"{_time(now - self.began)} so far, about {_time(left)} left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
