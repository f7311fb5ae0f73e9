"""One scored row, in the student's tokens: as they were scored, aligned by bytes, or without a behaviour policy.

Three kinds of rows come from `pear score` and `pear import` (docs/scoring.md has every key):

    token rows     ids and a log-prob each, of the behaviour policy's tokenizer
    byte rows      log-probs of pieces of the text, from servers that tell no ids
    without one    `"behavior_policy": "none"`: human text, every weight is 1

Where the student's tokens are the behaviour policy's, a log-prob belongs to a token. Elsewhere it belongs to a span of
bytes at whose ends both have a boundary (`pear.align`), and spans are the blocks of the weights.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from pear.align import ROLES, Roles, Spans, Unaligned, align, spans_of
from pear.align.contents import contents_of
from pear.align.roles import names_of
from pear.align.spans import JOINT, NO_BYTES
from pear.chat import is_assistant
from pear.io import (
    LOGPROB_COLUMNS,
    MAX_FLOAT32,
    MAX_LOGPROB,
    TOP_K_COLUMNS,
    DataError,
    check_label,
    check_scored_row,
)
from pear.models import tokenizer_fingerprint
from pear.notes import notes_of
from pear.rows import TokenizedRow, check_same_tokens, prompt_and_completion, tokenize_row
from pear_kernels.options import PEAROptions

NO_POLICY = "none"  # as `behavior_policy`
NO_RATIO = -1  # as a token's block: it carries no log-ratio
_NO_LOGPROBS = (
    'no log-probs of a behaviour policy (`behavior_logprobs`), and no `"behavior_policy": "none"` that says there is '
    "none. Score the rows first: `pear score --model <the model that wrote them> --data {file} --out scored.jsonl`; "
    "or, where nobody knows that model, with `--fallback none` (human text: each of its tokens has weight 1) or "
    "`--fallback MODEL` (that model's estimate) in its place. `pear sft --weighting none` and `dft` take rows without "
    "scores"
)


class Behavior(NamedTuple):
    """What a behaviour policy says of the C completion tokens of the student."""

    logprobs: np.ndarray  # (C,) float32; a span's sum at its first token, 0 at its others and where there is no ratio
    block_ids: np.ndarray | None  # (C,) int32, NO_RATIO where there is none; None: a log-prob a token, cut by the level


def no_behavior(mask: np.ndarray) -> Behavior:
    """Of a row without a log-ratio."""
    count = int(mask.sum())
    return Behavior(np.zeros(count, np.float32), np.full(count, NO_RATIO, np.int32))


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the `null`s that `datasets` fills in for keys that other rows have."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in ("behavior_spans", "behavior_sampling"):
        if isinstance(row.get(key), dict):
            row[key] = {name: value for name, value in row[key].items() if value is not None}
    marks = row.get("behavior_spans", {})
    if isinstance(marks, dict) and isinstance(marks.get("marks"), dict):
        row["behavior_spans"]["marks"] = {at: role for at, role in marks["marks"].items() if role is not None}
    return row


def has_policy(row: dict[str, Any]) -> bool:
    return row.get("behavior_policy") != NO_POLICY


def is_byte_row(row: dict[str, Any]) -> bool:
    spans = row.get("behavior_spans")
    return has_policy(row) and "input_ids" not in row and isinstance(spans, dict) and "logprobs" in spans


def has_logprobs(row: dict[str, Any]) -> bool:
    """Whether there are log-probs of a behaviour policy."""
    return has_policy(row) and ("behavior_logprobs" in row or is_byte_row(row))


def is_raw(row: dict[str, Any]) -> bool:
    """Whether nothing was ever scored or imported in this row."""
    scores = ("scored", *LOGPROB_COLUMNS, *TOP_K_COLUMNS, "behavior_spans")
    return not any(row.get(key) is not None for key in scores)


def is_cut(row: dict[str, Any]) -> bool:
    """Whether the policy was stopped at the text's end, by a limit of tokens say, and did not end there itself."""
    spans = row.get("behavior_spans")
    return has_policy(row) and isinstance(spans, dict) and spans.get("cut") is True


def check_kind(row: dict[str, Any], where: str) -> None:
    """Raise unless the row is one of the three kinds that a file for training holds."""
    if has_policy(row) and not has_logprobs(row):
        said = _NO_LOGPROBS.format(file=where.rpartition(":")[0])
        raise DataError(f"{where}: {said}. Keys found: {sorted(row)}")


def tokens_a_block(options: PEAROptions) -> int:
    """Of rows in the student's own tokens. One at level "sequence" too, where blocks are but what is clipped."""
    return options.block_size if options.level == "block" else 1


def own_blocks(mask: np.ndarray, options: PEAROptions) -> np.ndarray:
    """(L,) int32: the block of each completion token; NO_RATIO elsewhere."""
    place = np.cumsum(mask, dtype=np.int64) - 1
    return np.where(mask == 1, place // tokens_a_block(options), NO_RATIO).astype(np.int32)


class Reader:
    """Rows as the student with this tokenizer sees them; `roles` say which structural tokens mean the same."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        roles: Roles = ROLES,
        *,
        all_turns: bool = False,
        unchanged: PreTrainedTokenizerBase | None = None,
    ):
        """`all_turns`: see `prompt_and_completion`, of rows that were never scored. `unchanged`: the tokenizer before
        options changed it (`pear.tokenizer_options`); rows of whose tokens are refused, unless the change leaves them.
        """
        self.tokenizer = tokenizer
        self.all_turns = all_turns
        self._unchanged = None if unchanged is None else tokenizer_fingerprint(unchanged)
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.roles = roles
        self._names = names_of(roles)

    def tokens(self, row: dict[str, Any], where: str, needs: tuple[str, ...]) -> tuple[TokenizedRow, bool]:
        """The student's tokens of a row, and whether the row's columns (checked: `needs`) are of these very tokens.

        Raises:
            DataError: damaged columns, or no text to make tokens of.
        """
        if "input_ids" in row or "behavior_logprobs" in row:
            needs = needs if has_logprobs(row) else tuple(name for name in needs if name != "behavior_logprobs")
            check_scored_row(row, where, needs)
            stored = TokenizedRow(row["input_ids"], [int(bit) for bit in row["completion_mask"]], 0)
            if row.get("tokenizer") == self.fingerprint:
                if "prompt" in row and "completion" in row:
                    chat = prompt_and_completion(row, where)
                    self._check_others(chat, stored, where)
                    stored = stored._replace(notes=notes_of(chat, stored.input_ids, self.tokenizer, where))
                return stored, True
            if "prompt" not in row or "completion" not in row:
                raise DataError(
                    f"{where}: scored with another tokenizer than the student's (fingerprint "
                    f"{row.get('tokenizer')!r}), and the row has no `prompt` and `completion` to compare the ids by. "
                    "Score the data again, from rows that have them."
                )
            own = self._own(row, where)
            same = stored.input_ids == own.input_ids and stored.completion_mask == own.completion_mask
            if not same and row.get("tokenizer") == self._unchanged:
                raise DataError(
                    f"{where}: scored with the model's own chat template and EOS, and --chat_template_path or "
                    "--eos_token makes other tokens of the row. Score the data again with the same option (`pear "
                    "score` has it), or leave it out."
                )
            return own, same
        check_label(row, where)
        return self._own(row, where), False

    def _check_others(self, row: dict[str, Any], stored: TokenizedRow, where: str) -> None:
        """Raise where what others say in a completion counts, as older versions scored it."""
        completion, mask = row["completion"], stored.completion_mask
        if isinstance(completion, str) or all(map(is_assistant, completion)) or 0 in mask[mask.index(1) :]:
            return
        if 0 in (own := tokenize_row(row, self.tokenizer, where).completion_mask)[own.index(1) :]:
            raise DataError(
                f"{where}: an older version scored this row: in `completion_mask` what a tool or the user says in the "
                "completion counts as the policy's. Score the row again, without its `scored`, or import it again."
            )

    def _own(self, row: dict[str, Any], where: str) -> TokenizedRow:
        row = prompt_and_completion(row, where, self.all_turns)
        own = tokenize_row(row, self.tokenizer, where)
        return self._without_end(row, own) if is_cut(row) else own

    def _without_end(self, row: dict[str, Any], own: TokenizedRow) -> TokenizedRow:
        """Up to the text's last token: where a policy was cut off, an end of turn is nothing that it wrote."""
        try:
            spans = spans_of(row, own, self.tokenizer, self.roles)
        except Unaligned:  # `behavior` will say so
            return own
        parts = (i for i in spans.marks if spans.marks[i].startswith((NO_BYTES, JOINT)))
        last = max((*parts, *(i for i, (b, e) in enumerate(spans.extents) if e > b)), default=-1)
        if last < 0:
            return own
        end = [t for t, bit in enumerate(own.completion_mask) if bit][last] + 1
        return own._replace(input_ids=own.input_ids[:end], completion_mask=own.completion_mask[:end])

    def behavior(self, row: dict[str, Any], where: str, tokens: TokenizedRow, own: bool) -> Behavior | str:
        """The behaviour policy's log-probs on the student's `tokens`; or, in words, why they cannot be aligned.

        Raises:
            DataError: damaged spans; or ids of another tokenizer without spans.
        """
        mask = np.array(tokens.completion_mask, dtype=bool)
        if not has_logprobs(row):
            return no_behavior(mask)
        if own:
            return Behavior(np.array(row["behavior_logprobs"], dtype=np.float64)[mask].astype(np.float32), None)
        if "behavior_spans" not in row:
            check_same_tokens(row, tokens, self.tokenizer, where, whose="the student")  # raises: they are not
        return self._aligned(row, where, tokens)

    def _aligned(self, row: dict[str, Any], where: str, tokens: TokenizedRow) -> Behavior | str:
        row = prompt_and_completion(row, where)
        try:
            behavior = Spans.from_json(row["behavior_spans"], where)
            logprobs = _logprobs(row, where)
            if len(logprobs) != len(behavior.extents):  # one log-prob at least, so one extent
                raise DataError(
                    f"{where}: `behavior_spans` has {len(behavior.extents)} entries for {len(logprobs)} log-probs. "
                    "Score or import the row again."
                )
            student = spans_of(row, tokens, self.tokenizer, self.roles)
            _check_within(behavior, row["completion"])
            alignment = align(student, self._renamed(behavior), logprobs, self.roles)
        except Unaligned as reason:
            return str(reason)
        block_ids = alignment.block_ids
        if not (block_ids != NO_RATIO).any():
            return "the two tokenisations have no span of text in common"
        # each may exceed zero by rounding, so their sums may by more
        return Behavior(np.minimum(alignment.behavior_logprobs, MAX_LOGPROB).astype(np.float32), block_ids)

    def _renamed(self, spans: Spans) -> Spans:
        """Marks that were written as surfaces, by the roles there are now."""
        return replace(spans, marks={i: self._names.get(mark, mark) for i, mark in spans.marks.items()})


def _check_within(spans: Spans, completion: str | list[dict[str, Any]]) -> None:
    text = completion if isinstance(completion, str) else "".join(contents_of(completion))
    size, end = len(text.encode("utf-8", "surrogatepass")), spans.extents[-1][1]
    if end > size:
        raise Unaligned(f"its spans go up to byte {end} of a text of {size}: they are of another text")


def _logprobs(row: dict[str, Any], where: str) -> list[float]:
    """(C',) of the behaviour policy's own tokens: checked in token rows, and checked here in byte rows."""
    if not is_byte_row(row):
        return [value for value, bit in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if bit]
    logprobs = row["behavior_spans"]["logprobs"]
    if not isinstance(logprobs, list) or not logprobs:
        raise DataError(
            f"{where}: `behavior_spans.logprobs` must be a list of log-probs, got {logprobs!r:.100}. Import the row "
            "again."
        )
    for i, value in enumerate(logprobs):
        if type(value) not in (int, float) or not -MAX_FLOAT32 <= value <= MAX_LOGPROB:  # False for NaN too
            raise DataError(
                f"{where}: `behavior_spans.logprobs[{i}]` is {value!r:.100}; a log-prob is finite and at most 0. "
                "Import the row again."
            )
    return logprobs
