"""`make demo`: on two CPU cores, from nothing to a report: a student fine-tuned by SFT and by PEAR, and then by RL.

Teacher and student are small Llamas trained here, on worked Countdown solutions of different styles. The teacher's
right answers become the data; they are scored under the teacher; the student is fine-tuned on them twice, from the same
start and in the same order, without weights (SFT) and with PEAR's (token level). Both checkpoints then go through one
and the same RL run (GRPO, a verified reward; same prompts, seeds and budget). Everything is evaluated on problems that
no training saw. What comes out is written down as it is.

Simplifications: one seed, one learning rate for both, small models, short RL. It shows the path, not the paper's claim.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from rich.console import Console

import pear
import pear_kernels
from pear import pipeline
from pear.appending import output_folder
from pear.compare import compare, comparison_table
from pear.countdown import Numbers, make_tokenizer, train_problems, worked_example
from pear.eval import evaluate, table
from pear.folders import whole_folder
from pear.io import DataError, read_jsonl, write_json, write_jsonl
from pear.models import load_model, load_tokenizer
from pear.pipeline import Tick, draw_traces
from pear.pretrain import small_llama, teach
from pear.report import LABELS, draw_pictures, write_report
from pear.runs import evaluation_path, read_run, write_run
from pear.seal import write_scored
from pear.side_by_side import Job, Team, quiet
from pear.tasks import Problem, load_task

TUNED = ("sft", "pear")  # both from "student"
FOLDERS = {name: name for name in ("teacher", "student", *TUNED)} | {f"{name}_rl": f"rl/{name}" for name in TUNED}
MODELS = tuple(FOLDERS)


@dataclass(frozen=True)
class Settings:
    """Every number the demo depends on; a stage is kept only if none of them has changed."""

    seed: int = 0
    # teacher and student: Llamas of this size, trained on worked solutions
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    teacher_steps: int = 1000
    student_steps: int = 800
    student_backward: float = 0.25  # share of the student's examples in the teacher's style
    pretrain_batch: int = 32
    pretrain_lr: float = 4e-3
    memorise: bool = False  # let the two see only the problems that the traces are about
    # traces
    problems: int = 1000
    trace_samples: int = 4
    heldout_share: float = 0.1  # of the traces, kept from training to measure the NLL on
    # SFT and PEAR
    batch: int = 16
    epochs: int = 3
    learning_rate: float = 2e-3
    log_every: int = 2
    # RL, the same for both
    rl_rounds: int = 80  # of drawing completions and learning from them
    rl_prompts: int = 16  # a round
    rl_group: int = 8  # completions a prompt
    rl_updates: int = 4  # optimiser steps a round, each on a part of its completions
    rl_learning_rate: float = 5e-5
    # evaluation
    test_problems: int = 200
    samples: int = 16
    k: int = 8
    max_new_tokens: int = 96
    generate_batch: int = 400


FAST = Settings(
    hidden_size=32,
    layers=2,
    teacher_steps=180,
    student_steps=60,
    pretrain_batch=16,
    pretrain_lr=1e-2,
    memorise=True,
    problems=4,
    trace_samples=16,
    batch=4,
    epochs=1,
    log_every=1,
    rl_rounds=2,
    rl_prompts=4,
    rl_group=4,
    rl_updates=2,
    test_problems=8,
    samples=8,
    max_new_tokens=48,
)


def run(out: str | Path = "runs/demo", fast: bool = False, workers: int | None = None) -> dict[str, Any]:
    """The whole demo; prints as it goes and leaves checkpoints, report.md and pictures in `out`.

    A stage that an earlier call finished with the same settings, versions and code is kept, so a call after a kill
    goes on where it stopped. Delete `out` to start over.

    Args:
        out: a folder, made if missing
        fast: much smaller and shorter, for tests; its figures mean nothing
        workers: jobs side by side, one thread each; None for two, or one on a single core. Changes no figure.

    Returns:
        "results" (the evaluation of each of MODELS by name), "files" written, "seconds", "facts" (what the report says)

    Raises:
        DataError: `out` is a file, or the teacher got nothing right
        WriteError: the disk is full; finished stages stay
    """
    out = Path(out)
    console = Console()
    with output_folder(out), Team(workers, console) as team:
        return _run(out, fast, team, console)


def _run(out: Path, fast: bool, team: Team, console: Console) -> dict[str, Any]:
    began = time.monotonic()
    settings = FAST if fast else Settings()
    stages = _Stages(out, settings, console, total=7)

    with stages("data", "problems and tokenizer", ["problems.json"]) as todo:
        if todo:
            write_problems(out / "problems.json", settings)
    train, test = read_problems(out / "problems.json")

    with stages("base", "teacher and student, trained from nothing", ["teacher", "student"]) as todo:
        if todo:
            known = [_numbers_and_target(p) for p in train] if settings.memorise else None
            jobs = {
                name: Job(pretrain, dict(folder=out / name, name=name, settings=settings, known=known))
                for name in ("teacher", "student")
            }
            for name, facts in team.run(jobs).items():
                console.print(f"      {name}: {facts['parameters']:,} parameters, loss {facts['loss']:.3f}")

    with stages("traces", "the teacher's traces, right ones kept and scored", ["traces.jsonl", "scored"]) as todo:
        if todo:
            halves = [train[0::2], train[1::2]]  # two jobs, whatever the number of workers
            jobs = {
                f"traces {i + 1} of 2": Job(sample_traces, dict(out=out, problems=half, settings=settings, part=i))
                for i, half in enumerate(halves)
            }
            parts = list(team.run(jobs).values())
            drawn = sum(part["drawn"] for part in parts)
            rows = [row for part in parts for row in part["rows"]]
            if len(rows) < 10:
                raise DataError(f"the teacher got only {len(rows)} of {drawn} traces right; nothing to train on")
            Random(settings.seed).shuffle(rows)
            write_jsonl(out / "traces.jsonl", rows)
            facts = team.run({"scoring": Job(score_traces, dict(out=out, settings=settings))})["scoring"]
            facts |= {"drawn": drawn, "right": sum(part["right"] for part in parts)}
            write_json(out / "scored" / "facts.json", facts)
    traces = json.loads((out / "scored" / "facts.json").read_text())
    console.print(
        f"      {traces['right']} of {traces['drawn']} traces right, {traces['train']} different ones to train on, "
        f"{traces['heldout']} held out; {traces['mean_tokens']:.1f} tokens a trace"
    )

    with stages("train", "the student on these traces, by SFT and by PEAR", ["sft", "pear", "training"]) as todo:
        if todo:
            jobs = {
                name: Job(fine_tune, dict(out=out, name=name, weighting=weighting, settings=settings))
                for name, weighting in (("sft", "none"), ("pear", "pear"))
            }
            team.run(jobs)
    saved = {name: json.loads((out / "training" / f"{name}.json").read_text()) for name in ("sft", "pear")}
    logs = {name: each["log"] for name, each in saved.items()}
    warnings = saved["sft"]["warnings"] + saved["pear"]["warnings"]
    for warning in warnings:
        console.print(f"      {warning}", style="yellow", markup=False, highlight=False)

    with stages("rl", "the same RL from both", [FOLDERS[f"{name}_rl"] for name in TUNED]) as todo:
        if todo:
            team.run(
                {name: Job(reinforce, dict(out=out, name=name, problems=train, settings=settings)) for name in TUNED}
            )

    outputs = [f"eval/{name}.json" for name in MODELS] + [f"rl/{name}/eval" for name in TUNED]
    with stages("eval", "pass@k on problems that none of them saw", outputs) as todo:
        if todo:
            jobs = {
                name: Job(evaluate_one, dict(folder=out / folder, problems=test, settings=settings))
                for name, folder in FOLDERS.items()
            }
            for name, result in team.run(jobs).items():
                write_json(out / "eval" / f"{name}.json", result)
                model, moment = (name[:-3], "after") if name.endswith("_rl") else (name, "before")
                if model in TUNED:  # beside the RL run too, where `pear compare` looks for it
                    write_json(evaluation_path(out / "rl" / model, moment), result)
    results = {name: json.loads((out / "eval" / f"{name}.json").read_text()) for name in MODELS}

    with stages("report", "report and pictures", []), quiet():
        facts = {
            "settings": asdict(settings),
            "traces": traces,
            "parameters": load_model(str(out / "student")).num_parameters(),
            "warnings": warnings,
            "device": f"{platform.machine()} CPU ({platform.system()}), one thread a job",
            "versions": stages.versions,
            "seconds": {**stages.seconds, "all": time.monotonic() - began},
            "kept": stages.kept,
            "fast": fast,
        }
        files = draw_pictures(out, logs, traces["heldout"])
        runs = [out / FOLDERS[f"{name}_rl"] for name in TUNED]
        files += compare(runs, out / "rl")
        files.append(write_report(out, results, logs, facts, comparison_table([read_run(run) for run in runs])))

    console.print(table(results, title="Countdown, problems that none of them saw"))
    console.print("A demo of the path on toy models, not evidence for or against the paper's claim.")
    for path in (*(out / folder for folder in FOLDERS.values()), *sorted(files)):
        console.print(f"  {path}", soft_wrap=True, highlight=False)
    seconds = time.monotonic() - began
    console.print(
        f"{seconds:.0f} s in all; go on with: pear compare {out / 'rl/sft'} {out / 'rl/pear'}", soft_wrap=True
    )
    return {"results": results, "files": [str(path) for path in files], "seconds": seconds, "facts": facts}


# ---------------------------------------------------------------------------------------------------------------------
# Stages: kept when whole and made with the same settings, else made anew


class _Stages:
    """Numbers the stages, prints them, and remembers which are whole.

    A stage's stamp is written last, with a hash of settings, versions and code. Without a stamp that fits, what the
    stage left is removed and made again; so is everything after it.
    """

    def __init__(self, out: Path, settings: Settings, console: Console, total: int):
        import trl

        self.versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "code": _code_hash(),
        }
        text = json.dumps([asdict(settings), self.versions], sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.out, self.console, self.total = out, console, total
        self.number, self.fresh = 0, False
        self.seconds: dict[str, float] = {}
        self.kept: list[str] = []

    @contextmanager
    def __call__(self, name: str, title: str, outputs: list[str]) -> Iterator[bool]:
        """Yields whether there is anything to do."""
        self.number += 1
        head = f"[bold]{self.number} of {self.total}[/bold] {title}"
        stamp = self.out / ".stages" / f"{name}.json"
        paths = [self.out / output for output in outputs]
        whole = outputs and not self.fresh and self._fits(stamp) and all(path.exists() for path in paths)
        if whole:
            self.kept.append(name)
            self.console.print(f"{head}: kept from an earlier run")
            yield False
            return
        self.fresh = True
        stamp.unlink(missing_ok=True)
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        began = time.monotonic()
        self.console.print(head)
        yield True
        self.seconds[name] = time.monotonic() - began
        write_json(stamp, {"key": self.key})
        self.console.print(f"      {self.seconds[name]:.0f} s", highlight=False)

    def _fits(self, stamp: Path) -> bool:
        try:
            return json.loads(stamp.read_text())["key"] == self.key
        except (OSError, ValueError, KeyError):
            return False


def _code_hash() -> str:
    """Of our two packages' files: a stage that older code made is not kept either."""
    digest = hashlib.sha256()
    for package in (pear, pear_kernels):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def write_problems(path: Path, settings: Settings) -> None:
    """Train and test problems from reasoning-gym, of splits that never meet."""
    problems = {
        "train": load_task("countdown", "train", settings.problems, settings.seed),
        "test": load_task("countdown", "test", settings.test_problems, settings.seed),
    }
    assert not {p.identity for p in problems["train"]} & {p.identity for p in problems["test"]}
    write_json(path, {split: [asdict(p) for p in each] for split, each in problems.items()})


def read_problems(path: Path) -> tuple[list[Problem], list[Problem]]:
    saved = json.loads(path.read_text())
    return tuple([Problem(**p) for p in saved[split]] for split in ("train", "test"))


def _numbers_and_target(problem: Problem) -> tuple[Numbers, int]:
    return tuple(problem.entry["metadata"]["numbers"]), problem.entry["metadata"]["target"]


# ---------------------------------------------------------------------------------------------------------------------
# Jobs: each runs in a process of its own with one thread, and reports how far it is by `tick(done, total)`


def pretrain(
    tick: Tick, folder: Path, name: str, settings: Settings, known: list[tuple[Numbers, int]] | None
) -> dict[str, Any]:
    """Train a small Llama from nothing on worked solutions; loss on the solution's tokens only.

    The teacher learns to work backward from the target. The student learns less, and mostly to go forward: it states a
    first step without having looked for it.
    """
    steps = settings.teacher_steps if name == "teacher" else settings.student_steps
    backward = 1.0 if name == "teacher" else settings.student_backward
    rng = Random(f"{name} {settings.seed}")
    torch.manual_seed(rng.getrandbits(32))
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer, settings.hidden_size, settings.layers, settings.heads)
    problems = train_problems() if known is None else known
    styles: list[str] = []

    def example() -> tuple[str, str]:
        if not styles:  # drawn a batch at a time
            styles.extend("backward" if rng.random() < backward else "forward" for _ in range(settings.pretrain_batch))
        return worked_example(rng, problems, styles.pop(0))

    loss = teach(
        model,
        tokenizer,
        example,
        steps=steps,
        batch=settings.pretrain_batch,
        learning_rate=settings.pretrain_lr,
        progress=tick,
    )
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return {"parameters": model.num_parameters(), "loss": loss}


def sample_traces(tick: Tick, out: Path, problems: list[Problem], settings: Settings, part: int) -> dict[str, Any]:
    """Draw the teacher's completions of these problems; keep the right ones that ended, each text once a problem."""
    traces = draw_traces(
        load_model(str(out / "teacher")),
        load_tokenizer(str(out / "teacher")),
        problems,
        settings.trace_samples,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed + part,
        batch_size=settings.generate_batch,
        progress=tick,
    )
    return traces._asdict()


def score_traces(tick: Tick, out: Path, settings: Settings) -> dict[str, Any]:
    """Behaviour log-probs of the traces under the teacher who wrote them, and the student's own for the pictures."""
    from pear.score import score

    files = {"behavior": "teacher", "student": "student"}
    with whole_folder(out / "scored") as folder:
        for i, (file, name) in enumerate(files.items()):
            summary = score(str(out / name), out / "traces.jsonl", folder / f"{file}.jsonl", progress=False)
            tick(i + 1, len(files))
        rows = [row for _, row in read_jsonl(folder / "behavior.jsonl")]
        heldout = max(1, round(settings.heldout_share * len(rows)))
        write_scored(folder / "heldout.jsonl", rows[:heldout])
        write_scored(folder / "train.jsonl", rows[heldout:])
    example = min(
        rows[heldout:], key=lambda row: abs(len(row["input_ids"]) - 45)
    )  # neither the shortest nor the longest
    return {
        "train": len(rows) - heldout,
        "heldout": heldout,
        "mean_tokens": summary["tokens"] / len(rows),
        "example": {key: example[key] for key in ("prompt", "completion")},
    }


def fine_tune(tick: Tick, out: Path, name: str, weighting: str, settings: Settings) -> None:
    """The student on the teacher's traces, by `pear.sft`; `weighting` is all that differs between "sft" and "pear"."""
    from pear.score import score

    tokenizer = load_tokenizer(str(out / "student"))
    with whole_folder(out / name) as folder:
        model = load_model(str(out / "student"))
        trained = pipeline.fine_tune(
            tick,
            model,
            tokenizer,
            folder,
            out / "scored" / "train.jsonl",
            out / "scored" / "heldout.jsonl",
            weighting=weighting,
            level="token",
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch,
            per_device_eval_batch_size=64,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=settings.log_every,
            eval_strategy="epoch",
            eval_on_start=True,
            seed=settings.seed,
            use_cpu=True,
        )
        write_run(folder, "sft", trained.log, {"start": "student", "weighting": weighting})
    after = out / "training" / f"{name}.jsonl"
    score(model, out / "traces.jsonl", after, tokenizer=tokenizer, progress=False, resume=False)
    write_json(after.with_suffix(".json"), trained._asdict())


def reinforce(tick: Tick, out: Path, name: str, problems: list[Problem], settings: Settings) -> None:
    """GRPO from the checkpoint `name`, by `pear.rl`; nothing but the start differs between "sft" and "pear"."""
    from pear.rl import finish_run

    with whole_folder(out / "rl" / name) as folder:
        trainer = pipeline.reinforce(
            tick,
            load_model(str(out / name)),
            load_tokenizer(str(out / name)),
            folder,
            problems,
            loss_type="grpo",
            max_steps=settings.rl_rounds * settings.rl_updates,
            per_device_train_batch_size=settings.rl_prompts * settings.rl_group // settings.rl_updates,
            steps_per_generation=settings.rl_updates,
            num_generations=settings.rl_group,
            max_completion_length=settings.max_new_tokens,
            learning_rate=settings.rl_learning_rate,
            lr_scheduler_type="constant",
            logging_steps=settings.rl_updates,
            seed=settings.seed,
            use_cpu=True,
        )
        finish_run(folder, trainer, start=name, name=LABELS[name])


def evaluate_one(tick: Tick, folder: Path, problems: list[Problem], settings: Settings) -> dict[str, Any]:
    """pass@1 and pass@k of the model in `folder`."""
    result = evaluate(
        load_model(str(folder)),
        load_tokenizer(str(folder)),
        problems,
        settings.k,
        settings.samples,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.generate_batch,
        progress=tick,
    )
    return result | {"model": str(folder), "split": "test"}
