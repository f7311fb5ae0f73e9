"""The report's numbers against loops over the rows they are made of, its words, its pictures and its files."""

import dataclasses
import math
import re

import numpy as np
import pytest
from matplotlib import colors
from synthetic import make_results

from pear.eval import pass_at_k
from pear.intervals import Interval
from pear.io import WriteError
from pear.pictures import plt
from pear.replicate.figures import TITLES, figures, mean_curve, styles, weight_profile
from pear.replicate.report import (
    FAST,
    ONE_SEED,
    comparisons,
    duration,
    mean_text,
    report_text,
    verdict,
    write_report,
)
from pear.replicate.summary import ablation_rows, compared, difference, gain, order, passes, rate
from pear.tables import points


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def report(results):
    return report_text(results, TITLES)


def tables(text):
    """Every table of a markdown text, as a list of rows of cells, heads included and rules left out."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            if not line.startswith("| ---"):
                found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def section(text, title):
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def looped_mean(results, arm, moment, k, seeds):
    values = [
        pass_at_k(row["samples"], correct, k)
        for row in results.evaluations
        if (row["arm"], row["moment"]) == (arm, moment) and row["seed"] in seeds
        for correct in row["correct"]
    ]
    return 100 * sum(values) / len(values)


def first_number(text):
    return float(re.match(r"[+-]?\d+\.\d+", text)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("k", [1, 8, 32])
def test_tables_hold_the_means_of_the_rows(results, report, k):
    rates, differences = tables(section(report, f"pass@{k}"))
    assert [row[0] for row in rates[1:]] == ["sft", "pear-token", "pear-block", "pear-sequence"]
    base = {moment: looped_mean(results, "sft", moment, k, range(3)) for moment in ("before", "after")}
    for arm, before, after, gained in rates[1:]:
        means = {moment: looped_mean(results, arm, moment, k, range(3)) for moment in ("before", "after")}
        assert first_number(before) == pytest.approx(means["before"], abs=0.051)
        assert first_number(after) == pytest.approx(means["after"], abs=0.051)
        assert first_number(gained) == pytest.approx(means["after"] - means["before"], abs=0.051)
        for row in differences[1:]:
            if row[0].strip("*").split("*")[0] == arm:
                assert first_number(row[1]) == pytest.approx(means["before"] - base["before"], abs=0.051)
                assert first_number(row[3]) == pytest.approx(means["after"] - base["after"], abs=0.051)
    assert len(differences) == 4
    found = re.search(r"arms start from has ([\d.]+) % .*the teacher ([\d.]+) %", section(report, f"pass@{k}"))
    assert float(found[1]) == pytest.approx(looped_mean(results, "student", "start", k, range(3)), abs=0.051)
    assert float(found[2]) == pytest.approx(looped_mean(results, "teacher", "start", k, range(3)), abs=0.051)


def test_a_teacher_no_better_than_its_student_is_told(results, report):
    assert "no stronger behaviour policy" not in report
    counts = {row["seed"]: row["correct"] for row in results.evaluations if row["arm"] == "student"}
    rows = [
        row | {"correct": counts[row["seed"]]} if row["arm"] == "teacher" and row["seed"] in (0, 2) else row
        for row in results.evaluations
    ]
    assert "On 2 seeds (0, 2) the teacher's" in report_text(dataclasses.replace(results, evaluations=rows), [])


def test_only_the_primary_comparison_is_marked(report):
    for k in (1, 8, 32):
        marked = [row[0] for row in tables(section(report, f"pass@{k}"))[1] if "primary" in row[0]]
        assert marked == (["**pear-token** (primary)"] if k == 8 else [])


def test_seeds_won_are_counted_seed_by_seed(results):
    found = difference(results, "pear-block", "after", 8)
    signs = []
    for seed in range(3):
        ours, theirs = (looped_mean(results, arm, "after", 8, [seed]) for arm in ("pear-block", "sft"))
        signs.append(0 if abs(ours - theirs) < 1e-9 else math.copysign(1, ours - theirs))
    assert (found.won, found.tied, found.lost) == tuple(signs.count(sign) for sign in (1, 0, -1))


def test_ablations_are_compared_on_their_own_seeds():
    results = make_results(seeds=4)
    head, *rows = tables(section(report_text(results, []), "Ablations"))[0]
    assert [row[0] for row in rows] == ["pear-token (as in the study)", "pear-gamma-1", "pear-gamma-0.9"]
    for name, *cells in rows:
        for place, k in enumerate((1, 8, 32)):
            arm = name.split()[0]
            expected = looped_mean(results, arm, "after", k, (0, 1)) - looped_mean(results, "sft", "after", k, (0, 1))
            assert first_number(cells[2 * place]) == pytest.approx(expected, abs=0.051)
            assert sum(map(int, cells[2 * place + 1].split("/"))) == 2


def test_ablations_stand_below_the_arms_they_change(results):
    arms = {"sft": {"weighting": "none"}, "pear-token": {"weighting": "pear", "level": "token"}}
    arms |= {"pear-block": {"weighting": "pear", "level": "block"}}
    ablations = {"a": {"weighting": "pear", "level": "block", "block_size": 16}, "b": {"weighting": "none"}}
    ablations |= {"c": {"weighting": "pear", "level": "token", "gamma": 1.0}, "d": {"weighting": "asft"}}
    changed = dataclasses.replace(results, study=results.study | {"arms": arms, "ablations": ablations})
    # the baseline minus itself is nothing, and what is like no arm is compared with the primary one
    assert ablation_rows(changed) == ["pear-block", "pear-token", "a", "b", "c", "d"]


def test_comparisons_are_as_many_as_the_report_shows(results, report):
    shown = sum(
        bool(re.match(r"[+-]\d+\.\d \[[+-]", text))
        for title in ("pass@1", "pass@8", "pass@32", "Ablations")
        for table in tables(section(report, title))
        for row in table
        for text in (row[1:] if "gain by RL, points" not in table[0] else [])
    )
    assert comparisons(results) == shown == 3 * 3 * 2 + 3 * 3
    assert f"There are {shown} comparisons" in report and f"up to {0.05 * shown:.1f} or so" in report


def test_rank_correlation_of_the_report_is_that_of_the_arms_means(results, report):
    rows = tables(section(report, "Order of the arms"))[0][1:]
    for (name, text), k in zip(rows, (1, 8, 32), strict=True):
        ranks = []
        for moment in ("before", "after"):
            means = [round(looped_mean(results, arm, moment, k, range(3)), 9) for arm in results.arms]
            ranks.append([sum((other < mean) + (other <= mean) for other in means) / 2 for mean in means])
        assert name == f"pass@{k}"
        assert first_number(text) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=0.0051)


def test_diagnostics_are_means_over_seeds(results, report):
    head, *rows = tables(section(report, "Diagnostics"))[0]
    assert [row[0] for row in rows] == [*results.arms, *results.ablations]
    for row in rows:
        found = [each for each in results.diagnostics if each["arm"] == row[0]]
        for title, value in (
            ("KL(SFT ‖ student)", lambda each: each["sft_kl"]),
            ("move by RL", lambda each: each["rl_distance"] / each["start_norm"]),
            ("held-out NLL", lambda each: each["heldout_nll"]),
        ):
            text = row[head.index(title)]
            mean, _, error = text.partition(" ± ")
            values = [value(each) for each in found]
            assert float(mean) == pytest.approx(np.mean(values), rel=0.03)
            if error:
                assert float(error) == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=0.26)
            else:
                assert len(values) == 1


def test_time_and_jobs_are_told_by_phase(report):
    assert tables(section(report, "Settings, versions, time"))[0] == [
        ["phase", "jobs", "time of its jobs"],
        ["sft", "14", "9 min 20 s"],
        ["rl", "14", "18 min 40 s"],
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "1 min 40 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "values, text",
    [
        ([], "–"),
        ([None], "–"),
        ([0.123456], "0.123"),
        ([None, 2.0], "2"),
        ([1.0, 1.0, 1.0], "1"),
        ([1.0, 2.0], "1.5 ± 0.5"),
        ([1.0, 1.3], "1.15 ± 0.15"),
        ([100.0, 160.0], "130 ± 30"),
        ([1e-9, 3e-9], "2e-09 ± 1e-09"),
    ],
)
def test_means_have_the_digits_that_their_errors_leave(values, text):
    assert mean_text(values) == text


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "low, high, words",
    [
        (0.01, 0.2, "a gain"),
        (-0.2, -0.01, "a loss"),
        (-0.1, 0.1, "no difference that this study can tell from noise"),
        (0.0, 0.1, "no difference that this study can tell from noise"),
        (0.0, 0.0, "no difference that this study can tell from noise"),
    ],
)
def test_verdict(low, high, words):
    assert verdict(Interval((low + high) / 2, low, high)) == words


@pytest.mark.parametrize(
    "effect, words", [(3.0, "shows a gain"), (-3.0, "shows a loss"), (0.0, "shows no difference that this study can")]
)
def test_first_paragraph_says_what_was_put_in(effect, words):
    results = make_results(arms=2, seeds=8, problems=30, ablations=0, effect=effect)
    paragraph = section(report_text(results, []), "In one paragraph")
    assert f"This **{words}" in paragraph
    assert f"a difference of {points(difference(results, 'pear-token', 'after', 8).interval)} points" in paragraph
    assert "over 8 seeds and 30 problems" in paragraph


def test_what_was_fixed_is_listed(report):
    fixed = section(report, "What was fixed in advance")
    assert "- Primary comparison: pass@8 after RL, pear-token minus sft" in fixed
    assert "- 3 seeds (0, 1, 2). Ablations: 1 seed (0)." in fixed
    assert "- The settings of RL were chosen on the SFT arm alone." in fixed
    assert "- RL, the same for all arms: learning_rate 0.0001, steps 12." in fixed
    rows = dict(tables(fixed)[0])
    assert rows["pear-block"] == "weighting pear, level block, block_size 4"
    assert rows["pear-gamma-0.9 (ablation)"] == "weighting pear, level token, gamma 0.9"


def test_a_fast_run_says_so_first(results):
    fast = dataclasses.replace(results, study=results.study | {"fast": True})
    assert report_text(fast, []).splitlines()[0] == FAST
    assert FAST not in report_text(results, [])


def test_notes_stand_as_they_were_written(results, report):
    notes = "A **note**, with a table:\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n- and a list"
    with_notes = dataclasses.replace(results, study=results.study | {"notes": notes})
    assert f"\n\n## Notes\n\n{notes}\n\n" in report_text(with_notes, [])
    assert "## Notes" not in report


def test_one_seed_is_said_to_be_one(report):
    assert report_text(make_results(seeds=1), []).count(ONE_SEED) == 2
    assert ONE_SEED not in report


def test_a_pretrained_start_is_named(results, report):
    config = results.study["config"] | {"model": {"start": "smollm2"}}
    text = report_text(dataclasses.replace(results, study=results.study | {"config": config}), [])
    assert "A student and a teacher start from smollm2 and are taught countdown" in text
    assert "from nothing" in report and "from nothing" not in text


def test_warnings_of_several_seeds_are_one_line(results, report):
    assert section(report, "Warnings of SFT").strip() == (
        "- pear-sequence, 3 of 3 seeds: half of the weights lie on the floor (0.50)"
    )
    none = [row | {"warnings": []} for row in results.training]
    assert section(report_text(dataclasses.replace(results, training=none), []), "Warnings of SFT").strip() == "None."


def test_names_cannot_break_out_of_their_cells(results):
    arms = {("a|b" if arm == "pear-block" else arm): options for arm, options in results.study["arms"].items()}
    rows = [
        [row | {"arm": "a|b"} if row["arm"] == "pear-block" else row for row in each]
        for each in (results.evaluations, results.training, results.diagnostics, results.weights)
    ]
    names = ("evaluations", "training", "diagnostics", "weights")
    odd = dataclasses.replace(results, study=results.study | {"arms": arms}, **dict(zip(names, rows, strict=True)))
    for table in tables(report_text(odd, [])):
        assert len({len(row) for row in table}) == 1


def test_report_without_ablations_diagnostics_and_logs():
    results = make_results(ablations=0)
    bare = dataclasses.replace(results, training=[], diagnostics=[], weights=[], jobs=[])
    assert list(figures(bare)) == ["passes.png", "differences.png", "order.png"]
    text = report_text(bare, ["passes.png"])
    for title in ("## Ablations", "### Weights", "### Over training"):
        assert title not in text
    assert "nothing" in text and "KL(SFT" not in text


def test_arms_that_are_all_alike_have_no_order(results):
    alike = [row | {"correct": [3] * 12} for row in results.evaluations]
    text = report_text(dataclasses.replace(results, evaluations=alike), [])
    assert [row[1] for row in tables(section(text, "Order of the arms"))[0][1:]] == [
        "not defined: all arms are alike"
    ] * 3
    assert "rank correlation" not in section(text, "In one paragraph")
    assert "This **shows no difference" in text


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_marks_stand_where_the_intervals_are(results):
    found = figures(results)
    for name, arms, intervals in (
        ("passes.png", results.arms, lambda arm, moment, k: rate(results, arm, moment, k)),
        ("differences.png", compared(results), lambda arm, moment, k: difference(results, arm, moment, k).interval),
    ):
        panels = [axis for axis in found[name].axes]
        assert [axis.get_title() for axis in panels] == ["pass@1", "pass@8", "pass@32"]
        assert [label.get_text() for label in panels[0].get_yticklabels()] == arms
        for axis, k in zip(panels, (1, 8, 32), strict=True):
            lines = [tuple(line.get_xdata()) for line in axis.lines]
            for row, arm in enumerate(arms):
                for place, moment in enumerate(("before", "after")):
                    mean, low, high = (100 * value for value in intervals(arm, moment, k))
                    assert lines[4 * row + 2 * place] == (low, high)
                    assert lines[4 * row + 2 * place + 1] == (mean,)
    heights = [axis.lines[1].get_xdata()[0] for axis in found["ablations.png"].axes]
    expected = [100 * difference(results, "pear-token", "after", k, [0]).interval.mean for k in (1, 8, 32)]
    assert heights == expected


def test_student_and_teacher_are_lines_at_their_means(results):
    for axis, k in zip(figures(results)["passes.png"].axes, (1, 8, 32), strict=True):
        student, teacher = (line.get_xdata()[0] for line in axis.lines[-2:])
        assert student == pytest.approx(looped_mean(results, "student", "start", k, range(3)))
        assert teacher == pytest.approx(looped_mean(results, "teacher", "start", k, range(3)))


def test_title_of_the_order_is_its_correlation(results):
    for axis, k in zip(figures(results)["order.png"].axes, (1, 8, 32), strict=True):
        mean, low, high = order(results, k)
        assert axis.get_title() == f"pass@{k}\nrank correlation {mean:.2f} [{low:.2f}, {high:.2f}]"


def test_curves_are_means_over_seeds_at_steps_that_all_have(results):
    logs = [row["log"] for row in results.training if (row["arm"], row["phase"]) == ("sft", "rl")]
    shorter = [
        row | {"log": row["log"][:-2] + [{"step": 11, "reward": None}]}
        if (row["arm"], row["seed"], row["phase"]) == ("sft", 1, "rl")
        else row
        for row in results.training
    ]
    steps, mean, error = mean_curve(dataclasses.replace(results, training=shorter), "rl", "sft", ("none", "reward"))
    assert steps.tolist() == list(range(1, 11))
    for place in range(10):
        values = [log[place]["reward"] for log in logs]
        assert mean[place] == pytest.approx(sum(values) / 3)
        variance = sum((value - sum(values) / 3) ** 2 for value in values) / 2
        assert error[place] == pytest.approx(math.sqrt(variance / 3))
    assert mean_curve(results, "rl", "sft", ("none",)) is None
    assert mean_curve(make_results(seeds=1), "rl", "sft", ("reward",))[2].tolist() == [0.0] * 12


def test_long_curves_are_smoothed_seed_by_seed():
    results = make_results(arms=2, ablations=0, steps=100)
    steps, mean, _ = mean_curve(results, "rl", "sft", ("reward",))
    logs = [row["log"] for row in results.training if (row["arm"], row["phase"]) == ("sft", "rl")]
    raw = np.mean([[entry["reward"] for entry in log] for log in logs], axis=0)
    assert len(steps) == 100
    assert mean[50] == pytest.approx(raw[48:53].mean())  # 100 / 25 = 4 neighbours
    assert mean[0] == pytest.approx(raw[:3].mean())


def test_each_arm_has_its_panel_beside_the_baseline(results):
    figure = figures(results)["rl_curves.png"]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == compared(results) * 2
    reward, entropy = figure.axes[1], figure.axes[4]
    for axis, arm, key in ((reward, "pear-block", "reward"), (entropy, "pear-block", "entropy")):
        ours = [line.get_ydata() for line in axis.lines]
        for drawn, name in zip(ours, ("sft", arm), strict=True):
            assert drawn == pytest.approx(mean_curve(results, "rl", name, (key,))[1])
    assert figure.axes[0].get_ylim() == reward.get_ylim() != entropy.get_ylim()


def test_weights_are_those_of_the_arms_that_have_some(results):
    axes = figures(results)["weights.png"].axes
    assert [axis.get_title() for axis in axes] == ["pear-token", "pear-block", "pear-sequence"]
    for moment, line in zip(("start", "end"), axes[0].lines, strict=False):
        rows = [row["by_position"] for row in results.weights if (row["arm"], row["moment"]) == ("pear-token", moment)]
        assert line.get_ydata() == pytest.approx([sum(column) / 3 for column in zip(*rows, strict=True)])
        assert line.get_xdata()[[0, -1]] == pytest.approx([0.025, 0.975])
    assert weight_profile(results, "sft", "start") is None


def test_arms_are_told_apart_without_colour():
    found = styles(make_results(arms=9))
    main = [(style["color"], style["marker"]) for style in list(found.values())[2:]]
    assert len(set(main)) == len(main)
    assert len({marker for _, marker in main}) == min(len(main), 8)
    for color, _ in main:
        assert np.mean(colors.to_rgb(color)) < 0.75  # seen on white


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_same_results_are_same_bytes_and_all_pictures_are_there(results, tmp_path):
    for name in "ab":
        write_report(results, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(["REPORT.md", *TITLES])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a/REPORT.md").read_text()
    assert sorted(re.findall(r"!\[.*?\]\((.*?)\)", text)) == sorted(TITLES)
    assert "uniform" not in text and "nan" not in text.split("```")[0]
    assert plt.get_fignums() == []


def test_report_and_pictures_are_written_together_or_not_at_all(results, tmp_path):
    (tmp_path / "weights.png").mkdir()
    (tmp_path / "REPORT.md").write_text("old")
    with pytest.raises(WriteError, match="weights.png"):
        write_report(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["REPORT.md", "weights.png"]
    assert (tmp_path / "REPORT.md").read_text() == "old"


def test_intervals_of_summary_stay_within_what_is_possible():
    results = make_results(seeds=2, problems=3, random=4)
    for k in (1, 8, 32):
        for arm in results.arms:
            assert 0 <= rate(results, arm, "after", k).low <= rate(results, arm, "after", k).high <= 1
            assert -1 <= gain(results, arm, k).low <= gain(results, arm, k).high <= 1
            assert passes(results, arm, "after", k).shape == (2, 3)
