"""Long work shows how far it is: a bar on a terminal, lines with an estimate elsewhere, nothing on a quiet console."""

import io

from rich.console import Console

import pear.progress
from pear.progress import progress


def shown(monkeypatch, seconds: float, **console) -> str:
    """100 rows of which 20 were done before, 10 at a time, each time after `seconds`."""
    now = [0.0]
    monkeypatch.setattr(pear.progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with progress("scoring", 100, "rows", done=20, console=Console(file=file, width=100, **console)) as advance:
        for _ in range(8):
            now[0] += seconds
            advance(10)
    return file.getvalue()


def test_lines_in_a_file(monkeypatch):
    lines = shown(monkeypatch, 20.0).splitlines()
    assert lines[0] == "scoring: 40 of 100 rows (40%), 0:00:40 so far, about 0:02:00 left"
    assert [line.split()[1] for line in lines] == ["40", "60", "80", "100"]  # not more than one in 30 s
    assert len(shown(monkeypatch, 400.0).splitlines()) == 8
    assert shown(monkeypatch, 1.0) == "scoring: 100 of 100 rows (100%), 0:00:08 so far, about 0:00:00 left\n"


def test_a_bar_on_a_terminal_and_nothing_where_it_is_quiet(monkeypatch):
    assert "100/100" in shown(monkeypatch, 20.0, force_terminal=True)
    assert shown(monkeypatch, 20.0, quiet=True) == ""
