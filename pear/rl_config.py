"""The options of `pear rl`: TRL's, and ours beside them."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from pear.io import DataError
from pear_kernels.options import HeadOptions


@dataclass
class PEARGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig, every flag of it, and ours; each is a flag and a YAML key.

    Without an accelerator `bf16` is off unless asked for: bfloat16 is slow and coarse on a CPU.
    """

    gradient_tolerance: float = field(
        default=HeadOptions.gradient_tolerance,
        metadata={
            "help": "Share of the gradient's mass at the head that may be left out, from 0 to below 1. 0: exact. 0.01 "
            "skips most of the work of the two gradient products on a trained model; losses stay exact. Not where "
            "TRL's own formula runs (an entropy bonus, ...)."
        },
    )
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Size of the chunk of logits; changes speed and memory, not the result."}
    )
    keep_samples: int = field(
        default=8, metadata={"help": "Completions of each generation to keep in output_dir/samples/; 0 for none."}
    )

    def __post_init__(self):
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False
        super().__post_init__()
        HeadOptions(gradient_tolerance=self.gradient_tolerance)
        if self.trust_remote_code:
            raise DataError("trust_remote_code = True does not go with `pear rl`: code of a model's is never run")
        if self.keep_samples < 0:
            raise DataError(f"keep_samples must be 0 or more, got {self.keep_samples}")


@dataclass
class RLArguments:
    """Which model, which problems, which reward."""

    model: str | None = field(
        default=None,
        metadata={"help": "Where to start: smollm2, a transformers folder (of `pear sft`, say) or a hub name."},
    )
    task: str | None = field(
        default=None, metadata={"help": "Problems from reasoning-gym, with their verified reward: countdown, ..."}
    )
    data: str | None = field(
        default=None, metadata={"help": "JSONL rows with `prompt` and what the reward needs; instead of --task."}
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "math: math-verify against the row's `solution`. Left out: the task's own.",
            "choices": ["math"],
        },
    )
    problems: int = field(default=1000, metadata={"help": "Problems of the task's train split to draw."})
    problem_seed: int = field(default=0, metadata={"help": "Seed of the problems, whatever the trainer's seed."})
    eval_problems: int = field(
        default=0, metadata={"help": "Held-out problems of the task for pass@k before and after RL; 0 for none."}
    )
    eval_samples: int = field(default=16, metadata={"help": "Samples of each held-out problem."})
    k: int = field(default=8, metadata={"help": "Report pass@k for this k, besides 1."})
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "LoRA: write a plain merged model to output_dir (the adapter alone goes to adapter/)."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Replace the model and the checkpoints that another run left in output_dir; else they are an error."
        },
    )

    def __post_init__(self):
        if (self.task is None) == (self.data is None):
            raise DataError("give either --task, a name of reasoning-gym's, or --data, a JSONL file of prompts")
        if self.data is not None and self.reward is None:
            raise DataError("--data needs --reward: math compares with the row's `solution`")
        if self.task is not None and self.reward is not None:
            raise DataError(f"--reward {self.reward} goes with --data; --task {self.task} has its own verified reward")
        if self.eval_problems and self.task is None:
            raise DataError("--eval_problems draws held-out problems of --task, which is not given")
        if self.eval_problems and not 1 <= self.k <= self.eval_samples:
            raise DataError(f"k must lie between 1 and eval_samples = {self.eval_samples}, got {self.k}")
