"""Spelling of options: underscores and dashes, switches with and without a value, the nearest name, one line."""

import re
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from pear.cli import app
from pear.command_line import with_underscores
from pear.io import DataError
from pear.options import parse
from pear.sft_config import DataArguments, ModelArguments, PEARSFTConfig

KINDS = (DataArguments, PEARSFTConfig, ModelArguments)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def one_line(result) -> str:
    assert result.stdout == "" and result.stderr.count("\n") == 1
    return result.stderr


def test_version():
    assert run("--version").stdout == f"pear {version('pear-kernels')}\n"


def test_dashes_become_underscores_in_names_alone():
    line = ["--max-length=a-b", "--top-k", "-1", "x-y", "--", "--not-mine"]
    assert with_underscores(line) == ["--max_length=a-b", "--top_k", "-1", "x-y", "--", "--not-mine"]


@pytest.mark.parametrize(
    "line, off, found",
    [
        (["--bf16"], [], True),
        (["--bf16", "true"], [], True),
        (["--bf16=True"], [], True),
        (["--bf16", "false"], [], False),
        (["--no-bf16"], [], False),
        (["--no_bf16"], [], False),
        (["--json", "false"], [], True),  # bf16's own default
    ],
)
def test_switches_work_alone_and_with_a_value(line, off, found):
    command = typer.main.get_command(app).commands["plan"]
    context = command.make_context("plan", ["--model", "smollm2", *line])
    assert context.params["bf16"] is found and context.params["json"] is False


@pytest.mark.parametrize("line, found", [(["--bf16"], True), (["--bf16", "true"], True), (["--bf16", "false"], False)])
def test_switches_of_the_trainers(line, found, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    _, args, _ = parse(
        KINDS, "pear sft", [*line, "--use-cpu", "--log-ratio-clip", "-0.1", "0.2", "--report_to", "none"]
    )
    assert args.bf16 is found and args.use_cpu and args.log_ratio_clip == [-0.1, 0.2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("plan --modl x", "pear plan: no such option: --modl; did you mean --model?"),
        ("inspect --data x --model y --center maybe", "unexpected extra argument(s) (maybe)"),
        ("plan --model x --context abc", "pear plan: Invalid value for '--context'"),
        ("compare", "pear compare: Missing argument"),
        ("scor", "No such command 'scor'. Did you mean 'score'?"),
        ("sft --dta x", "options of pear sft: no such option: --dta; did you mean --data?"),
        ("sft --lora-rank 3", "no such option: --lora_rank; did you mean"),
        ("sft x.jsonl", "'x.jsonl' belongs to no option"),
        ("sft --config", "--config takes the path of one YAML file"),
        ("rl --tsk countdown", "options of pear rl: no such option: --tsk; did you mean --task?"),
        ("sft --learning_rate nan", "learning_rate must be at least 0 and finite, got nan"),
        ("sft --adam_beta1 1", "adam_beta1 must be at least 0 and below 1, got 1.0"),
        ("sft --per_device_eval_batch_size 0", "per_device_eval_batch_size must be at least 1 and finite, got 0"),
        ("rl --task x --seed -1", "seed must be at least 0 and below 2**32, got -1"),
        ("rl --task x --temperature 0", "temperature must be above 0 and finite, got 0.0"),
        ("rl --task x --num_generations 0", "a batch size or num_generations is 0; give at least 1"),
    ],
)
def test_a_wrong_command_line_is_one_line(line, message):
    result = run(*line.split())
    assert result.exit_code in (1, 2) and message in one_line(result)


def test_an_unknown_key_of_a_configuration_names_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rte: 0.1\n")
    with pytest.raises(DataError, match="configuration file: no such option: learning_rte; did you mean learning_rate"):
        parse(KINDS, "pear sft", [f"--config={tmp_path / 'c.yaml'}"])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file (expected YAML of options"),
        ("- a\n", "expected YAML of options, `name: value`, got ['a']"),
        ("", "expected YAML of options, `name: value`, got None"),
        ("1: 2\n", "expected YAML of options, `name: value`, got {1: 2}"),
        ("a: [" * 3000, "nested too deep"),
        ("model: a\nmodel: b\n", "key 'model' is given twice"),
        ("\x1f\x8b", "a gzip archive"),
    ],
)
def test_a_configuration_that_is_none_is_said_with_its_name(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        parse(KINDS, "pear sft", ["--config", str(path)])
