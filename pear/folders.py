"""Folders that appear under their name when they are complete, and never otherwise."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pear.io import disk_error, write_error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its name when the block ends well; what was there before goes then.

    One process at a time may make a folder: the temporary one beside it, `.NAME.tmp`, is the same for all.

    Raises:
        WriteError: the disk is full, or the folder cannot be written; an older folder is as it was
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except Exception as error:
        if (cause := disk_error(error)) is None:
            raise
        raise write_error(folder, cause) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Push all files in `folder` to the disk, so that not even a crash of the system leaves one half written."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
