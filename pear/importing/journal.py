"""The side file of an import: a line for each record that is done, appended as it comes: a kill loses nothing."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from pear.appending import appending, write_all
from pear.io import DataError, WriteError, write_error


class Journal:
    """`<out>.<hash of header>.partial`: a header line, then an entry a line; of two for one record the later counts.

    An entry is `{"record": number, "rows": [scored row without seal, ...], "rejects": [{"reason": ...}, ...], "counts":
    {...}}`. In memory is where each line starts, and no row.
    """

    def __init__(self, out: Path, header: dict[str, Any], resume: bool):
        self.header = header
        self.key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        self.path = out.with_name(f"{out.name}.{self.key[:12]}.partial")
        self.done: dict[int, int] = {}  # record -> bytes before its line
        self.rows: dict[int, int] = {}  # record -> its rows
        self.rejected: dict[int, int] = {}  # record -> its rejects
        self._resume = resume
        self._file: FileIO | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Take over what an earlier call left, and hold the file: only one process at a time has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with appending(self.path, "importing") as file:
                if not self._resume:
                    file.truncate(0)
                self._file, end = file, self._load()
                file.truncate(end)
                if not end:
                    self._write(self.header)
                yield
        except WriteError:
            raise
        except OSError as error:
            if error.filename not in (None, str(self.path)):
                raise
            kept = f"What was imported so far is in {self.path}; the same command goes on from there."
            raise write_error(self.path, error, kept=kept) from error
        finally:
            self._file = None

    def _load(self) -> int:
        """Read which records are done; the end of the last whole line, behind which a kill tore one."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if number == 1:
                        if entry != self.header:
                            raise ValueError("the header is of another import")
                    else:
                        self._note(entry, end)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise DataError(
                        f"{self.path}:{number}: damaged ({error}). Delete the file, or turn resume off, to start anew."
                    ) from error
                end += len(line)
        return end

    def _write(self, value: dict[str, Any]) -> int:
        """A line at the end; where it starts."""
        at = self._file.seek(0, os.SEEK_END)
        write_all(self._file, json.dumps(value, allow_nan=False).encode() + b"\n")
        return at

    def _note(self, entry: dict[str, Any], at: int) -> None:
        number = entry["record"]
        self.done[number] = at
        self.rows[number] = len(entry["rows"])
        self.rejected[number] = len(entry["rejects"])

    def add(self, entry: dict[str, Any]) -> None:
        self._note(entry, self._write(entry))

    def forget_rejected(self) -> int:
        """Records with a reject count as not done, and are tried again; how many."""
        again = [number for number, count in self.rejected.items() if count]
        for number in again:
            del self.done[number], self.rows[number], self.rejected[number]
        return len(again)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every record's entry, in the order of the records."""
        with open(self.path, "rb") as file:
            for number in sorted(self.done):
                file.seek(self.done[number])
                yield json.loads(file.readline())

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
