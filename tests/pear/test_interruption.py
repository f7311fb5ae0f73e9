"""Ctrl-C and SIGTERM: a sentence, the command that goes on, the shell's exit status; training goes on by it."""

import json
import os
import re
import shlex
import signal

import pytest
from safetensors.torch import load_file
from transformers import Trainer
from typer.testing import CliRunner

from pear.cli import app
from pear.interruption import with_resume
from pear.score import score

SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "stopped by SIGTERM")}


@pytest.fixture(scope="module")
def student(save_model):
    return save_model(seed=0)


@pytest.fixture
def data(save_model, text_rows, jsonl, tmp_path):
    score(str(save_model(seed=1)), jsonl(text_rows), tmp_path / "scored.jsonl", progress=False)
    return tmp_path / "scored.jsonl"


def logged(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("number", SIGNALS)
def test_training_goes_on_by_the_command_that_is_printed(student, data, tmp_path, monkeypatch, number):
    def line(out):
        return (
            f"sft --model {student} --data {data} --output_dir {out} --max_steps 4 --save_steps 2 --logging_steps 1 "
            "--report_to none --per_device_train_batch_size 2 --disable_tqdm true --dataloader_pin_memory false"
        ).split()

    out = tmp_path / "a folder"
    arguments = line("X")
    arguments[arguments.index("X")] = str(out)
    whole = CliRunner().invoke(app, line(tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    step = Trainer.training_step

    def until_step_3(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", until_step_3)
        stopped = CliRunner().invoke(app, arguments)
    status, how = SIGNALS[number]
    assert stopped.exit_code == status and "Traceback" not in stopped.output
    told = f"{how} at step 3 of 4; the last whole checkpoint is {out}/checkpoint-2. To go on from there:"
    assert told in stopped.output
    command = shlex.split(stopped.output.splitlines()[-1])
    assert command == ["pear", *arguments, "--resume_from_checkpoint", "true"]
    assert logged(out) == [1, 2, 3]
    on = CliRunner().invoke(app, command[1:])
    assert on.exit_code == 0 and f"Going on from {out}/checkpoint-2: step 2 of 4" in on.output
    assert re.search(r"4 steps: NLL \S+ at first, \S+ at last", on.output) and f"model: {out}" in on.output
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert logged(out) == [1, 2, 3, 4]


def test_without_a_checkpoint(student, data, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "training_step", stop)
    line = ["sft", "--model", str(student), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*line, "--report_to", "none", "--max_steps", "2"])
    assert run.exit_code == 130
    assert "at step 0 of 2" in run.output and "has no whole checkpoint" in run.output
    assert "--resume_from_checkpoint" not in run.output


@pytest.mark.parametrize(
    "line, where, kept",
    [
        ("score --data d.jsonl --out s.jsonl --model smollm2", "pear.score.score", "What was scored is kept"),
        (
            "import --source openai --data d.jsonl --out s.jsonl",
            "pear.importing.command.run",
            "What was imported is kept",
        ),
        ("eval --model smollm2 --task countdown", "pear.eval.run", "Nothing was written"),
        ("compare a b", "pear.compare.compare", "Nothing was written"),
        ("inspect --data d.jsonl --model smollm2", "pear.inspecting.inspect", "Nothing was written"),
        ("demo --fast", "pear.demo.run", "Finished parts are kept"),
        ("replicate --config x.yaml", "pear.replicate.replicate", "Finished jobs are kept"),
    ],
)
def test_other_commands(monkeypatch, line, where, kept):
    for number, (status, how) in SIGNALS.items():
        monkeypatch.setattr(where, lambda *args, number=number, **kwargs: os.kill(os.getpid(), number))
        run = CliRunner().invoke(app, line.split())
        assert run.exit_code == status
        assert run.output.startswith(f"{how}. {kept}: the same command ") and run.output.endswith(f"\n  pear {line}\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "arguments",
    ["--a 1", "--resume-from-checkpoint x --a 1", "--a 1 --resume_from_checkpoint=x", "--resume_from_checkpoint --a 1"],
)
def test_resume_stands_there_once(arguments):
    assert with_resume(arguments.split()) == ["--a", "1", "--resume_from_checkpoint", "true"]
