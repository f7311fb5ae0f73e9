"""`pear rl`: GRPO and its relatives, a subclass of TRL's GRPOTrainer whose loss and log-probs come from our pass.

What TRL does stays TRL's: rollouts (transformers or vLLM), rewards, advantages, schedules, LoRA, logging. Ours are the
loss of one micro-batch (`pear_kernels.linear_policy_loss`, inside the model's own forward), all log-probs, rewards that
survive a completion they cannot judge (rewards.py), rollouts that depend on seed, step and weights alone, and
checkpoints that hold the rollouts in hand, so that a run resumed at any step is the unbroken one.

Where an option asks for a formula that `linear_policy_loss` does not have (`other_formula`), TRL's own runs on our
log-probs and entropies: the same numbers, at four products instead of three. Options are in rl_config.py.
"""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PretrainedConfig
from trl import GRPOTrainer, ModelConfig, get_quantization_config
from trl.import_utils import is_math_verify_available
from trl.trainer.utils import RepeatSampler

from pear import rl_metrics
from pear.adapters import check_targets
from pear.appending import is_main, output_folder
from pear.checkpoints import WholeCheckpoints, begin, clear, readable
from pear.decode import decoding_in_stages, finite_logits
from pear.eval import evaluate, prompt_format
from pear.fused_head import IGNORE, add_fused_head
from pear.generate import encode_prompt
from pear.io import DataError, line_list, read_jsonl, write_json, write_jsonl
from pear.models import (
    check_architecture,
    check_ids,
    embedding_rows,
    find_config,
    load_model,
    load_tokenizer,
    start_model,
)
from pear.notes import Notes, doubled
from pear.options import (
    adapter_config,
    adapter_options,
    check_trackers,
    model_init_kwargs,
    model_name,
    parse,
    trainer_refusals,
)
from pear.outcome import outcome
from pear.rewards import GuardedReward, TaskReward, guarded, is_right, math_reward, text_of
from pear.rl_config import PEARGRPOConfig, RLArguments
from pear.rl_health import RolloutHealth, log_in_words, rollouts_in_words
from pear.rl_metrics import CLIPPED
from pear.rows import is_bare_text
from pear.run_identity import identity
from pear.run_log import SaysHowItRuns
from pear.runs import given, read_run, write_run
from pear.save import Extras, check_push, finish, save_final, train
from pear.sft_data import virtual_tokens
from pear.shown import say
from pear.tasks import Problem, load_task
from pear_kernels import LossOutput
from pear_kernels.huggingface.positions import position_limit
from pear_kernels.objectives.base import OF_GRADIENT
from pear_kernels.objectives.policy import POLICY_STATS

logger = get_logger(__name__)

SHOWN_FAULTS = 3  # of a generation, in the log; all are counted
# TRL's names of losses, and ours. In TRL the ratio of a sequence is an option of them, in ours an objective.
OBJECTIVE_OF = {name: name for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")}
MEANS = [name for name in POLICY_STATS if name not in ("ratio_max", "tokens")]


class PEARGRPOTrainer(SaysHowItRuns, WholeCheckpoints, GRPOTrainer):
    """GRPOTrainer with the fused policy loss. Arguments, datasets and reward functions are GRPOTrainer's.

    Logged besides TRL's own, under `pear/` (and `eval_pear/`): the statistics of
    `pear_kernels.objectives.policy.POLICY_STATS`, means over completion tokens since the last log; `reward_faults`,
    completions whose reward could not be had; `empty_completions`; `pass@1` and `pass@G` of the rollouts, groups of G;
    with `gradient_tolerance`, while training, `gradient_kept` and `gradient_left_out` as `PEARSFTTrainer` logs them.
    """

    def __init__(self, model, reward_funcs=None, args: PEARGRPOConfig | None = None, **kwargs: Any):
        if args is None:
            args = PEARGRPOConfig("pear-rl")
        if not isinstance(args, PEARGRPOConfig):
            raise TypeError(f"args must be a PEARGRPOConfig, got {type(args).__name__}")
        functions = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = self._without_empty_rollouts(kwargs["rollout_func"])
        virtual_tokens(kwargs.get("peft_config"), packed=False)  # an adapter that cannot work, before a model is loaded
        super().__init__(model, [guarded(function) for function in functions], args, **kwargs)
        at_once = self.args.generation_batch_size // self.num_generations
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) < at_once:
            raise DataError(
                f"{len(self.train_dataset)} prompts are too few: one generation takes {at_once}, for "
                f"generation_batch_size = {self.args.generation_batch_size} in groups of {self.num_generations}"
            )
        adapter = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        self._virtual_tokens = virtual_tokens(adapter, packed=False)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        float32 = args.cast_lm_head_to_fp32
        add_fused_head(base, temperature=self.temperature, entropy=True, float32=float32)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            add_fused_head(reference, temperature=self.temperature, float32=float32)
        self._policy_stats: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._rollout_health = RolloutHealth()
        self._unlogged: tuple[float, int] | None = None  # running loss and last logged step of a checkpoint
        if why := self.other_formula({}):
            self._refuse_tolerance(why)
            logger.warning(f"{why}: TRL's own formula runs on our log-probs, at four products instead of three")

    def _send_telemetry(self) -> None:
        """TRL reports which of its trainers are used; ours is none of them."""

    # ---- rollouts

    def _prepare_inputs(self, generation_batch):
        """TRL's; but what is drawn depends on seed, step and process alone, so that a resumed run draws the same."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        with seeded(f"{self.args.seed} {self._step} {self.accelerator.process_index}", self.accelerator.device):
            return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs):
        """TRL's; and what is wrong with what it drew."""
        found = super()._generate_and_score_completions(inputs)
        if self.model.training:
            trained = (found["completion_mask"] * found.get("tool_mask", 1)).sum()
            sizes = torch.stack([found["advantages"].abs().max().float(), trained.float()])
            sizes = self.accelerator.gather(sizes[None])  # (processes, 2)
            metrics = self._metrics["train"]
            troubles = rollouts_in_words(
                advantage=sizes[:, 0].max().item(),
                reward=metrics["reward"][-1],
                trained=int(sizes[:, 1].sum().item()),
                truncated=metrics["completions/clipped_ratio"][-1],
                max_completion_length=self.max_completion_length,
                beta=self.beta,
                samples=str(Path(self.args.output_dir) / "samples") if self.args.keep_samples else None,
            )
            self._rollout_health.note(self.state.global_step, troubles)
        return found

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the step ends with this micro-batch
            for kind, message in self._rollout_health.lasting(self.state.global_step + 1).items():
                self.warn_once(kind, message)
        return loss

    def _get_train_sampler(self, dataset=None):
        """TRL's, its order that of the epoch in which a resumed run goes on."""
        return EpochSampler(super()._get_train_sampler(dataset), lambda: int((self.state.epoch or 0) + 1e-6))

    def _generate_single_turn(self, *args, **kwargs):
        """TRL's, with an end-of-sequence token where a backend returned no token at all: it ended at once."""
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        with finite_logits(), sampled_as_asked(base), decoding_in_stages(base):
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        return self._without_empty(completion_ids, logprobs)

    def _without_empty(self, completion_ids: list[list[int]], logprobs: list[list[float]] | None):
        empty = [i for i, ids in enumerate(completion_ids) if len(ids) == 0]
        for i in empty:
            completion_ids[i] = [self._tokenizer.eos_token_id]
            if logprobs is not None:
                logprobs[i] = [None]  # TRL's for "not scored": no correction of the sampler there
        self._log_count("pear/empty_completions", len(empty))
        return completion_ids, logprobs

    def _without_empty_rollouts(self, rollout_func):
        @functools.wraps(rollout_func)
        def rollouts(prompts, trainer):
            output = dict(rollout_func(prompts, trainer))
            output["completion_ids"], output["logprobs"] = self._without_empty(
                list(output["completion_ids"]), output.get("logprobs") and list(output["logprobs"])
            )
            return output

        return rollouts

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's rewards, with their faults counted and shown, pass@k of the rollouts, and samples kept to read."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (all processes', F)
        faults = [f for reward in self.reward_funcs if isinstance(reward, GuardedReward) for f in reward.take_faults()]
        for fault in faults[:SHOWN_FAULTS]:
            logger.warning(f"{fault}. It scores 0.", main_process_only=False)
        if len(faults) > SHOWN_FAULTS:
            logger.warning(f"... and {len(faults) - SHOWN_FAULTS} more completions that could not be judged")
        self._log_count("pear/reward_faults", len(faults))
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        group = self.num_generations if self.model.training else self.num_generations_eval
        right = torch.tensor([is_right(total) for total in totals.tolist()]).view(-1, group)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["pear/pass@1"].append(right.float().mean().item())
        if group > 1:
            self._metrics[mode][f"pear/pass@{group}"].append(right.any(dim=1).float().mean().item())
        if self.model.training and self.accelerator.is_main_process:
            self._keep_samples(prompts, completions, completion_ids_list, rewards, faults)
        return rewards

    def _keep_samples(self, prompts, completions, completion_ids_list, rewards, faults) -> None:
        why = {fault.row: str(fault) for fault in faults}
        rows = []
        for i in range(min(self.args.keep_samples, len(prompts))):
            named = zip(self.reward_func_names, rewards[i].tolist(), strict=True)
            scores = {name: None if math.isnan(value) else value for name, value in named}
            rows.append(
                {
                    "step": self.state.global_step,
                    "prompt": text_of(prompts[i]),
                    "completion": text_of(completions[i]),
                    "tokens": len(completion_ids_list[i]),
                    "ended": completion_ids_list[i][-1] in self.eos_token_ids,
                    "rewards": scores,
                    "fault": why.get(i),
                }
            )
        if rows:  # a file a generation: one that is drawn again after a kill takes the place of the first
            write_jsonl(Path(self.args.output_dir) / "samples" / f"{self._step:08d}.jsonl", rows)

    def _log_count(self, name: str, count: int) -> None:
        mode = "train" if self.model.training else "eval"
        total = torch.tensor(float(count), device=self.accelerator.device)
        self._metrics[mode][name].append(self.accelerator.reduce(total, reduction="sum").item())

    # ---- loss

    def other_formula(self, inputs: dict[str, Any]) -> str | None:
        """Why the loss of these options (and inputs) is not among `linear_policy_loss`'s; None where it is."""
        args = self.args
        of_sequences = self.importance_sampling_level == "sequence"
        reasons = {
            f"loss_type = {self.loss_type!r}": self.loss_type not in OBJECTIVE_OF,
            f"importance_sampling_level = 'sequence' with {self.loss_type!r}": of_sequences
            and self.loss_type not in CLIPPED,
            f"epsilon_high = {self.epsilon_high} below 1 with 'cispo'": self.loss_type == "cispo"
            and self.epsilon_high < 1,
            f"delta = {args.delta} below 1 + epsilon_high": args.delta is not None
            and args.delta < 1 + self.epsilon_high,
            f"top_entropy_quantile = {self.top_entropy_quantile}": self.top_entropy_quantile < 1,
            "an entropy bonus": self._entropy_bonus_enabled,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "use_bias_correction_kl with importance_sampling_level = 'sequence'": of_sequences
            and args.use_bias_correction_kl
            and self.beta != 0,
            "the auxiliary loss of mixtures of experts": self.aux_loss_enabled,
            "images": "pixel_values" in inputs,
        }
        return next((why for why, holds in reasons.items() if holds), None)

    def _refuse_tolerance(self, why: str) -> None:
        if self.args.gradient_tolerance:
            raise DataError(
                f"gradient_tolerance = {self.args.gradient_tolerance} does not go with {why}: TRL's own formula makes "
                "that loss, whose gradient is exact. Set gradient_tolerance to 0"
            )

    def _compute_loss(self, model, inputs):
        if why := self.other_formula(inputs):
            self._refuse_tolerance(why)
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # (B, C)
        width = prompt_ids.shape[1]

        def beside_prompt(values: torch.Tensor, fill: float) -> torch.Tensor:
            """(B, C) -> (B, P + C)."""
            return torch.nn.functional.pad(values, (width, 0), value=fill)

        advantages = inputs["advantages"]
        if (ratio := inputs.get("importance_sampling_ratio")) is not None:
            # a constant of at least 0: it may multiply the advantage as well as the loss
            advantages = (advantages[:, None] if advantages.dim() == 1 else advantages) * ratio
        if advantages.dim() == 2:
            advantages = beside_prompt(advantages.expand_as(completion_ids).contiguous(), 0.0)
        columns = {}
        for ours, theirs in (("old_logprobs", "old_per_token_logps"), ("ref_logprobs", "ref_per_token_logps")):
            if inputs.get(theirs) is not None:
                columns[ours] = beside_prompt(inputs[theirs], 0.0)
        output: LossOutput = model(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            labels=beside_prompt(completion_ids.masked_fill(mask == 0, IGNORE), IGNORE),
            advantages=advantages,
            **columns,
            pear={
                **self.policy_options(),
                **self._divisor(inputs, mask, mode),
                "virtual_tokens": self._virtual_tokens,
            },
        )
        values = output.stats
        as_trl = rl_metrics.micro_batch(
            output.logprobs[:, width:].detach().to(mask.device),
            values["entropy"],
            mask,
            inputs,
            loss_type=self.loss_type,
            of_sequences=self.importance_sampling_level == "sequence",
            beta=self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            unbiased_kl=self.args.use_bias_correction_kl,
        )
        of_ours = torch.stack([values[name] for name in (*self._means(mode), "ratio_max", "tokens")]).float()
        self._policy_stats[mode].append(torch.cat([of_ours.to(as_trl.device), as_trl]))
        return output.loss

    def policy_options(self) -> dict[str, Any]:
        """`linear_policy_loss`'s options for GRPOConfig's."""
        is_cispo = self.loss_type == "cispo"  # where epsilon_high is the cap itself, not what it is above 1
        return {
            "objective": "gspo" if self.importance_sampling_level == "sequence" else OBJECTIVE_OF[self.loss_type],
            "beta": self.beta,
            "unbiased_kl": self.args.use_bias_correction_kl,
            "clip_low": min(self.epsilon_low, 1.0),
            "clip_high": self.epsilon_high - 1 if is_cispo else self.epsilon_high,
            "dual_clip": self.args.delta if self.loss_type in CLIPPED else None,
            "sapo_temperatures": (self.args.sapo_temperature_pos, self.args.sapo_temperature_neg),
            "workspace_bytes": self.args.workspace_bytes,
            "gradient_tolerance": self.args.gradient_tolerance,
        }

    def _divisor(self, inputs: dict[str, Any], mask: torch.Tensor, mode: str) -> dict[str, Any]:
        """`reduction` and `denominator` of TRL's loss types, gradient accumulation included."""
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self.loss_type in ("grpo", "sapo"):
            return {"reduction": "sequence_mean", "denominator": float(len(mask) * steps)}
        if self.loss_type == "bnpo":
            return {"reduction": "sum", "denominator": mask.sum().clamp(min=1) * steps}
        if self.loss_type == "dr_grpo":
            return {"reduction": "sum", "denominator": float(len(mask) * self.max_completion_length * steps)}
        # dapo, cispo: the tokens of the whole generation, and of these an optimiser step's share
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return {
            "reduction": "sum",
            "denominator": tokens * steps / self.args.steps_per_generation if mode == "train" else tokens,
        }

    # ---- statistics: gathered as tensors, read back only when they are logged

    def _means(self, mode: str) -> list[str]:
        """Our statistics that are means over tokens."""
        return [*MEANS, *(OF_GRADIENT if self.args.gradient_tolerance and mode == "train" else ())]

    def _read_stats(self, mode: str) -> tuple[dict[str, float], dict[str, list[float]]]:
        """`POLICY_STATS` over all tokens since the last call, and TRL's figures of each micro-batch, by name."""
        if not self._policy_stats[mode]:
            return {}, {}
        table = torch.stack(self._policy_stats[mode])  # a row a micro-batch: means, ratio_max, tokens; TRL's
        self._policy_stats[mode].clear()
        own = len(names := self._means(mode)) + 2
        as_trl = rl_metrics.read(table[:, own:], *rl_metrics.names(self.loss_type, self.beta), self.accelerator)
        table = table[:, :own].double()
        tokens, largest = table[:, -1:], table[:, -2].max()
        sums = torch.cat([(table[:, :-2] * tokens).sum(0), tokens.sum(0)])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
            largest = self.accelerator.gather(largest.reshape(1)).max()
        *means, tokens = sums.tolist()
        stats = {name: value / max(tokens, 1) for name, value in zip(names, means, strict=True)}
        return stats | {"ratio_max": largest.item(), "tokens": tokens}, as_trl

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        stats, as_trl = self._read_stats(mode)
        metrics = self._metrics[mode]
        for name, value in stats.items():
            metrics[f"pear/{name}"] = [value]
        for name, values in as_trl.items():
            metrics[name].extend(values)
        super().log(logs, start_time)
        if mode == "train":
            for kind, message in log_in_words(logs, self.beta).items():
                self.warn_once(kind, message)

    # ---- files: what TRL forgets at a checkpoint is which step of which rollouts it was at

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        tensors, lists = {}, {}
        for i, batch in enumerate(self._buffered_inputs or []):
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{i}.{name}"] = value.detach().cpu().contiguous().clone()
                else:
                    lists[f"{i}.{name}"] = value
        stats = {f"stats.{mode}": torch.stack(rows).cpu() for mode, rows in self._policy_stats.items() if rows}
        rank = self.accelerator.process_index
        save_file({**tensors, **stats}, str(Path(output_dir) / f"rollouts-{rank}.safetensors"))
        state = {
            "step": self._step,
            "batches": len(self._buffered_inputs or []),
            "lists": lists,
            "metrics": {mode: dict(metrics) for mode, metrics in self._metrics.items()},
            "seconds": self._current_train_step_time,
            "loss": self._tr_loss.item(),  # of the steps since the last log
            "logged": self._globalstep_last_logged,
        }
        (Path(output_dir) / f"rollouts-{rank}.json").write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rank = self.accelerator.process_index
        path = Path(checkpoint) / f"rollouts-{rank}.json"
        if not path.is_file():
            raise DataError(
                f"{checkpoint} has no {path.name}: it was not written by `pear rl` with as many processes as now"
            )
        with readable(checkpoint, "state of the rollouts"):
            state = json.loads(path.read_text())
            tensors = load_file(str(path.with_suffix(".safetensors")))
        tensors = {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
        self._step = state["step"]
        batches: list[dict[str, Any]] = [{} for _ in range(state["batches"])]
        for key, value in {**tensors, **state["lists"]}.items():
            place, _, name = key.partition(".")
            if place == "stats":
                self._policy_stats[name] = list(value)
            else:
                batches[int(place)][name] = value
        self._buffered_inputs = batches or None
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].update(metrics)
        self._current_train_step_time = state["seconds"]
        self._unlogged = (state["loss"], state["logged"])

    def _load_rng_state(self, checkpoint) -> None:
        """Transformers' own; and by now it has reset its running loss, so that what was not logged can be put back."""
        super()._load_rng_state(checkpoint)
        if self._unlogged is not None:
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss += loss
            self._total_loss_scalar -= loss  # `train_loss` is of this call's steps alone
            self._unlogged = None


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order is the next one each time it is asked; this one is told which epoch it is."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        self.__dict__.update(sampler.__dict__)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def sampled_as_asked(model) -> Iterator[None]:
    """Nothing merged into the trainer's sampling from the folder's generation_config (beams, suppressed tokens, ...):
    rollouts would not be drawn from the policy that is trained."""
    own = model.generation_config
    if own is not None:
        model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKEN_IDS})
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def seeded(what: str, device: torch.device) -> Iterator[None]:
    """PyTorch's random numbers as `what` says, and afterwards as they were before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big"))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The command


def task_dataset(problems: list[Problem], tokenizer) -> Dataset:
    """Prompts as the model wants them, and which problem each is."""
    style = prompt_format(tokenizer)
    prompts: list[Any] = [problem.prompt(style) for problem in problems]
    if tokenizer.chat_template is not None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "problem": list(range(len(problems)))})


def data_dataset(path: str, column: str) -> Dataset:
    """Rows of a JSONL file, with `prompt` and the column that the reward reads."""
    rows, left_out = [], []
    for line, row in read_jsonl(path):
        for name in ("prompt", column):
            if row.get(name) in (None, "", []):
                raise DataError(f"{path}:{line}: no `{name}`; a row has `prompt` and `{column}`. Found: {sorted(row)}")
        if rows and type(row["prompt"]) is not type(rows[0]["prompt"]):
            raise DataError(f"{path}:{line}: `prompt` must be text in all rows, or a list of messages in all rows")
        check_prompt(row["prompt"], f"{path}:{line}")
        if not isinstance(answer := row[column], (str, int, float)) or isinstance(answer, bool):
            raise DataError(f"{path}:{line}: `{column}` must be text or a number, got {answer!r:.100}")
        rows.append({"prompt": row["prompt"], column: str(answer)})
        if row.get("tools") or row.get("chat_template_kwargs"):
            left_out.append(line)
    if not rows:
        raise DataError(f"{path}: no row to train on")
    if left_out:
        logging.getLogger(__name__).warning(
            f"{path}: `tools` and `chat_template_kwargs` of rows are not used ({line_list(left_out)}): prompts are "
            "rendered without them. --chat_template_kwargs holds for all rows"
        )
    try:
        return Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # arrow's: `content` is text in one row, a list in another
        raise DataError(f"{path}: `prompt` must have one form in all rows: {error}") from error


def check_prompt(prompt: Any, where: str) -> None:
    """Raise unless a prompt is text, or a list of messages with a role each."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list):
        raise DataError(f"{where}: `prompt` must be text or a list of chat messages, got {type(prompt).__name__}")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: `prompt[{i}]` must be a message with a `role`, got {message!r:.100}")


def check_prompts(
    prompts: Sequence[Any],
    tokenizer,
    config: PretrainedConfig | None,
    new_tokens: int | None,
    model: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """Prompts are never cut or left out: DataError where one fills the model's positions or has tokens that `model`
    has no embedding for, a warning where a completion of `new_tokens` may leave the positions; and one for text that a
    chat model is asked without its template."""
    said = logging.getLogger(__name__)  # accelerate's logger needs a trainer's state
    limit, beyond, notes = None if config is None else position_limit(config), 0, Notes()
    rows = None if model is None else embedding_rows(model, config)
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number} of {len(prompts)}"
        try:
            ids = (
                tokenizer(text=prompt)["input_ids"]
                if isinstance(prompt, str)
                else encode_prompt(tokenizer, prompt, where, chat_template_kwargs)
            )
        except DataError:
            raise
        except Exception as error:  # chat templates are code of the tokenizer's authors; they raise what they like
            raise DataError(f"{where}: the chat template cannot render it: {error}") from error
        check_ids(ids, rows, where, model, tokenizer)
        notes.add(number, doubled(ids, tokenizer, whole=False))
        if limit is None:
            continue
        if len(ids) >= limit:
            raise DataError(
                f"{where} has {len(ids)} tokens, but the model has positions for {limit}, "
                "prompt and completion together. Leave the prompt out, or shorten it."
            )
        beyond += len(ids) + (new_tokens or 0) > limit
    if beyond:
        said.warning(
            f"{beyond} of {len(prompts)} prompts with max_completion_length = {new_tokens} are longer than the {limit} "
            "positions of the model: completions that go beyond them are likely to be nonsense. Lower "
            "max_completion_length."
        )
    for sentence in notes.in_words():
        said.warning(f"Prompts: {sentence}.")
    if text := sum(is_bare_text({"prompt": prompt}, tokenizer) for prompt in prompts):
        said.warning(
            f"{text} of {len(prompts)} prompts are text, and the tokenizer has a chat template: they are asked as they "
            "stand, without the template, while `pear rl --task` and `pear eval` put their questions through it. Give "
            "prompts as lists of chat messages for a model that was trained on chats."
        )


def main(argv: Sequence[str] | None = None) -> PEARGRPOTrainer:
    """`pear rl --model M --task countdown --flag value ...`; `argv` without the program's name."""
    rl_args, args, model_args = parse((RLArguments, PEARGRPOConfig, ModelConfig), "pear rl", argv)
    name = model_name(rl_args.model, model_args)
    with output_folder(args.output_dir, "output_dir", held=is_main()):
        check_trackers(args)
        check_push(args)
        return _run(name, rl_args, args, model_args)


def _run(name: str, rl_args: RLArguments, args: PEARGRPOConfig, model_args: ModelConfig) -> PEARGRPOTrainer:
    """The command, once its output folder is its own."""
    data = {key: getattr(rl_args, key) for key in ("data", "task", "problems", "problem_seed")}
    record = identity("rl", name, data, args, {"reward": rl_args.reward, **adapter_options(model_args)})
    checkpoint = begin(args, record, rl_args.overwrite_output_dir)

    tokenizer = load_tokenizer(name)
    held_out: list[Problem] = []
    try:
        if rl_args.task is not None:
            problems = load_task(rl_args.task, "train", rl_args.problems, rl_args.problem_seed)
            dataset, reward = task_dataset(problems, tokenizer), TaskReward(problems)
            if rl_args.eval_problems:
                held_out = load_task(rl_args.task, "test", rl_args.eval_problems, rl_args.problem_seed)
        else:
            dataset, reward = data_dataset(rl_args.data, "solution"), math_reward
            if not is_math_verify_available():
                raise DataError("--reward math needs the package math-verify: pip install math-verify")
    except ValueError as error:  # of an unknown task, or one with too few problems
        raise DataError(str(error)) from error
    args.model_init_kwargs = model_init_kwargs(args, model_args)
    config = find_config(name, **args.model_init_kwargs)
    check_architecture(config, name)
    if model_args.use_peft:
        check_targets(config, model_args.lora_target_modules, model_args.lora_target_parameters)
    check_prompts(dataset["prompt"], tokenizer, config, args.max_completion_length, name, args.chat_template_kwargs)
    by_name = {key: getattr(model_args, key) for key in ("load_in_4bit", "load_in_8bit")}
    if not model_args.use_peft:  # else the reference is the model without its new adapter
        by_name["beta"] = args.beta
    start = start_model(name, by_name, **args.model_init_kwargs)
    if not isinstance(start, str):
        args.model_init_kwargs = None
    with trainer_refusals():
        trainer = PEARGRPOTrainer(
            start,
            reward,
            args,
            train_dataset=dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=adapter_config(model_args),
        )
    clear(args, checkpoint, rl_args.overwrite_output_dir)
    out = Path(args.output_dir)
    main_process = trainer.accelerator.is_main_process

    def pass_at_k(model, when: str) -> None:
        found = evaluate(
            model, tokenizer, held_out, rl_args.k, rl_args.eval_samples, seed=rl_args.problem_seed,
            max_new_tokens=args.max_completion_length, temperature=args.temperature, progress=f"pass@k {when} RL",
            chat_template_kwargs=args.chat_template_kwargs,
        )  # fmt: skip
        write_json(out / "eval" / f"{when}.json", found | {"model": name, "split": "test"})

    if held_out and main_process and not (checkpoint and (out / "eval" / "before.json").is_file()):
        pass_at_k(load_model(name).to(trainer.accelerator.device), "before")
    trainer.run_identity = record
    train(trainer, checkpoint)
    saved = save_final(trainer, merge_adapter=rl_args.merge_adapter)
    extras = Extras(args.output_dir, alone=trainer.accelerator.num_processes == 1)
    if main_process:
        if held_out:
            with extras("the evaluation"):
                pass_at_k(load_model(str(out)).to(trainer.accelerator.device), "after")
        with extras("writing run.json"):
            finish_run(out, trainer, name)
            for line in outcome(out, "rl"):
                say(line)
    finish(trainer, saved, extras)
    return trainer


def finish_run(out: Path, trainer: PEARGRPOTrainer, start: str, name: str | None = None) -> None:
    """The run's record, for `pear compare`, and its curves."""
    from pear.curves import draw_curves

    write_run(out, "rl", trainer.state.log_history, {"start": start, **given(trainer.args)}, name=name)
    draw_curves([read_run(out)], out / "curves.png")
