"""Results as files: what is written is read again, and whatever is damaged is named by file and line."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from synthetic import make_results

from pear.io import DataError, WriteError
from pear.replicate.results import ROWS, STUDY, read_results, write_results


@pytest.fixture
def results():
    return make_results()


def test_what_is_written_is_read_again(results, tmp_path):
    paths = write_results(tmp_path / "new" / "folder", results)
    assert sorted(path.name for path in paths) == sorted([STUDY, *(f"{name}.jsonl" for name in ROWS)])
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    assert read_results(tmp_path / "new" / "folder") == results
    rows = [json.loads(line) for line in (tmp_path / "new/folder/evaluations.jsonl").read_text().splitlines()]
    assert rows == results.evaluations


def test_same_results_are_same_bytes(results, tmp_path):
    for name in "ab":
        write_results(tmp_path / name, results)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_empty_files_of_rows_are_results_too(results, tmp_path):
    bare = dataclasses.replace(results, training=[], diagnostics=[], weights=[], jobs=[])
    write_results(tmp_path, bare)
    assert read_results(tmp_path) == bare


def test_arms_are_in_the_order_of_the_configuration(results, tmp_path):
    study = results.study | {"arms": {name: results.study["arms"][name] for name in reversed(results.arms)}}
    write_results(tmp_path, dataclasses.replace(results, study=study))
    assert read_results(tmp_path).arms == ["pear-sequence", "pear-block", "pear-token", "sft"]
    assert results.ablations == ["pear-gamma-1", "pear-gamma-0.9"]


def test_counts_stand_in_the_order_of_the_seeds_asked_for(results):
    shuffled = dataclasses.replace(results, evaluations=results.evaluations[::-1])
    counts = shuffled.counts("pear-token", "after")
    assert counts.shape == (3, 12) and counts.dtype == np.int64
    for seed in range(3):
        row = next(
            r for r in results.evaluations if (r["arm"], r["seed"], r["moment"]) == ("pear-token", seed, "after")
        )
        assert counts[seed].tolist() == row["correct"]
    assert (shuffled.counts("pear-token", "after", [2, 0]) == counts[[2, 0]]).all()
    assert shuffled.counts("student", "start").shape == (3, 12)
    assert shuffled.counts("pear-gamma-1", "before").shape == (1, 12)
    assert shuffled.samples("sft", "before") == 32


@pytest.mark.parametrize(
    "arm, moment, seeds, message",
    [
        ("sft", "start", None, "no evaluation of arm 'sft' at moment 'start' with seed 0"),
        ("sft", "after", [0, 7], "no evaluation of arm 'sft' at moment 'after' with seed 7"),
        ("other", "after", None, "arm must be one of sft, pear-token, .*, teacher, got 'other'"),
    ],
)
def test_counts_refuse_what_was_not_evaluated(results, arm, moment, seeds, message):
    with pytest.raises(ValueError, match=message):
        results.counts(arm, moment, seeds)


def test_a_write_that_fails_leaves_the_old_files(results, tmp_path):
    write_results(tmp_path, results)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "jobs.jsonl"}
    (tmp_path / "jobs.jsonl").unlink()
    (tmp_path / "jobs.jsonl").mkdir()
    with pytest.raises(WriteError, match="jobs.jsonl"):
        write_results(tmp_path, make_results(random=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def set_row(name, place, **fields):
    return lambda results: getattr(results, name)[place].update(fields)


def drop_row(name, place):
    return lambda results: getattr(results, name).pop(place)


def drop_field(name, place, field):
    return lambda results: getattr(results, name)[place].pop(field)


def set_study(**fields):
    return lambda results: results.study.update(fields)


def repeat_row(name, place):
    return lambda results: getattr(results, name).append(getattr(results, name)[place])


DAMAGES = {
    "field gone": (drop_field("evaluations", 3, "correct"), "evaluations.jsonl:4: no `correct`"),
    "wrong type": (set_row("evaluations", 1, seed="0"), "evaluations.jsonl:2: `seed` .*'0'"),
    "a count too many": (set_row("evaluations", 2, correct=[1] * 13), "evaluations.jsonl:3: .* each of 12 .* got 13"),
    "a negative count": (set_row("evaluations", 2, correct=[-1] * 12), "evaluations.jsonl:3: `correct` has"),
    "count over samples": (
        set_row("evaluations", 2, correct=[33] * 12),
        "evaluations.jsonl:3: .* 33, more than the 32",
    ),
    "few samples": (
        set_row("evaluations", 2, samples=16, correct=[1] * 12),
        "evaluations.jsonl:3: 16 samples .* too few for pass@32",
    ),
    "other samples": (set_row("evaluations", 6, samples=64), r"evaluations.jsonl: 'sft' at 'before' .*\[32, 64\]"),
    "unknown arm": (set_row("training", 4, arm="other"), "training.jsonl:5: unknown arm 'other'; known are sft, "),
    "unknown seed": (set_row("diagnostics", 0, seed=9), r"diagnostics.jsonl:1: arm 'sft' .* \[0, 1, 2\], got 9"),
    "unknown moment": (set_row("evaluations", 8, moment="late"), "evaluations.jsonl:9: `moment` .*'late'"),
    "start of an arm": (set_row("evaluations", 8, moment="start"), "evaluations.jsonl:9: .* cannot have the moment"),
    "unknown phase": (set_row("training", 0, phase="x"), "training.jsonl:1: `phase` .*'x'"),
    "log without step": (set_row("training", 0, log=[{"reward": 1.0}]), "training.jsonl:1: `log`"),
    "a row twice": (repeat_row("weights", 0), "weights.jsonl:.*there twice .*weights.jsonl:1"),
    "a job twice": (repeat_row("jobs", 2), "jobs.jsonl:.* name 'sft/sft/1' is there twice .*jobs.jsonl:3"),
    "positions": (set_row("weights", 1, by_position=[1.0] * 19), "weights.jsonl:2: `by_position`"),
    "problems out of order": (lambda r: r.problems.reverse(), "problems.jsonl:1: problem 11 stands in place 0"),
    "no problems": (
        lambda r: (r.problems.clear(), [row.update(correct=[]) for row in r.evaluations]),
        "evaluations.jsonl: there are no problems",
    ),
    "evaluation missing": (drop_row("evaluations", 6), "no evaluation of 'sft' at 'before' with seed 0: let the study"),
    "teacher missing": (drop_row("evaluations", 1), "no evaluation of 'teacher' at 'start' with seed 0"),
    "no seeds": (set_study(seeds=[]), "study.json: `seeds` must be one or more"),
    "a seed twice": (set_study(seeds=[0, 1, 1]), r"`seeds` .* none twice, got \[0, 1, 1\]"),
    "ablation seeds": (set_study(ablation_seeds=[5]), r"`ablation_seeds` must be among `seeds` .*also \[5\]"),
    "no ablation seeds": (set_study(ablation_seeds=[]), "`ablation_seeds` is empty"),
    "baseline": (set_study(baseline="x"), "`baseline` must be one of sft, .*got 'x'"),
    "primary arm": (set_study(primary={"arm": "sft", "k": 8}), "`primary.arm` must be an arm and not the baseline"),
    "primary k": (set_study(primary={"arm": "pear-token", "k": 2}), "`primary.k` must be one of `ks`"),
    "no primary": (set_study(primary={}), "`primary.arm` .*got None"),
    "ks": (set_study(ks=[0]), r"`ks` must be one or more whole numbers from 1, got \[0\]"),
    "seconds": (set_study(seconds={}), "`seconds` must have `all_jobs`"),
    "name twice": (set_study(ablations={"sft": {}}), "'sft' names 2 of"),
    "study field": (lambda r: r.study.pop("ks"), "study.json: no `ks`"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_when_read_and_when_written(results, tmp_path, damage):
    spoil, message = DAMAGES[damage]
    damaged = copy.deepcopy(results)
    spoil(damaged)
    with pytest.raises(DataError, match=message):
        write_results(tmp_path / "new", damaged)
    assert not (tmp_path / "new").exists()
    write_results(tmp_path / "old", results)
    (tmp_path / "old" / STUDY).write_text(json.dumps(damaged.study))
    for name in ROWS:
        rows = getattr(damaged, name)
        (tmp_path / "old" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message) as caught:
        read_results(tmp_path / "old")
    assert str(tmp_path / "old") in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(results, tmp_path, value):
    write_results(tmp_path, results)
    results.training[2]["log"][1]["reward"] = value
    message = r"training.jsonl:3: `log\[1\].reward` is (nan|inf), .* write null"
    with pytest.raises(DataError, match=message):
        write_results(tmp_path, results)
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results.training))
    with pytest.raises(DataError, match=message):
        read_results(tmp_path)


def test_lines_are_counted_as_they_stand_in_the_file(results, tmp_path):
    write_results(tmp_path, results)
    path = tmp_path / "diagnostics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", lines[1].replace('"sft"', '"other"')]))
    with pytest.raises(DataError, match="diagnostics.jsonl:3: unknown arm 'other'"):
        read_results(tmp_path)


def test_folders_and_files_that_are_no_results(results, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_results(tmp_path / "none")
    with pytest.raises(DataError, match="there is no study.json"):
        read_results(tmp_path)
    write_results(tmp_path, results)
    (tmp_path / "jobs.jsonl").write_text('{"name": \n')
    with pytest.raises(DataError, match="jobs.jsonl:1: not JSON"):
        read_results(tmp_path)
    (tmp_path / "jobs.jsonl").unlink()
    with pytest.raises(DataError, match="jobs.jsonl: no such file"):
        read_results(tmp_path)
    for content in (b"{", b'{"study": "\xff"}'):
        (tmp_path / STUDY).write_bytes(content)
        with pytest.raises(DataError, match="study.json: not JSON"):
            read_results(tmp_path)
    (tmp_path / STUDY).write_text("[]")
    with pytest.raises(DataError, match="study.json: expected a JSON object with keys, got list"):
        read_results(tmp_path)
