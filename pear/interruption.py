"""Ctrl-C and SIGTERM end a command with a sentence on how to go on, the shell's exit status, and no traceback."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import typer

from pear.shown import many_lines

RESUME = "--resume_from_checkpoint"
KEPT = {  # what an interrupted command leaves to go on from
    "score": "What was scored is kept: the same command goes on from there",
    "import": "What was imported is kept: the same command goes on from there",
    "demo": "Finished parts are kept: the same command goes on from there",
    "replicate": "Finished jobs are kept: the same command goes on from there",
}
NOTHING = "Nothing was written: the same command starts at the beginning"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception, so that whatever cleans up after Ctrl-C does so here too."""


@contextlib.contextmanager
def ends_in_words(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """For the length of a command of `pear`, given with these arguments.

    Raises:
        typer.Exit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    own = os.getpid()

    def terminate(number: int, frame: object) -> None:
        if os.getpid() != own:  # a process that was forked from this one: as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        by_signal = isinstance(error, Terminated)
        if int(os.environ.get("RANK", 0)) == 0:
            how = "stopped by SIGTERM" if by_signal else "interrupted"
            start = "\n" if command in ("sft", "rl") else ""  # behind the trainer's bar
            print(start + many_lines(f"{how}{in_words(command, arguments, error)}"), file=sys.stderr)
        raise typer.Exit(128 + (signal.SIGTERM if by_signal else signal.SIGINT)) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def in_words(command: str, arguments: Sequence[str], error: KeyboardInterrupt) -> str:
    """The rest of the sentence: where the command was, what is kept, what to run."""
    same = command_line(command, arguments)
    if command not in ("sft", "rl"):
        return f". {KEPT.get(command, NOTHING)}:\n  {same}"
    again = command_line(command, with_resume(arguments))
    progress = getattr(error, "progress", None)  # of pear.run_log
    if progress is None:
        return f" outside of training. To go on from the newest checkpoint, if there is one:\n  {again}"
    if not error.can_resume:
        return f" {progress} (save_steps says when one is written). To start at the beginning:\n  {same}"
    return f" {progress}. To go on from there:\n  {again}"


def command_line(command: str, arguments: Sequence[str]) -> str:
    start = "accelerate launch -m pear" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "pear"
    return f"{start} {command} {shlex.join(arguments)}".rstrip()


def with_resume(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--resume_from_checkpoint true`, and no other value of it."""
    found: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name = "--" + argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if name != RESUME:
            found.append(argument)
        elif "=" not in argument and left and not left[0].startswith("--"):
            left.pop(0)
    return [*found, RESUME, "true"]
