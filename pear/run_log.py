"""What a training run says while it runs, for both trainers: log.jsonl in its folder, warnings, where it went on."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pear.checkpoints import newest_whole
from pear.runs import json_safe
from pear.shown import one_line

logger = logging.getLogger(__name__)

LOG = "log.jsonl"


class RunLog(TrainerCallback):
    """Writes output_dir/log.jsonl while training runs: a JSON line for whatever is logged, and one for each warning.

    A run that goes on from a checkpoint keeps the lines up to its step and appends to them.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / LOG
        self._file = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        try:
            kept = _lines_up_to(self.path, state.global_step) if state.global_step else []
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 (closed when training ends)
            self._file.writelines(kept)
        except OSError as error:
            self._give_up(error)

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.log_history:
            self.add(state.log_history[-1])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def add(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(json_safe(entry)) + "\n")
                self._file.flush()
            except OSError as error:  # the run is worth more than its log
                self._give_up(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logger.warning(f"{self.path} cannot be written ({error.strerror or error}): training goes on without it")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of a log that are not later than `step`."""
    kept = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return kept


class SaysHowItRuns:
    """Mix-in of a Trainer: log.jsonl, warnings that come once, and what to do after an interruption."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run_log = RunLog(self.args.output_dir)
        self.add_callback(self.run_log)
        self._said: set[str] = set()
        self._resumed_from: str | None = None

    def warn_once(self, kind: str, message: str) -> None:
        """A warning on the terminal and in log.jsonl; one of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            if self.accelerator.is_main_process:
                logger.warning(message)
                self.run_log.add({"step": self.state.global_step, "warning": message})

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """The trainer's own. A KeyboardInterrupt gets `progress`, what there is to go on from, and `can_resume`."""
        if isinstance(resume_from_checkpoint, str):
            self.add_callback(_SaysWhereItGoesOn(resume_from_checkpoint, self.accelerator))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except KeyboardInterrupt as error:
            found = newest_whole(self.args.output_dir)
            done = f"at step {self.state.global_step} of {self.state.max_steps}"
            if found is None:
                error.progress = f"{done}; {self.args.output_dir} has no whole checkpoint"
            else:
                error.progress = f"{done}; the last whole checkpoint is {found}"
            error.can_resume = found is not None
            raise
        finally:
            self.run_log.close()


class _SaysWhereItGoesOn(TrainerCallback):
    def __init__(self, checkpoint: str, accelerator):
        self.checkpoint, self.accelerator = checkpoint, accelerator

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        going_on = f"Going on from {self.checkpoint}: step {state.global_step} of {state.max_steps}"
        self.accelerator.print(one_line(going_on))
