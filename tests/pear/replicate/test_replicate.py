"""Whole studies by the command line: counts, weights and distances computed anew from the checkpoints they left.

Two are run: the shipped Countdown study as `--fast` makes it, whose models get no held-out problem right, and one of
short sums, whose models get some right, and in which an ablation is the baseline under another name.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pear.replicate
from pear.cli import app
from pear.eval import evaluate
from pear.models import load_model, load_tokenizer
from pear.replicate.results import ROWS, read_results
from pear.replicate.study import load_study
from pear.replicate.units import study_units
from pear.side_by_side import quiet
from pear.tasks import load_task, rewards, split_of
from pear_kernels.reference import naive_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two studies are run before the first test

COUNTDOWN = Path(__file__).parents[3] / "experiments" / "countdown.yaml"
SUMS = {
    "study": "sums",
    "task": "chain_sum",
    "task_config": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "seeds": 2,
    "ablation_seeds": 1,
    "model": {"hidden_size": 32, "layers": 1, "heads": 4},
    "student": {
        "steps": 200,
        "batch": 16,
        "learning_rate": 1e-2,
        "styles": {"pairs": 3, "checked": 1},
        "memorise": 200,
    },
    "teacher": {"steps": 300, "batch": 16, "learning_rate": 1e-2, "styles": {"checked": 1.0}, "memorise": 200},
    "traces": {"problems": 40, "samples": 16, "rows": 48},
    "sft": {"epochs": 1, "batch": 6, "learning_rate": 2e-3, "warmup_steps": 1},
    "rl": {"rounds": 2, "prompts": 8, "group": 8, "updates": 2, "learning_rate": 1e-3, "problems": 20},
    "evaluation": {"problems": 12, "samples": 16, "ks": [1, 4, 16]},
    "max_new_tokens": 32,
    "arms": {
        "sft": {"weighting": "none"},
        "pear-token": {"weighting": "pear"},
        "iw-sft": {"weighting": "iw-sft", "iw_tau": 10},
    },
    "ablations": {"again": {"weighting": "none"}},
    "primary": {"arm": "pear-token", "k": 4},
    "notes": "notes.md",
}
RUNNING = re.compile(r"^\[ *\d+/\d+\] (\S+)", re.MULTILINE)  # a line of a finished job


class Run(SimpleNamespace):
    """A finished study: `out`, `results` (folders), `output` (what was printed) and `again()`."""

    def folder(self, name: str) -> Path:
        return self.out / "jobs" / name

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder(name) / "job.json").read_text())

    def read(self):
        return read_results(self.results)


def call(arguments: list[str], out: Path, results: Path) -> Run:
    arguments = ["replicate", *arguments, "--jobs", "2", "--out", str(out), "--results", str(results)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return Run(out=out, results=results, output=done.output)


@pytest.fixture(scope="module")
def settled() -> Iterator[None]:
    """The commit of the report is one text, whatever else changes in the checkout during these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pear.replicate, "_commit", lambda: "0123456789")
        yield


@pytest.fixture(scope="module")
def shipped(settled, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("countdown")
    again = lambda: call(["--config", str(COUNTDOWN), "--fast"], folder / "out", folder / "results")  # noqa: E731
    return Run(**vars(again()), again=again)


@pytest.fixture(scope="module")
def sums(settled, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "sums.yaml").write_text(yaml.safe_dump(SUMS, sort_keys=False))
    (folder / "notes.md").write_text("Sums are **short** here.\n")
    again = lambda: call(["--config", str(folder / "sums.yaml")], folder / "out", folder / "results")  # noqa: E731
    return Run(**vars(again()), again=again)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(out: Path) -> dict[str, int]:
    """When each job's record was written, by its name."""
    jobs = out / "jobs"
    return {p.parent.relative_to(jobs).as_posix(): p.stat().st_mtime_ns for p in jobs.rglob("job.json")}


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs without what a clock says."""
    clock = ("runtime", "_per_second", "step_time")
    return [
        row | {"log": [{k: v for k, v in each.items() if not any(c in k for c in clock)} for each in row["log"]]}
        for row in rows
    ]


# ---- all of it is there


def test_every_job_ran_and_every_file_is_there(shipped, sums):
    for run, study, fast in ((shipped, yaml.safe_load(COUNTDOWN.read_text()), True), (sums, SUMS, False)):
        found = run.read()  # checks fields, arms, seeds and that nothing is missing
        assert found.study["fast"] is fast and found.arms == list(study["arms"])
        seeds, ablation_seeds = (2, 1)
        jobs = seeds * 5 + 5 * (seeds * len(found.arms) + ablation_seeds * len(found.ablations))
        assert len(found.ablations) == 1 and len(found.jobs) == len(stamps(run.out)) == jobs
        assert sorted(RUNNING.findall(run.output)) == sorted(stamps(run.out))
        written = re.findall(r"^written: (.*)$", run.output, re.MULTILINE)
        assert written[0] == str(run.results / "REPORT.md")
        assert sorted(written) == sorted(map(str, run.results.iterdir()))
        assert {"study.json", "passes.png", *(f"{name}.jsonl" for name in ROWS)} <= set(bytes_of(run.results))
        assert not (run.out / ".running").exists()
        total = sum(job["seconds"] for job in found.jobs)
        assert found.study["seconds"]["all_jobs"] == pytest.approx(total, abs=0.1)
        assert found.study["jobs_at_once"] == 2


def test_a_fast_run_says_so_and_notes_are_kept(shipped, sums):
    report = (shipped.results / "REPORT.md").read_text()
    assert report.startswith("A fast run, to show that the pipeline is whole; its figures mean nothing.\n")
    report = (sums.results / "REPORT.md").read_text()
    assert report.startswith("# ") and "Sums are **short** here." in report


# ---- pass@k


def pass_at_k(samples: int, correct: int, k: int) -> float:
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def number(text: str) -> float:
    """What stands before an interval, "6.2 % [1.0, 12.5]"."""
    return float(text.split(" [")[0].removesuffix(" %"))


def tables(report: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|\n").split("|")] for line in each.splitlines()] for each in found]


@pytest.mark.parametrize("which", ["shipped", "sums"])
def test_tables_hold_pass_at_k_of_the_counts(which, request):
    run = request.getfixturevalue(which)
    study = json.loads((run.results / "study.json").read_text())
    rows = [json.loads(line) for line in (run.results / "evaluations.jsonl").read_text().splitlines()]
    report = (run.results / "REPORT.md").read_text()

    def mean(arm: str, moment: str, k: int) -> float:
        values = [
            pass_at_k(row["samples"], c, k)
            for row in rows
            if (row["arm"], row["moment"]) == (arm, moment)
            for c in row["correct"]
        ]
        assert len(values) == len(study["seeds"]) * study["config"]["evaluation"]["problems"]
        return 100 * sum(values) / len(values)

    for k in study["ks"]:
        (table,) = [each for each in tables(report) if each[0][1] == f"pass@{k} before RL"]
        assert [row[0] for row in table[2:]] == list(study["arms"])
        for arm, before, after, gain in table[2:]:
            for moment, text in (("before", before), ("after", after)):  # a tie may be rounded either way
                assert re.fullmatch(r"\d+\.\d %", text.split(" [")[0])
                assert number(text) == pytest.approx(mean(arm, moment, k), abs=0.0501)
            assert float(gain.split(" [")[0]) == pytest.approx(
                mean(arm, "after", k) - mean(arm, "before", k), abs=0.0501
            )
        (table,) = [each for each in tables(report) if each[0][0] == f"pass@{k} minus sft, points"]
        assert [re.sub(r"\W*(primary)?\W*$", "", row[0]).strip("*") for row in table[2:]] == list(study["arms"])[1:]
        for arm, row in zip(list(study["arms"])[1:], table[2:], strict=True):
            for moment, text in (("before", row[1]), ("after", row[3])):
                expected = mean(arm, moment, k) - mean("sft", moment, k)
                assert number(text) == pytest.approx(expected, abs=0.0501)
        starts = re.findall(
            r"^The student that all arms start from has (.*), the teacher (.*)\.$", report, re.MULTILINE
        )
        for name, text in zip(("student", "teacher"), starts[study["ks"].index(k)], strict=True):
            assert number(text) == pytest.approx(mean(name, "start", k), abs=0.0501)
    if which == "sums":
        assert sum(sum(row["correct"]) for row in rows) > 20  # there was something to count


def test_counts_are_those_of_the_checkpoints(sums):
    problems = load_task("chain_sum", "test", 12, 0, **SUMS["task_config"])
    found = sums.read()
    assert [row["prompt"] for row in found.problems] == [problem.compact for problem in problems]
    assert all(split_of(problem.identity) == "test" for problem in problems)
    folders = {("student", "start"): "student/1", ("teacher", "start"): "teacher/1"}
    for arm in ("sft", "pear-token"):
        folders |= {(arm, "before"): f"sft/{arm}/1", (arm, "after"): f"rl/{arm}/1"}
    for (arm, moment), name in folders.items():
        folder = str(sums.folder(name))
        options = dict(seed=1, max_new_tokens=32, batch_size=400, progress=None)
        again = evaluate(load_model(folder, dtype=torch.float32), load_tokenizer(folder), problems, 16, 16, **options)
        assert found.counts(arm, moment, [1]).tolist() == [[each["correct"] for each in again["problems"]]], name


# ---- what arms share


@pytest.mark.parametrize("which", ["shipped", "sums"])
def test_all_arms_have_the_same_prompts_in_rl(which, request):
    run = request.getfixturevalue(which)
    found = run.read()
    for seed in (0, 1):
        arms = [arm for arm in (*found.arms, *found.ablations) if seed in found.seeds_of(arm)]
        drawn = {}
        for arm in arms:
            samples = [
                json.loads(line)
                for path in sorted((run.folder(f"rl/{arm}/{seed}") / "samples").iterdir())
                for line in path.read_text().splitlines()
            ]
            drawn[arm] = [sample["prompt"] for sample in samples]
        config = found.study["config"]
        assert len(drawn["sft"]) == 2 * config["rl"]["rounds"]  # two samples are kept of a round
        assert all(each == drawn["sft"] for each in drawn.values())
        train = load_task(found.study["task"], "train", config["rl"]["problems"], seed, **config["task_config"])
        assert set(drawn["sft"]) <= {problem.compact for problem in train}
        assert not set(drawn["sft"]) & {row["prompt"] for row in found.problems}


@pytest.mark.parametrize("which", ["shipped", "sums"])
def test_all_arms_see_the_same_batches_in_sft(which, request):
    found = request.getfixturevalue(which).read()
    logs = {
        (row["arm"], row["seed"]): [
            (entry["step"], entry.get("learning_rate"), entry.get("pear/tokens"), entry.get("eval_pear/tokens"))
            for entry in row["log"]
        ]
        for row in found.training
        if row["phase"] == "sft"
    }
    for (_, seed), log in logs.items():
        assert log == logs["sft", seed]
    first = {
        row["arm"]: row["log"][0]["eval_pear/nll"]
        for row in found.training
        if (row["phase"], row["seed"]) == ("sft", 1)
    }
    assert len(set(first.values())) == 1  # before the first step they are one model


def vector(folder: Path) -> torch.Tensor:
    """All stored weights, one after another, float64."""
    weights = load_file(folder / "model.safetensors")
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def had_advantages(sums, name: str) -> bool:
    """Whether some group of a job's rollouts had rewards that differ; so few, of so small a model, may all be 0."""
    return any(entry.get("frac_reward_zero_std", 1) < 1 for entry in sums.record(name)["result"]["log"])


def test_rl_starts_from_the_sft_of_its_own_arm(sums, tmp_path):
    rate, steps = SUMS["rl"]["learning_rate"], SUMS["rl"]["rounds"] * SUMS["rl"]["updates"]
    units = {unit.name: unit for unit in study_units(load_study(sums.out.parent / "sums.yaml"))}
    for name in [name for name in units if name.startswith("rl/")]:
        start = name.replace("rl/", "sft/")
        assert sums.record(name)["needs"] == [start]
        moved = (vector(sums.folder(name)) - vector(sums.folder(start))).abs().max()
        assert moved < 1.2 * rate * steps  # a step of Adam moves no weight by much more than the learning rate
        assert (moved > 0) == had_advantages(sums, name)
    assert had_advantages(sums, "rl/iw-sft/0")
    for i, start in enumerate(("sft/iw-sft/0", "sft/pear-token/0")):  # from its own checkpoint, and from another one
        (folder := tmp_path / str(i)).mkdir()
        unit = units["rl/iw-sft/0"]
        with quiet():
            unit.function(lambda done, total: None, folder, {start: sums.folder(start)}, **unit.arguments)
        assert torch.equal(vector(folder), vector(sums.folder("rl/iw-sft/0"))) is (i == 0)


def test_an_arm_of_another_name_is_the_same_to_the_last_digit(sums):
    found = sums.read()
    for moment in ("before", "after"):
        assert (found.counts("again", moment, [0]) == found.counts("sft", moment, [0])).all()

    def of(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
        return [{**row, "arm": None} for row in rows if (row["arm"], row["seed"]) == (arm, 0)]

    assert of(timeless(found.training), "again") == of(timeless(found.training), "sft") != []
    assert of(found.diagnostics, "again") == of(found.diagnostics, "sft") != []
    for phase in ("sft", "rl"):
        same, other = (vector(sums.folder(f"{phase}/{arm}/0")) for arm in ("again", "pear-token"))
        first = vector(sums.folder(f"{phase}/sft/0"))
        assert torch.equal(same, first) and not torch.equal(other, first)


# ---- traces, weights and distances


def train_rows(run: Run, seed: int, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder(f"traces/{seed}") / f"{name}.jsonl").read_text().splitlines()]


@torch.no_grad()
def logprobs(folder: Path, rows: list[dict[str, Any]]) -> list[list[float]]:
    """Of the tokens that count in each row, by transformers alone, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        ids, mask = row["input_ids"], row["completion_mask"]
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append([log_p[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]])
    return found


@pytest.mark.parametrize("which", ["shipped", "sums"])
def test_traces_are_right_and_scored_by_teacher_and_student(which, request):
    run = request.getfixturevalue(which)
    study = run.read().study
    config = study["config"]
    for seed in (0, 1):
        rows = train_rows(run, seed) + train_rows(run, seed, "heldout")
        drawn = load_task(study["task"], "train", config["traces"]["problems"], seed, **config["task_config"])
        problems = {problem.compact: problem for problem in drawn}
        assert all(rewards(problems[row["prompt"]], [row["completion"]]) == [1] for row in rows)
        assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows) <= config["traces"]["rows"]
        for column, model in (("behavior_logprobs", "teacher"), ("ref_logprobs", "student")):
            for row, expected in zip(rows, logprobs(run.folder(f"{model}/{seed}"), rows), strict=True):
                stored = [x for x, m in zip(row[column], row["completion_mask"], strict=True) if m]
                assert stored == pytest.approx(expected, abs=1e-4)


def test_weights_are_those_of_the_models_log_probs(sums):
    for seed in (0, 1):
        rows = train_rows(sums, seed)
        teacher, student = (logprobs(sums.folder(f"{name}/{seed}"), rows) for name in ("teacher", "student"))
        found = {(w["arm"], w["moment"]): w for w in sums.read().weights if w["seed"] == seed}
        assert set(found) == {(arm, moment) for arm in ("pear-token", "iw-sft") for moment in ("start", "end")}
        for (arm, moment), row in found.items():
            now = student if moment == "start" else logprobs(sums.folder(f"sft/{arm}/{seed}"), rows)
            if arm == "pear-token":
                weights = [
                    naive_weights(torch.tensor(p), torch.tensor(b)).tolist() for p, b in zip(now, teacher, strict=True)
                ]
            else:
                means = [sum(p) / len(p) - sum(q) / len(q) for p, q in zip(now, student, strict=True)]
                weights = [[min(16.0, math.exp(10 * mean))] * len(p) for mean, p in zip(means, now, strict=True)]
            flat = [w for each in weights for w in each]
            assert row["mean"] == pytest.approx(sum(flat) / len(flat), rel=1e-4)
            assert row["effective_sample_size"] == pytest.approx(
                sum(flat) ** 2 / len(flat) / sum(w * w for w in flat), rel=1e-4
            )
            last = [w for each in weights for t, w in enumerate(each) if t * 20 // len(each) == 19]
            if last:
                assert row["by_position"][19] == pytest.approx(sum(last) / len(last), rel=1e-4)
            ratios = [p - b for x, y in zip(now, teacher, strict=True) for p, b in zip(x, y, strict=True)]
            assert row["log_ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)


def test_distances_and_losses_are_those_of_the_checkpoints(sums):
    for row in sums.read().diagnostics:
        arm, seed = row["arm"], row["seed"]
        student, sft, rl = (vector(sums.folder(f"{n}/{seed}")) for n in ("student", f"sft/{arm}", f"rl/{arm}"))
        assert row["start_norm"] == pytest.approx(student.norm().item(), rel=1e-6)
        assert row["sft_distance"] == pytest.approx((sft - student).norm().item(), rel=1e-6)
        assert row["rl_distance"] == pytest.approx((rl - sft).norm().item(), rel=1e-6)
        cosine = torch.nn.functional.cosine_similarity(sft - student, rl - sft, dim=0).item()
        assert row["update_cosine"] == pytest.approx(cosine, abs=1e-6)
        assert row["sft_kl"] > 0 and (row["rl_kl"] > 0) == had_advantages(sums, f"rl/{arm}/{seed}")
        heldout = logprobs(sums.folder(f"sft/{arm}/{seed}"), train_rows(sums, seed, "heldout"))
        nll = -sum(map(sum, heldout)) / sum(map(len, heldout))
        assert row["heldout_nll"] == pytest.approx(nll, rel=1e-4)


# ---- again


@pytest.mark.parametrize("which", ["shipped", "sums"])
def test_a_second_call_does_nothing_anew_and_gives_the_same_bytes(which, request):
    run = request.getfixturevalue(which)
    before, written = bytes_of(run.results), stamps(run.out)
    second = run.again()
    assert RUNNING.findall(second.output) == [] and stamps(run.out) == written
    assert bytes_of(run.results) == before


def test_a_report_can_be_written_again_with_other_notes(sums):
    before, written = bytes_of(sums.results), stamps(sums.out)
    notes, config = sums.out.parent / "notes.md", str(sums.out.parent / "sums.yaml")
    said = notes.read_text()
    for text in ("Sums were *long* there.\n", said):
        notes.write_text(text)
        call(["--config", config, "--report"], sums.out, sums.results)
        now = bytes_of(sums.results)
        changed = {name for name in before if now[name] != before[name]}
        assert changed == (set() if text == said else {"REPORT.md", "study.json"})
        assert text.strip() in now["REPORT.md"].decode() and set(now) == set(before)
    assert stamps(sums.out) == written


@pytest.mark.parametrize("gone", ["traces/1", "sft/pear-token/1", "rl/sft/0"])
def test_a_job_that_is_gone_is_done_again_and_nothing_that_does_not_need_it(gone, sums):
    needs = {name: set(sums.record(name)["needs"]) for name in stamps(sums.out)}
    dependent = {gone}
    while more := {name for name, of in needs.items() if of & dependent} - dependent:
        dependent |= more
    before, written = bytes_of(sums.results), stamps(sums.out)
    rows = timeless(sums.read().training)
    shutil.rmtree(sums.folder(gone))
    redone = set(RUNNING.findall(sums.again().output))
    now = stamps(sums.out)
    assert gone in redone <= dependent and set(now) == set(written)
    assert {name for name in now if now[name] != written[name]} == redone
    after = bytes_of(sums.results)
    for name in ("problems", "evaluations", "diagnostics", "weights"):  # the same but for what a clock says
        assert after[f"{name}.jsonl"] == before[f"{name}.jsonl"], name
    assert timeless(sums.read().training) == rows


# ---- failures


@pytest.fixture
def fails(tmp_path) -> Callable[..., str]:
    """fails(values) -> what the command line says."""

    def run(values: dict[str, Any]) -> str:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
        folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
        done = CliRunner().invoke(app, ["replicate", "--config", str(tmp_path / "study.yaml"), "--jobs", "1", *folders])
        assert done.exit_code != 0 and not (tmp_path / "results").exists()
        assert isinstance(done.exception, SystemExit), done.exception  # no traceback
        return " ".join(done.output.split())

    return run


def test_a_teacher_who_has_learnt_nothing_is_named(fails):
    taught = {"steps": 0, "styles": {"checked": 1.0}, "memorise": 5}
    values = SUMS | {"student": taught, "teacher": taught, "notes": None, "traces": {"problems": 2, "samples": 2}}
    said = fails(values)
    assert (
        "traces/0: the behaviour policy got only" in said and "Teach it longer, or draw more (traces.samples)" in said
    )


def test_a_bad_configuration_is_named(fails):
    assert "rl: unknown key 'round'; did you mean 'rounds'?" in fails(SUMS | {"rl": {"round": 1}})
