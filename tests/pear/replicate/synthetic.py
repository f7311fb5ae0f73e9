"""Results of a study that never ran, drawn from a model of seeds, problems and arms: everything in them is known."""

from itertools import product

import numpy as np

from pear.replicate.results import POSITIONS, Results

ARMS = {
    "sft": {"weighting": "none"},
    "pear-token": {"weighting": "pear", "level": "token"},
    "pear-block": {"weighting": "pear", "level": "block", "block_size": 4},
    "pear-sequence": {"weighting": "pear", "level": "sequence"},
    "dft": {"weighting": "dft"},
    "iw-sft": {"weighting": "iw-sft"},
    "topr": {"weighting": "topr"},
    "sft-short": {"weighting": "none", "epochs": 1},
    "pear-low": {"weighting": "pear", "level": "token", "gamma": 0.9},
}
ABLATIONS = {
    f"pear-{name}": {"weighting": "pear", "level": "token", **options}
    for name, options in (
        ("gamma-1", {"gamma": 1.0}),
        ("gamma-0.9", {"gamma": 0.9}),
        ("no-clip", {"log_ratio_clip": [-10, 10]}),
        ("wide-weight", {"log_weight_clip": [-8, 2]}),
        ("shuffled", {"behavior": "shuffled"}),
    )
}
DIAGNOSTICS = {"sft_kl": 0.3, "rl_kl": 0.1, "sft_distance": 4.0, "rl_distance": 1.0, "start_norm": 60.0}
DIAGNOSTICS |= {"update_cosine": 0.05, "entropy_before": 0.9, "entropy_after": 0.4, "heldout_nll": 0.7}


def make_results(
    arms: int = 4,
    seeds: int = 3,
    problems: int = 12,
    ablations: int = 2,
    samples: int = 32,
    effect: float = 0.0,
    fast: bool = False,
    notes: str | None = None,
    steps: int = 12,
    random: int = 0,
) -> Results:
    """`effect`: what the arms after the first add, after RL, to the log-odds of a right answer."""
    rng = np.random.default_rng(random)
    arms = dict(list(ARMS.items())[:arms])
    ablations = dict(list(ABLATIONS.items())[:ablations])
    ablation_seeds = list(range(max(1, seeds // 2))) if ablations else []
    difficulty = rng.normal(0, 2, problems)
    of_seed = rng.normal(0, 0.4, seeds)
    shift = {name: rng.normal(0, 0.2) for name in [*arms, *ablations]}
    evaluations, training, diagnostics, weights, jobs = [], [], [], [], []

    def evaluate(arm, seed, moment, skill):
        chance = 1 / (
            1 + np.exp(difficulty - skill - of_seed[seed] - rng.normal(0, 0.3) - rng.normal(0, 0.8, problems))
        )
        correct = rng.binomial(samples, chance).tolist()
        row = {"arm": arm, "seed": seed, "moment": moment, "samples": samples, "correct": correct}
        evaluations.append(row | {"mean_tokens": 20 + rng.normal(), "finished": 0.9 + 0.1 * rng.random()})

    for seed in range(seeds):
        evaluate("student", seed, "start", -2.5)
        evaluate("teacher", seed, "start", 0.5)
    runs = [*product(arms, range(seeds)), *product(ablations, ablation_seeds)]
    for arm, seed in runs:
        gain = effect if arm != "sft" else 0.0
        evaluate(arm, seed, "before", -1 + shift[arm])
        evaluate(arm, seed, "after", 0.3 + shift[arm] + gain)
        speed = 1 + 0.3 * shift[arm] + 0.1 * rng.normal()
        sft, rl = [], []
        for step in range(1, steps + 1):
            x = step / steps
            sft.append({"step": step, "pear/nll": 0.6 + np.exp(-3 * speed * x) + 0.05 * rng.normal()})
            if step % max(1, steps // 6) == 0:
                sft.append({"step": step, "eval_pear/nll": 0.7 + np.exp(-3 * speed * x) + 0.02 * rng.normal()})
            reward = 0.2 + 0.5 * (1 - np.exp(-2 * speed * x)) + 0.1 * gain * x + 0.05 * rng.normal()
            rl.append({"step": step, "reward": reward, "entropy": 1.2 * np.exp(-speed * x) + 0.02 * rng.normal()})
        warnings = [f"half of the weights lie on the floor ({0.5 + 0.1 * seed:.2f})"] if arm == "pear-sequence" else []
        training.append({"arm": arm, "seed": seed, "phase": "sft", "log": sft, "warnings": warnings})
        training.append({"arm": arm, "seed": seed, "phase": "rl", "log": rl})
        noise = np.exp(0.1 * rng.normal(size=len(DIAGNOSTICS)))
        values = {name: value * float(factor) for (name, value), factor in zip(DIAGNOSTICS.items(), noise, strict=True)}
        diagnostics.append({"arm": arm, "seed": seed} | values)
        if {**arms, **ablations}[arm]["weighting"] != "none":
            for moment, depth in (("start", 3.0), ("end", 1.0)):
                line = np.exp(-depth * np.linspace(1, 0, POSITIONS) + 0.1 * rng.normal(size=POSITIONS)).tolist()
                row = {"arm": arm, "seed": seed, "moment": moment, "by_position": line, "mean": float(np.mean(line))}
                row |= {"floor": 0.02, "ceiling": 0.01, "effective_sample_size": 0.4 + 0.1 * rng.random()}
                weights.append(row | {"log_ratio_mean": -0.1})
        for phase, seconds in (("sft", 40.0), ("rl", 80.0)):
            name = f"{phase}/{arm}/{seed}"
            jobs.append({"name": name, "phase": phase, "arm": arm, "seed": seed, "key": name, "seconds": seconds})
    study = {
        "study": "countdown",
        "task": "countdown",
        "fast": fast,
        "config": {
            "fixed_in_advance": ["The settings of RL were chosen on the SFT arm alone."],
            "sft": {"learning_rate": 1e-3, "epochs": 4},
            "rl": {"learning_rate": 1e-4, "steps": steps},
        },
        "versions": {"torch": "2.11.0", "trl": "1.16.0"},
        "commit": "0123abc",
        "device": "CPU, 2 cores",
        "seconds": {"all_jobs": 120.0 * len(runs), "by_phase": {"sft": 40.0 * len(runs), "rl": 80.0 * len(runs)}},
        "jobs_at_once": 2,
        "seeds": list(range(seeds)),
        "ablation_seeds": ablation_seeds,
        "arms": arms,
        "ablations": ablations,
        "baseline": "sft",
        "primary": {"arm": "pear-token", "k": 8},
        "ks": [1, 8, 32],
        "notes": notes,
    }
    asked = [{"problem": i, "prompt": f"Use {i}, 3, 7 to make {i + 10}."} for i in range(problems)]
    return Results(study, asked, evaluations, training, diagnostics, weights, jobs)
