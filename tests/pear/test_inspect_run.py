"""`pear inspect` from a scored file to its three outputs: the model's own log-probs, and what `pear sft` then logs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_rows import other_tokenizer
from rich.console import Console
from tiny import make_model, make_tokenizer
from training import make_config
from typer.main import get_command
from typer.testing import CliRunner

from pear.cli import app
from pear.inspecting import inspect
from pear.inspecting.data import read
from pear.io import DataError, read_jsonl, write_jsonl
from pear.score import score
from pear.scored import load_scored
from pear.scored_summary import Found
from pear.seal import write_scored
from pear.sft import PEARSFTTrainer
from pear_kernels.options import DEFAULTS, PEAROptions

OPTIONS = PEAROptions(gamma=0.97, log_weight_clip=(-2.0, 1.5))


def texts(count: int, policy: str | None = None, start: int = 0) -> list[dict]:
    rows = [
        {
            "prompt": f"What is {n} plus {n}?\n",
            "completion": f"It is {2 * n}. " + "Zebras think, step by step. " * (n % 3),
        }
        for n in range(start + 1, start + count + 1)
    ]
    return [row | ({} if policy is None else {"behavior_policy": policy}) for row in rows]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """own: rows of a teacher with the student's tokenizer; mixed: with those of another tokenizer and human text."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer, other = make_tokenizer(), other_tokenizer()
    # teachers close to the student, so that not every ratio is clipped
    teacher = make_model(tokenizer, seed=1)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in teacher.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    write_jsonl(folder / "texts.jsonl", texts(9))
    score(teacher, folder / "texts.jsonl", folder / "own.jsonl", tokenizer=tokenizer, progress=False)
    write_jsonl(folder / "more.jsonl", texts(6, start=9))
    foreign = make_model(other, seed=3)
    foreign.config.name_or_path = "foreign"
    score(foreign, folder / "more.jsonl", folder / "foreign.jsonl", tokenizer=other, progress=False)
    rows = [row for name in ("own", "foreign") for _, row in read_jsonl(folder / f"{name}.jsonl")]
    write_scored(folder / "mixed.jsonl", [*rows, *texts(3, policy="none", start=15)])
    return {name: folder / f"{name}.jsonl" for name in ("own", "foreign", "mixed")}


def plain_logprobs(folder: str, ids: list[int], mask: list[int]) -> list[float]:
    """By the model's own logits, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [logits[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]]


def test_log_probs_are_the_models_own(student, files):
    report = inspect(files["own"], student, rows=9)
    stored = {line: row for line, row in read_jsonl(files["own"])}
    assert report["data"]["rows"] == 9 == len(report["rows"])
    for shown in report["rows"]:
        row = stored[shown["line"]]
        expected = plain_logprobs(student, row["input_ids"], row["completion_mask"])
        behavior = [p for p, m in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if m]
        assert shown["logprob"] == pytest.approx(expected, abs=2e-4, rel=1e-4)
        assert shown["log_ratio"] == pytest.approx(np.subtract(expected, behavior), abs=2e-4, rel=2e-4)
        assert "".join(shown["text"]) == row["completion"] + "<|im_end|>" and row["prompt"].endswith(shown["before"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("own", OPTIONS),
        ("own", OPTIONS.replace(level="block")),
        ("own", OPTIONS.replace(level="sequence")),
        ("own", OPTIONS.replace(center=True)),
        ("own", OPTIONS.replace(clip_length=5)),
        ("own", OPTIONS.replace(normalize="sequence")),
        ("own", OPTIONS.replace(normalize="batch")),
        ("mixed", OPTIONS),
        ("mixed", OPTIONS.replace(level="block", clip_blocks=True)),
        ("mixed", OPTIONS.replace(level="sequence")),
    ],
    ids=lambda x: (
        x
        if isinstance(x, str)
        else "-".join(f"{v}" for v in x.asdict().values() if v not in DEFAULTS.asdict().values())
    ),
)
def test_sft_logs_the_same_at_its_first_step(student, files, tmp_path, name, options):
    """One step over all rows: what the trainer's loss says of itself is what was foretold."""
    report = inspect(files[name], student, options=options)
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.asdict().items()}
    args = make_config(tmp_path, per_device_train_batch_size=report["data"]["rows"], max_length=256, **given)
    tokenizer = make_tokenizer()
    trainer = PEARSFTTrainer(
        student,
        args,
        train_dataset=load_scored(files[name], tokenizer, 256, options=args.pear_options()),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = {key[5:]: value for key, value in trainer.state.log_history[0].items() if key.startswith("pear/")}
    summary, data = report["summary"], report["data"]
    share = data["ratio_tokens"] / data["tokens"]  # the trainer's shares are of all tokens
    assert logged["tokens"] == data["tokens"]
    foretold = {
        "log_ratio_mean": report["log_ratio"]["mean"] * share,
        "ratio_clipped_low": summary["clipped_low"] * share,
        "ratio_clipped_high": summary["clipped_high"] * share,
        "weight_mean": summary["weight_mean"],
        "weight_floor": summary["floor"],
        "weight_ceiling": summary["ceiling"],
        "effective_sample_size": summary["ess"],
    }
    assert {key: logged[key] for key in foretold} == pytest.approx(foretold, rel=2e-3, abs=1e-4)
    if name == "mixed":
        assert logged["ratio_tokens"] == pytest.approx(share) and 0.3 < share < 1


def test_each_kind_of_row_is_counted(student, files):
    report = inspect(files["mixed"], student, rows=18)
    policies = {policy["name"]: policy for policy in report["data"]["policies"]}
    assert [policy["rows"] for policy in policies.values()] == [9, 6, 3]
    assert policies["foreign"]["aligned_rows"] == 6 and policies["none"]["log_ratio_mean"] is None
    assert policies["none"]["weight_mean"] == 1
    kinds = {finding["kind"] for finding in report["advice"]}
    assert "some_without_policy" in kinds and report["options"]["clip_blocks"]
    foreign = [row for row in report["rows"] if row["policy"] == "foreign"]
    assert any(len(set(row["span"])) < row["tokens"] for row in foreign)  # spans of several tokens
    for row in report["rows"]:
        if row["policy"] == "none":
            assert row["weight"]["token"] == [1] * row["tokens"] and row["log_ratio"] == [None] * row["tokens"]
            assert row["mean_log_ratio"] is None
        if row["policy"] == "foreign":  # the sums of both sides over the row are the same, span by span
            known = [i for i, span in enumerate(row["span"]) if span >= 0]
            sums = np.subtract([row["logprob"][i] for i in known], [row["behavior_logprob"][i] for i in known]).sum()
            assert sums == pytest.approx(sum(row["log_ratio"][i] for i in known), abs=1e-2)


def test_command_writes_equal_bytes_and_prints_the_advice(student, files, tmp_path):
    outputs = []
    for place in ("a", "b"):
        files_of = [str(tmp_path / place / name) for name in ("page.html", "report.json")]
        command = ["inspect", "--data", str(files["mixed"]), "--model", student, "--log_ratio_clip", "-0.05", "0.2"]
        found = CliRunner().invoke(app, [*command, "--html", files_of[0], "--json", files_of[1], "--rows", "4"])
        assert found.exit_code == 0, found.output
        outputs.append([Path(path).read_bytes() for path in files_of])
        assert f"written: {files_of[0]}" in found.output
    assert outputs[0] == outputs[1]
    report = json.loads(outputs[0][1])
    assert report["options"]["log_ratio_clip"] == [-0.05, 0.2] and len(report["rows"]) == 4
    flat = "".join(found.output.split())
    assert all("".join(finding["text"].split()) in flat for finding in report["advice"])


def test_samples_are_drawn_by_seed_and_long_rows_told(student, files):
    lines = [{row["line"] for row in inspect(files["own"], student, sample=4, seed=seed)["rows"]} for seed in (0, 0, 1)]
    assert lines[0] == lines[1] != lines[2] and len(lines[0]) == 4
    tokenizer = make_tokenizer()
    lengths = {line: len(row["input_ids"]) for line, row in read_jsonl(files["own"])}
    limit = sorted(lengths.values())[5]
    with pytest.raises(DataError, match=rf" of 9 rows are longer than max_length = {limit} .*--drop_long_rows"):
        read(files["own"], tokenizer, max_length=limit)
    found = read(files["own"], tokenizer, max_length=limit, drop_long_rows=True)
    assert found.too_long == [line for line, length in lengths.items() if length > limit]
    assert found.total == 9 and len(found.rows) == 9 - len(found.too_long)
    report = inspect(files["own"], student, max_length=limit, drop_long_rows=True)
    assert "too_long" in {finding["kind"] for finding in report["advice"]}
    trained = Found()
    assert len(load_scored(files["own"], tokenizer, limit, drop_long_rows=True, found=trained)) == len(found.rows)
    assert report["data"]["in_words"] == trained.rows_in_words("Inspected", limit)  # as `pear sft` counts them


def test_log_probs_of_a_server_without_ids_say_the_same(student, files, tmp_path):
    """Byte rows of the student's own tokenizer: the same weights, though they come by way of bytes."""
    rows = []
    for _, row in read_jsonl(files["own"]):
        logprobs = [p for p, m in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if m]
        kept = {key: row[key] for key in ("prompt", "completion", "behavior_policy")}
        rows.append(kept | {"behavior_spans": row["behavior_spans"] | {"logprobs": logprobs}})
    write_scored(tmp_path / "bytes.jsonl", rows)
    by_ids, by_bytes = (inspect(path, student, options=OPTIONS) for path in (files["own"], tmp_path / "bytes.jsonl"))
    assert by_bytes["data"]["policies"][0]["aligned_rows"] == 9
    for level in ("token", "sequence"):
        found = by_bytes["levels"][level]["summary"]
        assert found == pytest.approx(by_ids["levels"][level]["summary"], rel=1e-5, abs=1e-6)


def test_a_row_that_does_not_align_is_left_out_and_told(student, files, tmp_path):
    rows = [row for _, row in read_jsonl(files["foreign"])]
    rows[2]["behavior_spans"] = {"problem": "the tokens do not spell the text"}
    write_scored(tmp_path / "x.jsonl", rows)
    report = inspect(tmp_path / "x.jsonl", student)
    (left_out,) = report["data"]["unaligned"]
    assert left_out["line"] == 3 and "do not spell the text" in left_out["reason"]
    assert any("do not spell the text" in finding["text"] for finding in report["advice"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: [{**rows[0], "completion": "edited"}, *rows[1:]], ":1: edited after it was scored"),
        (lambda rows: [{k: v for k, v in row.items() if k != "scored"} for row in rows], ":1: no seal"),
        (lambda rows: [{k: row[k] for k in ("prompt", "completion")} for row in rows], ":1: no log-probs of a behav"),
        (lambda rows: [], "spoiled.jsonl: no rows in it"),
    ],
    ids=["edited", "unsealed", "unscored", "empty"],
)
def test_a_spoiled_file_is_refused_and_nothing_written(student, files, tmp_path, spoil, words):
    write_jsonl(tmp_path / "spoiled.jsonl", spoil([row for _, row in read_jsonl(files["own"])]))
    command = ["inspect", "--data", str(tmp_path / "spoiled.jsonl"), "--model", student]
    found = CliRunner().invoke(app, [*command, "--html", str(tmp_path / "page.html")])
    assert found.exit_code == 1 and words in " ".join(found.output.split())
    assert "Traceback" not in found.output and not (tmp_path / "page.html").exists()


def test_an_option_of_the_weights_out_of_range_is_one_line(student, files):
    command = ["inspect", "--data", str(files["own"]), "--model", student]
    for flags, words in (
        (["--gamma", "1.5"], "gamma must be in (0, 1], got 1.5"),
        (["--level", "sequence", "--center"], "center must be off at level 'sequence'"),
    ):
        found = CliRunner().invoke(app, [*command, *flags])
        assert found.exit_code == 1 and words in " ".join(found.output.split()) and "Traceback" not in found.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": -1}, "rows must be at least 0"),
        ({"sample": 0}, "sample must be at least 1"),
        ({"max_length": 1}, "max_length"),
        ({"seed": -1, "sample": 3}, "seed must be at least 0"),
        ({"device": "banana"}, "device = 'banana' cannot be used here: .*Give cpu"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"html": "x.out", "json_report": "./x.out"}, "json and html are the same file"),
        ({"html": "."}, "html is a folder, .*: give the name of a file"),
    ],
)
def test_options_out_of_range(student, files, options, words):
    with pytest.raises(DataError, match=words):
        inspect(files["own"], student, **options)


def test_the_data_is_not_written_over(student, files):
    before = files["own"].read_bytes()
    with pytest.raises(DataError, match="json and data are the same file"):
        inspect(files["own"], student, json_report=files["own"])
    assert files["own"].read_bytes() == before


def test_a_loaded_model_stays_as_it_was(files):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=1).train()
    report = inspect(files["own"], model, tokenizer=tokenizer, console=Console(quiet=True))
    assert model.training and report["student"] == "LlamaForCausalLM"
    with pytest.raises(DataError, match="needs its tokenizer"):
        inspect(files["own"], model)


def test_help_is_quick_and_names_the_flags():
    """No heavy import: torch would be one."""
    code = "import sys; from pear.cli import app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    found = CliRunner().invoke(app, ["inspect", "--help"], env={"COLUMNS": "200"})
    assert found.exit_code == 0 and all(f"--{name}" in found.output for name in ("html", "json", "log_ratio_clip"))


def test_the_commands_defaults_are_the_papers():
    """They are typed out there, so that --help needs no torch."""
    parameters = {parameter.name: parameter.default for parameter in get_command(app).commands["inspect"].params}
    assert {name: parameters[name] for name in PEAROptions.names()} == DEFAULTS.asdict()
