"""REPORT.md of a replication, with its pictures, from its results alone: the same results give the same bytes."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pear.curves import SMOOTH_FROM, SMOOTH_SHARE, plain
from pear.eval import percent
from pear.intervals import Interval
from pear.pictures import png, write_whole
from pear.replicate.figures import TITLES, figures
from pear.replicate.results import START, START_MODELS, Results
from pear.replicate.statistics import DRAWS
from pear.replicate.summary import Difference, ablation_rows, compared, difference, gain, order, passes, rate
from pear.runs import MOMENTS
from pear.tables import NONE, cell, points, table
from pear.tables import rate as rate_text

REPORT = "REPORT.md"
FAST = "A fast run, to show that the pipeline is whole; its figures mean nothing."
DIAGNOSTICS = {  # column and field, or the field and what to divide it by
    "KL(SFT ‖ student)": "sft_kl",
    "KL(RL ‖ SFT)": "rl_kl",
    "move by SFT": ("sft_distance", "start_norm"),
    "move by RL": ("rl_distance", "start_norm"),
    "cosine": "update_cosine",
    "entropy before": "entropy_before",
    "entropy after": "entropy_after",
    "held-out NLL": "heldout_nll",
}


def write_report(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write REPORT.md and its pictures to `folder`, all of them or none, and return their paths, the report first.

    Raises:
        WriteError: a file cannot be written; what was in the folder is as it was
    """
    folder = Path(folder)
    pictures = {name: png(figure) for name, figure in figures(results).items()}
    files = {folder / REPORT: report_text(results, pictures).encode()}
    files |= {folder / name: content for name, content in pictures.items()}
    write_whole(files)
    return list(files)


def report_text(results: Results, pictures: Iterable[str]) -> str:
    """The report; `pictures` are the names of those that lie beside it."""
    shown = {name: f"![{TITLES[name]}]({name})" for name in pictures}
    study = results.study
    parts = [FAST] if study["fast"] else []
    parts += [f"# PEAR in miniature: {plain(study['study'])}", "## In one paragraph", _in_one_paragraph(results)]
    parts += ["## What was asked", *_asked(results), "## What was fixed in advance", *_fixed(results)]
    parts += ["## What came out", *_came_out(results, shown)]
    parts += ["## Diagnostics", *_diagnostics(results, shown)]
    if results.ablations:
        parts += ["## Ablations", *_ablations(results, shown)]
    if study["notes"]:
        parts += ["## Notes", study["notes"].strip("\n")]
    parts += ["## What it does not show", _limits(results), "## Settings, versions, time", *_settings(results)]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# In one paragraph, what was asked, what was fixed


def verdict(interval: Interval) -> str:
    """What a difference and its interval show, in words."""
    if interval.low > 0:
        return "a gain"
    return "a loss" if interval.high < 0 else "no difference that this study can tell from noise"


def _in_one_paragraph(results: Results) -> str:
    baseline, arm, k = results.study["baseline"], results.study["primary"]["arm"], results.study["primary"]["k"]
    after, before = (difference(results, arm, moment, k) for moment in ("after", "before"))
    ours, theirs = (percent(rate(results, each, "after", k).mean) for each in (arm, baseline))
    seeds, problems = len(results.study["seeds"]), len(results.problems)
    text = (
        f"After SFT and then the same RL, {plain(arm)} has a pass@{k} of {ours} and {plain(baseline)} one of {theirs}: "
        f"a difference of {points(after.interval)} points (95 % interval over {_several(seeds, 'seed')} and "
        f"{_several(problems, 'problem')}; {_seeds(after)}). This **shows {verdict(after.interval)}**. Before RL the "
        f"difference is {points(before.interval)} points, which shows {verdict(before.interval)}."
    )
    if (found := order(results, k)) is not None:
        text += (
            f" Over the {len(results.arms)} arms, the rank correlation of pass@{k} before and after RL is "
            f"{_correlation(found)}."
        )
    return text + (f" {ONE_SEED}" if seeds == 1 else "")


ONE_SEED = "There is one seed, so the intervals speak of other problems alone, and say nothing of other seeds."


def _several(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _seeds(found: Difference) -> str:
    return f"{_several(found.won, 'seed')} won, {found.tied} tied, {found.lost} lost"


def _asked(results: Results) -> list[str]:
    bases = (results.study["config"].get("bases") or 0) if len(results.study["seeds"]) > 1 else 0
    seed = (
        "A seed is a replication of all of it: models, traces, order of the data, RL."
        if not bases
        else f"Seeds share {_several(bases, 'pair')} of student and teacher with the traces; a seed is a replication "
        "of what follows: order of the data, RL and evaluation."
    )
    made = f"start from {start} and are taught" if (start := _start(results)) else "are trained from nothing on"
    return [
        "Whether fine-tuning that weights tokens as PEAR does leaves a better start for RL than plain SFT does; and "
        "whether the order of methods after SFT is still their order after RL.",
        f"A student and a teacher {made} {plain(results.study['task'])}; the teacher writes traces, of "
        "which the verified ones are kept and scored with its log-probs. Each arm fine-tunes the same student on the "
        "same traces and then goes through the same RL. All are evaluated before and after RL on the same "
        f"{_several(len(results.problems), 'problem')}. {seed}",
    ]


def _start(results: Results) -> str | None:
    """The pretrained model that student and teacher start from; None if they start from nothing."""
    start = (results.study["config"].get("model") or {}).get("start")
    return None if start is None else plain(str(start))


def _fixed(results: Results) -> list[str]:
    study = results.study
    primary, ks = study["primary"], study["ks"]
    lines = [
        f"- Primary comparison: pass@{primary['k']} after RL, {plain(primary['arm'])} minus {plain(study['baseline'])};"
        " all others are for orientation.",
        f"- {_numbered_seeds(study['seeds'])}."
        + (f" Ablations: {_numbered_seeds(study['ablation_seeds'])}." if results.ablations else ""),
        f"- Evaluation: {_samples(results)} completions of each of {_several(len(results.problems), 'problem')}; "
        f"{', '.join(f'pass@{k}' for k in ks)}.",
    ]
    for name, title in (("sft", "SFT"), ("rl", "RL")):
        if isinstance(settings := study["config"].get(name), dict) and settings:
            lines.append(f"- {title}, the same for all arms: {_options(settings)}.")
    lines += [f"- {plain(str(text))}" for text in study["config"].get("fixed_in_advance") or []]
    rows = [[cell(arm), cell(_options(options)) or NONE] for arm, options in study["arms"].items()]
    rows += [
        [f"{cell(arm)} (ablation)", cell(_options(options)) or NONE] for arm, options in study["ablations"].items()
    ]
    return ["\n".join(lines), table(["arm", "options of its SFT"], rows, text=2)]


def _samples(results: Results) -> str:
    found = {results.samples(arm, moment) for arm in [*results.arms, *results.ablations] for moment in MOMENTS}
    return _listed(sorted(found))


def _numbered_seeds(seeds: Sequence[int]) -> str:
    return f"{_several(len(seeds), 'seed')} ({_listed(seeds)})"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in options.items() if value is not None)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def _came_out(results: Results, shown: dict[str, str]) -> list[str]:
    study, arms = results.study, compared(results)
    parts = [_how_to_read(results), *_weak_teachers(results)]
    for k in study["ks"]:
        student, teacher = (rate_text(rate(results, model, START, k)) for model in START_MODELS)
        rows = []
        for arm in results.arms:
            cells = [rate_text(rate(results, arm, moment, k)) for moment in MOMENTS]
            rows.append([cell(arm), *cells, points(gain(results, arm, k))])
        head = ["arm", f"pass@{k} before RL", f"pass@{k} after RL", "gain by RL, points"]
        parts += [
            f"### pass@{k}",
            table(head, rows),
            f"The student that all arms start from has {student}, the teacher {teacher}.",
        ]
        rows = []
        for arm in arms:
            found = [difference(results, arm, moment, k) for moment in MOMENTS]
            cells = [text for each in found for text in (points(each.interval), _record(each))]
            primary = (arm, k) == (study["primary"]["arm"], study["primary"]["k"])
            rows.append([f"**{cell(arm)}** (primary)" if primary else cell(arm), *cells])
        minus = f"minus {cell(study['baseline'])}"
        head = [f"pass@{k} {minus}, points", "before RL", "seeds before", "after RL", "seeds after"]
        parts.append(table(head, rows))
    parts += [shown[name] for name in ("passes.png", "differences.png") if name in shown]
    parts += ["### Order of the arms", _ORDER]
    rows = [[f"pass@{k}", _correlation(order(results, k))] for k in study["ks"]]
    parts.append(table(["", "rank correlation of before and after RL"], rows))
    parts += [shown["order.png"]] if "order.png" in shown else []
    if curves := [shown[name] for name in ("rl_curves.png", "sft_curves.png") if name in shown]:
        parts += ["### Over training", *curves, _CURVES]
    return parts


_ORDER = (
    "Spearman's rank correlation, over the arms, of mean pass@k before RL and after it; 1: RL keeps their order, -1: "
    "RL turns it round. Its interval resamples seeds and problems, the same for all arms; the arms are those of this "
    "study. Resampling adds noise to the means, and noise draws a correlation towards 0: the interval lies rather too "
    "near to 0. In the picture, intervals are each arm's own; arms share seeds and problems, so their differences "
    "are known better than it looks, and stand in the tables."
)


_CURVES = f"Means over seeds. Curves of {SMOOTH_FROM} points or more are running means over a {SMOOTH_SHARE}th of them."


def _record(found: Difference) -> str:
    return f"{found.won}/{found.tied}/{found.lost}"


def _correlation(found: Interval | None) -> str:
    if found is None:
        return "not defined: all arms are alike"
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _weak_teachers(results: Results) -> list[str]:
    """A paragraph, if some seed's teacher is no better than its student."""
    rates = {model: passes(results, model, START, 1).mean(axis=1) for model in START_MODELS}  # (S,)
    weak = [
        seed
        for seed, student, teacher in zip(results.seeds_of("teacher"), rates["student"], rates["teacher"], strict=True)
        if teacher <= student
    ]
    if not weak:
        return []
    return [
        f"> On {_several(len(weak), 'seed')} ({_listed(weak)}) the teacher's pass@1 is not above the student's: there "
        "it is no stronger behaviour policy, and this is not the setting of the paper."
    ]


def _how_to_read(results: Results) -> str:
    lines = [
        "- **pass@k**: the chance that at least one of k completions is right, by the unbiased estimate, as the mean "
        "over problems and seeds.",
        "- **in brackets**: a 95 % interval for other seeds and other problems of the same kind. Seeds and problems "
        f"are drawn anew, {DRAWS} times, each with replacement (the pigeonhole bootstrap of Owen 2007). It also spans "
        "Student's t interval of the seeds' means, without which it would be too narrow with few seeds. "
        "So it is rather too wide than too narrow.",
        "- **differences**: percentage points, paired by seed and problem. An interval with 0 inside shows no "
        "difference that can be told from noise.",
        "- **seeds**: won/tied/lost against the baseline, by the mean over problems.",
    ]
    return "\n".join(lines) + (f"\n\n{ONE_SEED}" if len(results.study["seeds"]) == 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics


def _diagnostics(results: Results, shown: dict[str, str]) -> list[str]:
    parts = []
    if results.diagnostics:
        arms = [*results.arms, *results.ablations]
        rows = []
        for arm in arms:
            found = [row for row in results.diagnostics if row["arm"] == arm]
            if found:
                rows.append([cell(arm), *(mean_text(_values(found, field)) for field in DIAGNOSTICS.values())])
        parts += [_DIAGNOSTICS, table(["arm", *DIAGNOSTICS], rows)]
    rows = []
    for arm in results.arms:
        cells = []
        for moment in MOMENTS:
            found = [row for row in results.evaluations if (row["arm"], row["moment"]) == (arm, moment)]
            cells.append(mean_text([row["mean_tokens"] for row in found]))
            cells.append(mean_text([_times_100(row["finished"]) for row in found]))
        rows.append([cell(arm), *cells])
    head = [f"{what} {moment} RL" for moment in MOMENTS for what in ("tokens", "% finished")]
    parts += [
        "Mean length of a completion, and the share of them that ended by themselves:",
        table(["arm", *head], rows),
    ]
    if results.weights:
        parts += ["### Weights", _WEIGHTS, table(*_weights(results), text=2)]
        parts += [shown[name] for name in ("weights.png",) if name in shown]
    return [*parts, "### Warnings of SFT", _warnings(results)]


_DIAGNOSTICS = (
    "Means over seeds, ± their standard error. KL: nats a token, on completions of the first-named model. Move: the "
    "distance that the parameters went, as a share of the student's norm. Cosine: of the step that SFT made and the "
    "one that RL made. Entropy: nats a token, on the model's own completions, before and after RL. Held-out NLL: nats "
    "a token, unweighted, after SFT."
)
_WEIGHTS = (
    "Of the training data, under the student before SFT (start) and after it (end); means over seeds, ± their standard "
    "error. Floor, ceiling: share of tokens whose weight lies there. Effective sample size: the share of tokens that, "
    "weighted alike, would be worth as much. Log-ratio: mean log-prob of the student minus that of the teacher, nats."
)


def _values(rows: list[dict[str, Any]], field: str | tuple[str, str]) -> list[float | None]:
    if isinstance(field, str):
        return [row[field] for row in rows]
    above, below = field
    return [row[above] / row[below] if row[above] is not None and row[below] else None for row in rows]


def _times_100(value: float | None) -> float | None:
    return None if value is None else 100 * value


def mean_text(values: Sequence[float | None]) -> str:
    """Mean ± standard error, to one digit of the error or two where it begins with 1; without one, three digits."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    mean = float(np.mean(known))
    error = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    if error <= 1e-12 * abs(mean):  # one value, or all alike
        return f"{mean:.3g}"
    digits = -math.floor(math.log10(error))
    digits = max(0, digits + (error * 10**digits < 2))
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if digits <= 6 else f"{mean:.3g} ± {error:.2g}"


def _weights(results: Results) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm in [*results.arms, *results.ablations]:
        for moment in ("start", "end"):
            found = [row for row in results.weights if (row["arm"], row["moment"]) == (arm, moment)]
            if found:
                shares = ("floor", "ceiling", "effective_sample_size")
                cells = [mean_text([_times_100(row[share]) for row in found]) for share in shares]
                ends = [mean_text([row[name] for row in found]) for name in ("mean", "log_ratio_mean")]
                rows.append([cell(arm), moment, ends[0], *cells, ends[1]])
    return ["arm", "moment", "mean", "% on floor", "% on ceiling", "effective sample size, %", "log-ratio"], rows


def _warnings(results: Results) -> str:
    """A line for each arm and kind of warning: how many seeds had it. Warnings that differ in numbers are one kind."""
    lines = []
    for arm in [*results.arms, *results.ablations]:
        rows = [row for row in results.training if (row["arm"], row["phase"]) == (arm, "sft")]
        kinds: dict[str, list[str]] = {}
        for row in rows:
            for kind, text in {
                re.sub(r"[-+]?\d[\d.e+-]*", "#", text): text for text in row.get("warnings", [])
            }.items():
                kinds.setdefault(kind, []).append(text)
        for texts in kinds.values():
            lines.append(f"- {plain(arm)}, {len(texts)} of {_several(len(rows), 'seed')}: {plain(texts[0])}")
    return "\n".join(lines) if lines else "None."


# ---------------------------------------------------------------------------------------------------------------------
# Ablations, limits, settings


def _ablations(results: Results, shown: dict[str, str]) -> list[str]:
    ks, seeds = results.study["ks"], results.study["ablation_seeds"]
    rows = []
    for arm in ablation_rows(results):
        found = [difference(results, arm, "after", k, seeds) for k in ks]
        cells = [text for each in found for text in (points(each.interval), _record(each))]
        rows.append([f"{cell(arm)} (as in the study)" if arm in results.arms else cell(arm), *cells])
    head = [text for k in ks for text in (f"pass@{k}", "seeds")]
    text = f"Each minus {plain(results.study['baseline'])}, after RL, in points, on the same {_numbered_seeds(seeds)}."
    return [text, table(["arm", *head], rows), *([shown["ablations.png"]] if "ablations.png" in shown else [])]


def comparisons(results: Results) -> int:
    """How many differences from the baseline, with intervals, the report holds."""
    ks = len(results.study["ks"])
    return len(compared(results)) * ks * len(MOMENTS) + len(ablation_rows(results)) * ks


def _limits(results: Results) -> str:
    number = comparisons(results)
    lines = [
        f"- The models are small and {'taught' if _start(results) else 'trained from nothing on'} one task "
        f"({plain(results.study['task'])}). Nothing here speaks of large models, of other tasks, or of longer answers.",
        "- The intervals speak of other seeds and other problems of this kind; they are conditional on everything that "
        "was held fixed: the sizes of the models, the recipe of teacher and traces, and the settings of SFT and RL.",
        f"- There are {number} comparisons with the baseline in this report, each with its own 95 % interval and none "
        f"corrected for the others: of as many comparisons without any difference, up to {0.05 * number:.1f} or "
        "so would look like one. Only the primary comparison was named in advance.",
        "- But for the options of its SFT, each arm has the same hyper-parameters, and no arm was tuned. One that "
        "loses here might win with settings of its own, and one that wins might owe it to these.",
    ]
    if bases := results.study["config"].get("bases"):
        lines.append(
            f"- Seeds share {_several(bases, 'pair')} of student and teacher, and take turns with them: intervals "
            "speak of other seeds with these, not of other students."
        )
    lines.append("- Diagnostics go along with outcomes; that they cause them, this study cannot say.")
    if (k := max(results.study["ks"])) in {results.samples(arm, "after") for arm in results.arms}:
        lines.append(
            f"- pass@{k} of {k} completions asks whether any of them is right, so one lucky one counts as much as {k} "
            "right ones; it says the least about how well a model solves a problem."
        )
    if results.ablations:
        lines.append(
            f"- Ablations ran on {_several(len(results.study['ablation_seeds']), 'seed')} of "
            f"{len(results.study['seeds'])}; they are to be read as hints."
        )
    return "\n".join(lines)


def _settings(results: Results) -> list[str]:
    study = results.study
    seconds, jobs = study["seconds"], study["jobs_at_once"]
    versions = ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    lines = [f"- Device: {plain(study['device'])}", f"- Versions: {plain(versions) or 'unknown'}"]
    lines.append(f"- Commit: {study['commit'] or 'unknown'}")
    lines.append(f"- Time of all jobs together: {duration(seconds['all_jobs'])}; {_several(jobs, 'job')} at once")
    parts = ["\n".join(lines)]
    if phases := seconds["by_phase"]:
        numbers = {phase: sum(job["phase"] == phase for job in results.jobs) for phase in phases}
        rows = [[cell(phase), str(numbers[phase]), duration(value)] for phase, value in phases.items()]
        parts.append(table(["phase", "jobs", "time of its jobs"], rows))
    config = yaml.safe_dump(study["config"], sort_keys=False, allow_unicode=True, width=100).strip()
    return [*parts, "The configuration, in full:", f"```yaml\n{config}\n```"]


def duration(seconds: float) -> str:
    """Seconds, minutes and seconds, or hours and minutes."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
