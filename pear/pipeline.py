"""The steps from a behaviour policy to a checkpoint after RL, as jobs of one CPU process call them.

Drawing and verifying traces, SFT by `pear.sft`, RL by `pear.rl`: what `pear demo` and `pear replicate` have in common.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.eval import prompt_format
from pear.generate import generate
from pear.tasks import Problem, rewards

Tick = Callable[[int, int], None]  # told (done, total)
# of both trainers: one process that reports by `tick` and is saved whole at its end
TRAINER_OPTIONS: dict[str, Any] = dict(
    save_strategy="no", report_to="none", gradient_checkpointing=False, disable_tqdm=True
)


class Traces(NamedTuple):
    rows: list[dict[str, Any]]  # prompt and completion of right completions that ended, each text once a problem
    right: int
    drawn: int


class Trained(NamedTuple):
    log: list[dict[str, Any]]  # the trainer's
    warnings: list[str]  # in words, see `pear.health`


def draw_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    samples: int,
    **options: Any,
) -> Traces:
    """Draw completions of these problems and keep the right ones; `options` go to `pear.generate.generate`."""
    style = prompt_format(tokenizer)
    prompts = [problem.prompt(style) for problem in problems]
    drawn = generate(model, tokenizer, prompts, samples=samples, **options)
    rows, right = [], 0
    for problem, prompt, completions in zip(problems, prompts, drawn, strict=True):
        verdicts = rewards(problem, [c.text for c in completions])
        right += sum(verdicts)
        texts = {c.text: None for c, ok in zip(completions, verdicts, strict=True) if ok and c.finished}
        rows += [{"prompt": prompt, "completion": text} for text in texts]
    return Traces(rows, right, len(problems) * samples)


def fine_tune(
    tick: Tick,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    train: Path,
    heldout: Path,
    peft_config: Any = None,
    **options: Any,
) -> Trained:
    """SFT on the scored rows of `train`, by `pear.sft`; the model goes to `folder`, LoRA merged into plain weights.

    `options` are PEARSFTConfig's: what differs between two runs is there and nowhere else.
    """
    from pear.scored import load_scored
    from pear.sft import PEARSFTTrainer
    from pear.sft_config import PEARSFTConfig

    warnings = _Collect()
    logger = logging.getLogger("pear.sft")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(warnings)
    try:
        args = PEARSFTConfig(output_dir=str(folder), **TRAINER_OPTIONS, **options)
        loading: dict[str, Any] = dict(columns=args.more_columns(), options=args.pear_options())
        trainer = PEARSFTTrainer(
            model,
            args,
            train_dataset=load_scored(train, tokenizer, **loading),
            eval_dataset=load_scored(heldout, tokenizer, **loading),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[_ticker(tick)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    finally:
        logger.removeHandler(warnings)
        logger.propagate = propagate
    _save(trainer)
    return Trained(trainer.state.log_history, warnings.messages)


def reinforce(
    tick: Tick,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    problems: Sequence[Problem],
    peft_config: Any = None,
    **options: Any,
):
    """GRPO with a verified reward, by `pear.rl`; `options` are PEARGRPOConfig's.

    Returns:
        the trainer, after training, its model saved in `folder`, LoRA merged into plain weights
    """
    from pear.rewards import TaskReward
    from pear.rl import PEARGRPOConfig, PEARGRPOTrainer, task_dataset

    trainer = PEARGRPOTrainer(
        model,
        TaskReward(list(problems)),
        PEARGRPOConfig(output_dir=str(folder), **TRAINER_OPTIONS, **options),
        train_dataset=task_dataset(list(problems), tokenizer),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[_ticker(tick)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    _save(trainer)
    return trainer


def _save(trainer) -> None:
    """The trained model to its folder, without a line on the terminal."""
    from pear.save import save_final

    printed, trainer.accelerator.print = trainer.accelerator.print, lambda *args, **kwargs: None
    try:
        save_final(trainer)
    finally:
        trainer.accelerator.print = printed


def _ticker(tick: Tick) -> transformers.TrainerCallback:
    """A trainer's steps, told to `tick`."""

    class Ticker(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tick(state.global_step, state.max_steps)

    return Ticker()


class _Collect(logging.Handler):
    """Keeps what is logged as a warning, to show it where it can be read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
