"""What `pear sft` and `pear rl` print when they are done: what came of it, where the model lies, what to run next."""

import shlex
from pathlib import Path
from typing import Any

from pear.eval import percent
from pear.run_log import LOG
from pear.runs import RECORD, read_run

SHOWN = {  # name in the log, and what it is
    "sft": {"pear/nll": "NLL", "pear/divergence": "divergence", "eval_pear/nll": "held-out NLL"},
    "rl": {"reward": "reward", "completions/mean_length": "tokens of a completion"},
}


def outcome(folder: Path, kind: str) -> list[str]:
    """Lines about a finished run, from its record."""
    run = read_run(folder)
    steps = max((entry["step"] for entry in run.log), default=0)
    figures = [text for key, name in SHOWN[kind].items() if (text := _first_and_last(run.log, key, name))]
    said = [f"{folder}: {steps} steps" + (": " + "; ".join(figures) if figures else "")]
    if run.before and run.after:
        ks = [key for key in run.after if key.startswith("pass@") and not key.endswith("_stderr") and key in run.before]
        rates = [f"{key} {_rate(run.before, key)} before, {_rate(run.after, key)} after" for key in ks]
        said.append(f"held-out problems: {'; '.join(rates)}")
    said.append(f"model: {folder}; log: {folder / LOG}; record: {folder / RECORD}")
    model = shlex.quote(str(folder))
    if kind == "sft":
        folder_of_rl = shlex.quote(f"{folder}-rl")
        said.append(f"next: pear rl --model {model} --task countdown --output_dir {folder_of_rl}")
    else:
        said.append(f"next: pear eval --model {model} --task countdown")
    return said


def _first_and_last(log: list[dict[str, Any]], key: str, name: str) -> str | None:
    values = [entry[key] for entry in log if isinstance(entry.get(key), (int, float))]
    if not values:
        return None
    return f"{name} {values[0]:.4g}" + (f" at first, {values[-1]:.4g} at last" if len(values) > 1 else "")


def _rate(evaluation: dict[str, Any], key: str) -> str:
    return percent(evaluation[key], evaluation.get(f"{key}_stderr"))
