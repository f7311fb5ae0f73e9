"""The record of a training run: run.json with settings, versions and log, and its evaluations before and after."""

import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from pear.io import DataError, write_json
from pear.strict_json import find_half_pair, parse_json

FORMAT = 1  # of run.json; raise it when an older reader would misread a newer file
KINDS = ("sft", "rl")
RECORD = "run.json"
MOMENTS = ("before", "after")  # before: the model as it was before this run, whatever had been done to it
PACKAGES = {"torch": "torch", "transformers": "transformers", "trl": "trl", "pear": "pear-kernels"}


@dataclass(frozen=True)
class Run:
    """A run as `read_run` found it. `before` and `after` are what `pear.eval.evaluate` returned, or None."""

    folder: Path
    name: str
    kind: str
    settings: dict[str, Any]
    versions: dict[str, str]
    log: list[dict[str, Any]]
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


def evaluation_path(folder: str | os.PathLike, moment: str) -> Path:
    """Where the evaluation "before" or "after" a run lies."""
    if moment not in MOMENTS:
        raise ValueError(f"moment must be one of {', '.join(MOMENTS)}, got {moment!r}")
    return Path(folder) / "eval" / f"{moment}.json"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_run(
    folder: str | os.PathLike,
    kind: str,
    log: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Path:
    """Write folder/run.json, whole or not at all.

    Args:
        folder: the run's; made if missing
        kind: one of KINDS
        log: the trainer's `state.log_history`; NaN and infinities become null
        settings: whatever the run depended on; what JSON has no form for becomes its text
        versions: of packages; None for those of PACKAGES that are installed
        name: what tables call the run; None for the folder's name

    Raises:
        ValueError: unknown kind
        WriteError: the disk is full, or the folder cannot be written; an older run.json is as it was
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    record = {
        "format": FORMAT,
        "kind": kind,
        "name": name or Path(folder).resolve().name,
        "settings": json_safe(dict(settings)),
        "versions": json_safe(dict(installed_versions() if versions is None else versions)),
        "log": json_safe(list(log)),
    }
    path = Path(folder) / RECORD
    write_json(path, record)
    return path


def given(arguments: Any) -> dict[str, Any]:
    """A trainer's arguments (with a `to_dict`, which leaves secrets out) but for those that are None."""
    return {key: value for key, value in arguments.to_dict().items() if value is not None}


def objective(run: Run) -> str | None:
    """What loss a run of `pear sft` had, in its options' words; None of a run that does not say."""
    weighting, distill = run.settings.get("weighting"), run.settings.get("distill", "none")
    if weighting is None:
        return None
    if distill != "none":
        return f"distill {distill}" + (f", weighted by {weighting}" if weighting != "none" else "")
    if weighting == "none":
        return "none (plain SFT)"
    return weighting + (", negatives" if run.settings.get("negatives") else "")


def installed_versions(packages: Mapping[str, str] = PACKAGES) -> dict[str, str]:
    """Versions of packages, by what to call each, from their metadata, so that nothing has to be imported.

    What is missing is left out.
    """
    found = {}
    for name, package in packages.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def json_safe(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite as None, anything unknown as its text."""
    if value is None or isinstance(value, (bool, str)):
        return value.value if isinstance(value, Enum) else value  # transformers' enums are strings as well
    if isinstance(value, Mapping):
        return {str(key): json_safe(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return [json_safe(each) for each in sorted(value, key=str)]  # a set's own order changes from run to run
    if isinstance(value, Enum):
        return json_safe(value.value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a tensor's or an array's one number
        return json_safe(value.item())
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_run(folder: str | os.PathLike) -> Run:
    """The run in `folder`, with its evaluations where there are any.

    Raises:
        DataError: no folder, no run in it, a file that is damaged, or one that a newer pear wrote; names the file
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (expected the output_dir of a run of `pear sft` or `pear rl`)")
    path = folder / RECORD
    if not path.is_file():
        raise DataError(f"{folder}: not a run: there is no {RECORD}, which `pear sft` and `pear rl` write at their end")
    record = _read_object(path)
    _check_record(record, path)
    evaluations = {}
    for moment in MOMENTS:
        if (beside := evaluation_path(folder, moment)).is_file():
            evaluations[moment] = _read_object(beside)
            _check_evaluation(evaluations[moment], beside)
    keys = ("name", "kind", "settings", "versions", "log")
    return Run(folder, **{key: record[key] for key in keys}, **evaluations)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise _damaged(path, f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if place := find_half_pair(value):
        raise _damaged(path, f"{place} holds half of a surrogate pair, which is no character")
    if not isinstance(value, dict):
        raise _damaged(path, f"expected a JSON object with keys, got {type(value).__name__}")
    return value


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged, or not what its name says: {what}")


def _check_record(record: dict[str, Any], path: Path) -> None:
    number = record.get("format")
    if type(number) is not int or number < 1:
        raise _damaged(path, f"`format` must be a whole number from 1, got {number!r}")
    if number > FORMAT:  # said before anything else: the rest of the file may look different
        raise DataError(f"{path}: written by a newer pear (format {number}; this one reads {FORMAT}): upgrade pear")
    if record.get("kind") not in KINDS:
        raise _damaged(path, f"`kind` must be one of {', '.join(KINDS)}, got {record.get('kind')!r}")
    for key, kind in (("name", str), ("settings", dict), ("versions", dict), ("log", list)):
        if not isinstance(record.get(key), kind):
            raise _damaged(path, f"`{key}` must be a {kind.__name__}, got {type(record.get(key)).__name__}")
    for i, entry in enumerate(record["log"]):
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            raise _damaged(path, f"`log[{i}]` must be an object with a number `step`")


def _check_evaluation(result: dict[str, Any], path: Path) -> None:
    samples, k, problems = result.get("samples"), result.get("k"), result.get("problems")
    if type(samples) is not int or samples < 1:
        raise _damaged(path, f"`samples` must be a whole number from 1, got {samples!r}")
    if type(k) is not int or not 1 <= k <= samples:
        raise _damaged(path, f"`k` must lie between 1 and samples={samples}, got {k!r}")
    for key in ("mean_tokens", "finished"):
        if not _is_number(result.get(key)):
            raise _damaged(path, f"`{key}` must be a number, got {result.get(key)!r}")
    if not isinstance(problems, list) or not problems:
        raise _damaged(path, "`problems` must be a list with at least one problem")
    for i, problem in enumerate(problems):
        if not isinstance(problem, dict) or not isinstance(problem.get("prompt"), str):
            raise _damaged(path, f"`problems[{i}]` must be an object with a text `prompt`")
        if problem.get("samples") != samples:
            raise _damaged(path, f"`problems[{i}].samples` must be {samples}, got {problem.get('samples')!r}")
        correct = problem.get("correct")
        if type(correct) is not int or not 0 <= correct <= samples:
            raise _damaged(path, f"`problems[{i}].correct` must lie between 0 and {samples}, got {correct!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
