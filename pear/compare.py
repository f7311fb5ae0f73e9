"""`pear compare`: the same table and pictures from any two runs or more of `pear sft` and `pear rl`."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pear.appending import holding, output_folder
from pear.curves import CURVES, SMOOTH_FROM, SMOOTH_SHARE, TITLES, figures, last, plain, shorten
from pear.eval import percent
from pear.intervals import all_ks, difference, evaluations_of, interval_of, paired_counts
from pear.io import DataError
from pear.pictures import png, write_whole
from pear.runs import MOMENTS, Run, objective, read_run
from pear.tables import NONE, cell, number, points, rate, table

REPORT = "report.md"
LAST = {  # what was logged last; a column where some run has it. First what all objectives of SFT have in common.
    "NLL": "pear/nll",
    "held-out NLL": "eval_pear/nll",
    "NLL of wrong answers": "pear/wrong_nll",
    "divergence": "pear/divergence",
    "weight": "pear/weight_mean",
    "effective sample size": "pear/effective_sample_size",
    "reward": "reward",
    "KL from the old": "pear/kl_old",
    "KL to the reference": "pear/kl_ref",
}
EVALUATED = ("task", "prompt_format", "samples", "temperature", "max_new_tokens")  # must agree, or figures do not
PLACES = ("output_dir", "run_name", "logging_dir")  # settings that differ between any two runs


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
    columns: dict[str, Callable[[Run], str]] = {"run": lambda run: cell(run.name), "kind": lambda run: run.kind}
    if any(objective(run) is not None for run in runs):
        columns["objective"] = lambda run: objective(run) or NONE
    for k in all_ks(runs):
        for moment in MOMENTS:
            columns[f"pass@{k} {moment}"] = lambda run, k=k, moment=moment: rate(interval_of(getattr(run, moment), k))
    columns["tokens after"] = lambda run: f"{run.after['mean_tokens']:.1f}" if run.after else NONE
    columns["finished after"] = lambda run: percent(run.after["finished"]) if run.after else NONE
    for title, key in LAST.items():
        if any(last(run, key) is not None for run in runs):
            columns[f"last {title}"] = lambda run, key=key: number(last(run, key))
    return table(list(columns), [[make(run) for make in columns.values()] for run in runs])


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
        cells = [points(difference(a, b, k)) if same else "different problems" for k in all_ks(runs)]
        rows.append([cell(title), *cells])
    return table(["difference", *(f"pass@{k}" for k in all_ks(runs))], rows) if rows else None


# ---------------------------------------------------------------------------------------------------------------------
# The command


@holding(output_folder, "out")
def compare(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    names: Sequence[str] | None = None,
    show: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write report.md and its pictures to `out`, all of them or none; the same runs give the same bytes.

    Args:
        folders: of two runs or more (see `pear.runs`), of any kinds; the difference is between the first two
        out: a folder, made if missing
        names: what to call the runs, one each; None for the names in their records, or, where two runs share one,
            their folders
        show: is given the report's tables and remarks as text

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
    files = {name: png(figure) for name, figure in figures(runs).items() if figure is not None}
    report = _report(runs, list(files))
    written = {out / REPORT: report.encode()} | {out / name: content for name, content in files.items()}
    write_whole(written)
    if show is not None:
        show("\n\n".join([comparison_table(runs), *_remarks(runs)]))
    return list(written)


def _check_folders(folders: list[Path], out: Path) -> None:
    if len(folders) < 2:
        raise DataError(f"a comparison needs two runs or more, got {len(folders)}: give their folders")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (real := folder.resolve()) in seen:
            raise DataError(f"{folder}: this run is given twice (the other time as {seen[real]})")
        seen[real] = folder
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
    paragraphs = ["# " + ", ".join(plain(run.name) for run in runs), comparison_table(runs), _legend(runs)]
    paragraphs += [f"> {remark}" for remark in _remarks(runs)]
    paragraphs += [f"![{TITLES[name]}]({name})" for name in pictures]
    if CURVES["rl"] in pictures or CURVES["sft"] in pictures:
        paragraphs.append(
            f"Curves of {SMOOTH_FROM} points or more are running means over a {SMOOTH_SHARE}th of them; what was "
            "logged lies pale behind."
        )
    paragraphs += ["## Runs", table(["run", "folder"], [[cell(r.name), cell(str(r.folder))] for r in runs])]
    paragraphs += ["## Settings that differ", _settings(runs)]
    return "\n\n".join(paragraphs) + "\n"


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
    if any(last(run, key) is not None for run in runs for key in LAST.values()):
        lines.append("- **last**: what was logged last; of a step or a few, so noisy.")
    if any(objective(run) is not None for run in runs):
        lines.append(
            "- **objective**: what the run minimised. Losses of different objectives are different quantities; the NLL "
            "is unweighted in all of them (with negatives, of right answers), so curves are to be compared by that. "
            "Which run is better, pass@k says."
        )
    return "\n".join(lines)


def _remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before trusting a comparison."""
    remarks = []
    for run in runs:
        if missing := [moment for moment in MOMENTS if getattr(run, moment) is None]:
            remarks.append(f"{plain(run.name)}: not evaluated {' nor '.join(missing)} the run.")
    evaluations = evaluations_of(runs)
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
                rows.append([cell(title), *(cell(shorten(value, 80)) for value in values)])
    return table(["setting", *(cell(run.name) for run in runs)], rows) if rows else "None."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
