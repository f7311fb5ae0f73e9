"""The configuration of a study: what YAML may say, checked before anything runs.

Every choice that the paper leaves open is a key here with our default, and the configuration file says so.
"""

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pear.io import DataError, read_yaml
from pear.tasks import TASKS
from pear.worked import WORKED
from pear_kernels.options import PEAROptions, WeightingOptions

NAME = "abcdefghijklmnopqrstuvwxyz0123456789-"


@dataclass(frozen=True)
class Model:
    """What student and behaviour policy are made from: `start`, or a small Llama with random weights."""

    start: str | None = None  # smollm2, a transformers folder or a hub name
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    dtype: str = "float32"
    lora_rank: int = 0  # of SFT and RL; 0 trains all weights


@dataclass(frozen=True)
class Taught:
    """How student or behaviour policy learn the task: worked solutions in a mixture of styles."""

    styles: dict[str, float]  # style of `pear.worked` -> share
    steps: int
    batch: int = 32
    learning_rate: float = 4e-3
    memorise: int | None = None  # see only so many problems, the first of the traces'; for runs too short to learn more


@dataclass(frozen=True)
class Traces:
    """The behaviour policy's verified traces."""

    problems: int = 800
    samples: int = 4  # of each problem
    rows: int | None = None  # at most so many of the right ones
    heldout_share: float = 0.1  # of these, kept from training to measure the NLL on


@dataclass(frozen=True)
class SFT:
    epochs: int = 3
    batch: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 10


@dataclass(frozen=True)
class RL:
    """GRPO, the same for every arm."""

    rounds: int = 60  # of drawing completions and learning from them
    prompts: int = 16  # a round
    group: int = 8  # completions a prompt
    updates: int = 2  # optimiser steps a round, each on a part of its completions
    learning_rate: float = 5e-5
    beta: float = 0.0  # KL to the checkpoint that RL starts from
    problems: int = 1000  # of the train split


@dataclass(frozen=True)
class Evaluation:
    problems: int = 100  # of the test split, the same for every arm and seed
    samples: int = 32  # of each
    ks: list[int] = field(default_factory=lambda: [1, 8, 32])
    seed: int = 0  # of the problems


@dataclass(frozen=True)
class Primary:
    """The comparison that the study was made for, named before anything runs."""

    arm: str = "pear-token"
    k: int = 8


@dataclass(frozen=True)
class Calibration:
    """Settings of RL tried on the baseline arm alone, on seeds that the study does not use.

    Students, traces and RL's problems are those of these seeds; the held-out problems are the study's.
    """

    seeds: list[int] = field(default_factory=lambda: [100, 101])
    try_rl: list[dict[str, Any]] = field(default_factory=list)  # overrides of `rl`


@dataclass(frozen=True)
class Study:
    """A whole study; see `load_study`."""

    study: str
    task: str
    student: Taught
    teacher: Taught
    arms: dict[str, dict[str, Any]]  # name -> options of PEARSFTConfig
    task_config: dict[str, Any] = field(default_factory=dict)  # overrides of the task's reasoning-gym configuration
    seeds: int = 8  # an arm; of the order of the data, of RL and of evaluation
    bases: int | None = None  # students with their behaviour policies and traces, shared by seeds; None: one a seed
    ablations: dict[str, dict[str, Any]] = field(default_factory=dict)  # more arms
    ablation_seeds: int = 4  # of these arms: the first of `seeds`
    baseline: str = "sft"
    primary: Primary = field(default_factory=Primary)
    model: Model = field(default_factory=Model)
    traces: Traces = field(default_factory=Traces)
    sft: SFT = field(default_factory=SFT)
    rl: RL = field(default_factory=RL)
    evaluation: Evaluation = field(default_factory=Evaluation)
    calibration: Calibration = field(default_factory=Calibration)
    max_new_tokens: int = 96
    generate_batch: int = 400
    cpu: bool = True  # False: on the accelerator, if there is one
    fixed_in_advance: list[str] = field(default_factory=list)  # sentences for the report
    notes: str | None = None  # a markdown file beside the configuration, for the report

    @property
    def all_arms(self) -> dict[str, dict[str, Any]]:
        return {**self.arms, **self.ablations}

    def seeds_of(self, arm: str) -> range:
        return range(self.seeds if arm in self.arms else self.ablation_seeds)

    def base_of(self, seed: int) -> int:
        """Which student, behaviour policy and traces a seed works with."""
        return seed if self.bases is None or seed >= self.seeds else seed % self.bases

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_study(path: str | os.PathLike, fast: bool = False) -> Study:
    """A study from YAML; with `fast`, what its key `fast` says is laid over the rest.

    Raises:
        DataError: no such file, not YAML, or a key or value that cannot be, naming it
    """
    path = Path(path)
    values = read_yaml(path, "YAML of a study")
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be a YAML mapping of keys, got {type(values).__name__}")
    overlay = values.pop("fast", None)
    if fast:
        if not isinstance(overlay, dict):
            raise DataError(f"--fast: {path} has no key `fast` with what is smaller then")
        values = overlaid(values, overlay)
    for group in ("arms", "ablations"):  # an arm that `fast` says null of is left out
        if isinstance(values.get(group), dict):
            values[group] = {name: options for name, options in values[group].items() if options is not None}
    study = _build(Study, values, str(path))
    _check(study, path)
    return study


def overlaid(values: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `overlay` in their place; mappings are merged key by key."""
    merged = dict(values)
    for key, value in overlay.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = overlaid(merged[key], value) if both else value
    return merged


def with_rl(study: Study, overrides: Mapping[str, Any]) -> Study:
    """The study with other settings of RL; DataError for one that there is not."""
    return replace(study, rl=_build(RL, {**asdict(study.rl), **overrides}, "calibration.try_rl"))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _build(kind: type, values: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping, its values of the types that are written there."""
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a mapping of keys, got {values!r}")
    hints, known = get_type_hints(kind), {each.name: each for each in fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise DataError(
                f"{where}: unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {list(known)}")
            )
    for name, each in known.items():
        if name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise DataError(f"{where}: no `{name}`")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, where)
    kinds = get_args(hint) if get_origin(hint) not in (dict, list) else ()
    if type(None) in kinds:
        if value is None:
            return None
        hint = next(kind for kind in kinds if kind is not type(None))
    if hint is float and isinstance(value, str):  # YAML reads 5e-5 as text
        try:
            value = float(value)
        except ValueError:
            pass
    kind = get_origin(hint) or hint
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise DataError(f"{where} must be a {kind.__name__}, got {value!r}")
    return float(value) if kind is float else value


def _check(study: Study, path: Path) -> None:
    def refuse(what: str) -> None:
        raise DataError(f"{path}: {what}")

    if study.task not in WORKED:
        refuse(f"task must be one with worked solutions ({', '.join(WORKED)}), got {study.task!r}")
    if study.bases is not None and not 1 <= study.bases <= study.seeds:
        refuse(f"bases must lie between 1 and seeds = {study.seeds}, got {study.bases}")
    for name in (study.study, *study.all_arms):
        if not isinstance(name, str) or not name or set(name) - set(NAME):
            refuse(f"names of study and arms are of small letters, digits and hyphens, got {name!r}")
    if both := set(study.arms) & set(study.ablations):
        refuse(f"{sorted(both)[0]!r} is among both arms and ablations")
    if {"student", "teacher"} & set(study.all_arms):
        refuse("no arm can be called student or teacher: those are what the arms start from")
    for key, name in (("baseline", study.baseline), ("primary.arm", study.primary.arm)):
        if name not in study.arms:
            refuse(f"{key} must be among the arms ({', '.join(study.arms)}), got {name!r}")
    if study.primary.arm == study.baseline:
        refuse(f"primary.arm must be another arm than the baseline, got {study.baseline!r} for both")
    _check_numbers(study, refuse)
    if study.ablations and not 1 <= study.ablation_seeds <= study.seeds:
        refuse(f"ablation_seeds must lie between 1 and seeds = {study.seeds}, got {study.ablation_seeds}")
    for k in study.evaluation.ks:
        if type(k) is not int or not 1 <= k <= study.evaluation.samples:
            refuse(f"evaluation.ks must lie between 1 and samples = {study.evaluation.samples}, got {k!r}")
    if study.primary.k not in study.evaluation.ks:
        refuse(f"primary.k must be one of evaluation.ks = {study.evaluation.ks}, got {study.primary.k}")
    if study.model.dtype not in DTYPES:
        refuse(f"model.dtype must be one of {', '.join(DTYPES)}, got {study.model.dtype!r}")
    if study.model.start is None and study.model.hidden_size % (2 * study.model.heads):
        refuse(
            f"model.hidden_size must be a multiple of twice model.heads = {study.model.heads}, "
            f"got {study.model.hidden_size}"
        )
    for name in ("student", "teacher"):
        shares = getattr(study, name).styles
        if unknown := set(shares) - set(WORKED[study.task].styles):
            refuse(f"{name}.styles: {sorted(unknown)[0]!r} is no style of {study.task} ({WORKED[study.task].styles})")
        if not all(isinstance(s, (int, float)) and s >= 0 for s in shares.values()) or not sum(shares.values()) > 0:
            refuse(f"{name}.styles must be shares of 0 or more, not all 0, got {shares}")
    config = TASKS[study.task].config
    if unknown := set(study.task_config) - set(config):
        refuse(f"task_config: {sorted(unknown)[0]!r} is no setting of {study.task} ({', '.join(config)})")
    _check_rl("rl", study.rl, refuse)
    _check_calibration(study, refuse)
    _check_arms(study, refuse)


DTYPES = ("float32", "bfloat16", "float16")
LEAST = {  # of whole numbers
    "seeds": 1, "max_new_tokens": 1, "generate_batch": 1,
    "model.hidden_size": 1, "model.layers": 1, "model.heads": 1, "model.lora_rank": 0,
    "student.steps": 0, "student.batch": 1, "student.memorise": 1,
    "teacher.steps": 0, "teacher.batch": 1, "teacher.memorise": 1,
    "traces.problems": 1, "traces.samples": 1, "traces.rows": 1,
    "sft.epochs": 1, "sft.batch": 1, "sft.warmup_steps": 0,
    "evaluation.problems": 1, "evaluation.samples": 1, "evaluation.seed": 0,
}  # fmt: skip
LEAST_OF_RL = {"rounds": 1, "prompts": 1, "group": 2, "updates": 1}


def _check_numbers(study: Study, refuse) -> None:
    def get(name: str) -> Any:
        value = study
        for part in name.split("."):
            value = getattr(value, part)
        return value

    for name, least in LEAST.items():
        if (value := get(name)) is not None and value < least:
            refuse(f"{name} must be at least {least}, got {value}")
    for name in ("student.learning_rate", "teacher.learning_rate", "sft.learning_rate"):
        if not 0 < get(name) < float("inf"):
            refuse(f"{name} must be more than 0, got {get(name)}")
    if not 0 < study.traces.heldout_share < 1:
        refuse(f"traces.heldout_share must lie between 0 and 1, got {study.traces.heldout_share}")


def _check_rl(where: str, rl: RL, refuse) -> None:
    for name, least in LEAST_OF_RL.items():
        if (value := getattr(rl, name)) < least:
            refuse(f"{where}.{name} must be at least {least}, got {value}")
    if not 0 < rl.learning_rate < float("inf"):
        refuse(f"{where}.learning_rate must be more than 0, got {rl.learning_rate}")
    if not 0 <= rl.beta < float("inf"):
        refuse(f"{where}.beta must be 0 or more, got {rl.beta}")
    if rl.prompts * rl.group % rl.updates:
        refuse(f"{where}.updates must divide prompts x group = {rl.prompts * rl.group}, got {rl.updates}")
    if rl.problems < rl.prompts:
        refuse(f"{where}.problems must be at least {where}.prompts = {rl.prompts}, got {rl.problems}")


def _check_calibration(study: Study, refuse) -> None:
    seeds = study.calibration.seeds
    for seed in seeds:
        if type(seed) is not int or seed < study.seeds:
            refuse(f"calibration.seeds must be other than the study's, whole numbers from {study.seeds}, got {seed!r}")
    if len(set(seeds)) < len(seeds) or not seeds:
        refuse(f"calibration.seeds must be one or more, none twice, got {seeds}")
    for i, overrides in enumerate(study.calibration.try_rl):
        where = f"calibration.try_rl[{i}]"
        if not isinstance(overrides, dict):
            refuse(f"{where} must be a mapping of settings of rl, got {overrides!r}")
        try:
            tried = with_rl(study, overrides).rl
        except DataError as error:
            refuse(f"{where}: {str(error).partition(': ')[2]}")
        _check_rl(where, tried, refuse)


def _check_arms(study: Study, refuse) -> None:
    from pear.sft_config import PEARSFTConfig

    own = {f.name for f in fields(PEARSFTConfig)}
    for name, options in study.all_arms.items():
        if not isinstance(options, dict):
            refuse(f"arm {name!r} must be a mapping of options of `pear sft`, got {options!r}")
        for key in options:
            if key not in own:
                refuse(f"arm {name!r}: {key!r} is no option of `pear sft`")
            if key not in OBJECTIVE:
                refuse(
                    f"arm {name!r}: {key!r} is the same for all arms, which differ by their objective alone "
                    f"({', '.join(OBJECTIVE)}); what SFT has settings for is under `sft`"
                )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what TRL sets
                PEARSFTConfig(output_dir="none", use_cpu=True, report_to="none", **options)
        except (ValueError, TypeError) as error:
            refuse(f"arm {name!r}: {error}")


# What an arm may set. The traces hold what these need: log-probs of behaviour policy and student, no wrong answers and
# no teacher's top-k.
OBJECTIVE = (*PEAROptions.names(), *WeightingOptions.names())
