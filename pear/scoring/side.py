"""What has been scored, kept beside `out` until all is: an append-only file of each process, `<out>.<key>.<n>.partial`.

The key is a hash of all that the log-probs depend on, so whoever comes after a kill with the same data, model and
settings finds them, whatever the number of processes. A file is a header line, then a line a row, batch by batch; the
last line of a batch says so. A batch that a kill tore is cut off and scored again whole, so that every row is scored in
the batch that it would have been in: the log-probs come out the same to the last bit. Lines with the bytes of each
row's tokens (`behavior_spans`) follow, by whichever process made them.

In memory is only where each row's line starts; the numbers, bytes of arrays in base64, are read back from there.
"""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pear.appending import appending, write_all
from pear.io import TOP_K_COLUMNS, DataError, WriteError, write_error
from pear.scoring.batches import Scores
from pear.scoring.processes import Processes
from pear.scoring.rows import Row

_DTYPES = dict(zip(("logprobs", *TOP_K_COLUMNS), ("<f4", "<i4", "<f4"), strict=True))  # the same on every machine


class SideFiles:
    """The files of one policy's rows; this process appends to one of them, all are read."""

    def __init__(self, out: Path, header: dict[str, Any], rows: Iterable[Row], processes: Processes):
        self.header = header
        self.key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
        self._folder, self._stem = out.parent, f"{out.name}.{self.key}."
        self._processes = processes
        self._tokens = {row.line: int(row.mask.sum()) for row in rows}
        self.path = self._path(processes.rank)
        # line of the data -> whose file, bytes before its line there
        self._places: dict[int, tuple[int, int]] = {}
        self._spans: dict[int, tuple[int, int]] = {}
        self._file: FileIO

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._stem}{number}.partial"

    def _existing(self) -> list[int]:
        names = [path.name for path in self._folder.iterdir() if path.name.startswith(self._stem)]
        middles = [name.removeprefix(self._stem).removesuffix(".partial") for name in names]
        return sorted(int(middle) for middle in middles if middle.isdecimal() and self._path(int(middle)).exists())

    def __contains__(self, line: int) -> bool:
        return line in self._places

    def __len__(self) -> int:
        return len(self._places)

    # ---- opening

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """Take over what earlier calls have finished, unless not `resume`, and hold this process's file for `append`.

        Raises:
            DataError: another run is at work on them; a file is damaged.
            WriteError: the disk is full.
        """
        with contextlib.ExitStack() as held:
            with self._processes.together(), self._told():
                if self._processes.main:
                    self._hold(held)
                    self._tidy(resume)
                    self._begin()
            with self._processes.together(), self._told():
                if not self._processes.main:
                    self._hold(held)
                    self._begin()
            with self._processes.together(), self._told():
                self.read()
            yield

    def _hold(self, held: contextlib.ExitStack) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = held.enter_context(appending(self.path, "scoring"))

    def _begin(self) -> None:
        if self.path.stat().st_size == 0:
            self._write(json.dumps(self.header).encode() + b"\n")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (DataError, WriteError):
            raise
        except OSError as error:
            kept = f"Rows scored so far are in {self._stem}*.partial there; the same command goes on from them."
            raise write_error(self.path, error, kept=kept) from error

    def _tidy(self, resume: bool) -> None:
        """Cut off what a kill tore, of all files, as nobody else is at work on them; the main process does it."""
        for number in self._existing():
            path = self._path(number)
            with contextlib.nullcontext(self._file) if path == self.path else appending(path, "scoring") as file:
                file.truncate(self._whole(path) if resume else 0)
            if path != self.path and path.stat().st_size == 0:
                path.unlink()

    def _whole(self, path: Path) -> int:
        """Bytes up to the end of the last whole batch."""
        end = at = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                at += len(line)
                if number == 1 or line.endswith(b'"last": true}\n'):
                    end = at
        return end

    # ---- reading

    def read(self) -> None:
        """Find the rows in all files, again."""
        self._places.clear()
        self._spans.clear()
        for number in self._existing():
            at = 0
            with open(self._path(number), "rb") as file:
                for n, text in enumerate(file, start=1):
                    try:
                        if n > 1:
                            line, found = self._parse(text)
                            (self._places if isinstance(found, Scores) else self._spans)[line] = number, at
                        elif json.loads(text) != self.header:
                            raise ValueError("not the header of this data, model and settings")
                    except (ValueError, KeyError, TypeError, RecursionError) as error:
                        raise DataError(
                            f"{self._path(number)}:{n}: damaged ({error}). Delete the file, or turn resume off, to "
                            "start anew."
                        ) from error
                    at += len(text)

    def _parse(self, text: bytes) -> tuple[int, "Scores | SpansOf"]:
        record = json.loads(text)
        line, arrays = record["line"], []
        if line not in self._tokens:
            raise ValueError(f"no row of this run is at line {line} of the data")
        if "spans" in record:
            return line, SpansOf(record["text"], record["spans"])
        for key in _DTYPES if "top_k" in self.header else ("logprobs",):
            array = np.frombuffer(base64.b64decode(record[key], validate=True), _DTYPES[key])
            if key in TOP_K_COLUMNS:
                array = array.reshape(-1, self.header["top_k"])
            if len(array) != self._tokens[line]:
                raise ValueError(f"`{key}` of {len(array)} tokens for line {line}, which has {self._tokens[line]}")
            arrays.append(array)
        return line, Scores(*arrays)

    @contextlib.contextmanager
    def reader(self) -> Iterator["Reader"]:
        """The scores of any row, once all processes are done."""
        self.read()
        if missing := self._tokens.keys() - self._places.keys():
            raise DataError(
                f"{len(missing)} rows have no scores in {self._stem}*.partial (the first is of line {min(missing)}): "
                "do all processes see the folder of `out`? The same command goes on from what is there."
            )
        with contextlib.ExitStack() as stack:
            yield Reader(self, {n: stack.enter_context(open(self._path(n), "rb")) for n in self._existing()})

    # ---- writing

    def append(self, rows: Sequence[Row], scores: Sequence[Scores]) -> None:
        """Keep a batch that is scored; once this returns, a kill cannot take it back.

        Raises:
            WriteError: the disk is full; what was appended before stays.
        """
        lines = []
        for row, values in zip(rows, scores, strict=True):
            record: dict[str, Any] = {"line": row.line}
            for (key, dtype), array in zip(_DTYPES.items(), values, strict=True):
                if array is not None:
                    record[key] = base64.b64encode(array.astype(dtype).tobytes()).decode()
            if row is rows[-1]:
                record["last"] = True
            lines.append(json.dumps(record).encode() + b"\n")
        with self._told():
            self._write(b"".join(lines))

    def _write(self, data: bytes) -> None:
        write_all(self._file, data)

    def without_spans(self) -> list[int]:
        """Lines whose spans nobody has made before this call, in order; the same in every process."""
        return sorted(self._tokens.keys() - self._spans.keys())

    def append_spans(self, found: Mapping[int, "SpansOf"]) -> None:
        """Keep the spans of these lines.

        Raises:
            WriteError: the disk is full.
        """
        records = [{"line": line, "text": spans.text, "spans": spans.spans} for line, spans in found.items()]
        if records:
            records[-1]["last"] = True
            with self._told():
                self._write(b"".join(json.dumps(record).encode() + b"\n" for record in records))

    def remove(self) -> None:
        for number in self._existing():
            self._path(number).unlink()


class SpansOf(NamedTuple):
    text: str  # a hash of the row that they were made of
    spans: dict[str, Any]


class Reader:
    """What is known of a line of the data, from open side files."""

    def __init__(self, side: SideFiles, files: dict[int, BinaryIO]):
        self._side, self._files = side, files

    def scores(self, line: int) -> Scores:
        return self._at(*self._side._places[line])

    def spans(self, line: int) -> SpansOf | None:
        return self._at(*self._side._spans[line]) if line in self._side._spans else None

    def _at(self, number: int, at: int) -> Any:
        file = self._files[number]
        file.seek(at)
        return self._side._parse(file.readline())[1]
