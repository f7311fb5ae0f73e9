"""The demo from end to end, small: two runs print one table, nothing half-made is kept, the report holds together."""

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import make_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import pear.demo as demo
from pear.countdown import make_tokenizer
from pear.demo import FAST, run
from pear.eval import evaluate, pass_at_k
from pear.io import DataError
from pear.report import PICTURES
from pear.tasks import rewards
from pear_kernels import pear_weights


def table_of(report: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    run(out, fast=True, workers=1)
    return out


def test_report_has_every_figure_and_picture(finished):
    text = (finished / "report.md").read_text()
    head, rule, *rows = table_of(text)[: 2 + len(demo.MODELS)]
    assert head == ["model", "pass@1", "pass@8", "held-out NLL", "finished", "tokens"]
    names = ["teacher", "student (start of both)", "SFT", "PEAR", "SFT, then RL", "PEAR, then RL"]
    assert [row[0] for row in rows] == names
    for row, name in zip(rows, demo.MODELS, strict=True):
        saved = json.loads((finished / "eval" / f"{name}.json").read_text())
        for cell, key in zip(row[1:3], ("pass@1", "pass@8"), strict=True):
            value, error = re.fullmatch(r"([\d.]+) % ± ([\d.]+)", cell).groups()
            counts = [pass_at_k(p["samples"], p["correct"], int(key[5:])) for p in saved["problems"]]
            assert float(value) == pytest.approx(100 * sum(counts) / len(counts), abs=0.051)
            assert float(error) >= 0
        assert (row[3] == "") == (name not in ("student", "sft", "pear"))
        assert 0 < float(row[5]) <= FAST.max_new_tokens
    pictures = {*PICTURES, "rl/curves_rl.png", "rl/passes.png"}
    assert set(re.findall(r"!\[.*\]\((.*)\)", text)) == pictures
    for name in pictures:
        picture = matplotlib.image.imread(finished / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 600 and picture.std() > 0.05
    for word in ("not evidence", "seed", torch.__version__, "CPU", "reasoning-gym"):
        assert word in text


def test_checkpoints_are_plain_folders_that_differ_from_their_common_start(finished):
    models = {name: AutoModelForCausalLM.from_pretrained(finished / path) for name, path in demo.FOLDERS.items()}
    start = models["student"].state_dict()
    for name in ("sft", "pear"):
        assert AutoTokenizer.from_pretrained(finished / name).init_kwargs["prompt_format"] == "compact"
        assert any(not torch.equal(value, start[key]) for key, value in models[name].state_dict().items())
    pear = models["pear"].state_dict()
    assert any(not torch.equal(value, pear[key]) for key, value in models["sft"].state_dict().items())


def test_pear_eval_takes_a_checkpoint_with_its_default_options(finished):
    from typer.testing import CliRunner

    from pear.cli import app

    arguments = ["eval", "--model", str(finished / "pear"), "--task", "countdown", "--size", "2", "--samples", "8"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(finished / "again.json")])
    assert result.exit_code == 0, result.output
    saved = json.loads((finished / "again.json").read_text())
    assert saved["prompt_format"] == "compact" and saved["size"] == 2 and 0 <= saved["pass@8"] <= 1
    (finished / "again.json").unlink()


def test_both_runs_saw_the_same_batches_from_the_same_start(finished):
    logs = {n: json.loads((finished / "training" / f"{n}.json").read_text())["log"] for n in ("sft", "pear")}
    steps = {name: [entry for entry in log if "pear/nll" in entry] for name, log in logs.items()}
    assert [e["pear/tokens"] for e in steps["sft"]] == [e["pear/tokens"] for e in steps["pear"]]
    assert steps["sft"][0]["pear/nll"] == pytest.approx(steps["pear"][0]["pear/nll"], rel=1e-6)
    assert steps["sft"][-1]["pear/nll"] != steps["pear"][-1]["pear/nll"]
    assert "pear/weight_floor" in steps["pear"][0]


def test_both_arms_had_the_same_prompts_in_rl_and_their_table_is_that_of_pear_compare(finished, tmp_path):
    from typer.testing import CliRunner

    from pear.cli import app

    prompts = [
        [json.loads(line)["prompt"] for path in sorted((finished / "rl" / name / "samples").iterdir())
         for line in path.read_text().splitlines()]
        for name in demo.TUNED
    ]  # fmt: skip
    assert prompts[0] == prompts[1] and len(set(prompts[0])) > 1
    for name in demo.TUNED:  # each evaluation of an RL run is the one of the table
        for moment, model in (("before", name), ("after", f"{name}_rl")):
            beside = json.loads((finished / "rl" / name / "eval" / f"{moment}.json").read_text())
            assert beside == json.loads((finished / "eval" / f"{model}.json").read_text())
    folders = [str(finished / "rl" / name) for name in demo.TUNED]
    result = CliRunner().invoke(app, ["compare", *folders, "--out", str(tmp_path / "compared")])
    assert result.exit_code == 0, result.output
    rows = table_of((tmp_path / "compared" / "report.md").read_text())
    report = table_of((finished / "report.md").read_text())
    assert [row for row in rows if row[0] in ("SFT", "PEAR")][:2] == [
        row for row in report if row[0] in ("SFT", "PEAR") and row[1] == "rl"
    ]


def test_traces_are_right_different_and_held_apart(finished):
    train, _ = demo.read_problems(finished / "problems.json")
    by_prompt = {p.compact: p for p in train}
    rows = [json.loads(line) for line in (finished / "traces.jsonl").read_text().splitlines()]
    assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)
    assert all(rewards(by_prompt[row["prompt"]], [row["completion"]]) == [1] for row in rows)
    kept = {
        split: {
            (row["prompt"], row["completion"])
            for row in map(json.loads, (finished / "scored" / f"{split}.jsonl").read_text().splitlines())
        }
        for split in ("train", "heldout")
    }
    assert not kept["train"] & kept["heldout"]
    assert len(kept["train"]) + len(kept["heldout"]) == len(rows)


def test_behavior_logprobs_are_the_teachers(finished):
    teacher = AutoModelForCausalLM.from_pretrained(finished / "teacher").double()
    for line in (finished / "scored" / "train.jsonl").read_text().splitlines()[:5]:
        row = json.loads(line)
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs = teacher(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
        given = torch.tensor(row["behavior_logprobs"][1:], dtype=torch.float64)
        torch.testing.assert_close(given[mask], logprobs[mask], atol=1e-5, rtol=0)


def test_a_second_run_elsewhere_prints_the_same_table(finished, tmp_path):
    run(tmp_path / "again", fast=True, workers=1)
    reports = [table_of((out / "report.md").read_text()) for out in (finished, tmp_path / "again")]
    assert [row for row in reports[0] if row[0] != "versions"] == [row for row in reports[1] if row[0] != "versions"]
    weights = [(out / "rl" / "pear" / "model.safetensors").read_bytes() for out in (finished, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_whole_stages_are_kept_and_broken_ones_made_again(finished, monkeypatch):
    before = (finished / "report.md").read_text()
    done = []
    for job in ("pretrain", "sample_traces", "score_traces", "fine_tune", "reinforce", "evaluate_one"):
        original = getattr(demo, job)
        monkeypatch.setattr(demo, job, lambda *a, _f=original, _n=job, **k: done.append(_n) or _f(*a, **k))
    facts = run(finished, fast=True, workers=1)["facts"]
    assert done == [] and facts["kept"] == ["data", "base", "traces", "train", "rl", "eval"]

    (finished / ".stages" / "eval.json").unlink()  # as if the run had died while it evaluated
    facts = run(finished, fast=True, workers=1)["facts"]
    assert done == ["evaluate_one"] * 6 and facts["kept"] == ["data", "base", "traces", "train", "rl"]
    assert table_of((finished / "report.md").read_text()) == table_of(before)


def test_a_stage_is_made_again_after_any_doubt(tmp_path, monkeypatch):
    """Asked twice, a stage has nothing to do the second time; with other settings or code, a lost output or a broken
    stamp it has, and so have all stages after it."""

    def asked(settings):
        stages, todo = demo._Stages(tmp_path, settings, Console(quiet=True), 2), []
        for name in ("one", "two"):
            with stages(name, name, [f"{name}.txt"]) as is_todo:
                todo.append(is_todo)
                if is_todo:
                    assert not (tmp_path / f"{name}.txt").exists()
                    (tmp_path / f"{name}.txt").write_text(name)
        return todo

    assert asked(FAST) == [True, True]
    assert asked(FAST) == [False, False]
    assert asked(replace(FAST, seed=1)) == [True, True]
    assert asked(FAST) == [True, True]
    (tmp_path / "two.txt").unlink()
    assert asked(FAST) == [False, True]
    (tmp_path / ".stages" / "one.json").write_text('{"ke')
    assert asked(FAST) == [True, True]
    assert asked(FAST) == [False, False]
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("changed = True")
    monkeypatch.setattr(demo.pear_kernels, "__file__", str(package / "__init__.py"))
    assert asked(FAST) == [True, True]


def test_a_stage_that_fails_is_not_kept(tmp_path):
    for _ in range(2):
        stages = demo._Stages(tmp_path, FAST, Console(quiet=True), 1)
        with pytest.raises(KeyError), stages("one", "one", ["one.txt"]) as todo:
            assert todo
            (tmp_path / "one.txt").write_text("half")
            raise KeyError


def test_a_teacher_that_knows_nothing_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "FAST", replace(FAST, teacher_steps=1, student_steps=1))
    with pytest.raises(DataError, match=r"the teacher got only \d of 64 traces right"):
        run(tmp_path / "demo", fast=True, workers=1)
    assert not (tmp_path / "demo" / "traces.jsonl").exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="out: .*file is a file; give a folder"):
        run(tmp_path / "file", fast=True, workers=1)
    assert (tmp_path / "file").read_text() == "mine"


def test_generation_and_evaluation_report_how_far_they_are():
    tokenizer = make_tokenizer()
    seen = []
    evaluate(
        make_model(tokenizer), tokenizer, "countdown", 1, 2, size=3, max_new_tokens=2, batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(4, 6), (6, 6)]


def test_pear_weights_of_the_pictures_end_at_one(finished):
    from pear.report import _load

    behavior, mask = _load(finished / "scored" / "behavior.jsonl", 0)
    student, _ = _load(finished / "scored" / "student.jsonl", 0)
    weights = pear_weights(student, behavior, mask)
    last = mask.sum(1) - 1
    assert torch.equal(weights[torch.arange(len(last)), last], torch.ones(len(last)))
    delta = (student - behavior).clamp(-0.08, 0.3)[0, mask[0]].double()
    by_hand = [
        torch.exp(delta[t + 1 :].sum() + (len(delta) - 1 - t) * torch.log(torch.tensor(0.999, dtype=torch.float64)))
        for t in range(len(delta))
    ]
    torch.testing.assert_close(weights[0, mask[0]].double(), torch.stack(by_hand), atol=1e-6, rtol=1e-5)
