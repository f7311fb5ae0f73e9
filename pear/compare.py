"""`pear compare`: the same table and pictures from any two runs or more of `pear sft` and `pear rl`."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from pear.eval import pass_at_k, percent
from pear.io import DataError
from pear.pictures import plt, png, save_figure, write_whole
from pear.runs import MOMENTS, Run, read_run

REPORT = "report.md"
PASSES = "passes.png"
CURVES = {"rl": "curves_rl.png", "sft": "curves_sft.png"}
TITLES = {PASSES: "pass@k before and after", CURVES["rl"]: "RL over training", CURVES["sft"]: "SFT over training"}
ZERO_IS_NONE = ("pear/kl_ref",)  # logged as 0 by a run that has no reference
NONE = "–"  # in a cell that has nothing to say
EVALUATED = ("task", "prompt_format", "samples", "temperature", "max_new_tokens")  # must agree, or figures do not
PLACES = ("output_dir", "run_name", "logging_dir")  # settings that differ between any two runs
SMOOTH_FROM, SMOOTH_SHARE = 50, 25  # points from which a curve is smoothed, over this part of it


class Interval(NamedTuple):
    """A mean over problems, and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def bootstrap_interval(
    counts: Sequence[int], samples: int, k: int, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """Mean unbiased pass@k over problems, with the percentile bootstrap's interval over problems.

    It speaks of other problems of the same kind, not of other seeds of training. Where all problems have one pass@k
    (all right, all wrong, a single problem) it has no width, which is no certainty.

    Args:
        counts: (P,) right completions of each problem, each of 0..samples
        samples: completions drawn of each problem
        k: of 1..samples
        seed, draws: of the resampling
        level: share of resamples between the ends, in (0, 1)

    Raises:
        ValueError: no problems, counts or k out of range, draws < 1, level outside (0, 1)
    """
    return _bootstrap(_passes(counts, samples, k), seed, draws, level)


def paired_difference(
    counts_a: Sequence[int],
    counts_b: Sequence[int],
    samples_a: int,
    samples_b: int,
    k: int,
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """pass@k of b minus that of a on the same problems, resampled together: what problems they share cancels.

    Args:
        counts_a, counts_b: (P,) right completions; place i of both is one problem
        samples_a, samples_b: completions of each problem; they may differ
        k, seed, draws, level: as in `bootstrap_interval`

    Raises:
        ValueError: as `bootstrap_interval`, or the two have not the same number of problems
    """
    if len(counts_a) != len(counts_b):
        raise ValueError(f"counts_a and counts_b must be of the same problems, got {len(counts_a)} and {len(counts_b)}")
    return _bootstrap(_passes(counts_b, samples_b, k) - _passes(counts_a, samples_a, k), seed, draws, level)


def _passes(counts: Sequence[int], samples: int, k: int) -> np.ndarray:
    """(P,) pass@k of each problem."""
    values = {count: pass_at_k(samples, count, k) for count in set(counts)}
    return np.array([values[count] for count in counts], dtype=np.float64)


def _bootstrap(values: np.ndarray, seed: int, draws: int, level: float) -> Interval:
    """Interval of the mean of `values` (P,).

    A resample's mean depends only on how often it holds each different value, which is multinomial: so one draw of
    these numbers stands for P draws of problems, and the result does not depend on the problems' order.
    """
    if not len(values):
        raise ValueError("counts: no problems given")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    different, times = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), times / len(values), size=draws)  # (draws, different)
    low, high = np.quantile(drawn @ different / len(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(times @ different / len(values)), float(low), float(high))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations


def _counts(result: dict[str, Any]) -> list[int]:
    return [problem["correct"] for problem in result["problems"]]


def _interval(result: dict[str, Any] | None, k: int) -> Interval | None:
    """pass@k of an evaluation; None where there is none, or it drew fewer than k samples."""
    if result is None or k > result["samples"]:
        return None
    return bootstrap_interval(_counts(result), result["samples"], k)


def paired_counts(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """Counts (P,) of two evaluations, problem beside problem; None if they were not asked the same prompts."""
    prompts_a, prompts_b = ([problem["prompt"] for problem in each["problems"]] for each in (a, b))
    counts_a, counts_b = _counts(a), _counts(b)
    if prompts_a == prompts_b:
        return counts_a, counts_b
    if Counter(prompts_a) != Counter(prompts_b) or len(set(prompts_a)) < len(prompts_a):
        return None  # with a prompt twice in another order, nothing says which is which
    by_prompt = dict(zip(prompts_b, counts_b, strict=True))
    return counts_a, [by_prompt[prompt] for prompt in prompts_a]


def _difference(a: dict[str, Any], b: dict[str, Any], k: int) -> Interval | None:
    """pass@k of evaluation b minus that of a; None if their prompts disagree, or one drew fewer than k samples."""
    paired = paired_counts(a, b)
    if paired is None or k > min(a["samples"], b["samples"]):
        return None
    return paired_difference(*paired, a["samples"], b["samples"], k)


def _evaluations(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = [getattr(run, moment) for run in runs for moment in MOMENTS]
    return [each for each in found if each is not None]


def _ks(runs: Sequence[Run]) -> list[int]:
    """1 and every k that an evaluation was made for: all runs show all of these, since counts give any k."""
    return sorted({1} | {each["k"] for each in _evaluations(runs)})


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def comparison_table(runs: Sequence[Run]) -> str:
    """Markdown: a row a run, then the differences that share their problems.

    The second table has the second run minus the first, before and after, and each run's own gain, where both
    evaluations exist; a row whose evaluations were asked different prompts says so in its cells.
    """
    tables = [_runs_table(runs)]
    if differences := _differences_table(runs):
        tables.append(differences)
    return "\n\n".join(tables)


def _runs_table(runs: Sequence[Run]) -> str:
    columns: dict[str, Callable[[Run], str]] = {"run": lambda run: _cell(run.name), "kind": lambda run: run.kind}
    for k in _ks(runs):
        for moment in MOMENTS:
            columns[f"pass@{k} {moment}"] = lambda run, k=k, moment=moment: _rate(_interval(getattr(run, moment), k))
    columns["tokens after"] = lambda run: f"{run.after['mean_tokens']:.1f}" if run.after else NONE
    columns["finished after"] = lambda run: percent(run.after["finished"]) if run.after else NONE
    last = {"last reward": "reward", "last KL from the old": "pear/kl_old", "last KL to the reference": "pear/kl_ref"}
    for title, key in last.items():
        if any(_last(run, key) is not None for run in runs):
            columns[title] = lambda run, key=key: _number(_last(run, key))
    return _markdown(list(columns), [[make(run) for make in columns.values()] for run in runs])


def _differences_table(runs: Sequence[Run]) -> str | None:
    first, second = runs[:2]
    pairs = [
        (f"{second.name} − {first.name}, {moment}", getattr(first, moment), getattr(second, moment))
        for moment in reversed(MOMENTS)
    ]
    pairs += [(f"{run.name}, after − before", run.before, run.after) for run in runs]
    rows = []
    for title, a, b in pairs:
        if a is None or b is None:
            continue
        same = paired_counts(a, b) is not None
        cells = [_points(_difference(a, b, k)) if same else "different problems" for k in _ks(runs)]
        rows.append([_cell(title), *cells])
    return _markdown(["difference", *(f"pass@{k}" for k in _ks(runs))], rows) if rows else None


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _cell(text: str) -> str:
    """Text that cannot break out of its cell of a markdown table."""
    return _plain(text).replace("\\", "\\\\").replace("|", "\\|")


def _rate(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    return f"{percent(interval.mean)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return NONE
    mean, low, high = (100 * value + 0.0 for value in interval)  # + 0.0: no "-0.0"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def series(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a run's log, both (n,); entries without a finite number are left out."""
    entries = [entry for entry in run.log if _finite(entry.get(key))]
    if key in ZERO_IS_NONE and not any(entry[key] for entry in entries):
        return [], []
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _last(run: Run, key: str) -> float | None:
    values = series(run, key)[1]
    return values[-1] if values else None


def _rollout_keys(runs: Sequence[Run]) -> dict[str, str]:
    """pear/pass@k of the rollouts, for every k in any log, and how to name it; k is the group's size or 1."""
    found = {int(match[1]) for run in runs for e in run.log for key in e if (match := _ROLLOUT.fullmatch(key))}
    return {f"pear/pass@{k}": f"pass@{k}" for k in sorted(found, reverse=True)}


_ROLLOUT = re.compile(r"pear/pass@(\d+)")


class Panel(NamedTuple):
    """One axes: quantities of the log, by key, with the name that tells them apart where there are several."""

    title: str
    label: str
    keys: dict[str, str]


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """What to draw of runs of one kind; only panels for which some run has data."""
    if runs[0].kind == "sft":
        panels = [
            Panel("training data, each batch before its step", "NLL (nats a token)", {"pear/nll": "NLL"}),
            Panel("held-out data", "NLL (nats a token)", {"eval_pear/nll": "NLL"}),
        ]
    else:
        clipped = {"pear/clip_low": "low", "pear/clip_high": "high"}
        panels = [
            Panel("reward", "mean reward", {"reward": "reward"}),
            Panel("pass@k of the rollouts", "share of prompts", _rollout_keys(runs)),
            Panel("KL from the policy that drew", "nats a token", {"pear/kl_old": "KL"}),
            Panel("KL to the reference", "nats a token", {"pear/kl_ref": "KL"}),  # apart: it may be 100 times as large
            Panel("completion length", "tokens", {"completions/mean_length": "mean length"}),
            Panel("clipped", "share of tokens", clipped),
            Panel("entropy", "nats a token", {"pear/entropy": "entropy"}),
        ]
    drawn = [p._replace(keys={k: v for k, v in p.keys.items() if any(series(r, k)[1] for r in runs)}) for p in panels]
    return [panel for panel in drawn if panel.keys]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_curves(runs: Sequence[Run], path: str | os.PathLike) -> bool:
    """Draw the logs of runs of one kind as PNG; False, and no file, if there is nothing to draw.

    Raises:
        ValueError: no runs, or runs of several kinds
        WriteError: the picture cannot be written
    """
    return _save(_curves(runs, _colors(runs)), path)


def draw_passes(runs: Sequence[Run], path: str | os.PathLike) -> bool:
    """Draw pass@1 and pass@k before and after, with their intervals; False, and no file, if nothing was evaluated.

    Raises:
        WriteError: the picture cannot be written
    """
    return _save(_pass_bars(runs), path)


def _save(figure: plt.Figure | None, path: str | os.PathLike) -> bool:
    if figure is not None:
        save_figure(figure, path)
    return figure is not None


def _curves(runs: Sequence[Run], colors: Sequence[Any]) -> plt.Figure | None:
    if len(kinds := {run.kind for run in runs}) != 1:
        raise ValueError(f"curves are of runs of one kind, got {', '.join(sorted(kinds)) or 'no runs'}")
    if not (panels := _panels(runs)):
        return None
    columns = min(3 if len(panels) <= 6 else 4, len(panels))
    figure, grid = plt.subplots(
        rows := math.ceil(len(panels) / columns),
        columns,
        figsize=(max(4.4 * columns, 6), 3.3 * rows + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axis, panel, runs, colors)
    handles = [plt.Line2D([], [], color=color, linewidth=2) for color in colors]
    _name_runs(figure, handles, [run.name for run in runs])
    return figure


def _draw_panel(axis: plt.Axes, panel: Panel, runs: Sequence[Run], colors: Sequence[Any]) -> None:
    """A colour a run, a line style a quantity; long curves as a running mean over a pale original."""
    styles = dict(zip(panel.keys, ("-", "--", ":", "-.") * len(panel.keys), strict=False))
    for run, color in zip(runs, colors, strict=True):
        for key in panel.keys:
            steps, values = series(run, key)
            few = len(values) <= 20
            if len(values) >= SMOOTH_FROM:
                axis.plot(steps, values, color=color, linewidth=0.5, alpha=0.2)
                values = _running_mean(values, len(values) // SMOOTH_SHARE)
            axis.plot(
                steps,
                values,
                color=color,
                linestyle=styles[key],
                linewidth=1.5,
                marker="o" if few else None,
                markersize=4,
            )
    if len(panel.keys) > 1:
        lines = [plt.Line2D([], [], color="black", linestyle=styles[key]) for key in panel.keys]
        axis.legend(lines, list(panel.keys.values()), fontsize=8)
    axis.set(title=panel.title, xlabel="training step", ylabel=panel.label)
    axis.grid(alpha=0.3)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """(n,) mean over `width` neighbours or so, centred; at the ends over those that there are."""
    kernel = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _pass_bars(runs: Sequence[Run]) -> plt.Figure | None:
    """A panel a k, a line a run: before in grey above, after in the run's colour."""
    if not _evaluations(runs):
        return None
    ks = _ks(runs)
    figure, axes = plt.subplots(
        1, len(ks), figsize=(max(4.2 * len(ks), 6) + 1, 0.6 * len(runs) + 1.9), layout="constrained", squeeze=False
    )
    for axis, k in zip(axes[0], ks, strict=True):
        for place, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
            for moment, shift, style in (
                ("before", -0.13, dict(color="tab:gray", marker="o", markerfacecolor="white")),
                ("after", 0.13, dict(color=color, marker="o")),
            ):
                if (interval := _interval(getattr(run, moment), k)) is not None:
                    mean, low, high = (100 * value for value in interval)
                    axis.plot([low, high], [place + shift] * 2, color=style["color"], linewidth=2)
                    axis.plot([mean], [place + shift], linestyle="none", **style)
        axis.set(title=f"pass@{k}", xlabel="% of problems, 95 % interval", ylim=(len(runs) - 0.5, -0.5))
        axis.set_yticks(range(len(runs)), [""] * len(runs))
        axis.margins(x=0.08)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(runs)), [_label(run.name) for run in runs])
    handles = [
        plt.Line2D([], [], color="tab:gray", marker="o", markerfacecolor="white"),
        plt.Line2D([], [], color="black", marker="o"),
    ]
    _name_runs(figure, handles, ["before", "after (each run its colour)"])
    return figure


def _colors(runs: Sequence[Run]) -> list[Any]:
    """A colour a run, by its place: blue and orange first, as in the demo's report."""
    if len(runs) <= 10:
        return [f"C{i}" for i in range(len(runs))]
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(runs))))


def _name_runs(figure: plt.Figure, handles: list[plt.Line2D], names: list[str]) -> None:
    figure.legend(handles, [_label(name) for name in names], loc="outside lower center", ncols=min(len(names), 3))


def _label(name: str) -> str:
    """A name as matplotlib shows it: no formulas between dollars, and of a bearable length."""
    return _shorten(_plain(name), 40).replace("$", r"\$")


def _shorten(text: str, width: int) -> str:
    """Text of at most `width` characters, by leaving out the middle: names differ at their ends."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def compare(
    folders: Sequence[str | os.PathLike], out: str | os.PathLike, names: Sequence[str] | None = None
) -> list[Path]:
    """Write report.md and its pictures to `out`, all of them or none; the same runs give the same bytes.

    Args:
        folders: of two runs or more (see `pear.runs`), of any kinds; the difference is between the first two
        out: a folder, made if missing
        names: what to call the runs, one each; None for the names in their records, or, where two runs share one,
            their folders

    Returns:
        the files written, the report first

    Raises:
        DataError: fewer than two runs, one twice, a folder that is no run or is damaged, names too few, too many,
            empty or alike, or an `out` that is a file or one of the runs
        WriteError: a file cannot be written; what was in `out` is as it was
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    _check_folders(folders, out)
    _check_names(folders, names)
    runs = _named([read_run(folder) for folder in folders], names)
    files = {name: png(figure) for name, figure in _figures(runs).items() if figure is not None}
    report = _report(runs, list(files))
    written = {out / REPORT: report.encode()} | {out / name: content for name, content in files.items()}
    write_whole(written)
    return list(written)


def _figures(runs: Sequence[Run]) -> dict[str, plt.Figure | None]:
    figures = {PASSES: _pass_bars(runs)}
    for kind, name in CURVES.items():
        # A run has one colour in all pictures.
        if alike := [(run, color) for run, color in zip(runs, _colors(runs), strict=True) if run.kind == kind]:
            figures[name] = _curves(*zip(*alike, strict=True))
    return figures


def _check_folders(folders: list[Path], out: Path) -> None:
    if len(folders) < 2:
        raise DataError(f"a comparison needs two runs or more, got {len(folders)}: give their folders")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (real := folder.resolve()) in seen:
            raise DataError(f"{folder}: this run is given twice (the other time as {seen[real]})")
        seen[real] = folder
    if out.exists() and not out.is_dir():
        raise DataError(f"out: {out} is a file; give a folder to write the comparison to")
    if out.resolve() in seen:
        raise DataError(f"out: {out} is one of the runs; give another folder to write the comparison to")


def _check_names(folders: list[Path], names: Sequence[str] | None) -> None:
    if not names:
        return
    if len(names) != len(folders):
        raise DataError(
            f"names: {len(folders)} runs need as many names, got {len(names)}: give --name for each or none"
        )
    for name, times in Counter(" ".join(name.split()) for name in names).items():
        if not name:
            raise DataError("names: a name is empty")
        if times > 1:
            raise DataError(f"names: {name!r} is given to {times} runs; each needs a name of its own")


def _named(runs: list[Run], names: Sequence[str] | None) -> list[Run]:
    if names:
        return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    times = Counter(run.name for run in runs)
    named = [replace(run, name=str(run.folder)) if times[run.name] > 1 or not run.name else run for run in runs]
    name, most = Counter(run.name for run in named).most_common(1)[0]
    if most > 1:  # one run's name is another's folder
        raise DataError(f"{most} runs have the name {name!r}; tell them apart by --name")
    return named


def _report(runs: Sequence[Run], pictures: Sequence[str]) -> str:
    paragraphs = ["# " + ", ".join(_plain(run.name) for run in runs), comparison_table(runs), _legend(runs)]
    paragraphs += [f"> {remark}" for remark in _remarks(runs)]
    paragraphs += [f"![{TITLES[name]}]({name})" for name in pictures]
    if CURVES["rl"] in pictures or CURVES["sft"] in pictures:
        paragraphs.append(
            f"Curves of {SMOOTH_FROM} points or more are running means over a {SMOOTH_SHARE}th of them; what was "
            "logged lies pale behind."
        )
    paragraphs += ["## Runs", _markdown(["run", "folder"], [[_cell(r.name), _cell(str(r.folder))] for r in runs])]
    paragraphs += ["## Settings that differ", _settings(runs)]
    return "\n\n".join(paragraphs) + "\n"


def _plain(text: str) -> str:
    return " ".join(text.split())


def _legend(runs: Sequence[Run]) -> str:
    lines = [
        "- **before, after**: the model that the run started from, and what it made of it.",
        "- **pass@k**: the chance that at least one of k completions is right, by the unbiased estimate, as the mean "
        "over problems; in brackets its 95 % interval, by 2000 resamples of the problems (percentile bootstrap). It "
        "speaks of other problems of this kind, **not of other seeds of training**. No width (all right, all wrong, a "
        "single problem) is no certainty.",
        "- **difference**: percentage points, on the same problems, which are resampled together. An interval with 0 "
        "inside shows no difference.",
        "- **tokens, finished**: mean length of a completion after the run, and the share that ended by themselves.",
    ]
    if any(run.kind == "rl" for run in runs):
        lines.append("- **last**: what was logged last; of a step or a few, so noisy.")
    return "\n".join(lines)


def _remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before trusting a comparison."""
    remarks = []
    for run in runs:
        if missing := [moment for moment in MOMENTS if getattr(run, moment) is None]:
            remarks.append(f"{_plain(run.name)}: not evaluated {' nor '.join(missing)} the run.")
    evaluations = _evaluations(runs)
    if any(paired_counts(evaluations[0], other) is None for other in evaluations[1:]):
        remarks.append(
            "The evaluations were asked different problems: where two of them differ so, there is no paired "
            "difference, and the rows are not to be read against each other."
        )
    for key in EVALUATED:
        if len(found := _different([each.get(key) for each in evaluations])) > 1:
            remarks.append(f"The evaluations differ in {key}: {', '.join(found)}.")
    return remarks


def _different(values: list[Any]) -> list[str]:
    return list(dict.fromkeys(_text(value) for value in values))


def _settings(runs: Sequence[Run]) -> str:
    """Table of the settings and versions that are not the same in all runs."""
    rows = []
    for source in ("settings", "versions"):
        of_runs = [getattr(run, source) for run in runs]
        for key in sorted({key for each in of_runs for key in each}):
            values = [_text(each[key]) if key in each else NONE for each in of_runs]
            if len(set(values)) > 1 and key not in PLACES:
                title = key if source == "settings" else f"version of {key}"
                rows.append([_cell(title), *(_cell(_shorten(value, 80)) for value in values)])
    return _markdown(["setting", *(_cell(run.name) for run in runs)], rows) if rows else "None."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
