"""What the tests of `pear rl` share: short runs of our trainer or of TRL's, on the same rollouts."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from pear.rl import PEARGRPOTrainer
from pear.rl_config import PEARGRPOConfig

GROUP, LIMIT = 4, 8
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def prompts(count: int = 6) -> Dataset:
    return Dataset.from_dict({"prompt": [f"What is {n} plus {n * n}?" for n in range(count)]})


def by_ids(prompts, completions, completion_ids, **_) -> list[float]:
    """A reward that is seldom equal in a group."""
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


def rollouts(prompts, trainer) -> dict:
    """The same completions for every trainer: of several lengths, ended or cut off, whatever its weights."""
    tokenizer = trainer.processing_class
    rng = random.Random(f"{trainer._step} {prompts}")
    completions = []
    for i in range(len(prompts)):
        ids = [rng.randrange(5, 260) for _ in range(1 + (3 * i + trainer._step) % LIMIT)]
        completions.append(ids if len(ids) == LIMIT or i % 3 == 0 else [*ids, tokenizer.eos_token_id])
    return {"prompt_ids": [tokenizer(p)["input_ids"] for p in prompts], "completion_ids": completions, "logprobs": None}


def make_grpo_trainer(
    model, tokenizer, ours=True, *, output_dir: Path, reward=by_ids, data=None, rollout_func=None, peft_config=None,
    eval_data=None, **options,
):  # fmt: skip
    """In training mode; `model` is a folder or a model, `options` are GRPOConfig's."""
    defaults = dict(
        per_device_train_batch_size=GROUP, num_generations=GROUP, max_completion_length=LIMIT, logging_steps=1,
        save_strategy="no", report_to="none", learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True,
        max_steps=2, seed=7, bf16=False, model_init_kwargs={"dtype": "float32"} if isinstance(model, str) else None,
    )  # fmt: skip
    trainer = (PEARGRPOTrainer if ours else GRPOTrainer)(
        model,
        reward,
        (PEARGRPOConfig if ours else GRPOConfig)(str(output_dir), **defaults | options),
        train_dataset=prompts() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        rollout_func=rollout_func,
        peft_config=peft_config,
    )
    trainer.model.train()
    return trainer


randperm = torch.randperm


def reversed_or_seeded(n: int, generator=None) -> torch.Tensor:
    """The order of prompts is drawn from a generator; that of a generation's rows is not, and is here a fixed one."""
    return torch.arange(n - 1, -1, -1) if generator is None else randperm(n, generator=generator)
