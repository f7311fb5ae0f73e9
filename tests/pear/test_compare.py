"""`pear compare`: intervals against loops and simulations, the table against numbers made here, files and errors."""

import errno
import itertools
import json
import math
import os
import re
from collections import namedtuple
from enum import Enum
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import pear.curves
from pear.cli import app
from pear.compare import compare, comparison_table
from pear.curves import draw_curves, draw_passes, series
from pear.eval import pass_at_k
from pear.intervals import bootstrap_interval, paired_counts, paired_difference
from pear.io import DataError, WriteError, write_json
from pear.pictures import plt, png, write_whole
from pear.runs import evaluation_path, read_run, write_run

PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(counts, samples=8, k=4, prompts=None, **other):
    prompts = prompts or [f"problem {i}" for i in range(len(counts))]
    problems = [
        {"prompt": prompt, "samples": samples, "correct": count, "example": "1+1"}
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    result = {"task": "countdown", "samples": samples, "k": k, "temperature": 1.0, "mean_tokens": 12.25}
    return {**result, "finished": 0.875, "problems": problems, **other}


def rl_log(steps=6, group=4):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "reward": step / 10, "pear/pass@1": step / 20, f"pear/pass@{group}": step / 10}
        row |= {"pear/kl_old": 1e-3 * step, "completions/mean_length": 20.0 + step, "pear/entropy": 1 / step}
        rows.append(row | {"pear/clip_low": 0.01, "pear/clip_high": 0.02})
    return rows


SFT_LOG = [{"step": 1, "pear/nll": 1.5}, {"step": 2, "pear/nll": 1.25}, {"step": 2, "eval_pear/nll": 1.3}]
A, B = [0, 1, 4, 8, 2, 0], [3, 1, 5, 8, 8, 0]


@pytest.fixture
def make(tmp_path):
    """make(name, before=counts, after=counts, kind=, log=) -> the folder of a run."""

    def build(name, before=None, after=None, kind="rl", log=None, settings=None, **options) -> Path:
        log = (rl_log() if kind == "rl" else SFT_LOG) if log is None else log
        write_run(tmp_path / name, kind, log, settings or {"lr": 1e-3}, {"torch": "2.11"})
        for moment, counts in (("before", before), ("after", after)):
            if counts is not None:
                write_json(evaluation_path(tmp_path / name, moment), evaluation(counts, **options))
        return tmp_path / name

    return build


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def every_resample(values):
    """Means of all n^n resamples of n values: the bootstrap's distribution itself, nothing drawn."""
    return np.array([sum(each) / len(values) for each in itertools.product(values, repeat=len(values))])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_interval_is_that_of_all_resamples(k, level):
    counts = [0, 1, 3, 6, 2]
    values = [pass_at_k(8, c, k) for c in counts]
    means = every_resample(values)
    mean, low, high = bootstrap_interval(counts, 8, k, draws=100_000, level=level)
    assert mean == pytest.approx(sum(values) / 5, abs=1e-12)
    for end, share in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        # The mean takes few values: the end's share lies between "below it" and "up to it".
        assert (means < end - 1e-9).mean() - 0.005 <= share <= (means <= end + 1e-9).mean() + 0.005


def test_difference_is_that_of_all_resamples():
    a, b = [0, 1, 3, 6, 2], [2, 1, 6, 5, 8]
    values = [pass_at_k(8, y, 2) - pass_at_k(6, x, 2) for x, y in zip(a, b, strict=True)]
    means = every_resample(values)
    mean, low, high = paired_difference(a, b, 6, 8, 2, draws=100_000)
    assert mean == pytest.approx(sum(values) / 5, abs=1e-12)
    for end, share in ((low, 0.025), (high, 0.975)):
        assert (means < end - 1e-9).mean() - 0.003 <= share <= (means <= end + 1e-9).mean() + 0.003


def test_interval_agrees_with_a_loop_that_draws_problems():
    rng, random = Random(0), Random(1)
    counts = [rng.choice([0, 0, 1, 2, 5, 16]) for _ in range(60)]
    values = [pass_at_k(16, c, 8) for c in counts]
    means = sorted(sum(random.choices(values, k=60)) / 60 for _ in range(20_000))
    mean, low, high = bootstrap_interval(counts, 16, 8, draws=20_000)
    assert mean == pytest.approx(sum(values) / 60)
    assert low == pytest.approx(means[500], abs=0.004) and high == pytest.approx(means[19_500], abs=0.004)


@pytest.mark.parametrize(
    ("counts", "expected"), [([8] * 7, 1.0), ([0] * 7, 0.0), ([2], 1 - 15 / 28), ([4] * 9, 1 - 6 / 28)]
)
def test_equal_problems_have_an_interval_of_no_width(counts, expected):
    interval = bootstrap_interval(counts, 8, 2)
    assert interval == pytest.approx((expected,) * 3, abs=1e-12)
    assert interval.low <= interval.high


counted = st.lists(st.integers(0, 8), min_size=1, max_size=20)


@given(counted, st.integers(1, 8), st.integers(0, 5))
def test_interval_lies_within_the_values_and_forgets_the_order(counts, k, seed):
    mean, low, high = interval = bootstrap_interval(counts, 8, k, seed=seed, draws=50)
    values = [pass_at_k(8, c, k) for c in counts]
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert interval == bootstrap_interval(sorted(counts), 8, k, seed=seed, draws=50)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-12)


@given(counted, st.integers(1, 8))
def test_difference_of_equal_runs_is_exactly_0(counts, k):
    assert paired_difference(counts, counts, 8, 8, k, draws=50) == (0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=20))
def test_difference_changes_its_sign_with_the_order_of_runs(pairs):
    a, b = zip(*pairs, strict=True)
    there, back = paired_difference(a, b, 8, 8, 2), paired_difference(b, a, 8, 8, 2)
    assert there.mean == pytest.approx(-back.mean, abs=1e-12)
    spread = 1 / math.sqrt(len(pairs))
    assert there.low == pytest.approx(-back.high, abs=0.2 * spread)  # other draws, so other by noise


def test_interval_shrinks_with_the_root_of_problems_and_widens_with_level():
    widths = []
    for repeats in (1, 4, 16):
        _, low, high = bootstrap_interval(A * 5 * repeats, 8, 1)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15) and widths[1] / widths[2] == pytest.approx(2, rel=0.15)
    narrow, wide = (bootstrap_interval(A, 8, 1, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_difference_of_runs_that_agree_is_surer_than_the_runs():
    rng = Random(0)
    a = [rng.randrange(13) for _ in range(100)]
    b = [c + rng.randrange(3) for c in a]
    _, low, high = bootstrap_interval(a, 16, 1)
    _, less, more = paired_difference(a, b, 16, 16, 1)
    assert more - less < (high - low) / 3 and less > 0


@pytest.mark.parametrize("k", [1, 8])
def test_coverage_is_about_nominal(k):
    """Problems whose chances are Beta(1, 3): E[1 - (1-p)^k] = 1 - 3 / (3 + k), whatever the samples."""
    rng, hits, trials = np.random.default_rng(0), 0, 1000
    for trial in range(trials):
        counts = rng.binomial(16, rng.beta(1, 3, size=100)).tolist()
        _, low, high = bootstrap_interval(counts, 16, k, seed=trial, draws=500)
        hits += low <= 1 - 3 / (3 + k) <= high
    assert 0.925 <= hits / trials <= 0.965  # the share's standard error is 0.007; percentiles fall a little short


def test_coverage_of_the_difference_is_about_nominal():
    rng, hits, trials = np.random.default_rng(1), 0, 1000
    for trial in range(trials):
        chance = rng.beta(1, 3, size=100)
        a, b = rng.binomial(16, chance).tolist(), rng.binomial(8, chance**0.5).tolist()
        truth = math.exp(math.lgamma(1.5) + math.lgamma(4) - math.lgamma(1) - math.lgamma(4.5)) - 1 / 4  # E p^0.5 - E p
        _, low, high = paired_difference(a, b, 16, 8, 1, seed=trial, draws=500)
        hits += low <= truth <= high
    assert 0.925 <= hits / trials <= 0.965


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 8, 1), {}, "no problems"),
        (([1], 8, 9), {}, "k must lie between 1 and samples=8, got 9"),
        (([9], 8, 1), {}, "correct must lie between 0 and samples=8, got 9"),
        (([1], 8, 1), {"draws": 0}, "draws must be at least 1, got 0"),
        (([1], 8, 1), {"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        (([1], 8, 1), {"level": 0.0}, "level must lie between 0 and 1, got 0.0"),
    ],
)
def test_intervals_refuse_what_has_no_meaning(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(*arguments, **options)


def test_difference_needs_as_many_problems_in_both():
    with pytest.raises(ValueError, match="same problems, got 2 and 3"):
        paired_difference([1, 2], [1, 2, 3], 8, 8, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The record


class Strategy(str, Enum):  # noqa: UP042 (transformers' enums are made like this)
    STEPS = "steps"


def test_record_comes_back_with_what_json_can_hold(tmp_path):
    settings = {
        "lr": 1e-3,
        "path": Path("x/y"),
        "betas": (0.9, 0.95),
        "strategy": Strategy.STEPS,
        "dtype": torch.float32,
    }
    settings |= {
        "names": {"b", "a"},
        "count": np.int64(3),
        "rate": np.float32(0.5),
        "loss": torch.tensor(2.0),
        "on": True,
    }
    log = [{"step": 1, "reward": math.nan, "loss": math.inf}, {"step": 2, "reward": 0.5}]
    write_run(tmp_path / "a", "rl", log, settings)
    run = read_run(tmp_path / "a")
    assert (run.name, run.kind, run.folder, run.before, run.after) == ("a", "rl", tmp_path / "a", None, None)
    assert run.log == [{"step": 1, "reward": None, "loss": None}, {"step": 2, "reward": 0.5}]
    expected = {"lr": 1e-3, "path": "x/y", "betas": [0.9, 0.95], "strategy": "steps", "dtype": "torch.float32"}
    assert run.settings == expected | {"names": ["a", "b"], "count": 3, "rate": 0.5, "loss": 2.0, "on": True}
    assert type(run.settings["on"]) is bool and set(run.versions) == {"torch", "transformers", "trl", "pear"}
    assert json.loads((tmp_path / "a" / "run.json").read_text())["format"] == 1


def test_write_run_refuses_an_unknown_kind_and_an_unknown_moment(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of sft, rl, got 'dpo'"):
        write_run(tmp_path / "a", "dpo", [], {})
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="moment must be one of before, after, got 'during'"):
        evaluation_path(tmp_path, "during")


def changed(**fields):
    def change(text):
        return json.dumps(json.loads(text) | fields)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], r"run\.json: damaged.*not JSON.*at line \d+"),
        (lambda text: "", r"run\.json: damaged.*not JSON"),
        (lambda text: "[1]", r"run\.json: damaged.*expected a JSON object with keys, got list"),
        (changed(format=2), r"run\.json: written by a newer pear \(format 2; this one reads 1\): upgrade pear"),
        (changed(format=None), r"`format` must be a whole number from 1, got None"),
        (changed(kind="dpo"), r"`kind` must be one of sft, rl, got 'dpo'"),
        (changed(settings=[]), r"`settings` must be a dict, got list"),
        (changed(log={}), r"`log` must be a list, got dict"),
        (changed(log=[{"step": 1}, {"reward": 1}]), r"`log\[1\]` must be an object with a number `step`"),
        (changed(name=None), r"`name` must be a str, got NoneType"),
    ],
)
def test_damaged_record(make, change, message):
    path = make("a") / "run.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message) as error:
        read_run(path.parent)
    assert str(error.value).startswith(str(path))


def test_record_that_is_no_text(make):
    path = make("a") / "run.json"
    path.write_bytes(b'{"format": \xff}')
    with pytest.raises(DataError, match=r"run\.json: damaged.*not UTF-8 text.*byte 11"):
        read_run(path.parent)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "`samples` must be a whole number from 1, got 0"),
        ({"k": 9}, "`k` must lie between 1 and samples=8, got 9"),
        ({"mean_tokens": "12"}, "`mean_tokens` must be a number, got '12'"),
        ({"finished": None}, "`finished` must be a number, got None"),
        ({"problems": []}, "`problems` must be a list with at least one problem"),
        ({"problems": [{"samples": 8, "correct": 1}]}, r"`problems\[0\]` must be an object with a text `prompt`"),
        ({"problems": [{"prompt": "x", "samples": 7, "correct": 1}]}, r"`problems\[0\].samples` must be 8, got 7"),
        (
            {"problems": [{"prompt": "x", "samples": 8, "correct": 9}]},
            r"`problems\[0\].correct` must lie between 0 and 8",
        ),
    ],
)
def test_damaged_evaluation(make, fields, message):
    folder = make("a", after=A)
    write_json(evaluation_path(folder, "after"), evaluation(A) | fields)
    with pytest.raises(DataError, match=message) as error:
        read_run(folder)
    assert str(error.value).startswith(str(folder / "eval" / "after.json"))


def test_no_folder_and_no_run(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder \(expected the output_dir"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"not a run: there is no run\.json"):
        read_run(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def parse(table):
    """Markdown tables as lists of dicts by column."""
    found = []
    for block in table.split("\n\n"):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def numbers(cell):
    """ "12.5 % [1.0, 20.0]" or "+1.5 [-1.0, +3.0]" -> three floats."""
    return [float(each) for each in re.fullmatch(r"(\S+)(?: %)? \[(\S+), (\S+)\]", cell).groups()]


def percentiles(values, draws=40_000):
    """Independent of ours: problems drawn one by one, in percent."""
    values = np.array(values)
    means = values[np.random.default_rng(7).integers(len(values), size=(draws, len(values)))].mean(axis=1)
    return [100 * values.mean(), *(100 * np.quantile(means, [0.025, 0.975]))]


def test_table_holds_the_numbers(make):
    before, a, b = [c // 2 for c in A * 20], A * 20, B * 20
    runs = [read_run(make("a", before, a)), read_run(make("b", before, b, kind="sft"))]
    first, second = parse(comparison_table(runs))
    for row, after in zip(first, (a, b), strict=True):
        for k in (1, 4):
            for moment, counts in (("before", before), ("after", after)):
                expected = percentiles([1 - math.comb(8 - c, k) / math.comb(8, k) for c in counts])
                mean, *ends = numbers(row[f"pass@{k} {moment}"])
                assert mean == pytest.approx(expected[0], abs=0.0501)
                assert ends == pytest.approx(expected[1:], abs=0.7)
        assert row["tokens after"] == "12.2" and row["finished after"] == "87.5 %"
    assert [row["kind"] for row in first] == ["rl", "sft"]
    assert [row["last reward"] for row in first] == ["0.6", "–"]
    assert [row["last KL from the old"] for row in first] == ["0.006", "–"]
    assert "last KL to the reference" not in first[0]
    names = ["b − a, after", "b − a, before", "a, after − before", "b, after − before"]
    assert [row["difference"] for row in second] == names
    for row, (x, y) in zip(second, [(a, b), (before, before), (before, a), (before, b)], strict=True):
        for k in (1, 4):
            expected = percentiles([pass_at_k(8, d, k) - pass_at_k(8, c, k) for c, d in zip(x, y, strict=True)])
            mean, *ends = numbers(row[f"pass@{k}"])
            assert mean == pytest.approx(expected[0], abs=0.0501) and ends == pytest.approx(expected[1:], abs=0.7)
    assert second[1]["pass@1"] == "+0.0 [+0.0, +0.0]"


def sft_log(**more):
    """Two steps; each of `more` is logged as `pear/name`, a number a step."""
    return [
        {"step": t + 1, "pear/nll": 1.5 - t / 4, **{f"pear/{name}": values[t] for name, values in more.items()}}
        for t in range(2)
    ]


OBJECTIVE_RUNS = {
    "a": ({"weighting": "none", "distill": "none", "negatives": False}, {}, "none (plain SFT)"),
    "b": ({"weighting": "dft"}, {"weight_mean": [0.4, 0.5], "effective_sample_size": [0.7, 0.25]}, "dft"),
    "c": ({"weighting": "pear", "negatives": True}, {"wrong_nll": [2.0, 3.5]}, "pear, negatives"),
    "d": ({"weighting": "none", "distill": "js"}, {"divergence": [0.3, 0.125]}, "distill js"),
    "e": (
        {"weighting": "pear", "distill": "forward"},
        {"divergence": [0.3, 0.0625]},
        "distill forward, weighted by pear",
    ),
}


def test_runs_of_different_objectives_have_one_table(make, monkeypatch):
    """The plain NLL first, which all have; what a run has no number of stays empty; curves where there are any."""
    runs = [
        read_run(make(name, kind="sft", log=sft_log(**logged), settings=settings))
        for name, (settings, logged, _) in OBJECTIVE_RUNS.items()
    ]
    table = parse(comparison_table(runs))[0]
    assert [row["objective"] for row in table] == [words for *_, words in OBJECTIVE_RUNS.values()]
    assert [title for title in table[0] if title.startswith("last")] == [
        "last NLL", "last NLL of wrong answers", "last divergence", "last weight", "last effective sample size",
    ]  # fmt: skip
    for title, cells in {
        "last NLL": ["1.25"] * 5,
        "last NLL of wrong answers": ["–", "–", "3.5", "–", "–"],
        "last divergence": ["–", "–", "–", "0.125", "0.0625"],
        "last weight": ["–", "0.5", "–", "–", "–"],
        "last effective sample size": ["–", "0.25", "–", "–", "–"],
    }.items():
        assert [row[title] for row in table] == cells
    panels = {axis.get_title(): axis for axis in drawn(monkeypatch, draw_curves, runs, "x.png").axes}
    assert list(panels)[1:] == ["wrong answers", "divergence from the teacher", "weights", "effective sample size"]
    for title, runs_drawn in zip(panels, (5, 1, 2, 1, 1), strict=True):
        assert len([line for line in panels[title].lines if len(line.get_xdata())]) == runs_drawn
    assert list(panels["effective sample size"].lines[1].get_ydata()) == [0.7, 0.25]
    assert "objective" not in comparison_table([read_run(make("f")), read_run(make("g", kind="sft"))])


def test_last_is_the_last_that_was_logged_and_finite(make):
    log = [*rl_log(3), {"step": 4, "reward": math.nan}, {"step": 4, "train_runtime": 1.0}]
    first = parse(comparison_table([read_run(make("a", log=log)), read_run(make("b", log=[]))]))[0]
    assert [row["last reward"] for row in first] == ["0.3", "–"]


def test_runs_with_other_k_and_samples_show_the_same_columns(make):
    runs = [read_run(make("a", after=A, k=4)), read_run(make("b", after=[1, 2, 0, 0, 2, 1], samples=2, k=2))]
    first, second = parse(comparison_table(runs))
    assert [each for each in first[0] if each.endswith("after")][:3] == ["pass@1 after", "pass@2 after", "pass@4 after"]
    assert numbers(first[0]["pass@2 after"])[0] == pytest.approx(
        100 * np.mean([pass_at_k(8, c, 2) for c in A]), abs=0.05
    )
    assert first[1]["pass@4 after"] == "–" and second[0]["pass@4"] == "–"
    assert numbers(second[0]["pass@2"])


def test_problems_in_another_order_are_paired_by_their_prompts(make):
    order = [3, 0, 5, 1, 4, 2]
    moved = dict(after=[B[i] for i in order], prompts=[f"problem {i}" for i in order])
    straight = comparison_table([read_run(make("a", after=A)), read_run(make("b", after=B))])
    assert comparison_table([read_run(make("a", after=A)), read_run(make("b", **moved))]) == straight


@pytest.mark.parametrize(
    "prompts", [["other", *(f"problem {i}" for i in range(1, 6))], [f"problem {i}" for i in (0, 0, 1, 2, 3, 4)]]
)
def test_other_problems_have_no_difference_and_the_report_says_so(make, tmp_path, prompts):
    folders = [make("a", after=A), make("b", after=B, prompts=prompts)]
    _, second = parse(comparison_table([read_run(folder) for folder in folders]))
    assert second == [{"difference": "b − a, after", "pass@1": "different problems", "pass@4": "different problems"}]
    compare(folders, tmp_path / "out")
    assert "asked different problems" in (tmp_path / "out" / "report.md").read_text()


def test_prompts_twice_in_another_order_are_not_paired():
    a, b = evaluation([1, 2, 3], prompts=["x", "x", "y"]), evaluation([1, 2, 3], prompts=["x", "y", "x"])
    assert paired_counts(a, b) is None
    assert paired_counts(a, a) == ([1, 2, 3], [1, 2, 3])


def test_names_cannot_break_the_table(make, tmp_path):
    folders = [make("a", A, B), make("b", A, B)]
    compare(folders, tmp_path / "out", ["one | two\nthree", "_$x$_\\"])
    first, _ = parse(comparison_table([read_run(folder) for folder in folders]))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| one \\| two three | rl |" in text and "| _$x$_\\\\ | rl |" in text
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n\n")[1].splitlines()}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Files


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_report_and_pictures_the_same_twice(make, tmp_path):
    folders = [make("a", A, B), make("b", A, B[::-1], settings={"lr": 2e-3}), make("c", after=B, kind="sft")]
    written = compare(folders, tmp_path / "deep" / "out")
    first = contents(tmp_path / "deep" / "out")
    assert [path.name for path in written] == ["report.md", "passes.png", "curves_rl.png", "curves_sft.png"]
    assert sorted(first) == sorted(path.name for path in written)
    assert all(content.startswith(PNG) for name, content in first.items() if name.endswith(".png"))
    compare(folders, tmp_path / "deep" / "out")
    assert contents(tmp_path / "deep" / "out") == first
    compare(folders, tmp_path / "other")
    assert contents(tmp_path / "other") == first
    text = first["report.md"].decode()
    assert comparison_table([read_run(folder) for folder in folders]) in text
    assert "> c: not evaluated before the run." in text and "| lr | 0.001 | 0.002 | 0.001 |" in text
    assert set(re.findall(r"\]\((\S+\.png)\)", text)) == set(first) - {"report.md"}


def test_missing_evaluations_and_empty_logs(make, tmp_path):
    written = compare([make("a", log=[]), make("b", log=[])], tmp_path / "out")
    assert [path.name for path in written] == ["report.md"]
    text = written[0].read_text()
    assert "a: not evaluated before nor after the run" in text and "| a | rl | – | – | – | – |" in text


def test_evaluations_made_otherwise_are_told(make, tmp_path):
    compare([make("a", after=A), make("b", after=A, temperature=0.5)], tmp_path / "out")
    assert "> The evaluations differ in temperature: 1.0, 0.5." in (tmp_path / "out" / "report.md").read_text()


def drawn(monkeypatch, call, *arguments):
    """The figure that `call` would have saved."""
    figures = []
    monkeypatch.setattr(pear.curves, "save_figure", lambda figure, path: figures.append(figure))
    assert call(*arguments) is bool(figures)
    for figure in figures:
        plt.close(figure)
    return figures[0] if figures else None


def test_curves_draw_what_was_logged_and_no_empty_panel(make, monkeypatch):
    runs = [read_run(make("a")), read_run(make("b", log=rl_log(4, group=16)))]
    figure = drawn(monkeypatch, draw_curves, runs, "x.png")
    panels = {axis.get_title(): axis for axis in figure.axes}
    expected = [
        "reward",
        "pass@k of the rollouts",
        "KL from the policy that drew",
        "completion length",
        "clipped",
        "entropy",
    ]
    assert list(panels) == expected
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in panels["reward"].lines]
    assert lines == [([1, 2, 3, 4, 5, 6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])]
    legend = [text.get_text() for text in panels["pass@k of the rollouts"].get_legend().get_texts()]
    assert legend == ["pass@16", "pass@4", "pass@1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    sft = drawn(monkeypatch, draw_curves, [read_run(make("c", kind="sft", log=SFT_LOG[:2]))], "x.png")
    assert [axis.get_ylabel() for axis in sft.axes] == ["NLL (nats a token)"]
    log = [row | {"pear/gradient_kept": 0.2, "pear/gradient_left_out": 0.01} for row in SFT_LOG[:2]]
    sft = drawn(monkeypatch, draw_curves, [read_run(make("e", kind="sft", log=log))], "x.png")
    assert [axis.get_title() for axis in sft.axes][1:] == ["gradient products", "gradient left out"]
    assert drawn(monkeypatch, draw_curves, [read_run(make("d", log=[]))], "x.png") is None


def test_run_without_a_reference_has_no_kl_to_it(make):
    logs = [[row | {"pear/kl_ref": kl} for row, kl in zip(rl_log(2), kls, strict=True)] for kls in ([0, 0], [0, 0.5])]
    runs = [read_run(make(name, log=log)) for name, log in zip("ab", logs, strict=True)]
    assert [row["last KL to the reference"] for row in parse(comparison_table(runs))[0]] == ["–", "0.5"]
    assert "last KL to the reference" not in comparison_table([runs[0], runs[0]])
    assert series(runs[0], "pear/kl_ref") == ([], [])
    assert series(runs[1], "pear/kl_ref") == ([1, 2], [0, 0.5])


def test_long_curves_are_smoothed_without_a_bias_at_the_ends(make, monkeypatch):
    log = [{"step": step, "reward": 0.5 + 0.1 * (-1) ** step} for step in range(200)]
    figure = drawn(monkeypatch, draw_curves, [read_run(make("a", log=log))], "x.png")
    raw, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    assert len(raw) == len(smooth) == 200
    assert np.abs(smooth - 0.5).max() <= 0.1 / 5 + 1e-9 and np.abs(raw - 0.5).max() == pytest.approx(0.1)


def test_curves_are_of_one_kind(make):
    with pytest.raises(ValueError, match="one kind, got rl, sft"):
        draw_curves([read_run(make("a")), read_run(make("b", kind="sft"))], "x.png")
    with pytest.raises(ValueError, match="one kind, got no runs"):
        draw_curves([], "x.png")


def test_passes_draw_every_interval(make, monkeypatch):
    runs = [read_run(make("a", A, B)), read_run(make("b", after=B))]
    figure = drawn(monkeypatch, draw_passes, runs, "x.png")
    assert [axis.get_title() for axis in figure.axes] == ["pass@1", "pass@4"]
    for axis, k in zip(figure.axes, (1, 4), strict=True):
        assert len(axis.lines) == 6  # a bar and a point for each of three evaluations
        for (bar, point), counts in zip(zip(axis.lines[::2], axis.lines[1::2], strict=True), (A, B, B), strict=True):
            mean, low, high = (100 * value for value in bootstrap_interval(counts, 8, k))
            assert list(bar.get_xdata()) == [low, high] and list(point.get_xdata()) == [mean]
    assert drawn(monkeypatch, draw_passes, [read_run(make("c"))], "x.png") is None


def test_draw_functions_write_files(make, tmp_path):
    run = read_run(make("a", A, B))
    assert draw_curves([run], tmp_path / "new" / "curves.png") and draw_passes([run], tmp_path / "new" / "passes.png")
    assert all(content.startswith(PNG) for content in contents(tmp_path / "new").values())
    assert not plt.get_fignums()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", [1, 3])
def test_full_disk_leaves_what_was_there(make, tmp_path, monkeypatch, existing, fails):
    out, calls = tmp_path / "deep" / "out", []
    folders = [make("a", A, B), make("b", A, B)]
    if existing:
        compare([make("c", B, A), folders[0]], out)
    before = contents(out) if existing else None

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pear.pictures.os.fsync", full)
    name = {1: "report.md", 3: "curves_rl.png"}[fails]
    with pytest.raises(WriteError, match=rf"could not write .*{name}: the disk is full"):
        compare(folders, out)
    assert (contents(out) == before) if existing else not out.parent.exists()
    assert not plt.get_fignums()


def test_name_taken_by_a_folder_stops_before_any_file(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(WriteError, match=r"could not write .*b: Is a directory"):
        write_whole({tmp_path / "a": b"x", tmp_path / "b": b"y"})
    assert os.listdir(tmp_path) == ["b"]


def test_png_of_equal_figures_is_equal():
    def figure():
        made, axis = plt.subplots()
        axis.plot([1, 2], [3, 4])
        return made

    assert png(figure()) == png(figure()) and b"Matplotlib" not in png(figure())


Case = namedtuple("Case", "runs out names message")


@pytest.mark.parametrize(
    "case",
    [
        Case(["a"], "out", None, "two runs or more, got 1"),
        Case([], "out", None, "two runs or more, got 0"),
        Case(["a", "b", "a"], "out", None, "this run is given twice"),
        Case(["a", "b/../a"], "out", None, "this run is given twice"),
        Case(["a", "b"], "file", None, "out: .*file is a file; give a folder"),
        Case(["a", "b"], "b", None, "out: .*b is one of the runs"),
        Case(["a", "b"], "out", ["x"], "2 runs need as many names, got 1"),
        Case(["a", "b"], "out", ["x", "x"], "'x' is given to 2 runs; each needs a name of its own"),
        Case(["a", "b"], "out", ["x", " "], "a name is empty"),
        Case(["a", "nowhere"], "out", None, "nowhere: no such folder"),
        Case(["a", "empty"], "out", None, "empty: not a run"),
    ],
)
def test_compare_refuses_before_writing(make, tmp_path, case):
    make("a", A, B), make("b", A, B), (tmp_path / "file").touch(), (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=case.message):
        compare([tmp_path / name for name in case.runs], tmp_path / case.out, case.names)
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_one_name_are_told_apart_by_their_folders(make, tmp_path):
    folders = [make("x/final", A, B), make("y/final", A, B), make("z", A, B)]
    text = compare(folders, tmp_path / "out")[0].read_text()
    assert text.startswith(f"# {folders[0]}, {folders[1]}, z\n")
    write_run(folders[2], "rl", [], {}, {}, name=str(folders[0]))
    with pytest.raises(DataError, match="2 runs have the name .*x/final.*--name"):
        compare(folders, tmp_path / "out")


def test_command(make, tmp_path):
    folders = [str(make("a", A, B)), str(make("b", A, B, kind="sft"))]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", *folders, "--out", str(out), "--name", "SFT", "--name", "PEAR"])
    assert result.exit_code == 0, result.output
    assert f"written: {out / 'report.md'}" in result.output and f"written: {out / 'curves_sft.png'}" in result.output
    report = (out / "report.md").read_text()
    assert report.startswith("# SFT, PEAR\n")
    tables = [line for line in report.splitlines() if line.startswith("|")]
    runs, differences = tables[:4], tables[4:9]
    assert "pass@" in runs[0] and differences[0].startswith("| difference")
    assert all(line in result.output for line in (*runs, *differences))
    failed = CliRunner().invoke(app, ["compare", folders[0], "--out", str(tmp_path / "none")])
    assert failed.exit_code == 1 and "error: a comparison needs two runs or more, got 1" in failed.output
    assert "Traceback" not in failed.output and not (tmp_path / "none").exists()
