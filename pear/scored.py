"""Rows that `pear score` or `pear import` wrote, as a dataset for training: checked, and in the student's tokens."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from pear.align import ROLES, Roles
from pear.io import LOGPROB_COLUMNS, TOP_K_COLUMNS, DataError, check_writable, read_jsonl
from pear.models import check_ids, vocabulary_fingerprint
from pear.rows import TokenizedRow
from pear.scored_rows import (
    NO_RATIO,
    Behavior,
    Reader,
    check_kind,
    is_byte_row,
    is_raw,
    no_behavior,
    own_blocks,
    tokens_a_block,
    without_nulls,
)
from pear.scored_summary import Found
from pear.scored_top_k import check_top_k, check_top_k_vocabulary
from pear.seal import check_seal
from pear_kernels.options import DEFAULTS, PEAROptions

COLUMNS = ("input_ids", "completion_mask", "behavior_logprobs")  # what every objective needs
# What comes with them where a row has another tokenizer, or no behaviour policy: the block of each token, and how they
# were cut: tokens a block, SPANS where the blocks are spans of another tokenizer, null without a behaviour policy.
BLOCK_COLUMNS = ("block_ids", "block_tokens")
SPANS = 0
FEATURES = {  # of L tokens; the lists of K are empty at prompts
    "input_ids": ListOf(Value("int32")),
    "completion_mask": ListOf(Value("int8")),
    "behavior_logprobs": ListOf(Value("float32")),
    "block_ids": ListOf(Value("int32")),
    "block_tokens": Value("int64"),
    "ref_logprobs": ListOf(Value("float32")),
    "sequence_label": ListOf(Value("bool")),  # one answer, L times, so that packs can carry it
    "top_k_ids": ListOf(ListOf(Value("int32"))),
    "top_k_logprobs": ListOf(ListOf(Value("float32"))),
    "top_k_temperature": Value("float64"),
    "top_k_vocabulary": Value("int64"),  # null where the row does not tell, or tells its tokenizer, which is enough
}
# How a column comes into a file, {file} and {temperature} to be filled in.
WRITTEN_BY = {
    "ref_logprobs": "`pear score --column ref_logprobs --model <initial student> --data {file} --out {file}` writes it"
    "; or, with weighting asft, pass --teacher <initial student>, which is held in memory",
    "top_k_ids": "`pear score --column none --top_k K --top_k_temperature {temperature:g} --model <teacher> --data "
    "{file} --out {file}` writes it, and every log-prob stays as it is; or pass --teacher, which is held in memory",
}
UNALIGNED = ("error", "skip")


def load_scored(
    path: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    strict: bool = False,
    drop_long_rows: bool = False,
    needs_behavior: bool = True,
    columns: Sequence[str] = (),
    temperature: float = 1.0,
    head_size: int | None = None,
    options: PEAROptions = DEFAULTS,
    unaligned: str = "error",
    roles: Roles = ROLES,
    found: Found | None = None,
    model: str = "",
    vocabulary_size: int | None = None,
    all_turns: bool = False,
    unchanged: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """Rows of `pear score` and `pear import`, checked, as a dataset with the COLUMNS, in tokens of the student.

    `columns` are further keys of FEATURES that the objective needs (`PEARSFTConfig.more_columns`), of these the top-k
    ones at `temperature`, of a teacher with the student's vocabulary; where the two differ, the message names the
    `head_size` of the student, if given. Rows with `"label": false` are wrong answers: only with `sequence_label` among
    the columns are they no error.

    A log-prob belongs to a token where the student's `tokenizer` makes the very ids that were scored: true if its
    fingerprint is the stored one, else each row's text is tokenised again and compared. Rows of other tokens, and those
    of servers that tell no ids, are aligned by bytes (`pear.align`; `roles` are its rule for structural tokens): the
    sum of each common span stands at its first token. Rows without a behaviour policy have no log-ratio. If there is a
    row of one of these kinds, the dataset has the BLOCK_COLUMNS too, with blocks by the level and block_size of
    `options` (`PEARSFTConfig.pear_options`) in rows of the student's own tokens, by spans in aligned ones, and -1 at
    tokens without a log-ratio. Which rows are of which kind is logged.

    Without `needs_behavior` (`PEARSFTConfig.needs_behavior`: whether the objective uses a behaviour policy's log-probs)
    rows that were never scored are taken too, in the tokens that `pear score` would write, and no row has to be
    aligned.

    Rows longer than `max_length` are counted, logged with their line numbers and left out; none is ever cut. More than
    1 % of such rows are an error without `drop_long_rows`; with `strict` a single one is. Rows that cannot be aligned
    are an error, or with `unaligned="skip"` left out likewise. `found` receives the counts.
    `vocabulary_size` is how many ids the student (`model`, for messages) has embeddings for, if known. `all_turns`
    (`--assistant_only_loss`): of raw rows with `messages`, all turns of the assistant's are the completion's.
    `unchanged` is the student's tokenizer before `tokenizer`'s template or EOS was changed: rows scored with it are
    refused.

    Raises:
        DataError: with file and line: a row that is damaged, edited or of an older version, a column that is not
            there, a row that is neither scored nor said to have no behaviour policy, rows that cannot be aligned, and
            columns that are of single tokens, which aligned rows cannot have; ids beyond
            `vocabulary_size`; wrong answers that nobody asked for; no row left.
    """
    if unaligned not in UNALIGNED:
        raise DataError(f"unaligned must be one of {', '.join(UNALIGNED)}, got {unaligned!r}")
    reader = Reader(tokenizer, roles, all_turns=all_turns, unchanged=unchanged if needs_behavior else None)
    vocabulary = vocabulary_fingerprint(tokenizer)
    table: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *columns)}
    needs = tuple(name for name in table if name in (*LOGPROB_COLUMNS, *TOP_K_COLUMNS))
    found, behaviors = Found() if found is None else found, []
    found.weighted, found.all_turns = needs_behavior, all_turns
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        row = without_nulls(row)
        raw = not needs_behavior and is_raw(row)
        if raw:
            check_writable(row, where)  # as `pear score` does: half a surrogate pair has no tokens
            row = {key: value for key, value in row.items() if key not in ("input_ids", "completion_mask")}
        else:
            if needs_behavior:
                check_kind(row, where)
            check_seal(row, where)
        for name, how in WRITTEN_BY.items():
            if name in columns and name not in row and not is_byte_row(row):
                raise DataError(f"{where}: no `{name}`: {how.format(file=path, temperature=temperature)}")
        tokens, own = reader.tokens(row, where, needs)
        check_ids(tokens.input_ids, vocabulary_size, where, model, tokenizer)
        if not own and (names := [name for name in needs if name != "behavior_logprobs"]):
            raise DataError(f"{where}: {_single_tokens_message(names[0])}")
        if "top_k_ids" in columns:
            check_top_k_vocabulary(row, reader.fingerprint, vocabulary, head_size, where)
            check_top_k(row, temperature, table["top_k_ids"], where)
        if max_length is not None and len(tokens.input_ids) > max_length:
            found.too_long.append(line)
            continue
        behavior = reader.behavior(row, where, tokens, own)
        if isinstance(behavior, str) and not needs_behavior:
            behavior = no_behavior(np.array(tokens.completion_mask))
        if isinstance(behavior, str):
            found.unaligned[line] = behavior
            continue
        found.add(line, row, behavior, tokens, tokenizer)
        behaviors.append(behavior)
        for name, values in table.items():
            values.append(_read(name, row, tokens, behavior))
    found.check(
        path,
        max_length=max_length,
        strict=strict,
        drop_long_rows=drop_long_rows,
        unaligned=unaligned,
        negatives="sequence_label" in columns,
        block_level=needs_behavior and options.level == "block" and not options.clip_blocks,
    )
    if any(behavior.block_ids is not None for behavior in behaviors):
        masks = table["completion_mask"]
        table["block_ids"] = [
            _block_ids(behavior, mask, options) for behavior, mask in zip(behaviors, masks, strict=True)
        ]
        table["block_tokens"] = [_block_tokens(behavior, options) for behavior in behaviors]
    found.tell(path, max_length)
    return Dataset.from_dict(table, features=Features({name: FEATURES[name] for name in table}))


def _read(name: str, row: dict[str, Any], tokens: TokenizedRow, behavior: Behavior) -> Any:
    """A column of a checked row; nothing but zeros, or lists of nothing, where the mask is 0."""
    mask = np.array(tokens.completion_mask, dtype=np.int8)
    if name == "completion_mask":
        return mask
    if name == "input_ids":
        return np.array(tokens.input_ids, dtype=np.int32)
    if name == "behavior_logprobs":
        return _at_completion(behavior.logprobs, mask, 0)
    if name == "sequence_label":
        return np.full(len(mask), row.get("label", True))
    if name == "top_k_temperature":
        return float(row.get(name, 1.0))
    if name == "top_k_vocabulary":
        return None if "top_k_tokenizer" in row else row.get(name)
    if name in TOP_K_COLUMNS:
        dtype = np.int32 if name == "top_k_ids" else np.float32
        return [np.array(values if bit else [], dtype=dtype) for values, bit in zip(row[name], mask, strict=True)]
    return np.where(mask == 1, np.array(row[name], dtype=np.float64), 0.0).astype(np.float32)


def _block_ids(behavior: Behavior, mask: np.ndarray, options: PEAROptions) -> np.ndarray:
    if behavior.block_ids is None:
        return own_blocks(mask, options)
    return _at_completion(behavior.block_ids, mask, NO_RATIO)


def _block_tokens(behavior: Behavior, options: PEAROptions) -> int | None:
    if behavior.block_ids is None:
        return tokens_a_block(options)
    return SPANS if (behavior.block_ids != NO_RATIO).any() else None


def _at_completion(values: np.ndarray, mask: np.ndarray, elsewhere: float) -> np.ndarray:
    """(C,) -> (L,)."""
    spread = np.full(len(mask), elsewhere, dtype=values.dtype)
    spread[mask == 1] = values
    return spread


def _single_tokens_message(name: str) -> str:
    return (
        f"`{name}` is of single tokens, and this row has other tokens than the student's, or none: log-probs of other "
        "tokens can be aligned as sums, of which this objective has no use. Leave such rows out, or give the model by "
        "--teacher where the objective takes one."
    )
