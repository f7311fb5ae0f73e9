"""The results of a replication as files: what was evaluated, logged and measured of every arm and seed.

A results folder holds study.json and the files of ROWS, one JSON object a line. Pictures and report are made from these
files alone.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pear.io import DataError, read_jsonl
from pear.pictures import write_whole
from pear.runs import MOMENTS
from pear.strict_json import parse_json

STUDY = "study.json"
ROWS = ("problems", "evaluations", "training", "diagnostics", "weights", "jobs")  # each <name>.jsonl
START = "start"  # the moment of the models that everything starts from
START_MODELS = ("student", "teacher")
POSITIONS = 20  # parts of a response, by relative position, that mean weights are given for


@dataclass(frozen=True)
class Results:
    """A study (configuration, versions, time) and its rows, as the specification of each in FIELDS says.

    Checked when read and when written, by `check`.
    """

    study: dict[str, Any]
    problems: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    training: list[dict[str, Any]]
    diagnostics: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    jobs: list[dict[str, Any]]

    @property
    def arms(self) -> list[str]:
        """Names of the arms that ran on all seeds, in the configuration's order."""
        return list(self.study["arms"])

    @property
    def ablations(self) -> list[str]:
        """Names of the arms that ran on `ablation_seeds`, in the configuration's order."""
        return list(self.study["ablations"])

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds that an arm, or a model of START_MODELS, was run with.

        Raises:
            ValueError: no such arm
        """
        if arm in self.study["arms"] or arm in START_MODELS:
            return list(self.study["seeds"])
        if arm in self.study["ablations"]:
            return list(self.study["ablation_seeds"])
        raise ValueError(f"arm must be one of {', '.join(_names(self.study))}, got {arm!r}")

    def counts(self, arm: str, moment: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """(S, P) int64: right completions of each problem, a row for each of `seeds`; None for all of the arm.

        Raises:
            ValueError: an arm, a moment or a seed that was not evaluated
        """
        rows = self._evaluated(arm, moment, self.seeds_of(arm) if seeds is None else seeds)
        return np.array([row["correct"] for row in rows], dtype=np.int64).reshape(len(rows), len(self.problems))

    def samples(self, arm: str, moment: str) -> int:
        """Completions drawn of each problem; the same for all seeds.

        Raises:
            ValueError: an arm or a moment that was not evaluated
        """
        return self._evaluated(arm, moment, self.seeds_of(arm))[0]["samples"]

    def _evaluated(self, arm: str, moment: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        found = {row["seed"]: row for row in self.evaluations if (row["arm"], row["moment"]) == (arm, moment)}
        if missing := [seed for seed in seeds if seed not in found]:
            raise ValueError(f"no evaluation of arm {arm!r} at moment {moment!r} with seed {missing[0]}")
        return [found[seed] for seed in seeds]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_results(folder: str | os.PathLike, results: Results) -> list[Path]:
    """Write all files of a results folder, all of them or none, and return their paths.

    Raises:
        DataError: results that `check` refuses
        WriteError: a file cannot be written; what was in the folder is as it was
    """
    folder = Path(folder)
    check(results, lambda name, place: f"{name}.jsonl:{place + 1}")
    files = {folder / STUDY: json.dumps(results.study, indent=2, ensure_ascii=False, allow_nan=False) + "\n"}
    for name in ROWS:
        rows = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in getattr(results, name))
        files[folder / f"{name}.jsonl"] = "".join(rows)
    write_whole({path: text.encode() for path, text in files.items()})
    return list(files)


def read_results(folder: str | os.PathLike) -> Results:
    """The results in `folder`.

    Raises:
        DataError: no folder, a file missing or damaged, or results that `check` refuses; names file and line
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (expected the results of `pear replicate`)")
    path = folder / STUDY
    if not path.is_file():
        raise DataError(f"{folder}: no results: there is no {STUDY}, which `pear replicate` writes")
    try:
        study = parse_json(path.read_bytes())
    except ValueError as error:  # of JSON or of UTF-8
        raise DataError(f"{path}: not JSON: {error}") from None
    _check_study(study, str(path))
    numbered = {name: list(read_jsonl(folder / f"{name}.jsonl")) for name in ROWS}
    results = Results(study, **{name: [row for _, row in rows] for name, rows in numbered.items()})
    check(results, lambda name, place: f"{folder / name}.jsonl:{numbered[name][place][0]}", study_at=str(path))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# What may stand in them


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float)  # that it is finite, `_unreal` sees


def _or_null(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: value in values


def _logged(value: Any) -> bool:
    return isinstance(value, dict) and _number(value.get("step"))


def _by_position(value: Any) -> bool:
    return _list_of(_or_null(_number))(value) and len(value) == POSITIONS


_ROW = {"arm": _text, "seed": _whole}
_NUMBER = _or_null(_number)
FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {  # what a row must have; it may have more
    "study": {
        "study": _text,
        "task": _text,
        "fast": lambda value: isinstance(value, bool),
        "config": _object,
        "versions": _object,
        "commit": _or_null(_text),
        "device": _text,
        "seconds": _object,
        "jobs_at_once": _whole,
        "seeds": _list_of(_whole),
        "ablation_seeds": _list_of(_whole),
        "arms": _object,
        "ablations": _object,
        "baseline": _text,
        "primary": _object,
        "ks": _list_of(_whole),
        "notes": _or_null(_text),
    },
    "problems": {"problem": _whole, "prompt": _text},
    "evaluations": _ROW
    | {
        "moment": _one_of(START, *MOMENTS),
        "samples": _whole,
        "correct": _list_of(_whole),
        "mean_tokens": _NUMBER,
        "finished": _NUMBER,
    },
    "training": _ROW | {"phase": _one_of("sft", "rl"), "log": _list_of(_logged)},
    "diagnostics": _ROW
    | dict.fromkeys(
        ("sft_kl", "rl_kl", "sft_distance", "rl_distance", "start_norm", "update_cosine", "entropy_before"), _NUMBER
    )
    | dict.fromkeys(("entropy_after", "heldout_nll"), _NUMBER),
    "weights": _ROW
    | {"moment": _one_of("start", "end"), "by_position": _by_position}
    | dict.fromkeys(("mean", "floor", "ceiling", "effective_sample_size", "log_ratio_mean"), _NUMBER),
    "jobs": {"name": _text, "phase": _text, "arm": _or_null(_text), "seed": _or_null(_whole), "key": _text}
    | {"seconds": _number},
}
KEYS = {  # what tells rows apart
    "problems": ("problem",),
    "evaluations": ("arm", "seed", "moment"),
    "training": ("arm", "seed", "phase"),
    "diagnostics": ("arm", "seed"),
    "weights": ("arm", "seed", "moment"),
    "jobs": ("name",),
}


def check(results: Results, where: Callable[[str, int], str], study_at: str = STUDY) -> None:
    """Raise unless the results are whole: fields and types, known arms and seeds, no row twice, no evaluation missing.

    Args:
        where: what to call row `place` (from 0) of file `name`
        study_at: what to call study.json

    Raises:
        DataError: names the file and, of a row, its line, and says what was found and what to do
    """
    _check_study(results.study, study_at)
    for name in ROWS:
        seen: dict[tuple, str] = {}
        for place, row in enumerate(getattr(results, name)):
            at = where(name, place)
            _check_fields(row, FIELDS[name], at)
            key = tuple(row[field] for field in KEYS[name])
            if key in seen:
                told = ", ".join(f"{field} {value!r}" for field, value in zip(KEYS[name], key, strict=True))
                raise DataError(f"{at}: {told} is there twice (the other at {seen[key]}): remove one of them")
            seen[key] = at
            if "arm" in KEYS[name]:
                _check_arm(results, row, at)
            if name == "problems" and row["problem"] != place:
                raise DataError(f"{at}: problem {row['problem']} stands in place {place}: keep problems in order")
            if name == "evaluations":
                _check_evaluation(results, row, at)
    _check_complete(results, where("evaluations", 0).rsplit(":", 1)[0] if results.evaluations else "evaluations.jsonl")


def _check_fields(row: Any, fields: dict[str, Callable[[Any], bool]], at: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{at}: expected a JSON object with keys, got {type(row).__name__}")
    for field, test in fields.items():
        if field not in row:
            raise DataError(f"{at}: no `{field}`; found are {', '.join(row)}: make the results anew")
        if not test(row[field]):
            raise DataError(f"{at}: `{field}` has a value that cannot stand there: {row[field]!r:.100}")
    for path, value in _unreal(row, ""):
        raise DataError(f"{at}: `{path}` is {value}, which is no JSON: write null instead")


def _unreal(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Numbers in a row that are not finite, with where they stand."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _unreal(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _unreal(each, f"{path}[{place}]")


def _names(study: dict[str, Any]) -> list[str]:
    return [*study["arms"], *study["ablations"], *START_MODELS]


def _check_study(study: Any, at: str) -> None:
    _check_fields(study, FIELDS["study"], at)
    for name, times in Counter(_names(study)).items():
        if times > 1:
            raise DataError(f"{at}: {name!r} names {times} of the arms, ablations, student and teacher: rename one")
    if not study["seeds"] or len(set(study["seeds"])) < len(study["seeds"]):
        raise DataError(f"{at}: `seeds` must be one or more, none twice, got {study['seeds']}")
    if other := set(study["ablation_seeds"]) - set(study["seeds"]):
        raise DataError(f"{at}: `ablation_seeds` must be among `seeds` {study['seeds']}, got also {sorted(other)}")
    if study["ablations"] and not study["ablation_seeds"]:
        raise DataError(f"{at}: `ablation_seeds` is empty, but there are ablations")
    if not study["ks"] or min(study["ks"]) < 1:
        raise DataError(f"{at}: `ks` must be one or more whole numbers from 1, got {study['ks']}")
    primary = study["primary"]
    if study["baseline"] not in study["arms"]:
        raise DataError(f"{at}: `baseline` must be one of {', '.join(study['arms'])}, got {study['baseline']!r}")
    if primary.get("arm") not in study["arms"] or primary["arm"] == study["baseline"]:
        raise DataError(f"{at}: `primary.arm` must be an arm and not the baseline, got {primary.get('arm')!r}")
    if primary.get("k") not in study["ks"]:
        raise DataError(f"{at}: `primary.k` must be one of `ks` {study['ks']}, got {primary.get('k')!r}")
    seconds = study["seconds"]
    phases = seconds.get("by_phase")
    if not _number(seconds.get("all_jobs")) or not _object(phases) or not all(map(_number, phases.values())):
        raise DataError(f"{at}: `seconds` must have `all_jobs`, a number, and `by_phase`, numbers, got {seconds}")


def _check_arm(results: Results, row: dict[str, Any], at: str) -> None:
    if row["arm"] not in _names(results.study):
        raise DataError(f"{at}: unknown arm {row['arm']!r}; known are {', '.join(_names(results.study))}")
    if row["seed"] not in results.seeds_of(row["arm"]):
        raise DataError(f"{at}: arm {row['arm']!r} has the seeds {results.seeds_of(row['arm'])}, got {row['seed']}")


def _check_evaluation(results: Results, row: dict[str, Any], at: str) -> None:
    correct, samples = row["correct"], row["samples"]
    if (row["moment"] == START) != (row["arm"] in START_MODELS):
        raise DataError(f"{at}: arm {row['arm']!r} cannot have the moment {row['moment']!r}")
    if len(correct) != (problems := len(results.problems)):
        raise DataError(f"{at}: `correct` must have a count for each of {problems} problems, got {len(correct)}")
    if correct and max(correct) > samples:
        raise DataError(f"{at}: `correct` holds {max(correct)}, more than the {samples} samples of a problem")
    if samples < max(results.study["ks"]):
        raise DataError(f"{at}: {samples} samples of a problem are too few for pass@{max(results.study['ks'])}")


def _check_complete(results: Results, at: str) -> None:
    """Every arm before and after, student and teacher at the start, on all of their seeds, with as many samples."""
    if not results.problems:
        raise DataError(f"{at}: there are no problems (problems.jsonl is empty)")
    found = {(row["arm"], row["moment"], row["seed"]): row["samples"] for row in results.evaluations}
    pairs = [*product(START_MODELS, (START,)), *product([*results.arms, *results.ablations], MOMENTS)]
    for arm, moment in pairs:
        for seed in results.seeds_of(arm):
            if (arm, moment, seed) not in found:
                raise DataError(f"{at}: no evaluation of {arm!r} at {moment!r} with seed {seed}: let the study finish")
        if len(different := {found[arm, moment, seed] for seed in results.seeds_of(arm)}) > 1:
            raise DataError(f"{at}: {arm!r} at {moment!r} has {sorted(different)} samples of a problem, not one number")
