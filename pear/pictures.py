"""Pictures as files: equal figures are equal bytes, and several files are written together or not at all."""

import contextlib
import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib

from pear.io import WriteError, is_stream, write_error, write_stream

matplotlib.use("Agg")  # files only; there may be no display
from matplotlib import pyplot as plt  # noqa: E402


def png(figure: plt.Figure) -> bytes:
    """The figure as a PNG file's bytes; the figure is closed."""
    buffer = io.BytesIO()
    try:
        # Without the version of matplotlib in the file, equal pictures are equal files.
        figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
    return buffer.getvalue()


def save_figure(figure: plt.Figure, path: str | os.PathLike) -> None:
    """Write the figure as PNG, whole or not at all, and close it; the folder is made if missing.

    Raises:
        WriteError: the disk is full, or the folder cannot be written; an older file at `path` is as it was
    """
    write_whole({Path(path): png(figure)})


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write all the files or, if any cannot be written, none: no name changes hands before every byte is on the disk.

    A path that `is_stream` (a FIFO, a device) is not replaced but written into, after the others.

    Raises:
        WriteError: names the file that failed; older files are as they were, and folders made for new ones are gone
    """
    temporaries: dict[Path, Path] = {}
    made: list[Path] = []
    path = None
    try:
        for path, content in files.items():
            if is_stream(path):
                continue
            real = Path(os.path.realpath(path))  # follow a link, or the rename would replace the link itself
            if real.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))  # seen now, not at the rename
            made += [folder for folder in real.parents if not folder.exists()]
            real.parent.mkdir(parents=True, exist_ok=True)
            temporaries[real] = real.with_name(f".{real.name}.{os.getpid()}.tmp")
            with open(temporaries[real], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a full disk can show only here
        for path, temporary in temporaries.items():  # noqa: B007 (the error below names it)
            temporary.replace(path)
        made.clear()
        for path, content in files.items():
            if is_stream(path):  # last: what went into a FIFO cannot be taken back
                write_stream(path, [content])
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        for folder in made:  # from the innermost; one that is not empty stays
            with contextlib.suppress(OSError):
                folder.rmdir()
