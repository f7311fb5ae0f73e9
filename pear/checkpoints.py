"""Checkpoints that are whole or not there, for both trainers, and which one to go on from."""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from pear import run_identity
from pear.io import DataError, WriteError, disk_error, write_error

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the last file of a checkpoint to be written


class WholeCheckpoints:
    """Mix-in of a Trainer: a checkpoint that cannot be written whole is taken away, so that no resume finds it.

    What can be checked of saving is checked before training. `run_identity`, if it is set, is kept in each checkpoint.
    """

    run_identity: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise DataError("no parameter of the model is to be trained (all are frozen): use_peft adds an adapter")
        prepare_to_save(self)
        step = step_of(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else 0
        if 0 < self.args.max_steps <= step and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Transformers' loop would make one step more before it looks at how many there are to be.
            logger.warning(
                f"{resume_from_checkpoint} is at step {step} of {self.args.max_steps}: no step is left to make"
            )
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE))
            return TrainOutput(step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        with readable(args[0] if args else kwargs["resume_from_checkpoint"], "weights"):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with readable(checkpoint, "state of the optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint) -> None:
        with readable(checkpoint, "state of the gradient scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with readable(checkpoint, "state of the random numbers"):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = is_whole(folder)
        try:
            if self.run_identity is not None and self.args.should_save:
                run_identity.write(folder, self.run_identity)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if (cause := disk_error(error)) is None:
                raise
            if not existed and self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise write_error(folder, cause, kept="Earlier checkpoints are whole.") from error


@contextlib.contextmanager
def readable(checkpoint: str | None, what: str) -> Iterator[None]:
    """Files of a checkpoint are read without running code in them; what cannot be read so is an error of one line."""
    try:
        yield
    except (DataError, WriteError):
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError,
            SafetensorError) as error:  # fmt: skip
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = " ".join(str(error).split())
        raise DataError(
            f"resume_from_checkpoint: the {what} in {checkpoint} cannot be read: a file is damaged, or was not written "
            f"by this trainer with these settings ({type(error).__name__}: {said:.200}). No code in it was run. Go on "
            "from another checkpoint, or start anew in another output_dir."
        ) from error


def prepare_to_save(trainer: Trainer) -> None:
    """Before training: whatever can keep the trained model from being saved is repaired, or refused by name.

    Configs and tokenizer are written once, to a temporary folder in output_dir.

    Raises:
        DataError: a config or the tokenizer cannot be saved
        WriteError: output_dir cannot be written
    """
    base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    repair_generation_config(base)
    if not trainer.args.should_save:
        return
    parts = {"config": base.config, "generation_config": getattr(base, "generation_config", None)}
    try:
        Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=trainer.args.output_dir, prefix=".final.") as folder:
            for what, part in {**parts, "tokenizer": trainer.processing_class}.items():
                try:
                    if part is not None:
                        part.save_pretrained(folder)
                except OSError:
                    raise
                except Exception as error:
                    said = " ".join(str(error).split())
                    raise DataError(
                        f"the model's {what} cannot be saved, so training would end without a model: "
                        f"{type(error).__name__}: {said:.400}. Repair it in the folder of the model that training "
                        "starts from."
                    ) from error
    except OSError as error:
        raise write_error(trainer.args.output_dir, error) from error


# What makes generation sample; without do_sample it has no effect, and transformers saves none of it.
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


def repair_generation_config(model: PreTrainedModel) -> None:
    """Make a generation_config that transformers loads but does not save, once it is changed, one that it saves.

    Training changes it (it sets the pad token). Settings of sampling without do_sample turn it on; others without
    effect are dropped. Each is said.

    Raises:
        DataError: it has a value that is wrong whatever else is set
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    where = "generation_config.json of the model"
    sampling = {name: getattr(config, name, None) for name in SAMPLING}
    if wrong := [name for name, value in sampling.items() if not isinstance(value, (int, float, type(None)))]:
        raise DataError(f"{where}: {wrong[0]} must be a number, got {sampling[wrong[0]]!r:.60}: repair it there")
    if sampling["temperature"] is not None and sampling["temperature"] <= 0:  # by which people mean no sampling
        sampling = {}
    found = _minor_issues(config, where)
    if config.do_sample is not True and (ignored := [name for name in found if name in sampling]):
        config.do_sample = True
        logger.warning(
            f"{where}: {', '.join(f'{name} = {sampling[name]}' for name in ignored)} without do_sample cannot be "
            "saved: do_sample is set to true"
        )
        found = _minor_issues(config, where)
    if found:
        defaults = GenerationConfig()
        for name in found:
            logger.warning(f"{where}: {name} = {getattr(config, name)!r} has no effect and cannot be saved: left out")
            setattr(config, name, getattr(defaults, name))
        _minor_issues(config, where)


def _minor_issues(config: GenerationConfig, where: str) -> list[str]:
    """Names of the settings that `validate(strict=True)` refuses, and that are only warned about when loading."""
    found: list[str] = []
    try:
        config.validate(strict=True)
    except ValueError as error:
        found = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        if not found:
            raise DataError(f"{where} cannot be saved again: {' '.join(str(error).split()):.400}") from error
    return found


def begin(args: TrainingArguments, record: dict[str, Any], overwrite: bool) -> str | None:
    """The checkpoint that a run goes on from, or None, when it is sure that nothing of another run gets lost.

    Args:
        record: what the run is, of `pear.run_identity.identity`
        overwrite: whether what an earlier run left in output_dir may go (see `clear`)

    Raises:
        DataError: output_dir holds what another run left; the checkpoint is no whole one, or another run's
    """
    checkpoint = resume_from(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None:
        if not run_identity.check(checkpoint, record):
            logger.warning(
                f"{checkpoint} has no {run_identity.RECORD}, so whether it is of the same data, model and objective is "
                "not checked"
            )
        if Path(checkpoint).resolve().parent == Path(args.output_dir).resolve():
            return checkpoint
    if not overwrite and (found := left_by_another(args.output_dir)) is not None:
        if not checkpoints(args.output_dir) and run_identity.is_the_same(args.output_dir, record):
            logger.warning(f"{args.output_dir} holds the model of this same run; it is made again and replaced")
            return checkpoint
        raise DataError(
            f"output_dir: {args.output_dir} holds {found} of an earlier run. Give another output_dir; or "
            "--resume_from_checkpoint true, to go on with that run; or --overwrite_output_dir, to replace it"
        )
    return checkpoint


def left_by_another(output_dir: str) -> str | None:
    """What of a run is in the folder, in words; None for a folder that holds none, whatever else there is."""
    folder = Path(output_dir)
    model = any(folder.glob("*.safetensors")) and any((folder / name).is_file() for name in CONFIGS)
    if model or (folder / "adapter" / CONFIGS[1]).is_file():
        return "the model"
    if whole := checkpoints(output_dir):
        return f"{len(whole)} checkpoint{'s' * (len(whole) > 1)}"
    return None


CONFIGS = ("config.json", "adapter_config.json")


# What a run leaves beside its model, and the next one would be taken to have left.
LEFT = ("run.json", "curves.png", "eval/before.json", "eval/after.json", "samples")


def clear(args: TrainingArguments, checkpoint: str | None, overwrite: bool) -> None:
    """Take away an earlier run's checkpoints and records, if they may go; its model is replaced at the end."""
    if checkpoint is not None or not overwrite or not args.should_save:
        return
    folder = Path(args.output_dir)
    for path in (*map(Path, checkpoints(args.output_dir).values()), *(folder / name for name in LEFT)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def step_of(checkpoint: str | None) -> int:
    """How many optimizer steps were made at a whole checkpoint; 0 for None."""
    return 0 if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint) / STATE)).global_step


def checkpoints(output_dir: str) -> dict[int, str]:
    """The whole checkpoints in a folder, by step."""
    found = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and is_whole(folder):
            found[int(match[1])] = str(folder)
    return found


def is_whole(folder: Path) -> bool:
    """Whether all of a checkpoint's files were written: its state came last, and can be read."""
    try:
        TrainerState.load_from_json(str(folder / STATE))
    except (OSError, ValueError, TypeError, KeyError, json.JSONDecodeError):
        return False
    return True


def resume_from(choice: bool | str | None, output_dir: str) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: true is the newest whole one, and none where there is none.

    A run that was killed while it saved has left a folder that is no checkpoint; that one is passed over.

    Raises:
        DataError: a checkpoint is named, and it is not a whole one.
    """
    if isinstance(choice, str) and choice.lower() in ("true", "false"):
        choice = choice.lower() == "true"
    if not choice:
        return None
    if isinstance(choice, str):
        if not is_whole(Path(choice)):
            raise DataError(f"resume_from_checkpoint: {choice} is not a whole checkpoint (its {STATE} cannot be read)")
        return choice
    found = newest_whole(output_dir)
    if found is None:
        logger.warning(f"{output_dir} has no whole checkpoint to go on from: training starts at the beginning")
    return found


def newest_whole(output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint of the latest step; None where there is none."""
    found = checkpoints(output_dir)
    return found[max(found)] if found else None
