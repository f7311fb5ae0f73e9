"""Files that one process at a time has: those that grow while work goes on, and the outputs of commands."""

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import ParamSpec, TypeVar

from pear.io import DataError, check_folder, check_output, is_stream, write_error

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def appending(path: Path, doing: str) -> Iterator[FileIO]:
    """The file, open to append and locked. Nothing waits in a buffer for a close that fails.

    Raises:
        DataError: another process has it, and is `doing` ("scoring") the very same.
    """
    with open(path, "ab", buffering=0) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{path}: another process is {doing} this very data now; wait for it, or stop it"
                ) from None
        yield file


def write_all(file: FileIO, data: bytes) -> None:
    """Once this returns, a kill cannot take the bytes back."""
    rest = memoryview(data)
    while rest:  # a call may write less than all, as on a disk that is nearly full
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def output_folder(folder: str | os.PathLike, name: str = "out", held: bool = True) -> Iterator[None]:
    """Hold an output folder, made if missing, for the length of the block: nobody else who asks so gets it.

    The lock is the system's, on the file .lock in the folder, so it ends with the process, whatever ends it. If nothing
    was written in the block, a folder that was made for it goes again.

    Args:
        name: of the argument, for messages
        held: False only checks that the folder can be written, for the processes of a launch that are not the first

    Raises:
        DataError: it is a file, or another process holds it
        WriteError: it cannot be written
    """
    if not os.fspath(folder):
        raise DataError(f"{name} is empty: give a folder to write to")
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{name}: {folder} is a file; give a folder to write to")
    except OSError as error:  # a name that is too long, say
        raise write_error(folder, error) from error
    check_folder(folder)
    if not held:
        yield
        return
    busy = f"{name}: another run is at work in {folder}; wait for its end, or give another folder"
    with _locked(folder / ".lock", busy):
        yield


@contextlib.contextmanager
def output_file(
    path: str | os.PathLike | None, name: str = "out", streams: bool = True, held: bool = True
) -> Iterator[None]:
    """`output_folder` for a file that is written at the end of the work; None is no file.

    Raises:
        DataError, WriteError: as `pear.io.check_output`; another process is about to write this file
    """
    if path is None:
        yield
        return
    check_output(path, name, streams=streams)
    if is_stream(path) or not held:
        yield
        return
    real = Path(os.path.realpath(path))
    busy = f"{name}: another process is about to write {path}; wait for its end, or give another file"
    with _locked(real.with_name(f".{real.name}.lock"), busy):
        yield


def holding(hold: Callable, argument: str, **options: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: while the function runs, `argument` is held by `hold`, `output_file` or `output_folder`.

    Of several processes that were launched together, the first holds it for all.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def held(*args: P.args, **kwargs: P.kwargs) -> R:
            output = signature.bind(*args, **kwargs).arguments.get(argument)
            with hold(output, held=is_main(), **options):
                return function(*args, **kwargs)

        return held

    return decorate


def is_main() -> bool:
    """Whether this process is the first of those that a launcher started; a process alone is."""
    return int(os.environ.get("RANK") or 0) == 0


@contextlib.contextmanager
def _locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` and take it away at the end; DataError(busy) where another process holds it."""
    if fcntl is None:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with _lock(path, busy):
            yield
    finally:
        for folder in made:  # from the innermost; one that is not empty stays
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _lock(path: Path, busy: str) -> Iterator[None]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
        except OSError as error:
            raise write_error(path.parent, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(busy) from None
            except OSError as error:  # a file system that has no locks
                logger.warning(f"{path} cannot be locked ({error.strerror}): start no second run with this output")
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                ours = False
            if ours:  # else its holder took the file away meanwhile, and the next one counts
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
