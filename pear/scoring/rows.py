"""The data read once before anything is scored: tokens, which model scores what, and whatever may be wrong."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from pear.io import LOGPROB_COLUMNS, TOP_K_COLUMNS, DataError, check_label, check_scored_row, check_writable, read_jsonl
from pear.notes import Notes
from pear.rows import TokenizedRow, check_same_tokens, is_bare_text, prompt_and_completion, tokenize_row
from pear.scored_rows import is_cut
from pear.scoring.choice import NONE, Choice, behavior_choice, has_byte_logprobs
from pear.scoring.policies import Policy
from pear.seal import SEALED, check_seal


class Row(NamedTuple):
    line: int
    input_ids: np.ndarray  # (L,) int32
    mask: np.ndarray  # (L,) bool: the C tokens with a log-prob, those of the completion that the policy wrote
    prompt_cut: int
    estimated: bool  # by a policy that did not write it

    @property
    def tokenized(self) -> TokenizedRow:
        return TokenizedRow(self.input_ids.tolist(), self.mask.astype(int).tolist(), self.prompt_cut)


@dataclass
class Share:
    """What one policy has to score."""

    policy: Policy
    rows: list[Row] = field(default_factory=list)


@dataclass
class Plan:
    """What becomes of each row of the data. Of the texts nothing is kept."""

    hash: str  # of the data
    shares: list[Share]
    none: set[int]  # lines of nobody's words
    passed: set[int]  # lines that keep the log-probs they have
    too_long: dict[int, int]  # line -> the limit of its model
    text: int = 0  # rows of text to score by a model whose tokenizer has a chat template
    all_turns: bool = False  # the completion of `messages` has all turns of the assistant's
    notes: Notes = field(default_factory=Notes)

    @property
    def written(self) -> int:
        return sum(len(share.rows) for share in self.shares) + len(self.none) + len(self.passed)


def read_plan(
    data: str | os.PathLike,
    policy: Policy | None,
    fallback: str | None,
    column: str,
    replaced: tuple[str, ...],
    open_policy: Callable[[str], Policy],
    all_turns: bool = False,
) -> Plan:
    """Read every row, tokenise those that are to be scored, and find all errors, before the hours of scoring.

    Args:
        policy: scores every row, but for those of nobody where `column` is "behavior_logprobs". None: each row's own
            does, from `open_policy`.
        replaced: columns that will be written, so that what rows have there does not matter.
        all_turns: see `prompt_and_completion`.

    Raises:
        DataError: a row that cannot be scored, was edited after it was scored before, or contradicts itself; rows that
            name no policy, without `fallback`.
    """
    shares = {} if policy is None else {policy.name: Share(policy)}
    plan = Plan("", [], set(), set(), {}, all_turns=all_turns)
    unnamed: list[int] = []
    digest = hashlib.sha256()
    for line, row in read_jsonl(data):
        where = f"{data}:{line}"
        digest.update(line_for_hash(line, row))
        if row.get("scored") is not None:
            check_seal(row, where)
        check_writable(row, where)
        row = without_nulls(row)
        plan.notes.add_earlier(line, row, all_turns)
        row = prompt_and_completion(row, where, all_turns)
        check_label(row, where)
        choice = _choose(row, where, policy, fallback, column)
        if choice is None:
            unnamed.append(line)
        elif choice.what == "score":
            if choice.policy not in shares:
                try:
                    shares[choice.policy] = Share(open_policy(choice.policy))
                except (OSError, ValueError) as error:
                    raise DataError(f"{where}: model {choice.policy!r} cannot be loaded: {error}") from error
            _add(row, where, line, shares[choice.policy], choice, replaced, plan)
        else:
            if any(key in row for key in (*LOGPROB_COLUMNS, *TOP_K_COLUMNS)):
                check_scored_row(row, where, needs=())
            (plan.none if choice.what == "none" else plan.passed).add(line)
    if unnamed:
        raise DataError(_unnamed_message(data, unnamed))
    plan.hash, plan.shares = digest.hexdigest(), [share for share in shares.values() if share.rows]
    return plan


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that are there in name only, as `datasets` fills them in where rows have unlike keys."""
    return {key: value for key, value in row.items() if value is not None or key not in SEALED}


def line_for_hash(line: int, row: dict[str, Any]) -> bytes:
    return f"{line} {json.dumps(row, sort_keys=True)}\n".encode()


def scored_places(plan: Plan) -> dict[int, tuple[Share, Row]]:
    """Where the rows of these lines are."""
    return {row.line: (share, row) for share in plan.shares for row in share.rows}


def all_rows(plan: Plan) -> Iterator[Row]:
    for share in plan.shares:
        yield from share.rows


def _choose(row: dict[str, Any], where: str, policy: Policy | None, fallback: str | None, column: str) -> Choice | None:
    if column == "behavior_logprobs":
        return behavior_choice(row, where, None if policy is None else policy.name, fallback)
    if has_byte_logprobs(row):
        raise DataError(
            f"{where}: the behaviour log-probs are of bytes (`behavior_spans`), and {column!r} writes those of tokens "
            "beside them, which would be taken for the behaviour policy's. Leave such rows out."
        )
    return Choice("score", policy.name)


def _add(
    row: dict[str, Any],
    where: str,
    line: int,
    share: Share,
    choice: Choice,
    replaced: tuple[str, ...],
    plan: Plan,
) -> None:
    tokenizer = share.policy.tokenizer
    tokenized = _sealed_tokens(row, share.policy, where, replaced) or _own_tokens(row, share.policy, where)
    share.policy.check_ids(tokenized.input_ids, where)
    _check_what_stays(row, tokenized, tokenizer, where, replaced)
    limit = share.policy.max_length
    if limit is not None and len(tokenized.input_ids) > limit:
        plan.too_long[line] = limit
        return
    plan.text += is_bare_text(row, tokenizer)
    plan.notes.add(line, tokenized.notes, tokenized.completion_mask)
    ids, mask = np.array(tokenized.input_ids, dtype=np.int32), np.array(tokenized.completion_mask, dtype=bool)
    share.rows.append(Row(line, ids, mask, tokenized.prompt_cut, choice.estimated))


def _sealed_tokens(row: dict[str, Any], policy: Policy, where: str, replaced: tuple[str, ...]) -> TokenizedRow | None:
    """The tokens that a row keeps, if the seal says whose they are, and they are this tokenizer's: as they were drawn.

    `pear import` writes rows that the tokenizer would cut otherwise: without an end of turn where the policy was
    stopped, or without the line end that a template puts behind it.
    """
    if "behavior_logprobs" in replaced or row.get("scored") is None or row.get("tokenizer") != policy.fingerprint:
        return None
    tokens = {key: row[key] for key in ("input_ids", "completion_mask") if key in row}
    if len(tokens) < 2:
        return None
    check_scored_row(tokens, where, needs=())
    return TokenizedRow(row["input_ids"], [int(bit) for bit in row["completion_mask"]], 0)


def _own_tokens(row: dict[str, Any], policy: Policy, where: str) -> TokenizedRow:
    """What the tokenizer makes of a row, without the end of turn where it is known that the policy was cut off."""
    if not is_cut(row):
        return tokenize_row(row, policy.tokenizer, where)
    keys = ("prompt", "completion", "tools", "chat_template_kwargs", "behavior_spans")
    return policy.reader.tokens({key: row[key] for key in keys if key in row}, where, ())[0]


def _check_what_stays(
    row: dict[str, Any],
    tokenized: TokenizedRow,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    replaced: tuple[str, ...],
) -> None:
    """Token columns that a row keeps must be whole and about the very tokens that are scored now."""
    stays = {key: value for key, value in row.items() if key not in replaced}
    token_columns = (*LOGPROB_COLUMNS, *TOP_K_COLUMNS)
    if "behavior_logprobs" not in replaced:
        token_columns += ("input_ids", "completion_mask")  # what is written goes beside them
    if any(key in stays for key in token_columns):
        check_scored_row(stays, where, needs=())
        check_same_tokens(stays, tokenized, tokenizer, where, whose="this model")


def _unnamed_message(data: str | os.PathLike, lines: list[int]) -> str:
    return (
        f"{data}: {len(lines)} rows name no behaviour policy ({some_lines(lines)}), and no model is given. Give "
        "--model if one model wrote them all; or say what they are: --fallback none for text that no model wrote "
        f'(each of its tokens has weight 1; `"behavior_policy": "{NONE}"` in a row says so too), or --fallback MODEL '
        "to have their log-probs estimated by a model that did not write them."
    )


def some_lines(lines: list[int]) -> str:
    return "lines " + ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
