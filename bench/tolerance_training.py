"""`python -m bench.tolerance_training`: SmolLM2 fine-tuned by `pear sft` at several values of `gradient_tolerance`.

All parameters of SmolLM2-135M are trained in float32 by AdamW, without weights, on pieces of Python source (modules of
the standard library). Every sixth piece is held out. The runs share the model, the data, the seed and every option but
the tolerance. A finished run is kept in --work, so that a stopped study goes on. A table made by --report, before the
runs have ended, has as many steps as each has done, and the evaluations that all of them have. Figures are losses, not
times: other processes may share the cores.
"""

import argparse
import importlib
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from bench import machine
from bench.report import table
from bench.store import write_text_whole
from pear.curves import series
from pear.io import read_jsonl, write_jsonl
from pear.models import load_tokenizer
from pear.runs import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MODEL, SEED = "smollm2", 0
MODULES = ("argparse", "textwrap", "tarfile", "inspect", "zipfile", "subprocess")
HELD_OUT = 6  # one piece in so many
EVALUATIONS = 2  # after the one at the start
TOLERANCES = (0.0, 0.01, 0.05)
NLL, KEPT, LEFT_OUT = "eval_pear/nll", "pear/gradient_kept", "pear/gradient_left_out"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tolerance_training", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of each run (default 60)")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step (default 2)")
    parser.add_argument("--tokens", type=int, default=240, help="of a row (default 240)")
    parser.add_argument("--held_out", type=int, default=24, help="rows (default 24)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each run (default 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--work", type=Path, default=machine.ROOT / "runs" / "tolerance_training")
    parser.add_argument("--folder", type=Path, help="of the results (default: bench/results/MACHINE)")
    parser.add_argument("--report", action="store_true", help="of what the runs have logged so far; runs nothing")
    parser.add_argument("--note", default="", help="what a reader of the table should know, in a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, facts = arguments.work.resolve(), machine.facts("cpu")
    folder = (arguments.folder or machine.ROOT / "bench" / "results" / machine.folder_name(facts)).resolve()
    for path in (work, folder):
        path.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        write_data(work, arguments.tokens, {"train": arguments.batch * arguments.steps, "held_out": arguments.held_out})
    commands = [sft(t, arguments.steps, arguments.batch, 2 * arguments.tokens) for t in TOLERANCES]

    def run(command: list[str]) -> Run:
        if not arguments.report and not (work / command[-1] / "run.json").is_file():
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
            subprocess.run([sys.executable, "-m", "pear", *command], cwd=work, env=environment, check=True)
        log = [row for _, row in read_jsonl(work / command[-1] / "log.jsonl") if "step" in row]
        return Run(work / command[-1], command[-1], "sft", {}, {}, log)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = evaluated_alike(dict(zip(TOLERANCES, pool.map(run, commands), strict=True)))
    text = report(facts, found, " ".join(["pear", *commands[0]]), arguments.note)
    write_text_whole(folder / "tolerance_training.md", text)
    content = {"machine": facts, "note": arguments.note, "logs": {f"{t:g}": run.log for t, run in found.items()}}
    write_text_whole(folder / "tolerance_training.json", json.dumps(content) + "\n")
    draw(found, folder / "tolerance_training.png")
    print(text)


def write_data(work: Path, tokens: int, counts: dict[str, int]) -> None:
    """train.jsonl and held_out.jsonl: pieces of source, each with the name of its module as the prompt."""
    tokenizer = load_tokenizer(MODEL)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in counts}
    number = 0
    for module in MODULES:
        ids = tokenizer(inspect.getsource(importlib.import_module(module)))["input_ids"]
        for begin in range(0, len(ids) - tokens, tokens):
            row = {"prompt": f"# {module}.py\n", "completion": tokenizer.decode(ids[begin : begin + tokens])}
            rows["held_out" if number % HELD_OUT == 0 else "train"].append(row)
            number += 1
    for name, count in counts.items():
        if len(rows[name]) < count:
            raise SystemExit(f"{name}: {count} rows are asked for, and there are {len(rows[name])}")
        step = len(rows[name]) // count  # rows of every module
        write_jsonl(work / f"{name}.jsonl", rows[name][::step][:count])


def sft(tolerance: float, steps: int, batch: int, max_length: int) -> list[str]:
    """Arguments of `pear` in the folder --work; the last is the folder of the run."""
    options = {
        "model": MODEL, "data": "train.jsonl", "eval_data": "held_out.jsonl", "weighting": "none",
        "gradient_tolerance": f"{tolerance:g}", "dtype": "float32", "max_length": max_length, "max_steps": steps,
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": 4, "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine", "warmup_steps": 5, "gradient_checkpointing": False, "seed": SEED,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": max(1, steps // EVALUATIONS), "eval_on_start": True,
        "save_strategy": "no", "report_to": "none", "output_dir": f"tolerance-{tolerance:g}",
    }  # fmt: skip
    return ["sft", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def evaluated_alike(found: dict[float, Run]) -> dict[float, Run]:
    """The runs without evaluations that not all of them have."""
    common = set.intersection(*(set(series(run, NLL)[0]) for run in found.values()))
    return {
        t: replace(run, log=[row for row in run.log if NLL not in row or row["step"] in common])
        for t, run in found.items()
    }


def report(facts: dict, found: dict[float, Run], command: str, note: str) -> str:
    lines = ["# Fine-tuning with gradients that leave out what does not count", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- exact run: {command}", *([f"- note: {note}"] if note else []), ""]
    lines += [*(line.strip() for line in __doc__.split("\n\n", 1)[1].strip().splitlines()), ""]
    head = ["gradient_tolerance", "steps", "held-out NLL before", "after", "after, from exact", "furthest from exact"]
    head += ["mean training NLL", "work of the gradient products", "mass left out", "at most"]
    exact, rows = series(found[TOLERANCES[0]], NLL)[1], []
    for tolerance, run in found.items():
        values, training, kept, left = (series(run, key)[1] for key in (NLL, "pear/nll", KEPT, LEFT_OUT))
        away = [own / its - 1 for own, its in zip(values, exact, strict=True)]
        row = [f"{tolerance:g}", f"{len(training)}", f"{values[0]:.4f}", f"{values[-1]:.4f}", f"{away[-1]:+.3%}"]
        row += [f"{max(away, key=abs):+.3%}", f"{mean(training):.4f}"]
        row += [f"{mean(kept):.2f}", f"{mean(left):.4f}", f"{max(left):.4f}"] if kept else ["1", "0", "0"]
        rows.append(row)
    return "\n".join([*lines, *table(head, rows), "", "![NLL over training](tolerance_training.png)"]) + "\n"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(found: dict[float, Run], path: Path) -> None:
    """NLL over training; the held-out NLL; and how far that is from the exact run's."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    exact = series(found[TOLERANCES[0]], NLL)[1]
    for (tolerance, run), style in zip(found.items(), ("-", "--", ":"), strict=True):
        axes[0].plot(*series(run, "pear/nll"), style, label=f"gradient_tolerance {tolerance:g}")
        steps, values = series(run, NLL)
        axes[1].plot(steps, values, style, marker="o")
        axes[2].plot(steps, [100 * (a / b - 1) for a, b in zip(values, exact, strict=True)], style, marker="o")
    axes[2].axhspan(-0.2, 0.2, color="#8a94a6", alpha=0.2)
    for axis, title, label in zip(
        axes,
        ("training data, each batch before its step", "held-out data", "held-out data, from the exact run"),
        ("NLL (nats per token)", "NLL (nats per token)", "difference of NLL, %; grey: 0.2 %"),
        strict=True,
    ):
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
