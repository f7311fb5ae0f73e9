"""Files that grow while work goes on, and that the next call goes on from: each held by one process at a time."""

import contextlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from pear.io import DataError


@contextlib.contextmanager
def appending(path: Path, doing: str) -> Iterator[FileIO]:
    """The file, open to append and locked. Nothing waits in a buffer for a close that fails.

    Raises:
        DataError: another process has it, and is `doing` ("scoring") the very same.
    """
    with open(path, "ab", buffering=0) as file:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
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
