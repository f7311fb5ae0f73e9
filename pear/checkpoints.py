"""Checkpoints that are whole or not there, for both trainers, and which one to go on from."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pear.io import DataError, disk_error, write_error

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the last file of a checkpoint to be written


class WholeCheckpoints:
    """Mix-in of a Trainer: a checkpoint that cannot be written whole is taken away, so that no resume finds it."""

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = is_whole(folder)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if (cause := disk_error(error)) is None:
                raise
            if not existed and self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise write_error(folder, cause, kept="Earlier checkpoints are whole.") from error


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
    found = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and is_whole(folder):
            found[int(match[1])] = str(folder)
    return found[max(found)] if found else None
