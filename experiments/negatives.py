"""Do negatives run away? `python -m experiments.negatives runs/demo`, after `make demo`: some minutes on two cores.

The demo's teacher answers Countdown problems; right and wrong answers alike, a label on each, become the data, scored
under the teacher. From the demo's student `pear sft` trains five times in the same order on them, with nothing but the
handling of wrong answers changed: none (right answers alone), ours (lambda 0.1, log-prob floor -5), and with the factor
or the bound of the paper's term as others have tried it (lambda 1, no bound). What is measured, over training and on
held-out answers: the NLL of right and of wrong ones, and pass@1 on the demo's test problems. It leaves report.md, the
curves and each run's log in experiments/results/negatives/.
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch

import pear_kernels
from bench.machine import commit
from pear.curves import draw_curves
from pear.demo import Settings, evaluate_one, read_problems
from pear.eval import prompt_format
from pear.generate import generate
from pear.io import write_json, write_jsonl, write_text
from pear.models import load_model, load_tokenizer
from pear.runs import read_run
from pear.score import score
from pear.side_by_side import Job, Team
from pear.tasks import rewards

OUT = Path(__file__).parent / "results" / "negatives"
ARMS: dict[str, dict[str, Any] | None] = {
    "right answers alone": None,
    "lambda 0.1, floor -5 (ours)": dict(negative_lambda=0.1, logprob_floor=-5.0),
    "lambda 0.1, no bound": dict(negative_lambda=0.1, logprob_floor=float("-inf")),
    "lambda 1, floor -5": dict(negative_lambda=1.0, logprob_floor=-5.0),
    "lambda 1, no bound": dict(negative_lambda=1.0, logprob_floor=float("-inf")),
}
PROBLEMS, SAMPLES, HELD_OUT = 600, 4, 200  # of the teacher's, and answers of these kept from training
LOGGED = ("nll", "wrong_nll", "wrong_weight_mean", "wrong_below_floor")
EPOCHS, BATCH, LEARNING_RATE = 3, 16, 1e-3  # chosen before any of the five was run, and not changed after


def answers(tick, demo: Path, folder: Path) -> dict[str, int]:
    """The teacher's answers with labels, scored: train.jsonl and heldout.jsonl; without the wrong ones, right.jsonl."""
    settings = Settings()
    model, tokenizer = load_model(str(demo / "teacher")), load_tokenizer(str(demo / "teacher"))
    style = prompt_format(tokenizer)
    problems = read_problems(demo / "problems.json")[0][:PROBLEMS]
    drawn = generate(
        model, tokenizer, [p.prompt(style) for p in problems], samples=SAMPLES, seed=7,
        max_new_tokens=settings.max_new_tokens, batch_size=settings.generate_batch, progress=tick,
    )  # fmt: skip
    rows = []
    for problem, completions in zip(problems, drawn, strict=True):
        verdicts = rewards(problem, [c.text for c in completions])
        texts = {c.text: bool(ok) for c, ok in zip(completions, verdicts, strict=True) if c.finished}
        rows += [{"prompt": problem.prompt(style), "completion": text, "label": ok} for text, ok in texts.items()]
    Random(0).shuffle(rows)
    write_jsonl(folder / "answers.jsonl", rows)
    score(model, folder / "answers.jsonl", folder / "scored.jsonl", tokenizer=tokenizer, progress=False)
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    heldout, train = scored[:HELD_OUT], scored[HELD_OUT:]
    right = [row for row in train if row["label"]]
    for name, part in (("train", train), ("heldout", heldout), ("right", right)):
        write_jsonl(folder / f"{name}.jsonl", part)
    return {"rows": len(train), "right": len(right), "heldout": len(heldout)}


def train(tick, demo: Path, folder: Path, name: str) -> dict[str, Any]:
    """One arm; the last evaluation's figures, and pass@1."""
    from pear.sft import main

    options = ARMS[name]
    run = folder / name.replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
    steps = ["--max_steps", str(EPOCHS * len((folder / "train.jsonl").read_text().splitlines()) // BATCH)]
    data = "train" if options else "right"
    flags = ["--negatives"] if options else []
    for key, value in (options or {}).items():
        flags.append(f"--{key}={value}")
    held_out = str(folder / ("heldout.jsonl" if options else "heldout_right.jsonl"))
    if not options:
        rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
        write_jsonl(held_out, [row for row in rows if row["label"]])
    main(
        ["--model", str(demo / "student"), "--data", str(folder / f"{data}.jsonl"), "--eval_data", held_out,
         "--output_dir", str(run), "--per_device_train_batch_size", str(BATCH), "--learning_rate", str(LEARNING_RATE),
         "--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "20", "--eval_on_start", "true",
         "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "10", "--save_strategy", "no", "--use_cpu",
         "--gradient_checkpointing", "false", "--report_to", "none", "--disable_tqdm", "true", *steps, *flags]
    )  # fmt: skip
    _, test = read_problems(demo / "problems.json")
    evaluated = evaluate_one(tick, run, test, Settings(samples=8, k=8))
    log = json.loads((run / "run.json").read_text())["log"]
    last = {key: value for entry in log for key, value in entry.items()}
    return {"run": str(run), "pass@1": evaluated["pass@1"], "last": last, "log": log}


def report(facts: dict[str, int], found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Do negatives run away?",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
        "",
        f"{facts['rows']} answers to train on, {facts['right']} of them right; {facts['heldout']} held out. {EPOCHS} "
        f"epochs' steps in batches of {BATCH}, learning rate {LEARNING_RATE:g}, one seed.",
        "",
        "| wrong answers | loss at the end | lowest loss | NLL right, held out | NLL wrong, held out "
        "| wrong tokens below the floor | pass@1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in found.items():
        losses = [entry["loss"] for entry in arm["log"] if "loss" in entry]
        last = arm["last"]
        cells = [losses[-1], min(losses), last["eval_pear/nll"], last.get("eval_pear/wrong_nll")]
        shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        floor = last.get("pear/wrong_below_floor")
        shown += ["" if floor is None else f"{floor:.0%}", f"{arm['pass@1']:.1%}"]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += [
        "",
        "All runs take the same number of steps of the same batch size. With wrong answers in the batches, a third of",
        "their rows are right ones, so that run has seen each right answer a third as often as the first has.",
        "",
        "![curves](curves.png)",
        "",
        f"{platform.machine()} CPU, one thread a run; torch {torch.__version__}, pear-kernels "
        f"{pear_kernels.__version__}, commit {commit()}; `python -m experiments.negatives runs/demo`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path, help="the folder of a finished `pear demo`")
    parser.add_argument("--work", type=Path, default=Path("runs/negatives"), help="data and checkpoints")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    with Team() as team:
        facts = team.run({"answers": Job(answers, dict(demo=given.demo, folder=given.work))})["answers"]
        jobs = {name: Job(train, dict(demo=given.demo, folder=given.work, name=name)) for name in ARMS}
        found = team.run(jobs)
    OUT.mkdir(parents=True, exist_ok=True)
    runs = [replace(read_run(arm["run"]), name=name) for name, arm in found.items()]
    draw_curves(runs, OUT / "curves.png")
    kept = ("step", "loss", *(f"{mode}{name}" for mode in ("pear/", "eval_pear/") for name in LOGGED))
    logs = {
        name: [{key: entry[key] for key in kept if key in entry} for entry in arm["log"]] for name, arm in found.items()
    }
    write_json(OUT / "logs.json", logs)
    write_text(OUT / "report.md", report(facts, found))
    print((OUT / "report.md").read_text())


if __name__ == "__main__":
    main()
