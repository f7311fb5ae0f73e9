"""Does an arm gain by being sharper? After a study: `python -m experiments.temperature RUN CONFIG`, where RUN is
runs/replicate/countdown, say, and CONFIG experiments/countdown.yaml; some minutes on two cores.

A model that is surer of what it would have said anyway has a higher pass@1 at temperature 1 and has learnt nothing
more. Sampled more coldly every model is sharp, and that gain is gone; a better mode stays better. So the checkpoints
of a finished study, before RL and after, answer the same held-out problems again: greedily, and at temperature 0.5.
It leaves temperature.md and temperature.jsonl beside the study's results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pear.eval import evaluate
from pear.models import load_model, load_tokenizer
from pear.pictures import write_whole
from pear.replicate import RESULTS
from pear.replicate.phases import test_problems
from pear.replicate.statistics import crossed_bootstrap, pass_matrix
from pear.replicate.study import Study, load_study
from pear.side_by_side import Job, Team
from pear.tables import points, table

SAMPLES = {0.0: 1, 0.5: 8}  # completions a problem, by temperature
MOMENTS = {"before": "sft", "after": "rl"}  # before RL and after: where the checkpoint is


def answer(tick: Any, folder: Path, study: Study, seed: int, temperature: float) -> list[int]:
    """Right completions of each held-out problem."""
    result = evaluate(
        load_model(str(folder)),
        load_tokenizer(str(folder)),
        test_problems(study.task, study.task_config, study.evaluation),
        1,
        SAMPLES[temperature],
        seed=seed,
        max_new_tokens=study.max_new_tokens,
        temperature=temperature,
        batch_size=study.generate_batch,
        progress=tick,
    )
    return [problem["correct"] for problem in result["problems"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder with the study's jobs")
    parser.add_argument("config", type=Path, help="its configuration")
    parser.add_argument("--results", type=Path, help="default: experiments/results/STUDY")
    parsed = parser.parse_args()
    study = load_study(parsed.config)
    jobs = {
        (arm, seed, moment, temperature): Job(
            answer,
            dict(folder=parsed.run / "jobs" / kind / arm / str(seed), study=study, seed=seed, temperature=temperature),
        )
        for arm in study.arms
        for seed in range(study.seeds)
        for moment, kind in MOMENTS.items()
        for temperature in SAMPLES
    }
    with Team() as team:
        counts = team.run({" ".join(map(str, key)): job for key, job in jobs.items()})
    rows = [
        {"arm": arm, "seed": seed, "moment": moment, "temperature": temperature, "samples": SAMPLES[temperature]}
        | {"correct": counts[f"{arm} {seed} {moment} {temperature}"]}
        for arm, seed, moment, temperature in jobs
    ]
    lines = []
    for temperature in SAMPLES:
        rates = {
            (arm, moment): pass_matrix(
                np.array([counts[f"{arm} {seed} {moment} {temperature}"] for seed in range(study.seeds)]),
                SAMPLES[temperature],
                1,
            )
            for arm in study.arms
            for moment in MOMENTS
        }
        for arm in study.arms:
            cells = [arm, f"{temperature:g}"]
            for moment in MOMENTS:
                rate = rates[arm, moment]
                minus = "" if arm == study.baseline else points(crossed_bootstrap(rate - rates[study.baseline, moment]))
                cells += [f"{100 * rate.mean():.1f} %", minus]
            lines.append(cells)
    head = ["arm", "temperature", "pass@1 before RL", f"minus {study.baseline}", "after RL", f"minus {study.baseline}"]
    text = f"""# {study.study}: pass@1 by temperature

The checkpoints of the study, sampled again: greedily (temperature 0) and at 0.5. Intervals as in REPORT.md.

{table(head, lines)}
"""
    folder = parsed.results or RESULTS / study.study
    write_whole(
        {
            folder / "temperature.md": text.encode(),
            folder / "temperature.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        }
    )
    print(text)


if __name__ == "__main__":
    main()
