"""The experiment of the PEAR paper in miniature: several seeds, several ways of SFT, the same RL from each.

study.py says what a configuration holds, units.py which jobs it becomes, graph.py runs and keeps them, phases.py is
what they do, diagnostics.py what is looked at besides pass@k. results.py are the files that a study leaves;
statistics.py, summary.py, figures.py and report.py make REPORT.md of them, and of nothing else.
"""

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pear.io import DataError, check_folder
from pear.replicate.study import Study, load_study

RESULTS = Path("experiments/results")
RUNS = Path("runs/replicate")


def replicate(
    config: str | os.PathLike,
    *,
    fast: bool = False,
    jobs: int | None = None,
    out: str | os.PathLike | None = None,
    results: str | os.PathLike | None = None,
    calibrate: bool = False,
    report: bool = False,
) -> list[Path]:
    """Run a study, or what is missing of it, and write its results and report.

    Args:
        config: YAML, see `pear.replicate.study`
        fast: what the key `fast` of the configuration makes of it: a run that shows that everything works
        jobs: processes side by side; None for one a core. Changes no figure
        out: where checkpoints and the jobs' records go; None for runs/replicate/STUDY (-fast)
        results: where the results go; None for experiments/results/STUDY, or with `fast` a folder within `out`
        report: run nothing, and write the report again from the rows in `results`, with the notes as they are now
        calibrate: run instead the baseline arm alone, with each of `calibration.try_rl`, and write calibration.md

    Returns:
        the files written, the report first

    Raises:
        DataError: a configuration that cannot be, a folder that is in use, or a job that had bad input
        WriteError: the disk is full; finished jobs stay
        UnitError: a job failed, named; finished jobs stay
    """
    study = load_study(config, fast)
    out = RUNS / (study.study + "-fast" * fast) if out is None else Path(out)
    if results is None:
        results = out / "results" if fast else RESULTS / study.study
    results, console = Path(results), Console()
    for name, path in (("out", out), ("results", results)):
        if path.exists() and not path.is_dir():
            raise DataError(f"{name}: {path} is a file; give a folder")
        check_folder(path)
    notes = None
    if study.notes is not None and not fast:
        try:
            notes = (Path(config).parent / study.notes).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"notes: {study.notes}, beside {config}, cannot be read: {error.strerror}") from None

    from pear.replicate.report import write_report
    from pear.replicate.results import read_results, write_results

    if report:
        found = read_results(results)
        found = replace(found, study={**found.study, "notes": notes})
        return [*write_report(found, results), *write_results(results, found)]

    _check_problems(study, config)

    from pear.replicate.calibration import write_calibration
    from pear.replicate.graph import run_units
    from pear.replicate.units import calibration_units, code_hash, collect, study_units, versions
    from pear.workers import cores

    workers, commit = cores() if jobs is None else jobs, _commit()  # as it is now, not when the last job is done
    units = calibration_units(study) if calibrate else study_units(study)
    console.print(f"{study.study}: {len(units)} jobs, {workers} at once, in {out}", soft_wrap=True, highlight=False)
    records = run_units(units, out, workers=workers, code=code_hash(), console=console)
    about: dict[str, Any] = {
        "fast": fast,
        "versions": versions(),
        "commit": commit,
        "device": f"{platform.machine()} ({platform.system()}), one thread a job" if study.cpu else _accelerator(),
        "jobs_at_once": workers,
        "notes": notes,
    }
    if calibrate:
        return write_calibration(study, records, results, about)
    found = collect(study, records, about)
    files = write_results(results, found)
    return write_report(found, results) + files


def _check_problems(study: Study, config: str | os.PathLike) -> None:
    """Raise unless the task, configured so, has the problems that the study asks for."""
    from pear.tasks import load_task
    from pear.worked import WORKED

    wanted = {
        "evaluation.problems": ("test", study.evaluation.problems, study.evaluation.seed),
        "traces.problems": ("train", study.traces.problems, 0),
        "rl.problems": ("train", study.rl.problems, 0),
    }
    for name, (split, size, seed) in wanted.items():
        try:
            load_task(study.task, split, size, seed, **study.task_config)
        except (ValueError, TypeError, AssertionError) as error:  # reasoning-gym asserts
            raise DataError(f"{config}: {name} and task_config: {error}") from None
    if study.student.memorise is not None and study.teacher.memorise is not None:
        return
    try:
        WORKED[study.task].problems(study.task_config, 0)
    except ValueError as error:
        raise DataError(f"{config}: {error}") from None


def _commit() -> str | None:
    """Of the checkout this package is in, with a plus sign if files differ from it; None where there is none."""
    import subprocess

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

    try:
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
