"""The demo's report.md and its pictures, from the files that the demo's stages left."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from pear.curves import CURVES, PASSES
from pear.eval import percent
from pear.io import read_jsonl, write_text
from pear.pictures import plt, save_figure
from pear_kernels import pear_weights
from pear_kernels.options import DEFAULTS

COLORS = {"student": "tab:gray", "sft": "tab:blue", "pear": "tab:orange", "low": "tab:red", "high": "tab:green"}
LABELS = {
    "teacher": "teacher",
    "student": "student (start of both)",
    "sft": "SFT",
    "pear": "PEAR",
    "sft_rl": "SFT, then RL",
    "pear_rl": "PEAR, then RL",
}
PICTURES = {
    "weights_by_position.png": "mean weight by position",
    "ratio_histogram.png": "log-ratios of student and teacher",
    "weight_bounds.png": "share of weights on floor and ceiling over training",
    "nll.png": "NLL over training",
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_pictures(out: Path, logs: dict[str, list[dict[str, float]]], heldout: int) -> list[Path]:
    """Write PICTURES to `out`, from the scored traces there and the trainers' logs; the first `heldout` traces are not
    training data and are left out."""
    behavior, mask = _load(out / "scored" / "behavior.jsonl", heldout)
    before, _ = _load(out / "scored" / "student.jsonl", heldout)
    after, _ = _load(out / "training" / "pear.jsonl", heldout)
    draw = {
        "weights_by_position.png": lambda path: weights_by_position(path, behavior, before, after, mask),
        "ratio_histogram.png": lambda path: ratio_histogram(path, behavior, before, after, mask),
        "weight_bounds.png": lambda path: weight_bounds(path, logs["pear"], mask),
        "nll.png": lambda path: nll_curves(path, logs),
    }
    for name in PICTURES:
        draw[name](out / name)
    return [out / name for name in PICTURES]


def _load(path: Path, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (R, T) of each trace's response tokens from the left, and the mask of where there is one."""
    rows = []
    for _, row in list(read_jsonl(path))[skip:]:
        rows.append([p for p, m in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if m])
    logprobs = torch.zeros(len(rows), max(map(len, rows)))
    mask = torch.zeros_like(logprobs, dtype=torch.bool)
    for i, row in enumerate(rows):
        logprobs[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return logprobs, mask


def weights_by_position(
    path: Path, behavior: torch.Tensor, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor
) -> None:
    """Mean token-level weight, counted from the first and from the last token; all (R, T), tokens from the left."""
    lengths = mask.sum(1, keepdim=True)
    from_end = (lengths - 1 - torch.arange(mask.shape[1])).clamp(min=0)  # (R, T): tokens that follow
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, logprobs in (("before training", before), ("after PEAR", after)):
        weights = pear_weights(logprobs, behavior, mask)
        color = COLORS["student"] if name == "before training" else COLORS["pear"]
        _mean_line(axes[0], weights, torch.arange(mask.shape[1]).expand_as(mask), mask, name, color)
        _mean_line(axes[1], weights, from_end, mask, name, color)
    axes[0].set(xlabel="position in the response (tokens from its start)", ylabel="mean weight G")
    axes[1].set(xlabel="tokens that follow (0: the last token)")
    axes[1].invert_xaxis()
    for axis in axes:
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("PEAR weight by position, token level (dotted: SFT's weight of 1; band: middle half of the traces)")
    _save(figure, path)


def _mean_line(
    axis: Axes, weights: torch.Tensor, position: torch.Tensor, mask: torch.Tensor, name: str, color: str
) -> None:
    """Mean and middle half of `weights` at each position that at least 10 traces (or a tenth of them) have."""
    least = min(10, max(1, mask.shape[0] // 10))
    xs, means, lows, highs = [], [], [], []
    for x in range(mask.shape[1]):
        here = weights[mask & (position == x)]
        if len(here) >= least:
            xs.append(x)
            means.append(here.mean().item())
            low, high = torch.quantile(here, torch.tensor([0.25, 0.75])).tolist()
            lows.append(low)
            highs.append(high)
    axis.plot(xs, means, color=color, label=name)
    axis.fill_between(xs, lows, highs, color=color, alpha=0.2, linewidth=0)


def ratio_histogram(
    path: Path, behavior: torch.Tensor, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor
) -> None:
    """log pi - log pi_b of every response token, with the ends of the clip."""
    low, high = DEFAULTS.log_ratio_clip
    edge = 1.5
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, title, logprobs, color in (
        (axes[0], "before training", before, COLORS["student"]),
        (axes[1], "after PEAR", after, COLORS["pear"]),
    ):
        ratio = (logprobs - behavior)[mask].numpy()
        share = np.full(len(ratio), 100 / len(ratio))
        axis.hist(np.clip(ratio, -edge, edge), bins=np.linspace(-edge, edge, 101), weights=share, color=color)
        for end, name, side in ((low, "low", ratio < low), (high, "high", ratio > high)):
            axis.axvline(end, color=COLORS[name], label=f"clip at {end:g}: {100 * side.mean():.1f} % beyond")
        axis.set(yscale="log", title=f"{title}, mean after the clip {np.clip(ratio, low, high).mean():+.3f}")
        axis.set(xlabel=f"$\\log\\,\\pi - \\log\\,\\pi_b$ of a token (nats; beyond ±{edge} in the outer bins)")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right")  # the peak is at 0
    axes[0].set_ylabel("share of response tokens (%)")
    figure.suptitle("Log-ratio of the student to the teacher who wrote the traces")
    _save(figure, path)


def weight_bounds(path: Path, log: list[dict[str, float]], mask: torch.Tensor) -> None:
    """Shares of weights on floor and ceiling and of ratios beyond their clip, and the effective sample size."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    low, high = DEFAULTS.log_weight_clip
    for key, label, color in (
        ("weight_floor", f"floor, $e^{{{low:g}}}$", COLORS["low"]),
        ("weight_ceiling", f"ceiling, $e^{{{high:g}}}$", COLORS["high"]),
    ):
        steps, values = series(log, f"pear/{key}")
        axes[0].plot(steps, 100 * np.array(values), color=color, label=label)
    top = max(5.0, 110 * max(max(series(log, f"pear/weight_{k}")[1]) for k in ("floor", "ceiling")))
    axes[0].set(ylim=(-0.02 * top, top), ylabel="share of response tokens (%)", title="weights on floor and ceiling")
    tokens = low / (DEFAULTS.log_ratio_clip[0] + math.log(DEFAULTS.gamma))  # of the lowest ratio, down to the floor
    longest = int(mask.sum(1).max())
    if longest < tokens:
        note = f"The longest trace has {longest} tokens.\nNo weight can reach the floor in fewer than {tokens:.0f}."
        axes[0].text(0.97, 0.6, note, transform=axes[0].transAxes, ha="right", va="top", fontsize=9)
    for key, label, color in (
        ("ratio_clipped_low", f"log-ratio clipped at {DEFAULTS.log_ratio_clip[0]:g}", COLORS["low"]),
        ("ratio_clipped_high", f"log-ratio clipped at {DEFAULTS.log_ratio_clip[1]:g}", COLORS["high"]),
        ("effective_sample_size", "effective sample size", "black"),
    ):
        steps, values = series(log, f"pear/{key}")
        axes[1].plot(steps, 100 * np.array(values), color=color, label=label)
    axes[1].set(ylim=(0, 105), ylabel="share of response tokens (%)", title="where the weights come from")
    for axis in axes:
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("PEAR's weights over training")
    _save(figure, path)


def nll_curves(path: Path, logs: dict[str, list[dict[str, float]]]) -> None:
    """Plain NLL of both runs: on the batches as they came, and on traces that no step trained on."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, log in logs.items():
        axes[0].plot(*series(log, "pear/nll"), color=COLORS[name], label=LABELS[name], linewidth=1)
        axes[1].plot(*series(log, "eval_pear/nll"), color=COLORS[name], label=LABELS[name], marker="o")
    axes[0].set(ylabel="NLL (nats a response token, unweighted)", title="training traces, each batch before its step")
    axes[1].set(title="held-out traces")
    for axis in axes:
        axis.set(xlabel="training step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("NLL of the teacher's traces; PEAR does not minimise it, and need not have the lower one")
    _save(figure, path)


def series(log: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a trainer's log."""
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def results_table(results: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, float]]]) -> str:
    """The markdown table; the same for two runs with the same settings."""
    ks = [key for key in next(iter(results.values())) if key.startswith("pass@") and not key.endswith("_stderr")]
    lines = ["| model | " + " | ".join(ks) + " | held-out NLL | finished | tokens |"]
    lines.append("| --- |" + " ---: |" * (len(ks) + 3))
    # The student's own held-out NLL was measured before the first step.
    heldout = {name: series(log, "eval_pear/nll")[1][-1] for name, log in logs.items()}
    heldout["student"] = series(logs["sft"], "eval_pear/nll")[1][0]
    for name, result in results.items():
        cells = [percent(result[key], result[f"{key}_stderr"]) for key in ks]
        cells.append(f"{heldout[name]:.4f}" if name in heldout else "")
        cells += [percent(result["finished"]), f"{result['mean_tokens']:.1f}"]
        lines.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(
    out: Path,
    results: dict[str, dict[str, Any]],
    logs: dict[str, list[dict[str, float]]],
    facts: dict[str, Any],
    rl_table: str,  # of `pear.compare.comparison_table`
) -> Path:
    """Write report.md. `facts`: settings, traces, versions, device, parameters, warnings, seconds, kept, fast."""
    settings, traces = facts["settings"], facts["traces"]
    k, samples, size = settings["k"], settings["samples"], settings["test_problems"]
    first, last = (series(logs["pear"], "pear/log_ratio_mean")[1][i] for i in (0, -1))
    paragraphs = [
        "# SFT and PEAR on Countdown, and the same RL from both, from nothing",
        "This is a demo of the path, from data to evaluation, on toy models with one seed. It is **not evidence** for "
        "or against the paper's claim, which is about what reinforcement learning makes of large models afterwards. "
        "The figures are what came out. Settings were chosen by SFT's held-out NLL, by whether "
        "SFT improved on the student, and by the teacher's pass@1 on these very problems; not blindly, since earlier "
        "runs with other settings had shown PEAR's figures too. Settings of RL were chosen on the SFT arm alone.",
    ]
    if facts["fast"]:
        paragraphs.append("**This was a fast run, for tests: its figures mean nothing at all.**")
    paragraphs += [
        results_table(results, logs),
        f"- **pass@1, pass@{k}**: the chance that at least one of 1 or {k} completions is right: the unbiased estimate "
        f"from {samples} samples, at temperature 1, for each of {size} problems that no model was trained on in any "
        "order or wording; ± its standard error over problems. Right is what reasoning-gym's own scorer calls right. "
        "Differences of a standard error or two are noise.\n"
        f"- **held-out NLL**: nats a response token, on {traces['heldout']} right traces that were not trained on.\n"
        f"- **finished**: share of completions that ended within {settings['max_new_tokens']} tokens.\n"
        "- **tokens**: mean length of a completion.",
        "## Before and after the same RL",
        rl_table,
        "In brackets the 95 % bootstrap interval over problems: it says nothing of other seeds. The last rows are "
        "differences on the same problems. Both arms had the same prompts in the same order, the same seeds and the "
        f"same budget: {settings['rl_rounds']} rounds of GRPO of {settings['rl_prompts']} prompts with "
        f"{settings['rl_group']} completions each, {settings['rl_updates']} updates a round at a learning rate of "
        f"{settings['rl_learning_rate']:g}, no KL term, reward 1 for a right answer. `rl/report.md` is what "
        "`pear compare` makes of them.",
        f"![reward, pass@k, KL and length over RL](rl/{CURVES['rl']})",
        f"![pass@k before and after RL](rl/{PASSES})",
        "## What was done",
        f"Teacher and student are Llamas of {facts['parameters']:,} parameters with one tokenizer, trained on worked "
        f"solutions. The teacher learnt for {settings['teacher_steps']} steps to work backward from the target; the "
        f"student for {settings['student_steps']} steps to go forward ({1 - settings['student_backward']:.0%} of its "
        "examples) or backward. A trace of the teacher:",
        f"    {traces['example']['prompt']} {traces['example']['completion']}",
        f"It drew {traces['drawn']} completions of {settings['problems']} problems; {traces['right']} were right, and "
        f"{traces['train']} different ones of these were trained on, for {settings['epochs']} epochs "
        f"({traces['mean_tokens']:.1f} response tokens each on average): without weights (SFT) and with PEAR's, from "
        "the same start and in the same order. The mean log-ratio of student and teacher, before its clip, went from "
        f"{first:+.4f} to {last:+.4f}.",
    ]
    paragraphs += [f"> {warning}" for warning in facts["warnings"]]
    paragraphs.append("## Pictures")
    paragraphs += [f"![{title}]({name})" for name, title in PICTURES.items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in facts["seconds"].items())
    kept = f" Kept from an earlier run: {', '.join(facts['kept'])}." if facts["kept"] else ""
    paragraphs += [
        "## Settings",
        f"{facts['device']}; {versions}; float32. Every random choice follows from the seed. Seconds by stage: "
        f"{seconds}.{kept}",
        "| setting | value |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in settings.items()),
    ]
    path = out / "report.md"
    write_text(path, "\n\n".join(paragraphs) + "\n")
    return path
