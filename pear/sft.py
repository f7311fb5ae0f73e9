"""`pear sft`: supervised fine-tuning with PEAR weights, a subclass of TRL's SFTTrainer.

What TRL does stays TRL's: model loading, LoRA, packing, schedules, checkpoints, logging. Ours are the behaviour
log-probs carried through preparation and collation, the loss (from hidden states, see fused_head.py) and the statistics
`pear/*`. TRL's entropy and token accuracy are not logged: our pass does not make them, and one more would cost as much.
Options are in sft_config.py, the data in scored.py, the files that training leaves in save.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from pear.checkpoints import WholeCheckpoints, resume_from
from pear.fused_head import IGNORE, add_fused_head, first_tokens_ignored
from pear.io import DataError
from pear.models import load_tokenizer, resolve_model
from pear.options import model_init_kwargs, model_name, parse
from pear.runs import given, write_run
from pear.save import save_final
from pear.scored import COLUMNS, load_scored
from pear.sft_config import DataArguments, PEARSFTConfig
from pear_kernels import LossOutput
from pear_kernels.objectives import STATS
from pear_kernels.weights import DEFAULTS, PEAROptions

logger = get_logger(__name__)

MEANS = tuple(name for name in STATS if name != "tokens")
ESS = MEANS.index("effective_sample_size")

FLOOR_SHARE = 0.5  # above it, most response tokens no longer train
# A behaviour policy this close to the student is the student. In half precision, rounding alone moves log-probs more.
COPY_MAX_RATIO = {"full": 1e-3, "half": 0.25}


@dataclass
class PEARCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with `behavior_logprobs` laid out like `labels` and the first token of each sequence ignored."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        behavior = [torch.tensor(example["behavior_logprobs"], dtype=torch.float32) for example in examples]
        if self.padding_free:
            behavior = [torch.cat(behavior)]
        batch["behavior_logprobs"] = pad(
            behavior, padding_value=0.0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        batch["labels"] = first_tokens_ignored(batch["labels"], batch.get("cu_seq_lens_q"))
        return batch


class PEARSFTTrainer(WholeCheckpoints, SFTTrainer):
    """SFTTrainer whose loss is PEAR's. Datasets come from `load_scored`; arguments are SFTTrainer's.

    The loss is the sum of G_t * NLL_t over the response tokens of an optimiser step, over all its micro-batches and
    processes, divided by their number: accumulation gives the loss of one big batch.

    Logged besides TRL's own, under `pear/` (and `eval_pear/`), means over the response tokens since the last log:
    `nll` (unweighted: compare runs by this one), `log_ratio_mean`, `ratio_clipped_low`, `ratio_clipped_high`,
    `weight_mean`, `weight_floor`, `weight_ceiling`, `effective_sample_size` (a share), and `tokens`, their number. With
    `weighting="none"` only `nll`, `log_ratio_mean` and `tokens`.
    """

    _tag_names = ["trl", "sft", "pear"]
    _name = "PEAR SFT"
    _paper = {
        "title": "Good SFT Optimizes for SFT, Better SFT Prepares for Reinforcement Learning",
        "id": "2602.01058",
    }

    def __init__(self, model, args: PEARSFTConfig | None = None, **kwargs: Any):
        if args is None:
            args = PEARSFTConfig("pear-sft")
        if not isinstance(args, PEARSFTConfig):
            raise TypeError(f"args must be a PEARSFTConfig, got {type(args).__name__}")
        for name in ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise DataError(f"{name} does not go with PEARSFTTrainer: batches and loss are its own, without logits")
        if kwargs.get("formatting_func") is not None:
            raise DataError("formatting_func does not go with PEARSFTTrainer: its data is tokenised, by `pear score`")
        # Our own preparation keeps every row within max_length; TRL's check would refuse padding_free without packing.
        self._max_length = args.max_length
        if args.padding_free and not args.packing:
            args.max_length = None
        try:
            super().__init__(model, args, **kwargs)
        finally:
            args.max_length = self._max_length
        self.data_collator = PEARCollator(
            pad_token_id=self.data_collator.pad_token_id,
            padding_free=self.padding_free,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        if self.aux_loss_enabled:
            raise DataError(
                f"router_aux_loss_coef = {self.router_aux_loss_coef}: the auxiliary loss of mixtures of experts is not "
                "supported; set router_aux_loss_coef to 0.0 to train without it"
            )
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
            raise DataError("context and sequence parallelism are not supported: a weight needs the whole response")
        base = self.model
        if isinstance(base, PeftModel):
            if base.active_peft_config.is_prompt_learning:
                raise DataError(
                    f"{base.active_peft_config.peft_type}: prompt-learning adapters are not supported; use LoRA"
                )
            base = base.get_base_model()
        add_fused_head(base)
        self._pear_stats: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._max_ratio: torch.Tensor | None = None  # over the first optimiser step
        self._warned: set[str] = set()

    def _send_telemetry(self) -> None:
        """TRL reports which of its trainers are used; ours is none of them."""

    # ---- data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name) -> Dataset:
        """TRL's steps for tokenised rows: labels, length, packing, shuffling; with our column beside `labels`."""
        if not isinstance(dataset, Dataset):
            raise DataError(f"{dataset_name} dataset: expected load_scored's Dataset, got {type(dataset).__name__}")
        if "labels" in dataset.column_names and "behavior_logprobs" in dataset.column_names:
            return dataset  # prepared before
        if missing := [name for name in COLUMNS if name not in dataset.column_names]:
            raise DataError(
                f"{dataset_name} dataset: no column {', '.join(missing)}; load it with pear.scored.load_scored from a "
                f"file that `pear score` wrote. Columns found: {', '.join(dataset.column_names)}"
            )
        with args.main_process_first(local=False):
            dataset = dataset.select_columns(list(COLUMNS)).with_format("numpy")
            kwargs = {"num_proc": args.dataset_num_proc}
            if self._max_length is not None:
                lengths = [len(ids) for ids in dataset["input_ids"]]
                fits = [i for i, length in enumerate(lengths) if length <= self._max_length]
                if len(fits) < len(lengths):
                    message = (
                        f"{dataset_name} dataset: {len(lengths) - len(fits)} of {len(lengths)} rows are longer than "
                        f"max_length = {self._max_length} tokens"
                    )
                    if args.strict_length or not fits:
                        raise DataError(message)
                    logger.warning(f"{message}; they are left out")
                    dataset = dataset.select(fits)
            dataset = dataset.map(
                _labels, remove_columns="completion_mask", desc=f"Labels of {dataset_name} dataset", **kwargs
            ).with_format(None)
            if packing:
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
                dataset = dataset.select_columns(["input_ids", "labels", "behavior_logprobs"])
                dataset = pack_dataset(dataset, self._max_length, "bfd", kwargs | {"desc": f"Packing {dataset_name}"})
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "behavior_logprobs" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "behavior_logprobs"]

    # ---- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """PEAR loss of a micro-batch, over the response tokens of the whole optimiser step."""
        mode = "train" if self.model.training else "eval"
        args = self.args
        options = args.pear_options()
        if args.weighting == "none":  # every log-ratio clipped to 0, so every weight is exactly 1
            options = PEAROptions("token", 1, 1.0, (0.0, 0.0), DEFAULTS.log_weight_clip)
        denominator = None
        if num_items_in_batch is not None:
            denominator = torch.as_tensor(num_items_in_batch, device=inputs["labels"].device).clamp(min=1)
        output: LossOutput = model(
            **inputs,
            pear={**options._asdict(), "denominator": denominator, "workspace_bytes": args.workspace_bytes},
        )
        loss = output.loss
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            # The divisor counts the tokens of every process, and their gradients are averaged (as in TRL).
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._note(mode, inputs, output)
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss only; there are no logits to return."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    # ---- statistics: gathered as tensors, read back only when they are logged

    def _note(self, mode: str, inputs: dict[str, Any], output: LossOutput) -> None:
        tokens = output.stats["tokens"]
        if "attention_mask" in inputs:
            seen = inputs["attention_mask"].sum()
        else:
            seen = tokens.new_full((), inputs["input_ids"].numel())
        means = [output.stats[name] for name in MEANS]
        self._pear_stats[mode].append(torch.stack([seen.to(tokens), tokens, *means]).float())
        if mode == "train" and self.state.global_step == 0:
            counted = inputs["labels"] != IGNORE
            ratio = (output.logprobs - inputs["behavior_logprobs"].to(output.logprobs)).abs()
            largest = torch.where(counted, ratio, 0).max()
            self._max_ratio = largest if self._max_ratio is None else torch.maximum(self._max_ratio, largest)

    def _read_stats(self, mode: str) -> dict[str, float]:
        """Means over all response tokens, of every process, since the last call. The one place that waits."""
        if not self._pear_stats[mode]:
            return {}
        table = torch.stack(self._pear_stats[mode]).cpu().double()  # a row a micro-batch: seen, tokens, means
        self._pear_stats[mode].clear()
        tokens, mean, share = table[:, 1], table[:, 2 + MEANS.index("weight_mean")], table[:, 2 + ESS]
        # share = (sum G)^2 / (n sum G^2), so the sum of G^2 is n mean^2 / share; as means, like the others
        table[:, 2 + ESS] = mean.square() / share.clamp(min=torch.finfo(torch.float64).tiny)
        table[:, 2:] *= tokens[:, None]  # means back to sums over tokens
        sums = table.sum(dim=0)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")
        seen, tokens, *rest = sums.tolist()
        if mode == "train":
            self._total_train_tokens += int(seen) // self._tp_size
        stats = {f"pear/{name}": value / max(tokens, 1) for name, value in zip(MEANS, rest, strict=True)}
        square = stats["pear/effective_sample_size"]
        stats["pear/effective_sample_size"] = stats["pear/weight_mean"] ** 2 / square if square else 0.0
        stats["pear/tokens"] = round(tokens) // self._tp_size
        if self.args.weighting == "none":
            stats = {name: stats[name] for name in ("pear/nll", "pear/log_ratio_mean", "pear/tokens")}
        return stats

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        stats = self._read_stats(mode)
        if stats:
            prefix = "eval_" if mode == "eval" else ""
            logs.update({prefix + name: value for name, value in stats.items()})
            logs["num_tokens"] = self._total_train_tokens
            if mode == "train":
                self._warn_in_words(stats)
        super().log(logs, start_time)

    def _warn_in_words(self, stats: dict[str, float]) -> None:
        if self.args.weighting == "none":
            return
        if stats["pear/weight_floor"] > FLOOR_SHARE and "floor" not in self._warned:
            self._warned.add("floor")
            logger.warning(
                f"PEAR: {stats['pear/weight_floor']:.0%} of the response tokens have their weight at the floor, "
                f"exp({self.args.log_weight_clip[0]:g}), so most of the batch no longer trains. The behaviour policy "
                f"is more confident than the student (mean log-ratio {stats['pear/log_ratio_mean']:.3f}). Try a lower "
                "end of log_ratio_clip nearer to 0, shorter responses, or data from a closer policy."
            )
        if self._max_ratio is not None:
            half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
            largest = self.accelerator.gather(self._max_ratio.reshape(1)).max().item()
            self._max_ratio = None
            if largest < COPY_MAX_RATIO["half" if half else "full"]:
                logger.warning(
                    f"PEAR: before the first update every log-ratio is near 0 (largest {largest:.1e}): the behaviour "
                    "policy is a copy of the student, and only gamma is left in the weights. Score the data with the "
                    "model that wrote it."
                )


def _labels(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"labels": np.where(row["completion_mask"] == 1, row["input_ids"], IGNORE)}


def main(argv: Sequence[str] | None = None) -> PEARSFTTrainer:
    """`pear sft --config x.yaml --flag value ...`; `argv` without the program's name, None for the process's own."""
    data_args, args, model_args = parse((DataArguments, PEARSFTConfig, ModelConfig), "pear sft", argv)
    name = model_name(data_args.model, model_args)
    if data_args.data is None:
        raise DataError("no data given: pass --data, a file written by `pear score`")
    if args.eval_strategy != "no" and data_args.eval_data is None:
        raise DataError(f"eval_strategy is {args.eval_strategy!r}, but there is no eval_data: pass --eval_data")

    tokenizer = load_tokenizer(name)
    max_length, strict = args.max_length, args.strict_length
    train_dataset = load_scored(data_args.data, tokenizer, max_length, strict=strict)
    eval_dataset = None
    if data_args.eval_data is not None:
        eval_dataset = load_scored(data_args.eval_data, tokenizer, max_length, strict=strict)
    args.model_init_kwargs = model_init_kwargs(args, model_args)
    trainer = PEARSFTTrainer(
        resolve_model(name),
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_from(args.resume_from_checkpoint, args.output_dir))
    if eval_dataset is not None:
        trainer.evaluate()
    save_final(trainer, merge_adapter=data_args.merge_adapter)
    if trainer.accelerator.is_main_process:  # for `pear compare`
        settings = {"start": name, "data": data_args.data, **given(args)}
        write_run(args.output_dir, "sft", trainer.state.log_history, settings)
    if hasattr(trainer, "end"):  # transformers >= 5.18: closes trackers and the process group
        trainer.end()
    return trainer
