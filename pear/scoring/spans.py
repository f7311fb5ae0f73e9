"""Which bytes of the completion each of its tokens stands for: each process makes those of its part of the rows.

They need the texts, so the data is read once more, when everything is scored; the main process then only writes.
"""

import hashlib
import json
import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.io import read_jsonl
from pear.rows import prompt_and_completion
from pear.scoring.processes import Processes
from pear.scoring.rows import Plan, Row, scored_places, without_nulls
from pear.scoring.side import SideFiles, SpansOf

KEPT_AT_ONCE = 64  # rows


def make_spans(data: str | os.PathLike, plan: Plan, sides: dict[str, SideFiles], processes: Processes) -> None:
    """Append this process's part of the spans that are not there yet to its side files."""
    places, mine = scored_places(plan), set()
    for side in sides.values():
        mine.update(side.without_spans()[processes.rank :: processes.count])
    if not mine:
        return
    found: dict[str, dict[int, SpansOf]] = {name: {} for name in sides}
    for line, row in read_jsonl(data):
        if line in mine:
            row = prompt_and_completion(without_nulls(row), f"{data}:{line}", plan.all_turns)
            share, tokens = places[line]
            of_policy = found[share.policy.name]
            of_policy[line] = spans_of_row(row, tokens, share.policy.tokenizer)
            if len(of_policy) == KEPT_AT_ONCE:
                sides[share.policy.name].append_spans(of_policy)
                of_policy.clear()
    for name, of_policy in found.items():
        sides[name].append_spans(of_policy)


def spans_of_row(row: dict[str, Any], tokens: Row, tokenizer: PreTrainedTokenizerBase) -> SpansOf:
    """`behavior_spans` of a row with `prompt` and `completion`, or why there are none."""
    from pear.align import Unaligned, spans_of

    try:
        spans = spans_of(row, tokens.tokenized, tokenizer).to_json()
    except Unaligned as problem:
        spans = {"problem": str(problem)}
    return SpansOf(text_hash(row), spans)


def text_hash(row: dict[str, Any]) -> str:
    """Of what spans depend on."""
    text = [row.get(key) for key in ("prompt", "completion", "tools", "chat_template_kwargs")]
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:16]
