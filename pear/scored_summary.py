"""What the rows of a scored file were, in words: which were left out, have no ratio, or one that is in doubt."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.importing.sampling import bias, changed
from pear.io import DataError, line_list
from pear.long_rows import check_long_rows, rows_in_words, too_long
from pear.notes import Notes
from pear.rows import TokenizedRow, bare_text_in_words, is_bare_text, prompt_cut_in_words
from pear.scored_rows import NO_RATIO, Behavior, has_logprobs, is_raw

logger = logging.getLogger("pear.scored")  # not accelerate's, which needs a trainer's state

FEW_SHARED = 0.5  # of a row's tokens with a log-ratio: below it, a warning is due


def _rows(count: int) -> str:
    return f"{count} row" + ("" if count == 1 else "s")


def spans_at_block_level(lines: Sequence[int] = ()) -> str:
    """Why rows with spans need `clip_blocks` at level "block"."""
    which = f" ({line_list(lines)})" if lines else ""
    return (
        f"there are rows of another tokenizer than the student's{which}. Their blocks are spans of bytes, of which the "
        "sum is clipped, while of a block of block_size tokens each token is. Pass --clip_blocks true, by which the "
        "sum of every block is clipped, in all rows; or --level token, where the blocks are single tokens, and spans."
    )


@dataclass
class Found:
    """Line numbers of a file's rows, by what was found of them; only rows that are trained on are told of by `add`."""

    rows: int = 0
    all_turns: bool = False  # --assistant_only_loss
    notes: Notes = field(default_factory=Notes)
    weighted: bool = True  # by log-ratios to a behaviour policy
    text: int = 0  # rows that are neither chats nor rendered by the chat template that there is
    tokenizer: PreTrainedTokenizerBase | None = None
    prompt_cut: list[int] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    unaligned: dict[int, str] = field(default_factory=dict)  # with the reason
    aligned: list[int] = field(default_factory=list)
    few_shared: list[int] = field(default_factory=list)
    no_policy: list[int] = field(default_factory=list)
    estimated: list[int] = field(default_factory=list)
    sampled: Counter[str] = field(default_factory=Counter)  # setting -> rows
    biased: list[int] = field(default_factory=list)  # rows with one of these settings
    bias: Counter[str] = field(default_factory=Counter)  # why -> rows
    tokens: int = 0  # of aligned rows, as the next two
    ratio_tokens: int = 0
    spans: int = 0

    def add(
        self,
        line: int,
        row: dict[str, Any],
        behavior: Behavior,
        tokens: TokenizedRow,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.rows += 1
        self.notes.add(line, tokens.notes, tokens.completion_mask)
        self.notes.add_earlier(line, row, self.all_turns)
        if is_bare_text(row, tokenizer):
            self.text, self.tokenizer = self.text + 1, tokenizer
        if is_raw(row) and tokens.prompt_cut:
            self.prompt_cut.append(line)
        if not row.get("label", True):
            self.wrong.append(line)
        if row.get("behavior_estimated"):
            self.estimated.append(line)
        if why := bias(_told(row.get("behavior_sampling"))):
            self.biased.append(line)
            self.bias.update(why.split("; "))
            self.sampled.update(sampling_in_words(row["behavior_sampling"]))
        if not has_logprobs(row):
            self.no_policy.append(line)
        elif behavior.block_ids is not None and self.weighted:
            self.aligned.append(line)
            with_ratio = int((behavior.block_ids != NO_RATIO).sum())
            self.tokens += len(behavior.block_ids)
            self.ratio_tokens += with_ratio
            self.spans += int(behavior.block_ids.max()) + 1
            if with_ratio < FEW_SHARED * len(behavior.block_ids):
                self.few_shared.append(line)

    def check(
        self,
        path: str | os.PathLike,
        *,
        max_length: int | None,
        strict: bool,
        drop_long_rows: bool,
        unaligned: str,
        negatives: bool,
        block_level: bool,
    ) -> None:
        """Raise for what stops a run; `block_level` where aligned rows would be clipped unlike the others."""
        check_long_rows(str(path), self.too_long, self._all(), max_length or 0, drop=drop_long_rows, strict=strict)
        if self.unaligned and unaligned == "error":
            reasons = [f"line {line}: {reason}" for line, reason in list(self.unaligned.items())[:20]]
            more = len(self.unaligned) - len(reasons)
            raise DataError(
                f"{path}: {len(self.unaligned)} of {self._all()} rows cannot be aligned with the student's tokens. "
                + "; ".join(reasons)
                + (f"; and {more} more" if more else "")
                + ". Pass --unaligned skip to train without them, or score them by a policy of the student's tokenizer."
            )
        if not self.rows:
            limits = [f"within max_length = {max_length}"] if self.too_long else []
            limits += ["that can be aligned with the student's tokens"] if self.unaligned else []
            raise DataError(f"{path}: no row to train on" + "".join(f" {limit}" for limit in limits))
        if self.wrong and not negatives:
            raise DataError(
                f'{path}: {len(self.wrong)} of {self.rows} rows have "label": false ({line_list(self.wrong)}): wrong '
                "answers, which would be trained on like right ones. Pass --negatives to train away from them, or "
                "leave them out of the file."
            )
        if self.aligned and block_level:
            raise DataError(f"{path}: {spans_at_block_level(self.aligned)}")

    def tell(self, path: str | os.PathLike, max_length: int | None) -> None:
        """Log what one may not expect of the file, once the rows are those to train on."""
        if os.environ.get("RANK", "0") != "0":  # every process of a job reads the file
            return
        for message in self.in_words(max_length):
            logger.warning(f"{path}: {message}")

    def in_words(self, max_length: int | None = None) -> list[str]:
        said = []
        if self.too_long:
            said.append(
                f"left out {len(self.too_long)} of {self._all()} rows, {too_long(self.too_long, max_length or 0)}"
            )
        if self.unaligned:
            reasons = Counter(self.unaligned.values()).most_common(3)
            said.append(
                f"left out {len(self.unaligned)} of {self._all()} rows, which cannot be aligned with the student's "
                f"tokens ({line_list(list(self.unaligned))}): " + "; ".join(f"{reason} ({n})" for reason, n in reasons)
            )
        said += self.notes.in_words()
        if self.text:
            said.append(bare_text_in_words(self.text, self.rows, self.tokenizer))
        if self.prompt_cut:
            said.append(prompt_cut_in_words(len(self.prompt_cut)))
        if self.aligned:
            said.append(
                f"{len(self.aligned)} of {self.rows} rows are not in the student's tokens and were aligned by their "
                f"bytes: {self.ratio_tokens / self.tokens:.1%} of their response tokens carry a log-ratio, in spans of "
                f"{self.ratio_tokens / max(self.spans, 1):.2f} tokens, {self.spans / len(self.aligned):.1f} spans a "
                "row. These spans are the blocks of the weights, at levels token and block alike"
            )
        if self.few_shared:
            said.append(
                f"in {_rows(len(self.few_shared))} fewer than {FEW_SHARED:.0%} of the response tokens carry a "
                f"log-ratio ({line_list(self.few_shared)}): the others train with the weight of their place"
            )
        if self.no_policy and self.weighted:
            said.append(
                f"{len(self.no_policy)} of {self.rows} rows have no behaviour policy: each of their tokens has weight "
                "1, as in plain SFT"
            )
        if self.estimated:
            said.append(
                f"the log-probs of {_rows(len(self.estimated))} are an estimate, by a model that did not write them "
                f"({line_list(self.estimated)})"
            )
        if self.biased:
            settings = ", ".join(f"{setting}: {_rows(n)}" for setting, n in self.sampled.most_common())
            reasons = "; ".join(f"of {n} of them, {why}" for why, n in self.bias.most_common())
            said.append(
                f"the log-ratios of {_rows(len(self.biased))} are biased by how they were sampled ({settings}): "
                + reasons
            )
        return said

    def rows_in_words(self, done: str, max_length: int | None) -> str:
        """How many rows, and what was left out: a command's last line."""
        return rows_in_words(
            done,
            self.rows,
            {
                too_long(self.too_long, max_length or 0): len(self.too_long),
                f"not aligned with the student's tokens ({line_list(list(self.unaligned))})": len(self.unaligned),
            },
        )

    def counts(self) -> dict[str, int]:
        """For a run's record."""
        return {
            "read": self._all(),
            "kept": self.rows,
            "too_long": len(self.too_long),
            "unaligned": len(self.unaligned),
        }

    def _all(self) -> int:
        return self.rows + len(self.too_long) + len(self.unaligned)


def sampling_in_words(settings: Any) -> list[str]:
    """Of `behavior_sampling`, each setting that makes log-ratios biased: "temperature 0.7", say."""
    told = _told(settings)
    return [f"{name} {value:g}" for name, value in changed(told).items()] if bias(told) else []


def _told(settings: Any) -> dict[str, Any]:
    """Without what is no number, but for which distribution the log-probs are of."""
    if not isinstance(settings, dict):
        return {}
    return {name: value for name, value in settings.items() if name == "logprobs" or type(value) in (int, float)}
