"""Settings of RL, chosen on the baseline arm alone: a table of what each made of it, before any other arm is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pear.eval import percent
from pear.pictures import write_whole
from pear.replicate.statistics import pass_matrix
from pear.replicate.study import Study
from pear.tables import table


def write_calibration(
    study: Study, records: Mapping[str, dict[str, Any]], results: Path, about: dict[str, Any]
) -> list[Path]:
    """calibration.md and calibration.json in `results`: pass@k of the baseline before RL and after, by setting."""
    rows = [("before RL", None, [f"before/{study.baseline}/{seed}" for seed in study.calibration.seeds])]
    for i, overrides in enumerate(study.calibration.try_rl):
        rows.append((_words(overrides), i, [f"after/setting-{i}/{seed}" for seed in study.calibration.seeds]))
    ks = study.evaluation.ks
    lines, saved = [], []
    for words, i, names in rows:
        found = [records[name]["result"] for name in names]
        counts = np.array([each["correct"] for each in found])
        rates = [float(pass_matrix(counts, study.evaluation.samples, k).mean()) for k in ks]
        logs = (
            []
            if i is None
            else [records[f"rl/setting-{i}/{seed}"]["result"]["log"] for seed in study.calibration.seeds]
        )
        ends = [[e["entropy"] for e in log if "entropy" in e][-5:] for log in logs]
        entropy = float(np.mean(ends)) if ends else None
        tokens, finished = (float(np.mean([each[key] for each in found])) for key in ("mean_tokens", "finished"))
        saved.append({"rl": words, **{f"pass@{k}": r for k, r in zip(ks, rates, strict=True)}, "entropy": entropy})
        ending = "" if entropy is None else f"{entropy:.3f}"
        lines.append([words, *map(percent, rates), f"{tokens:.1f}", percent(finished), ending])
    head = ["rl", *(f"pass@{k}" for k in ks), "tokens", "finished", "entropy at the end"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"""# {study.study}: settings of RL, tried on the arm `{study.baseline}` alone

Seeds {", ".join(map(str, study.calibration.seeds))}, which the study does not use; {study.evaluation.problems} held-out
problems, {study.evaluation.samples} samples of each. A calibration runs no other arm.

{table(head, lines)}

Commit {about["commit"]}; {versions}; {about["device"]}.
"""
    paths = {
        results / "calibration.md": text.encode(),
        results / "calibration.json": (json.dumps({"settings": saved, **about}, indent=2) + "\n").encode(),
    }
    write_whole(paths)
    return list(paths)


def _words(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in overrides.items()) or "as configured"
