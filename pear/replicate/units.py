"""A study as units of work: which there are, what each needs, and how their results become rows."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pear
import pear_kernels
from pear.replicate import phases
from pear.replicate.graph import Unit
from pear.replicate.results import START, Results
from pear.replicate.study import Study, with_rl
from pear.runs import PACKAGES, installed_versions, json_safe

# Files of `pear` that only choose, show or compare: they change no checkpoint and no count.
SHOWING = {
    "cli.py", "compare.py", "curves.py", "demo.py", "intervals.py", "pictures.py", "report.py", "tables.py",
    "side_by_side.py", "workers.py", "replicate/__init__.py", "replicate/calibration.py", "replicate/figures.py",
    "replicate/graph.py", "replicate/report.py", "replicate/results.py", "replicate/statistics.py",
    "replicate/study.py", "replicate/summary.py", "replicate/units.py",
}  # fmt: skip
LOGGED = (
    "step",
    "epoch",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "reward",
    "entropy",
    "completions/mean_length",
)
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "reasoning-gym", "tokenizers", "numpy")


def study_units(study: Study) -> list[Unit]:
    """Every unit of a study. All arms of one seed before the next seed, so that a run cut short has whole seeds."""
    units = []
    for seed in range(study.seeds):
        units += _start(study, seed)
        for arm, options in study.all_arms.items():
            if seed in study.seeds_of(arm):
                units += _arm(study, arm, options, seed)
    return units


def calibration_units(study: Study) -> list[Unit]:
    """The baseline arm alone, with each setting of RL to try, on seeds that the study does not use."""
    units = []
    for seed in study.calibration.seeds:
        units += _start(study, seed)
        sft, *_ = _arm(study, study.baseline, study.arms[study.baseline], seed)
        units += [sft, _evaluate(study, f"before/{study.baseline}/{seed}", sft.name, sft.labels)]
        for i, overrides in enumerate(study.calibration.try_rl):
            labels = {**sft.labels, "setting": i}
            rl = _rl(with_rl(study, overrides), f"rl/setting-{i}/{seed}", sft.name, labels)
            units += [rl, _evaluate(study, f"after/setting-{i}/{seed}", rl.name, labels)]
    return units


def _start(study: Study, seed: int) -> list[Unit]:
    """Student, behaviour policy and its traces, if this seed is the first with them, and pass@k of both."""
    units, model, base = [], asdict(study.model), study.base_of(seed)
    if base == seed:
        for role in ("student", "teacher"):
            taught = asdict(getattr(study, role))
            arguments = dict(role=role, seed=seed, **_task(study), model=model, taught=taught, cpu=study.cpu)
            units.append(_unit(f"{role}/{seed}", phases.base, arguments, (), {"arm": role, "seed": seed}))
        arguments = dict(
            seed=seed, **_task(study), traces=asdict(study.traces), model=model, **_sampling(study), cpu=study.cpu
        )
        needs = (f"teacher/{seed}", f"student/{seed}")
        units.append(_unit(f"traces/{seed}", phases.traces, arguments, needs, {"seed": seed}))
    for role in ("student", "teacher"):
        labels = {"arm": role, "seed": seed}
        units.append(_evaluate(study, f"{START}/{role}/{seed}", f"{role}/{base}", labels))
    return units


def _arm(study: Study, arm: str, options: dict[str, Any], seed: int) -> list[Unit]:
    labels, sft, rl = {"arm": arm, "seed": seed}, f"sft/{arm}/{seed}", f"rl/{arm}/{seed}"
    base = study.base_of(seed)
    arguments = dict(seed=seed, sft=asdict(study.sft), model=asdict(study.model), options=options, cpu=study.cpu)
    return [
        _unit(sft, phases.sft, arguments, (f"student/{base}", f"traces/{base}"), labels),
        _rl(study, rl, sft, labels),
        _evaluate(study, f"before/{arm}/{seed}", sft, labels),
        _evaluate(study, f"after/{arm}/{seed}", rl, labels),
        _unit(
            f"diagnose/{arm}/{seed}", phases.diagnose, _evaluation(study, seed), (f"student/{base}", sft, rl), labels
        ),
    ]


def _rl(study: Study, name: str, sft: str, labels: dict[str, Any]) -> Unit:
    arguments = dict(
        seed=labels["seed"],
        **_task(study),
        rl=asdict(study.rl),
        model=asdict(study.model),
        max_new_tokens=study.max_new_tokens,
        cpu=study.cpu,
    )
    return _unit(name, phases.rl, arguments, (sft,), labels)


def _evaluate(study: Study, name: str, model: str, labels: dict[str, Any]) -> Unit:
    return _unit(name, phases.evaluate, _evaluation(study, labels["seed"]), (model,), labels)


def _evaluation(study: Study, seed: int) -> dict[str, Any]:
    return dict(
        seed=seed,
        **_task(study),
        evaluation=asdict(study.evaluation),
        model=asdict(study.model),
        **_sampling(study),
        cpu=study.cpu,
    )


def _task(study: Study) -> dict[str, Any]:
    return {"task": study.task, "config": study.task_config}


def _sampling(study: Study) -> dict[str, Any]:
    return {"max_new_tokens": study.max_new_tokens, "generate_batch": study.generate_batch}


def _unit(name: str, function, arguments: dict[str, Any], needs: tuple[str, ...], labels: dict[str, Any]) -> Unit:
    return Unit(name, function, arguments, needs, phase=function.__name__, labels=labels)


# ---------------------------------------------------------------------------------------------------------------------
# What results depend on besides


def versions() -> dict[str, str]:
    """Of Python, the libraries that compute, and our own package."""
    names = (*LIBRARIES, *PACKAGES.values())
    found = installed_versions({name: name for name in names})
    return {"python": platform.python_version(), **found, "torch": torch.__version__}  # with its build, as +cpu


def code_hash() -> str:
    """Of our files that compute (all but SHOWING) and the libraries' versions."""
    digest = hashlib.sha256(repr(sorted(versions().items())).encode())
    for package in (pear, pear_kernels):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            if (name := path.relative_to(folder).as_posix()) not in SHOWING or package is pear_kernels:
                digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def collect(study: Study, records: Mapping[str, dict[str, Any]], about: dict[str, Any]) -> Results:
    """The rows of a finished study; `about` is what study.json says besides the configuration."""
    evaluations, training, diagnostics, weights, jobs = [], [], [], [], []
    heldout = {}
    for record in records.values():
        labels, result = record["labels"], record["result"]
        moment = record["name"].split("/")[0]
        row = {"arm": labels.get("arm"), "seed": labels.get("seed")}
        told = {key: record[key] for key in ("key", "seconds")}
        jobs.append({"name": record["name"], "phase": record["phase"], **row, **told})
        if record["phase"] == "evaluate":
            evaluations.append(row | {"moment": moment} | result)
        elif record["phase"] in ("sft", "rl"):
            shown = [{key: value for key, value in entry.items() if _kept(key, value)} for entry in result["log"]]
            training.append(row | {"phase": record["phase"], "log": shown, "warnings": result.get("warnings", [])})
            weights += [row | each for each in result.get("weights", [])]
            if record["phase"] == "sft":
                nll = [entry["eval_pear/nll"] for entry in result["log"] if "eval_pear/nll" in entry]
                heldout[labels["arm"], labels["seed"]] = nll[-1] if nll else None
        elif record["phase"] == "diagnose":
            diagnostics.append(row | result)
    diagnostics = [row | {"heldout_nll": heldout.get((row["arm"], row["seed"]))} for row in diagnostics]
    by_phase: dict[str, float] = {}
    for job in jobs:
        by_phase[job["phase"]] = round(by_phase.get(job["phase"], 0.0) + job["seconds"], 3)
    problems = phases.test_problems(study.task, study.task_config, study.evaluation)
    described = {
        "study": study.study,
        "task": study.task,
        "config": study.as_dict(),
        "seconds": {"all_jobs": round(sum(by_phase.values()), 3), "by_phase": by_phase},
        "seeds": list(range(study.seeds)),
        "ablation_seeds": list(range(study.ablation_seeds)) if study.ablations else [],
        "arms": study.arms,
        "ablations": study.ablations,
        "baseline": study.baseline,
        "primary": asdict(study.primary),
        "ks": study.evaluation.ks,
        "traces": {
            name.split("/")[1]: record["result"] for name, record in records.items() if record["phase"] == "traces"
        },
        **about,
    }
    rows = (
        [{"problem": i, "prompt": problem.compact} for i, problem in enumerate(problems)],
        evaluations,
        training,
        diagnostics,
        weights,
        jobs,
    )
    return Results(json_safe(described), *(json_safe(each) for each in rows))


def _kept(key: str, value: Any) -> bool:
    """Of what trainers log, our own and the few of TRL's that are looked at; the rest stays in the job's folder."""
    return isinstance(value, (int, float)) and (key in LOGGED or key.startswith(("pear/", "eval_pear/")))
