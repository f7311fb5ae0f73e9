"""What has been measured so far: a file per machine, versions and source, written anew and whole after every cell.

A run that is stopped, killed or out of time loses the cell it was in and no other, and the next one goes on from there.
"""

import json
import math
import os
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.cells import Cell


class Store:
    def __init__(self, folder: Path, facts: dict[str, str | int]):
        self.facts = facts
        self.path = folder / f"{machine.stamp(facts)}.json"
        self.running = folder / "running.json"  # the cell that is being measured, for who watches from outside
        folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(self.path.read_text()) if self.path.exists() else {"machine": facts, "rows": {}}
        self.rows: dict[str, dict] = known["rows"]

    def done(self, cell: Cell) -> bool:
        """Whether there is a result, be it an error."""
        return str(cell) in self.rows

    def forget_errors(self) -> None:
        self.rows = {name: row for name, row in self.rows.items() if "error" not in row}
        write_rows(self.path, self.facts, self.rows)

    def start(self, cell: Cell) -> None:
        write_text_whole(self.running, json.dumps({"cell": cell._asdict(), "since": time.time()}))

    def finish(self, cell: Cell, row: dict) -> None:
        """Keeps a row; floats that are no numbers become None, which JSON has."""
        about = {"question": cell.question, "case": cell.case, "peer": cell.peer, "turn": cell.turn}
        self.rows[str(cell)] = {**about, **plain(row), "commit": self.facts["commit"]}
        write_rows(self.path, self.facts, self.rows)
        self.running.unlink(missing_ok=True)

    def interrupted(self) -> tuple[Cell, float] | None:
        """The cell that was started and not finished, and when."""
        try:
            found = json.loads(self.running.read_text())
        except FileNotFoundError:
            return None
        return Cell(**found["cell"]), found["since"]


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, facts: dict, rows: dict[str, dict]) -> None:
    """As JSON, a line a row."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row, allow_nan=False)}" for name, row in rows.items())
    write_text_whole(path, f'{{"machine": {json.dumps(facts, indent=1)},\n"rows": {{\n{lines}\n}}}}\n')


def write_text_whole(path: Path, text: str) -> None:
    """The whole file or, whatever happens, what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
