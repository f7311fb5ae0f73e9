"""One process at a time has an output; the lock ends with it, whatever ends it."""

import os
import subprocess
import sys

import pytest

from pear.appending import output_file, output_folder
from pear.compare import compare
from pear.eval import run as evaluate
from pear.importing.run import import_logprobs
from pear.io import DataError
from pear.score import score


def test_a_folder_and_a_file_are_had_once_at_a_time(tmp_path):
    folder, file = tmp_path / "run", tmp_path / "deep" / "out.json"
    with output_folder(folder, "output_dir"), output_file(file):
        with pytest.raises(DataError, match=rf"output_dir: another run is at work in {folder}; wait for its end"):
            with output_folder(folder, "output_dir"):
                pass
        with pytest.raises(DataError, match=rf"out: another process is about to write {file}; wait for its end"):
            with output_file(file):
                pass
    assert os.listdir(tmp_path) == []  # nothing was written, so nothing stays
    with output_folder(folder), output_file(file):
        (folder / "model").touch()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(folder) == ["model"]
    with pytest.raises(DataError, match="out: .*model is a file; give a folder to write to"):
        with output_folder(folder / "model"):
            pass


def test_a_killed_process_holds_nothing(tmp_path):
    code = "import os, sys; from pear.appending import output_folder\nwith output_folder(sys.argv[1]): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert os.listdir(tmp_path) == [".lock"]
    with output_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_commands_hold_their_output_before_they_look_at_anything_else(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "folder"
    calls = [
        lambda: score("no such model", tmp_path / "none.jsonl", out),
        lambda: import_logprobs("jsonl", tmp_path / "none.jsonl", out),
        lambda: evaluate("no such model", out=out),
    ]
    with output_file(out), output_folder(folder):
        for call in calls:
            with pytest.raises(DataError, match="another process is about to write .*out; wait for its end"):
                call()
        with pytest.raises(DataError, match="another run is at work in .*folder"):
            compare([tmp_path / "a", tmp_path / "b"], folder)
