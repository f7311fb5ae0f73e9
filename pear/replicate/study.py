"""The configuration of a study: what YAML may say, checked before anything runs.

Every choice that the paper leaves open is a key here with our default, and the configuration file says so.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from pear.io import DataError
from pear.tasks import TASKS
from pear.worked import WORKED

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
    """Settings of RL tried on the baseline arm alone, on seeds and problems that the study does not use."""

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
    seeds: int = 8  # an arm; each its own student, behaviour policy, traces, order and RL
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_study(path: str | os.PathLike, fast: bool = False) -> Study:
    """A study from YAML; with `fast`, what its key `fast` says is laid over the rest.

    Raises:
        DataError: no such file, not YAML, or a key or value that cannot be, naming it
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"config: {path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"config: {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"config: {path} must be a YAML mapping of keys, got {type(values).__name__}")
    overlay = values.pop("fast", None)
    if fast:
        if not isinstance(overlay, dict):
            raise DataError(f"--fast: {path} has no key `fast` with what is smaller then")
        values = overlaid(values, overlay)
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
    for name in ("seeds", "max_new_tokens", "generate_batch"):
        if getattr(study, name) < 1:
            refuse(f"{name} must be at least 1, got {getattr(study, name)}")
    for name in (study.study, *study.all_arms):
        if not name or set(name) - set(NAME):
            refuse(f"names of study and arms are of small letters, digits and hyphens, got {name!r}")
    if both := set(study.arms) & set(study.ablations):
        refuse(f"{sorted(both)[0]!r} is among both arms and ablations")
    if {"student", "teacher"} & set(study.all_arms):
        refuse("no arm can be called student or teacher: those are what the arms start from")
    for name in (study.baseline, study.primary.arm):
        if name not in study.arms:
            refuse(f"baseline and primary.arm must be among the arms ({', '.join(study.arms)}), got {name!r}")
    if study.primary.k not in study.evaluation.ks:
        refuse(f"primary.k must be one of evaluation.ks = {study.evaluation.ks}, got {study.primary.k}")
    for k in study.evaluation.ks:
        if not isinstance(k, int) or not 1 <= k <= study.evaluation.samples:
            refuse(f"evaluation.ks must lie between 1 and samples = {study.evaluation.samples}, got {k!r}")
    if not 0 <= study.ablation_seeds <= study.seeds:
        refuse(f"ablation_seeds must lie between 0 and seeds = {study.seeds}, got {study.ablation_seeds}")
    if study.ablations and not study.ablation_seeds:
        refuse("ablations need ablation_seeds of 1 or more")
    if study.rl.prompts * study.rl.group % study.rl.updates:
        refuse(f"rl.updates = {study.rl.updates} must divide prompts x group = {study.rl.prompts * study.rl.group}")
    if study.rl.problems < study.rl.prompts:
        refuse(f"rl.problems must be at least rl.prompts = {study.rl.prompts}, got {study.rl.problems}")
    for name in ("student", "teacher"):
        shares = getattr(study, name).styles
        if unknown := set(shares) - set(WORKED[study.task].styles):
            refuse(f"{name}.styles: {sorted(unknown)[0]!r} is no style of {study.task} ({WORKED[study.task].styles})")
        if not all(isinstance(s, (int, float)) and s >= 0 for s in shares.values()) or not sum(shares.values()) > 0:
            refuse(f"{name}.styles must be shares of 0 or more, not all 0, got {shares}")
    config = TASKS[study.task].config
    if unknown := set(study.task_config) - set(config):
        refuse(f"task_config: {sorted(unknown)[0]!r} is no setting of {study.task} ({', '.join(config)})")
    _check_arms(study, refuse)


def _check_arms(study: Study, refuse) -> None:
    from pear.sft_config import PEARSFTConfig

    own = {f.name for f in fields(PEARSFTConfig)}
    for name, options in study.all_arms.items():
        if not isinstance(options, dict):
            refuse(f"arm {name!r} must be a mapping of options of `pear sft`, got {options!r}")
        if unknown := set(options) - own:
            refuse(f"arm {name!r}: {sorted(unknown)[0]!r} is no option of `pear sft`")
        if fixed := set(options) & FIXED:
            refuse(f"arm {name!r}: {sorted(fixed)[0]!r} is the same for all arms; set it under `sft`")
        try:
            PEARSFTConfig(output_dir="none", use_cpu=True, report_to="none", **options)
        except (ValueError, TypeError) as error:
            refuse(f"arm {name!r}: {error}")


# what no arm may change: the arms differ by their objective alone
FIXED = {
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type",
    "warmup_steps", "seed", "output_dir", "gradient_accumulation_steps", "optim", "weight_decay",
}  # fmt: skip
