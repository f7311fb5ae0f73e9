"""Datasets that are streamed (`datasets.IterableDataset`): rows of `load_scored`, checked and prepared as they come."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from trl.data_utils import pack_dataset

from pear.fused_head import IGNORE
from pear.io import DataError
from pear.scored import BLOCK_COLUMNS, COLUMNS, SPANS
from pear.scored_rows import tokens_a_block
from pear.scored_summary import spans_at_block_level
from pear.sft_config import PEARSFTConfig

ONCE = ("top_k_temperature", "top_k_vocabulary", "block_tokens")  # one value a row, which training does not look at


@dataclass
class Limits:
    """What rows must keep to, as far as it is known: the model is loaded after the datasets are prepared."""

    positions: int | None = None
    ids: int | None = None
    head: int | None = None

    def of_model(self, ids: int, head: int) -> None:
        self.ids, self.head = ids, head


def check_datasets(train: Any, evaluation: Any, args: PEARSFTConfig) -> None:
    """Raise, before anything is loaded, for datasets that the trainer cannot read."""
    sets = {"train": train} if train is not None else {}
    if isinstance(evaluation, dict):
        sets |= {f"eval {name!r}": dataset for name, dataset in evaluation.items()}
    elif evaluation is not None:
        sets["eval"] = evaluation
    for name, dataset in sets.items():
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise DataError(
                f"{name} dataset: expected load_scored's Dataset or a datasets.IterableDataset of its columns, got "
                f"{type(dataset).__name__}"
            )
        if next(iter(dataset), None) is None:
            raise DataError(f"{name} dataset: no row")
        packing = args.packing if name == "train" or args.eval_packing is None else args.eval_packing
        if isinstance(dataset, IterableDataset) and packing and args.max_length is None:
            raise DataError(f"{name} dataset: packing a stream needs max_length, the tokens of a pack; got None")
    if isinstance(train, IterableDataset) and args.max_steps <= 0:
        raise DataError(
            f"train dataset: a stream has no length, so max_steps must say when to stop; got {args.max_steps}"
        )


def check_best_metric(args: PEARSFTConfig, evaluation: Any, figures: Sequence[str], computed: bool) -> None:
    """Raise where no evaluation will have the figure that is to choose a checkpoint, which would show after the first.

    `figures` are those that are ours; with `computed` there are more, of `compute_metrics`.
    """
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    metric = metric.removeprefix("eval_")
    prefixes = [f"{name}_" for name in evaluation] if isinstance(evaluation, dict) else [""]
    known = [prefix + figure for prefix in prefixes for figure in figures]
    timed = ("runtime", "samples_per_second", "steps_per_second")
    if metric in known or metric.endswith(timed) or (computed and metric.startswith(tuple(prefixes))):
        return
    raise DataError(
        f"metric_for_best_model = {metric!r} is no figure of the evaluation"
        + (" (of several datasets, each figure has the dataset's name before it)" if prefixes != [""] else "")
        + f": it is one of {', '.join(known)}"
    )


def prepare_stream(
    dataset: IterableDataset,
    name: str,
    args: PEARSFTConfig,
    max_length: int | None,
    columns: Sequence[str],
    packing: bool,
    limits: Limits,
) -> tuple[IterableDataset, tuple[str, ...]]:
    """`sft_data.prepare` of a stream, and the columns of its rows. Errors come with the row that is at fault.

    A row longer than `max_length` is an error, or with `drop_long_rows` left out: a share of all rows, as of a file,
    is not known. Shuffling and packing are those of `datasets` and TRL, within a buffer.
    """
    first = next(iter(dataset), None)
    if first is None:  # of `predict`
        raise DataError(f"{name} dataset: no row")
    if "labels" in first and "behavior_logprobs" in first:
        return dataset, tuple(first)  # prepared before
    wanted = [*COLUMNS, *columns, *(column for column in BLOCK_COLUMNS if column in first)]
    if missing := [column for column in wanted if column not in first]:
        raise DataError(
            f"{name} dataset: no column {', '.join(missing)}; stream rows of pear.scored.load_scored(..., "
            f"columns=args.more_columns()). Columns found: {', '.join(first)}"
        )
    if args.weighting == "pear" and "block_ids" in first and "block_tokens" not in first:
        raise DataError(f"{name} dataset: block_ids without block_tokens; keep the columns that load_scored made")
    kept = ("labels", *(column for column in wanted if column not in (*ONCE, "completion_mask")))
    check = _Row(name, args, max_length, tuple(wanted), limits)
    prepared = dataset.map(check, with_indices=True, remove_columns=[column for column in first if column not in kept])
    if max_length is not None and args.drop_long_rows:
        prepared = prepared.filter(check.fits)
    if packing:
        if args.shuffle_dataset:
            prepared = prepared.shuffle(seed=args.seed)
        prepared = pack_dataset(prepared, max_length, "bfd")
    if args.shuffle_dataset:
        prepared = prepared.shuffle(seed=args.seed)
    return prepared, kept


class _Row:
    """Checks a row of a stream and makes its labels."""

    def __init__(
        self, name: str, args: PEARSFTConfig, max_length: int | None, columns: tuple[str, ...], limits: Limits
    ):
        self.name, self.max_length, self.columns, self.limits = name, max_length, columns, limits
        self.drops, self.negatives = args.drop_long_rows, args.negatives
        self.temperature = args.distill_temperature
        options = args.pear_options()
        self.blocks = (None, SPANS, tokens_a_block(options)) if args.weighting == "pear" else None
        self.spans = options.level != "block" or options.clip_blocks

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{self.name} dataset, row {index}"
        if missing := [column for column in self.columns if row.get(column) is None and column not in ONCE]:
            raise DataError(f"{where}: no {', '.join(missing)}, which the first row has or the objective needs")
        ids, mask = np.asarray(row["input_ids"]), np.asarray(row["completion_mask"])
        for column in self.columns:
            if column not in ONCE and len(row[column]) != len(ids):
                raise DataError(f"{where}: {column} has {len(row[column])} values for {len(ids)} tokens")
        if not mask.any():
            raise DataError(f"{where}: completion_mask is 0 at every token, so there is nothing to train on")
        self.check_length(where, len(ids))
        self.check_ids(where, row, int(ids.max()))
        if not self.negatives and not np.all(row.get("sequence_label", True)):
            raise DataError(f"{where}: a wrong answer, and negatives is off; set negatives to train away from it")
        if self.blocks is not None and "block_ids" in self.columns:
            found = row["block_tokens"]
            if found not in self.blocks:
                raise DataError(
                    f"{where}: in blocks of {found} tokens, but level and block_size ask for {self.blocks[-1]}; load "
                    "it with pear.scored.load_scored(..., options=args.pear_options())"
                )
            if found == SPANS and not self.spans:
                raise DataError(f"{where}: {spans_at_block_level()}")
        if "top_k_temperature" in self.columns and row["top_k_temperature"] != self.temperature:
            raise DataError(
                f"{where}: top-k log-probs at top_k_temperature = {row['top_k_temperature']:g}, but "
                f"distill_temperature = {self.temperature:g}: the two must be the same"
            )
        return {"labels": np.where(mask == 1, ids, IGNORE).tolist()}

    def check_length(self, where: str, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            if not self.drops:
                raise DataError(
                    f"{where}: {tokens} tokens, longer than max_length = {self.max_length}; give a larger max_length, "
                    "or drop_long_rows to leave such rows of a stream out"
                )
        elif self.limits.positions is not None and tokens > self.limits.positions:
            raise DataError(
                f"{where}: {tokens} tokens, but the model has positions for {self.limits.positions}; set max_length to "
                "that or less, and drop_long_rows"
            )

    def check_ids(self, where: str, row: dict[str, Any], largest: int) -> None:
        if self.limits.ids is not None and largest >= self.limits.ids:
            raise DataError(f"{where}: token id {largest} is beyond the model, which has {self.limits.ids} tokens")
        head = self.limits.head
        if "top_k_ids" in self.columns and head is not None:
            top = max((int(np.max(ids)) for ids in row["top_k_ids"] if len(ids)), default=-1)
            if top >= head or row.get("top_k_vocabulary") not in (None, head):
                raise DataError(
                    f"{where}: teacher and student must have one vocabulary: top_k_ids go up to {top}, of a vocabulary "
                    f"of {row.get('top_k_vocabulary') or 'unknown size'}; the student's head has {head} tokens"
                )

    def fits(self, row: dict[str, Any]) -> bool:
        return len(row["input_ids"]) <= self.max_length
