"""Nothing that data, a file's name or a server says controls the terminal."""

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import pear.shown
from pear.cli import app
from pear.shown import install, many_lines, one_line, visible

# title, clear screen, one-byte CSI, direction marks and isolates, line separators, a carriage return, half of a pair
EVIL = "\x1b]0;t\x07\x1b[2J\x9b31m\u202e\u2066\u200f\u061c\u2028\u0085\rx\ud800"
CODES = [character for character in EVIL if not character.isalnum() and character not in "];["]
SIGNS = "␛]0;t␇␛[2J⟨U+009B⟩31m⟨U+202E⟩⟨U+2066⟩⟨U+200F⟩⟨U+061C⟩⟨U+2028⟩⟨U+0085⟩␍x⟨U+D800⟩"


def test_signs_stand_for_what_controls_a_terminal():
    assert visible(EVIL) == SIGNS
    assert one_line(f"a\n  error: {EVIL}\n") == f"a error: {SIGNS}"  # no line of its own is forged
    assert many_lines(f"a\n\t{EVIL}") == f"a\n\t{SIGNS}"
    assert visible("naïve 👨\u200d👩 日本語") == "naïve 👨\u200d👩 日本語"


@pytest.fixture
def installed(monkeypatch):
    """`install`, and afterwards everything as it was."""
    monkeypatch.setattr(Console, "render", Console.render)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    install()
    yield
    logging.setLogRecordFactory(factory)


def test_all_that_is_printed_passes_the_filter(installed, caplog):
    out = io.StringIO()
    console = Console(file=out, width=400, force_terminal=True, color_system=None)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(EVIL, markup=False)
    logging.getLogger("pear.any").warning("%s\nforged: %s", "a", EVIL)
    logging.getLogger("transformers.any").warning(f"\x1b[1m{EVIL}\nsecond")
    assert out.getvalue().count("␛[2J") == 4 and not any(code in out.getvalue() for code in CODES)
    assert caplog.messages == [f"a forged: {SIGNS}", f"{SIGNS}\nsecond"]
    assert warnings.formatwarning(EVIL, UserWarning, "f", 1, "") == f"f:1: UserWarning: {SIGNS}\n"


@pytest.mark.parametrize("name", ["run", "d\x1b[2Ja\nerror: forged\u202e"])
def test_error_lines_show_signs_for_data_and_for_a_files_name(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text(
        json.dumps({"format": 1, "kind": "sft", "name": {"\u202e\x1b[2J\n": 1}}, ensure_ascii=False)
    )
    result = CliRunner().invoke(app, ["compare", str(tmp_path / name), str(tmp_path)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "`name` must be" in result.stderr
    assert not any(code in result.stderr for code in CODES)


def test_a_traceback_shows_signs(tmp_path):
    code = (
        "import pear.__main__ as m, pear.cli as c, sys\n"
        f"def fail(**_): raise RuntimeError({EVIL!r})\n"
        "c.app = fail\n"
        "m.main()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.rstrip().endswith(f"RuntimeError: {SIGNS}")


def test_what_is_printed_beside_logging_and_tables_passes_the_filter():
    """print() and accelerate's of text that holds names, in the source: `say` and `one_line` are the ways."""
    package = Path(pear.shown.__file__).parent
    bare = re.compile(r"((?<![\w.])|accelerator\.|\(\)\.)print\(f[\"']")
    assert [str(path) for path in package.rglob("*.py") if bare.search(path.read_text())] == []
