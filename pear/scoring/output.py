"""The scored file: the data read once more, each row with its scores and its seal. Texts were not kept meanwhile."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pear.io import DataError, atomic_writer, read_jsonl
from pear.rows import prompt_and_completion
from pear.scored_rows import is_cut
from pear.scoring.batches import Scores
from pear.scoring.choice import NONE
from pear.scoring.policies import Policy
from pear.scoring.rows import Plan, Row, line_for_hash, scored_places, without_nulls
from pear.scoring.side import SideFiles
from pear.scoring.spans import spans_of_row, text_hash
from pear.seal import seal

MODEL_OF = {"behavior_logprobs": "model", "ref_logprobs": "ref_model"}  # the key that names whose log-probs they are


@dataclass
class Written:
    """What the file holds."""

    policies: Counter[str] = field(default_factory=Counter)  # rows of each behaviour policy
    estimated: int = 0
    tokens: int = 0  # scored now
    total: float = 0.0  # of their log-probs
    unaligned: dict[int, str] = field(default_factory=dict)  # line of the data -> why text and tokens do not match


def write_out(
    out: str | os.PathLike,
    data: str | os.PathLike,
    plan: Plan,
    sides: Mapping[str, SideFiles],
    column: str,
    beside_top_k: dict[str, Any],
) -> Written:
    """Write `out`, whole or not at all.

    Args:
        sides: of each policy, by name.
        beside_top_k: what tells of whom and at what the top-k are; empty without them.

    Raises:
        DataError: the data changed since `plan` was made of it.
    """
    places = scored_places(plan)
    written, digest = Written(), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        readers = {name: stack.enter_context(side.reader()) for name, side in sides.items()}
        target = stack.enter_context(atomic_writer(out))
        for line, row in read_jsonl(data):
            digest.update(line_for_hash(line, row))
            if line in plan.too_long:
                continue
            row = prompt_and_completion(without_nulls(row), f"{data}:{line}", plan.all_turns)
            if line in places:
                share, tokens = places[line]
                reader = readers[share.policy.name]
                scores = reader.scores(line)
                spans = None
                if column == "behavior_logprobs":
                    spans = reader.spans(line)
                    if spans is None or spans.text != text_hash(row):  # the data changed and changed back
                        spans = spans_of_row(row, tokens, share.policy.tokenizer)
                    if "problem" in spans.spans:
                        written.unaligned[line] = spans.spans["problem"]
                cut = {"cut": True} if is_cut(row) else {}  # of who wrote it, so it stays
                row = _scored(row, tokens, scores, share.policy, column, beside_top_k)
                if spans is not None:
                    row["behavior_spans"] = spans.spans | cut
                written.tokens += len(scores.logprobs)
                written.total += float(scores.logprobs.sum(dtype=np.float64))
            elif line in plan.none:
                row = row | {"behavior_policy": NONE}
            if (policy := row.get("behavior_policy")) is not None:
                written.policies[policy] += 1
            written.estimated += row.get("behavior_estimated") is True
            target.write(json.dumps(seal(row), ensure_ascii=False) + "\n")
        if digest.hexdigest() != plan.hash:
            raise DataError(f"{data}: the file changed while it was being scored; nothing was written. Score it again.")
    return written


def _scored(
    row: dict[str, Any], tokens: Row, scores: Scores, policy: Policy, column: str, beside_top_k: dict[str, Any]
) -> dict[str, Any]:
    tokenized = tokens.tokenized
    scored = row | {"input_ids": tokenized.input_ids, "completion_mask": tokenized.completion_mask}
    scored["tokenizer"] = policy.fingerprint
    if column != "behavior_logprobs" and "input_ids" in row:  # the behaviour policy's words for the same tokens
        scored |= {key: row[key] for key in ("input_ids", "completion_mask", "tokenizer") if key in row}
    if column != "none":
        scored |= {column: _spread(floats(scores.logprobs), tokens.mask, 0.0), MODEL_OF[column]: policy.name}
    if column == "behavior_logprobs":
        scored["behavior_policy"] = policy.name
        scored.pop("behavior_estimated", None)
        if tokens.estimated:
            scored["behavior_estimated"] = True
    if beside_top_k:
        scored |= {
            "top_k_ids": _spread(scores.top_k_ids.tolist(), tokens.mask, []),
            "top_k_logprobs": _spread(floats(scores.top_k_logprobs), tokens.mask, []),
            **beside_top_k,
        }
    return scored


def _spread(values: list, mask: np.ndarray, elsewhere: Any) -> list:
    """(C,) -> (L,): the values at the tokens with mask 1."""
    found = iter(values)
    return [next(found) if bit else elsewhere for bit in mask.tolist()]


def floats(values: np.ndarray) -> list:
    """float32 values, in an array of any shape, as the shortest decimal numbers that read back the same."""
    values = values + np.float32(0)  # turns -0.0 into 0.0
    found = np.full(values.shape, np.nan)
    for decimals in range(9, -1, -1):  # rounding whole arrays takes a tenth of the time of str() of every number
        rounded = np.rint(values.astype(np.float64) * 10.0**decimals) / 10.0**decimals
        found = np.where(rounded.astype(np.float32) == values, rounded, found)
    rest = np.isnan(found)  # so small that they need more decimals
    found[rest] = [float(str(v)) for v in values[rest]]
    return found.tolist()
