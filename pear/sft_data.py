"""From rows of `load_scored` to batches: labels, length, packing, and the loss's columns laid out like `labels`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftConfig
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from pear.io import TOP_K_COLUMNS, DataError
from pear.long_context import longest_row
from pear.long_rows import check_long_rows, too_long
from pear.scored import BLOCK_COLUMNS, COLUMNS, SPANS
from pear.scored_rows import tokens_a_block
from pear.scored_summary import spans_at_block_level
from pear.sft_config import PEARSFTConfig
from pear_kernels.huggingface.shifted import IGNORE, first_tokens_ignored

logger = get_logger("pear.sft")

# A number a token: its dtype, and what stands at padding.
PER_TOKEN = {
    "behavior_logprobs": (torch.float32, 0.0),
    "block_ids": (torch.int32, -1),
    "ref_logprobs": (torch.float32, 0.0),
    "sequence_label": (torch.bool, True),
}
PACK = 1024  # tokens of a pack, at least, where no length is given
# PEFT's prompt learning, and whether its prompt stands before a row as tokens (else as keys and values).
PROMPTS = {"PROMPT_TUNING": True, "P_TUNING": True, "PREFIX_TUNING": False}
WRONG_TO_RIGHT = 4  # tokens of wrong answers for one of a right answer, at most without a warning
IN_BATCHES = (*PER_TOKEN, *TOP_K_COLUMNS)


@dataclass
class PEARCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the loss's columns laid out like `labels` and the first token of each sequence ignored."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for name, (dtype, padding) in PER_TOKEN.items():
            if name in examples[0]:
                batch[name] = self._laid_out([torch.tensor(row[name], dtype=dtype) for row in examples], padding)
        if TOP_K_COLUMNS[0] in examples[0]:
            k = max(len(values) for row in examples for values in row[TOP_K_COLUMNS[0]])
            for name, dtype in zip(TOP_K_COLUMNS, (torch.int64, torch.float32), strict=True):
                nothing = [0] * k  # at prompts
                rows = [torch.tensor([values or nothing for values in row[name]], dtype=dtype) for row in examples]
                batch[name] = self._laid_out(rows, 0)
        batch["labels"] = first_tokens_ignored(batch["labels"], batch.get("cu_seq_lens_q"))
        return batch

    def _laid_out(self, rows: list[torch.Tensor], padding: float) -> torch.Tensor:
        """Rows (L,) or (L, K) -> (B, T) or (B, T, K); without padding, one row after the other, B = 1."""
        rows = [torch.cat(rows)] if self.padding_free else rows
        return pad(rows, padding_value=padding, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def prepare(
    dataset: Dataset,
    name: str,
    args: PEARSFTConfig,
    max_length: int | None,
    columns: Sequence[str],
    packing: bool,
) -> Dataset:
    """TRL's steps for tokenised rows: labels, length, packing, shuffling; with the loss's `columns` beside `labels`.

    Raises:
        DataError: a column is missing, wrong answers or a temperature that the options do not speak of, rows too long.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name} dataset: expected load_scored's Dataset, got {type(dataset).__name__}")
    if "labels" in dataset.column_names and "behavior_logprobs" in dataset.column_names:
        return dataset  # prepared before
    columns = [*COLUMNS, *columns]
    columns += [column for column in BLOCK_COLUMNS if column in dataset.column_names]
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise DataError(
            f"{name} dataset: no column {', '.join(missing)}; load it with pear.scored.load_scored(..., "
            "columns=args.more_columns()) from a file that `pear score` wrote. Columns found: "
            f"{', '.join(dataset.column_names)}"
        )
    _check_labels(dataset, name, args.negatives)
    _check_blocks(dataset, name, args)
    with args.main_process_first(local=False):
        dataset = dataset.select_columns(columns)
        if "top_k_temperature" in columns:
            _check_temperature(dataset, name, args.distill_temperature)
            dataset = dataset.remove_columns(["top_k_temperature", "top_k_vocabulary"])
        if "block_tokens" in columns:
            dataset = dataset.remove_columns("block_tokens")
        dataset = dataset.with_format("numpy")
        kwargs = {"num_proc": args.dataset_num_proc}
        if max_length is not None:
            dataset = _within(dataset, name, max_length, args)
        dataset = dataset.map(
            _labels,
            input_columns=["input_ids", "completion_mask"],  # top-k columns would take long to be looked at
            remove_columns="completion_mask",
            desc=f"Labels of {name} dataset",
            **kwargs,
        ).with_format(None)
        if packing:
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            kept = [column for column in ("input_ids", "labels", *IN_BATCHES) if column in dataset.column_names]
            length = max_length or max(PACK, longest_row(dataset))
            dataset = pack_dataset(dataset.select_columns(kept), length, "bfd", kwargs | {"desc": f"Packing {name}"})
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
    return dataset


def largest_id(dataset: Dataset, column: str) -> int:
    """The largest id in a column of a prepared dataset, input_ids or top_k_ids; -1 without such a column."""
    if column not in dataset.column_names:
        return -1
    largest = -1
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
        ids = table.column(0).combine_chunks()
        while not pyarrow.types.is_integer(ids.type):
            ids = ids.flatten()
        largest = max(largest, pyarrow.compute.max(ids).as_py() or -1)
    return largest


def top_k_vocabularies(dataset: Dataset) -> set[int]:
    """Sizes of the heads that top-k of a dataset of `load_scored` are of, where no fingerprint has been compared."""
    if "top_k_vocabulary" not in dataset.column_names:
        return set()
    return set(dataset.unique("top_k_vocabulary")) - {None}


def virtual_tokens(adapter: PeftConfig | None, packed: bool) -> int:
    """How many tokens PEFT puts before each row, and how many -100 before its labels.

    Raises:
        DataError: prompt learning of another kind than prompt tuning, p-tuning and prefix tuning, or of packs.
    """
    kind = None if adapter is None else adapter.peft_type.value
    # an adaption prompt keeps the forward that the model had before it got our head
    if adapter is None or not (adapter.is_prompt_learning or kind == "ADAPTION_PROMPT"):
        return 0
    if kind not in PROMPTS:
        raise DataError(f"peft_type {kind} is not supported: use {', '.join(PROMPTS)}, or LORA")
    if packed:
        raise DataError(
            f"peft_type {kind} does not go with packing and padding_free: PEFT puts its prompt before a pack, and not "
            "before each of its rows. Turn both off, or use LORA."
        )
    return adapter.num_virtual_tokens if PROMPTS[kind] else 0


def _check_labels(dataset: Dataset, name: str, negatives: bool) -> None:
    if "sequence_label" not in dataset.column_names:
        return
    right = [label[0] for label in dataset["sequence_label"]]
    wrong = right.count(False)
    if wrong and not negatives:
        raise DataError(
            f"{name} dataset: {wrong} of {len(dataset)} rows are wrong answers, and negatives is off, so they would be "
            "trained on like right ones. Set negatives to train away from them, or leave them out."
        )
    if not negatives or name != "train":
        return
    if not wrong:
        logger.warning(
            'negatives is on, but no row of the training data has "label": false: this is plain PEAR. Mark wrong '
            "answers in the data, or leave negatives off."
        )
    tokens = {True: 0, False: 0}
    for is_right, mask in zip(right, dataset["completion_mask"], strict=True):
        tokens[is_right] += sum(mask)
    if tokens[False] > WRONG_TO_RIGHT * tokens[True]:
        logger.warning(
            f"negatives: the training data has {tokens[False]} tokens of wrong answers against {tokens[True]} of right "
            f"ones, more than {WRONG_TO_RIGHT} to 1: the student is mostly told what not to say. Add right answers, "
            "leave wrong ones out, or lower negative_lambda."
        )


def _check_blocks(dataset: Dataset, name: str, args: PEARSFTConfig) -> None:
    """The blocks of `load_scored` must be those of the options; a file without any log-ratio is told."""
    if args.weighting != "pear" or "block_ids" not in dataset.column_names:
        return
    if "block_tokens" not in dataset.column_names:
        raise DataError(f"{name} dataset: block_ids without block_tokens; keep the columns that load_scored made")
    found, options = set(dataset.unique("block_tokens")), args.pear_options()
    if others := found - {None, SPANS, (expected := tokens_a_block(options))}:
        raise DataError(
            f"{name} dataset: loaded in blocks of {others.pop()} tokens, but level and block_size ask for {expected}; "
            "load it with pear.scored.load_scored(..., options=args.pear_options())"
        )
    if SPANS in found and options.level == "block" and not options.clip_blocks:
        raise DataError(f"{name} dataset: {spans_at_block_level()}")
    if found == {None}:
        logger.warning(
            f"{name} dataset: no row has a behaviour policy, so every PEAR weight is 1: this is plain SFT. Score the "
            "data by the model that wrote it, or give an estimate by `pear score --fallback MODEL`."
        )


def _check_temperature(dataset: Dataset, name: str, temperature: float) -> None:
    if others := {found for found in dataset["top_k_temperature"] if found != temperature}:
        raise DataError(
            f"{name} dataset: top-k log-probs at top_k_temperature = {', '.join(f'{t:g}' for t in sorted(others))}, "
            f"but distill_temperature = {temperature:g}: the two must be the same"
        )


def _within(dataset: Dataset, name: str, max_length: int, args: PEARSFTConfig) -> Dataset:
    lengths = [len(ids) for ids in dataset["input_ids"]]
    long = [i for i, length in enumerate(lengths) if length > max_length]
    if not long:
        return dataset
    where = f"{name} dataset"
    check_long_rows(where, long, len(lengths), max_length, drop=args.drop_long_rows, strict=args.strict_length)
    logger.warning(f"{where}: left out {len(long)} of {len(lengths)} rows, {too_long(long, max_length)}")
    return dataset.select([i for i, length in enumerate(lengths) if length <= max_length])


def _labels(input_ids: np.ndarray, completion_mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"labels": np.where(completion_mask == 1, input_ids, IGNORE)}
