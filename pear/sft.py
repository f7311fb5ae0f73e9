"""`pear sft`: supervised fine-tuning with weighted, signed or distilled losses, a subclass of TRL's SFTTrainer.

What TRL does stays TRL's: model loading, LoRA, packing, schedules, checkpoints, logging. Ours are the loss's columns
carried through preparation and collation (sft_data.py), the loss (from hidden states, see fused_head.py), a teacher
beside the student (teacher.py) and the statistics `pear/*` (health.py). TRL's token accuracy and entropy come from the
pass that makes the loss. Options are in sft_config.py, the data's files in scored.py, those that training leaves in
save.py.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from trl import SFTTrainer, get_quantization_config

from pear.adapters import check_targets
from pear.align import read_roles
from pear.appending import is_main, output_folder
from pear.attention import attention_for, check_packs
from pear.checkpoints import WholeCheckpoints, begin, clear
from pear.fused_head import IGNORE, add_fused_head
from pear.health import AS_IN_TRL, NEAR_ZERO, Statistics, block_sums, first_step_in_words, in_words, names_logged
from pear.io import DataError
from pear.long_context import check_context, check_quantization, longest_row, prepare_device_options, row_limit
from pear.models import check_architecture, embedding_rows, find_config, head_size, load_tokenizer, start_model
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
from pear.run_identity import identity
from pear.run_log import SaysHowItRuns
from pear.runs import given, write_run
from pear.save import Extras, check_push, evaluate_saved, finish, save_final, train
from pear.scored import load_scored
from pear.scored_summary import Found
from pear.sft_config import DataArguments, ModelArguments, PEARSFTConfig, eval_files
from pear.sft_data import IN_BATCHES, PEARCollator, largest_id, prepare, top_k_vocabularies, virtual_tokens
from pear.shown import say
from pear.streams import Limits, check_best_metric, check_datasets, prepare_stream
from pear.teacher import HeldTeacher, load_teacher, target_logprobs, teacher_dtype
from pear.tokenizer_options import OPTIONS, changed_tokenizer, check_applied
from pear_kernels import LossOutput, Teacher
from pear_kernels.objectives.base import OF_GRADIENT

logger = get_logger(__name__)

PAPER = {
    "title": "Good SFT Optimizes for SFT, Better SFT Prepares for Reinforcement Learning",
    "id": "2602.01058",
}


def objective_in_words(args: PEARSFTConfig) -> str:
    """What a model was trained with: "PEAR SFT", "SFT", "SFT weighted by dft", "distillation (forward)", ..."""
    if args.distill != "none":
        return f"distillation ({args.distill})" + (" weighted by PEAR" if args.weighting == "pear" else "")
    if args.weighting == "pear":
        return "PEAR SFT" + (" with wrong answers" if args.negatives else "")
    return "SFT" + (f" weighted by {args.weighting}" if args.weighting != "none" else "")


class PEARSFTTrainer(SaysHowItRuns, WholeCheckpoints, SFTTrainer):
    """SFTTrainer whose loss is one of `pear_kernels`. Datasets come from `load_scored`; arguments are SFTTrainer's.

    The loss is a sum over the response tokens of an optimiser step, over all its micro-batches and processes, divided
    by their number: accumulation gives the loss of one big batch. With `weighting="pear"` the sum is of G_t * NLL_t.

    `teacher` is a loaded model of the student's vocabulary, for `distill` without top-k columns in the data, or, for
    `weighting="asft"` without `ref_logprobs`, the model that training starts from, loaded once more.

    Logged as TRL does: `loss`, `mean_token_accuracy` (with negatives, of right answers), `entropy` (unless
    `log_entropy` is off, or the teacher is one of top-k columns) and `num_tokens`. Evaluation prefixes them with
    `eval_`, or with `eval_NAME_` where `eval_dataset` is a dictionary of datasets. `eval_loss` is the mean over all
    response tokens of a dataset, so it does not depend on the batch size (but with `normalize="batch"`, whose weights
    do, and for the auxiliary loss of mixtures of experts, which is a batch's). With `compute_metrics`, evaluation makes
    the logits by a forward pass of its own; training never does.

    Datasets may be streams (`datasets.IterableDataset` of the same columns, such as
    `load_scored(...).to_iterable_dataset()`), which need `max_steps`. Their rows are checked as they come.

    Logged besides, under `pear/` (and `eval_pear/`), means over the response tokens since the last log
    (with negatives, of right answers): `nll` (unweighted: compare runs by this one), `log_ratio_mean` to the behaviour
    policy, `tokens`, their number; where the data has block_ids, `ratio_tokens`, the share of them that carries a
    log-ratio (elsewhere it counts as 0); and by objective

    - pear: `ratio_clipped_low`, `ratio_clipped_high`, `weight_mean`, `weight_floor`, `weight_ceiling`,
      `effective_sample_size` (a share);
    - other weightings: `weight_mean`, `weight_max`, `weight_zero` (the share of weights that are 0),
      `effective_sample_size`; by `ref_logprobs`, `ref_log_ratio_mean`; of iw-sft `weight_ceiling` (the share at
      iw_max) and `weight_floor` (near 0);
    - negatives: `wrong_nll`, `wrong_weight_mean`, `wrong_below_floor`, over the tokens of wrong answers,
      `wrong_tokens`;
    - distill: `divergence`;
    - `gradient_tolerance` above 0, while training: `gradient_kept`, the share of the two gradient products' work that
      was done, and `gradient_left_out`, the share of the gradient's mass that was left out.
    """

    def __init__(
        self, model, args: PEARSFTConfig | None = None, *, teacher: PreTrainedModel | None = None, **kwargs: Any
    ):
        if args is None:
            args = PEARSFTConfig("pear-sft")
        if not isinstance(args, PEARSFTConfig):
            raise TypeError(f"args must be a PEARSFTConfig, got {type(args).__name__}")
        for name in ("data_collator", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise DataError(f"{name} does not go with PEARSFTTrainer: batches and loss are its own, without logits")
        check_datasets(kwargs.get("train_dataset"), kwargs.get("eval_dataset"), args)
        if kwargs.get("formatting_func") is not None:
            raise DataError("formatting_func does not go with PEARSFTTrainer: its data is tokenised, by `pear score`")
        if teacher is not None:
            args.check_teacher("a teacher is given")
        virtual_tokens(kwargs.get("peft_config"), args.padding_free or args.packing)  # before a model is loaded
        prepare_device_options(args)
        # What TRL writes into the model card.
        self._name = objective_in_words(args)
        self._tag_names, self._paper = (
            (["trl", "sft", "pear"], PAPER) if args.weighting == "pear" else (["trl", "sft"], {})
        )
        self._columns = args.more_columns(teacher_in_memory=teacher is not None)
        self._vocabulary: int | None = None
        self._largest_id = -1  # of the data's top-k
        self._has_blocks = False
        self._longest: dict[str, int] = {}  # row, by dataset
        self._largest_token: dict[str, int] = {}  # id, by dataset
        self._embedding: int | None = None  # its rows
        self._configs: dict[str, PretrainedConfig] = {}  # by what the model is called
        self._limits = Limits()  # of rows that come from a stream
        self._top_k_vocabularies: set[int] = set()
        # Our own preparation keeps every row within max_length; TRL's check would refuse padding_free without packing.
        self._max_length = args.max_length
        tokenizer = kwargs.get("processing_class")
        check_applied(args, getattr(tokenizer, "tokenizer", tokenizer))
        # What TRL must not see: the data is in tokens, whose masks say what trains and whose template is applied.
        kept = {name: getattr(args, name) for name in ("max_length", "chat_template_path", "assistant_only_loss")}
        args.chat_template_path, args.assistant_only_loss = None, False
        if args.padding_free and not args.packing:
            args.max_length = None
        try:
            super().__init__(model, args, **kwargs)
        finally:
            for name, value in kept.items():
                setattr(args, name, value)
        self.data_collator = PEARCollator(
            pad_token_id=self.data_collator.pad_token_id,
            padding_free=self.padding_free,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
            raise DataError("context and sequence parallelism are not supported: a weight needs the whole response")
        base = self.model
        adapter = base.active_peft_config if isinstance(base, PeftModel) else None
        self._virtual_tokens = virtual_tokens(adapter, self.padding_free)
        self._prompt = getattr(adapter, "num_virtual_tokens", None) or 0
        base = base if adapter is None else base.get_base_model()
        self._configs["model"] = base.config
        self._check_context()
        add_fused_head(base, offloaded=args.activation_offloading)
        self._vocabulary = base.get_output_embeddings().weight.shape[0]
        self._embedding = base.get_input_embeddings().weight.shape[0]
        self._limits.of_model(min(self._embedding, self._vocabulary), self._vocabulary)
        self._check_ids()
        self._teacher = None
        if teacher is not None:
            self._configs["teacher"] = teacher.config
            self._check_context()
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)  # a processor holds one
            self._teacher = HeldTeacher(teacher, base, tokenizer, self.accelerator.device)
        if self.padding_free:
            with self.accelerator.autocast():
                for what, each in (("model", base), ("teacher", teacher)):
                    if each is not None:
                        check_packs(each, next(iter(self.train_dataset))["input_ids"], what)
        self._names = names_logged(args, teacher is not None, self._has_blocks)
        self._of_gradient = OF_GRADIENT if args.gradient_tolerance else ()  # of training alone
        self._as_in_trl = dict(AS_IN_TRL)
        if not args.log_entropy or (args.distill != "none" and teacher is None):  # not made beside a top-k teacher
            del self._as_in_trl["entropy"]
        figures = ["loss", *self._as_in_trl, "num_tokens", *(f"pear/{name}" for name in self._names)]
        figures += ["aux_loss"] if self.aux_loss_enabled else []
        check_best_metric(args, self.eval_dataset, figures, computed=self.compute_metrics is not None)
        self._statistics = {"train": Statistics(), "eval": Statistics()}
        self._largest: dict[str, torch.Tensor] = {}  # over the first optimiser step

    def _send_telemetry(self) -> None:
        """TRL reports which of its trainers are used; ours is none of them."""

    # ---- data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name) -> Dataset:
        if isinstance(dataset, IterableDataset):
            prepared, columns = prepare_stream(
                dataset, dataset_name, args, self._max_length, self._columns, packing, self._limits
            )
            self._has_blocks |= "block_ids" in columns
            return prepared
        prepared = prepare(dataset, dataset_name, args, self._max_length, self._columns, packing)
        self._largest_id = max(self._largest_id, largest_id(prepared, "top_k_ids"))
        self._longest[dataset_name] = longest_row(prepared)
        self._largest_token[dataset_name] = largest_id(prepared, "input_ids")
        self._check_context()
        self._has_blocks |= "block_ids" in prepared.column_names
        if "top_k_vocabulary" in self._columns:
            self._top_k_vocabularies |= top_k_vocabularies(dataset)
        self._check_ids()
        return prepared

    def _check_context(self) -> None:
        self._limits.positions = row_limit(None, *self._configs.values())
        for what, config in self._configs.items():  # none before there is a model
            more = self._prompt if what == "model" else 0  # PEFT's virtual tokens have positions too
            check_context({name: tokens + more for name, tokens in self._longest.items()}, config, what)

    def _check_ids(self) -> None:
        if self._vocabulary is None:  # before there is a model
            return
        for name, largest in self._largest_token.items():
            if largest >= min(self._embedding, self._vocabulary):
                raise DataError(
                    f"{name} dataset: token id {largest} is beyond the model, whose embedding has {self._embedding} "
                    f"rows and whose head {self._vocabulary}: resize it for tokens that were added to its tokenizer "
                    "(resize_token_embeddings)"
                )
        if others := sorted(self._top_k_vocabularies - {self._vocabulary}):
            raise DataError(
                f"teacher and student must have one vocabulary: the data's top_k_vocabulary is {others[0]}, the "
                f"student's head has {self._vocabulary} tokens. Give a teacher with a head of that size."
            )
        if self._largest_id >= self._vocabulary:
            raise DataError(
                f"teacher and student must have one vocabulary: the data's top_k_ids go up to {self._largest_id}, the "
                f"student's head has {self._vocabulary} tokens. Give a teacher of the student's vocabulary."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = [name for name in IN_BATCHES if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *ours]

    # ---- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a micro-batch, over the response tokens of the whole optimiser step."""
        mode = "train" if self.model.training else "eval"
        args, inputs = self.args, dict(inputs)
        behavior, blocks = inputs["behavior_logprobs"], inputs.get("block_ids")
        if args.weighting != "pear":  # they are for the log then, and no business of the loss
            inputs = {name: x for name, x in inputs.items() if name not in ("behavior_logprobs", "block_ids")}
        options = args.loss_options(blocks is not None)
        if self._teacher is not None:
            options["reference" if args.weighting == "asft" else "teacher"] = self._teacher(inputs)
        denominator = None
        if num_items_in_batch is not None:
            denominator = torch.as_tensor(num_items_in_batch, device=inputs["labels"].device).clamp(min=1)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        output: LossOutput = model(
            **inputs,
            pear={
                **options,
                "denominator": denominator,
                "return_entropy": "entropy" in self._as_in_trl,
                "workspace_bytes": args.workspace_bytes,
                "gradient_tolerance": args.gradient_tolerance,
                "virtual_tokens": self._virtual_tokens,
            },
        )
        loss = output.loss
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            # The divisor counts the tokens of every process, and their gradients are averaged (as in TRL).
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:  # a mean of this micro-batch, which TRL averages over the steps that accumulate
            aux_loss = output.stats["aux_loss"]
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss.detach()).mean())
        self._note(mode, inputs, behavior, blocks, output._replace(loss=loss), options.get("reference"))
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss; and where metrics of the caller's are to be computed, logits from a forward pass of their own."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            plain = {name: x for name, x in inputs.items() if name not in ("labels", *IN_BATCHES)}
            logits = model(**plain, use_cache=False).logits.detach()  # PEFT's virtual tokens come first
            return (
                loss,
                logits[:, -inputs["labels"].shape[1] :],
                inputs["labels"],
            )

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Trainer's, of rows that are prepared as for `evaluate` (TRL takes them as they are), in their order."""
        args = copy.copy(self.args)
        args.shuffle_dataset = False
        prepared = self._prepare_dataset(test_dataset, self.processing_class, args, False, None, metric_key_prefix)
        return super().predict(prepared, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """TRL's, whose metrics get the means over all tokens of this dataset: the loss, and what training logs."""
        self._statistics["eval"] = Statistics()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        stats = self._read_stats("eval")
        found = {**stats, "num_tokens": self._total_train_tokens}
        if aux_losses := self._metrics["eval"].pop("aux_loss", None):
            found["aux_loss"] = torch.stack(aux_losses).mean().item()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        self._warn_in_words("eval", stats)
        return output

    # ---- statistics: gathered as tensors, read back only when they are logged

    @torch.no_grad()
    def _note(
        self,
        mode: str,
        inputs: dict[str, Any],
        behavior: torch.Tensor,
        blocks: torch.Tensor | None,
        output: LossOutput,
        reference: Teacher | None,
    ) -> None:
        tokens = output.stats["tokens"]
        if "attention_mask" in inputs:
            seen = inputs["attention_mask"].sum()
        else:
            seen = tokens.new_full((), inputs["input_ids"].numel())
        counted = inputs["labels"] != IGNORE
        with_ratio = counted if blocks is None else counted & (blocks >= 0)
        log_ratio = torch.where(with_ratio, output.logprobs - behavior.to(output.logprobs), 0)
        found = {"log_ratio_mean": log_ratio.sum() / tokens.clamp(min=1)} | output.stats
        of_right = with_ratio & inputs["sequence_label"] if "sequence_label" in inputs else with_ratio
        found["ratio_tokens"] = of_right.sum() / tokens.clamp(min=1)
        if self.args.weighting == "iw-sft":
            for name, clipped in (
                ("weight_floor", output.weights < NEAR_ZERO),
                ("weight_ceiling", output.weights >= self.args.iw_max * (1 - 1e-6)),  # as float32 has it
            ):
                found[name] = (clipped & counted).sum() / tokens.clamp(min=1)
        found |= {ours: found[theirs] for ours, theirs in self._as_in_trl.items()}
        noted = {"seen": seen.to(tokens), **{name: found[name] for name in (*self._names, *self._as_in_trl)}}
        if mode == "train":
            noted |= {name: found[name] for name in self._of_gradient}
        else:
            noted |= {"all_tokens": counted.sum().to(tokens), "loss": output.loss}
        self._statistics[mode].add(noted)
        if mode == "train" and self.state.global_step == 0:
            first = {}
            if self.args.weighting == "pear":
                if blocks is not None:  # a span's log-prob stands at its first token
                    log_ratio = block_sums(log_ratio, blocks, with_ratio, inputs.get("cu_seq_lens_q"))
                first = {"log_ratio": log_ratio.abs().max(), "ratio_tokens": with_ratio.any().to(log_ratio)}
            first |= {"divergence": found["divergence"]} if self.args.distill != "none" else {}
            before = {"ref_log_ratio": inputs.get("ref_logprobs")}
            if reference is not None:  # one product more, in the first step alone
                before["teacher_log_ratio"] = target_logprobs(reference, inputs["labels"], self.args.workspace_bytes)
            for name, ref in before.items():
                if ref is not None:
                    away = torch.where(counted, output.logprobs - ref.to(output.logprobs), 0).abs()
                    first[name] = away.sum() / tokens.clamp(min=1)
            for name, value in first.items():
                self._largest[name] = torch.maximum(self._largest.get(name, value), value)

    def _read_stats(self, mode: str) -> dict[str, float]:
        """Means over all response tokens, of every process, since the last call: those that TRL logs too, and ours."""
        found = self._statistics[mode].read(self.accelerator)
        if not found:
            return {}
        if mode == "train":
            self._total_train_tokens += int(found["seen"]) // self._tp_size
        for name in found.keys() & {"tokens", "wrong_tokens"}:
            found[name] = round(found[name]) // self._tp_size
        as_in_trl = {name: found[name] for name in ("loss", *self._as_in_trl) if name in found}
        ours = (*self._names, *self._of_gradient)
        return as_in_trl | {f"pear/{name}": found[name] for name in ours if name in found}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        stats = {}
        if self.model.training:  # an evaluation's are in its metrics already
            stats = self._read_stats("train")
            if "aux_loss" in (metrics := self._metrics["train"]):
                metrics["aux_loss"] = torch.stack(metrics["aux_loss"]).tolist()
        if stats:
            logs.update({**stats, "num_tokens": self._total_train_tokens})
        super().log(logs, start_time)
        if stats:
            self._warn_in_words("train", stats)

    def _warn_in_words(self, mode: str, stats: dict[str, float]) -> None:
        found = in_words(self.args, {name.removeprefix("pear/"): value for name, value in stats.items()})
        if mode == "eval":
            for kind, message in found.items():
                if kind not in self._said:
                    self.warn_once(f"eval {kind}", f"Evaluation data: {message}")
            return
        if self._largest:
            largest = torch.stack(list(self._largest.values())).float()[None]
            largest = self.accelerator.gather(largest).amax(0).tolist()  # over processes
            half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
            found |= first_step_in_words(self.args, dict(zip(self._largest, largest, strict=True)), half)
            self._largest = {}
        for kind, message in found.items():
            self.warn_once(kind, message)


def main(argv: Sequence[str] | None = None) -> PEARSFTTrainer:
    """`pear sft --config x.yaml --flag value ...`; `argv` without the program's name, None for the process's own."""
    data_args, args, model_args = parse((DataArguments, PEARSFTConfig, ModelArguments), "pear sft", argv)
    name = model_name(data_args.model, model_args)
    if data_args.data is None:
        raise DataError("no data given: pass --data, a file written by `pear score`")
    eval_files(data_args.eval_data)
    if args.eval_strategy != "no" and not data_args.eval_data:
        raise DataError(f"eval_strategy is {args.eval_strategy!r}, but there is no eval_data: pass --eval_data")

    if data_args.teacher is not None:
        args.check_teacher(f"teacher is {data_args.teacher!r}")
    with output_folder(args.output_dir, "output_dir", held=is_main()):
        check_trackers(args)
        check_push(args)
        return _run(name, data_args, args, model_args)


def _run(name: str, data_args: DataArguments, args: PEARSFTConfig, model_args: ModelArguments) -> PEARSFTTrainer:
    """The command, once its output folder is its own."""
    data = {"data": data_args.data}
    others = {key: getattr(data_args, key) for key in ("teacher", "unaligned", "roles")} | adapter_options(model_args)
    record = identity("sft", name, data, args, others)
    checkpoint = begin(args, record, data_args.overwrite_output_dir)

    unchanged = load_tokenizer(name)
    options = {option: getattr(args, option) for option in OPTIONS}
    tokenizer = changed_tokenizer(unchanged, **options)
    if tokenizer.eos_token != unchanged.eos_token:  # of a template's model; TRL tells the student's config
        args.eos_token = tokenizer.eos_token
    in_memory = data_args.teacher is not None
    init = model_init_kwargs(args, model_args)
    config = find_config(name, **init)
    check_architecture(config, name)
    check_quantization(config, model_args.load_in_4bit or model_args.load_in_8bit)
    if model_args.use_peft:
        check_targets(config, model_args.lora_target_modules, model_args.lora_target_parameters)
    teacher_config = find_config(data_args.teacher) if in_memory else None
    limit = row_limit(args.max_length, config, teacher_config)
    how = {
        "model": name,
        "vocabulary_size": embedding_rows(name, config),
        "max_length": limit,
        "strict": args.strict_length,
        "drop_long_rows": args.drop_long_rows,
        "needs_behavior": args.needs_behavior,
        "columns": args.more_columns(in_memory),
        "temperature": args.distill_temperature,
        "options": args.pear_options(),
        "unaligned": data_args.unaligned,
        "all_turns": args.assistant_only_loss,
        "unchanged": unchanged if tokenizer is not unchanged else None,
    }
    if data_args.roles is not None:
        how["roles"] = read_roles(data_args.roles)
    if "top_k_ids" in how["columns"]:
        how["head_size"] = head_size(name, revision=model_args.model_revision)
    rows = {"train": Found()}
    train_dataset = load_scored(data_args.data, tokenizer, found=rows["train"], **how)
    eval_dataset = None
    for evaluation, path in eval_files(data_args.eval_data).items():
        found = rows[f"eval_{evaluation}" if evaluation else "eval"] = Found()
        dataset = load_scored(path, tokenizer, found=found, **how)
        eval_dataset = {**(eval_dataset or {}), evaluation: dataset} if evaluation else dataset
    init["attn_implementation"] = attention_for(init["attn_implementation"], args, config, init["dtype"], "model")
    args.model_init_kwargs = init
    teacher = None
    if in_memory:
        attention = attention_for(model_args.attn_implementation, args, teacher_config, teacher_dtype(), "teacher")
        teacher = load_teacher(data_args.teacher, tokenizer, attn_implementation=attention)
    quantised = {key: getattr(model_args, key) for key in ("load_in_4bit", "load_in_8bit")}
    start = start_model(name, quantised, **init)
    if not isinstance(start, str):
        args.model_init_kwargs = None
    with trainer_refusals():
        trainer = PEARSFTTrainer(
            start,
            args,
            teacher=teacher,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=adapter_config(model_args),
        )
    clear(args, checkpoint, data_args.overwrite_output_dir)
    trainer.run_identity = record
    train(trainer, checkpoint)
    saved = save_final(trainer, merge_adapter=data_args.merge_adapter)
    extras = Extras(args.output_dir, alone=trainer.accelerator.num_processes == 1)
    if eval_dataset is not None:
        with extras("the evaluation"):
            evaluate_saved(trainer, saved)
    if trainer.accelerator.is_main_process:  # for `pear compare`
        settings = {"start": name, "data": data_args.data, **given(args)}
        settings |= {"teacher": data_args.teacher} if in_memory else {}
        settings["rows"] = {which: found.counts() for which, found in rows.items()}
        settings |= {"unaligned": data_args.unaligned} if data_args.unaligned != "error" else {}
        settings |= {"roles": data_args.roles} if data_args.roles is not None else {}
        with extras("writing run.json"):
            write_run(args.output_dir, "sft", trainer.state.log_history, settings)
            for line in outcome(Path(args.output_dir), "sft"):
                say(line)
    try:
        finish(trainer, saved, extras)
    finally:  # the last line, also where something that followed the training failed
        if args.should_log:
            said = []
            for which, found in rows.items():
                what = {"train": "Training data", "eval": "Evaluation data"}.get(which, f"Data of {which}")
                said.append(found.rows_in_words(f"{what}:", limit))
            say(". ".join(said))
    return trainer
