"""All that `pear inspect` found, as one JSON value: tables and page are made of it and nothing else."""

import functools
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pear.inspecting.advice import advise
from pear.inspecting.data import Data
from pear.inspecting.statistics import (
    BAND,
    LEVELS,
    TRAINS,
    Curve,
    along,
    at_level,
    by_following,
    grid,
    histogram,
    ratio_quantiles,
    summarize,
)
from pear.inspecting.suspicions import view
from pear.inspecting.text import token_texts
from pear.inspecting.tokens import Tokens, log_ratios, weights
from pear.inspecting.ways_out import Case
from pear.inspecting.worst import choose, judge
from pear_kernels.options import PEAROptions

FORMAT = 1
HEAD, TAIL = 500, 900  # tokens of a long row that are shown
CONTEXT = 48  # tokens before the completion


def make_report(
    data: Data,
    logprobs: list[np.ndarray],  # (C,) for each row, the student's
    options: PEAROptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: dict[str, str],  # of the data's file and the student
    rows: int,
    half: bool,
) -> dict[str, Any]:
    """Statistics, the rows to look at, and advice. `half`: the student ran in half precision."""
    tokens = data.tokens(logprobs)
    if tokens.aligned.any():  # as `pear sft` does: the clip of a span is that of its tokens together
        options = options.replace(clip_blocks=True)
    seen = view(data.rows, tokens, half, special_ids(tokenizer), lambda token: token_texts(tokenizer, [token])[0])
    predict = functools.cache(lambda options: summarize(tokens, options))
    case = Case(data, tokens, seen, options, predict(options), predict)
    g = weights(tokens, options)
    return {
        "format": FORMAT,
        **names,
        "data": _data(data, tokens, g),
        "options": options.asdict()
        | {"log_ratio_clip": list(options.log_ratio_clip), "log_weight_clip": list(options.log_weight_clip)},
        "trains": f"a token trains if its weight is at least {TRAINS:g} of the mean weight of all tokens",
        "summary": case.summary._asdict(),
        "log_ratio": ratio_quantiles(tokens) | {"histogram": histogram(tokens, options)._asdict()},
        "levels": {level: _level(tokens, at_level(options, level)) for level in LEVELS},
        "grid": [_cell(tokens, setting) for setting in grid(options)],
        "rows": _rows(data, tokens, options, g, tokenizer, rows),
        "advice": [
            finding._asdict() | {"options": [option._asdict() for option in finding.options]}
            for finding in advise(case)
        ],
    }


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that are no text: markers of roles, turns and thoughts."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _data(data: Data, tokens: Tokens, g: np.ndarray) -> dict[str, Any]:
    lengths, ratio, has = tokens.lengths, log_ratios(tokens), tokens.has_ratio
    names = ["none" if row.policy is None else str(row.policy) for row in data.rows]
    policies = []
    for name in dict.fromkeys(names):
        mine = np.array([other == name for other in names])
        at = mine[tokens.rows]
        policies.append(
            {
                "name": name,
                "rows": int(mine.sum()),
                "estimated_rows": sum(row.estimated for row, is_mine in zip(data.rows, mine, strict=True) if is_mine),
                "aligned_rows": int((mine & tokens.aligned).sum()),
                "tokens": int(at.sum()),
                "ratio_tokens": int((at & has).sum()),
                "log_ratio_mean": float(ratio[at & has].mean()) if (at & has).any() else None,
                "weight_mean": float(g[at].mean()),
            }
        )
    return {
        "rows_in_file": data.total,
        "rows": len(data.rows),
        "tokens": len(ratio),
        "ratio_tokens": int(has.sum()),
        "longest": int(lengths.max()),
        "median_length": float(np.median(lengths)),
        "wrong_rows": sum(not row.right for row in data.rows),
        "in_words": data.in_words,
        "notes": list(data.notes),
        "too_long": data.too_long,
        "unaligned": [{"line": line, "reason": reason} for line, reason in data.unaligned.items()],
        "policies": policies,
    }


def _level(tokens: Tokens, options: PEAROptions) -> dict[str, Any]:
    g = weights(tokens, options)
    return {
        "summary": summarize(tokens, options, g)._asdict(),
        "by_following": _curve(by_following(tokens, g)),
        "along": _curve(along(tokens, g)),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    named = {f"{quantile:g}": [values[i] for values in curve.quantiles] for i, quantile in enumerate(BAND)}
    return curve._asdict() | {"quantiles": named}


def _cell(tokens: Tokens, options: PEAROptions) -> dict[str, Any]:
    g = weights(tokens, options)
    return {
        "level": options.level,
        "gamma": options.gamma,
        "log_ratio_clip": list(options.log_ratio_clip),
        "summary": summarize(tokens, options, g)._asdict(),
        "by_following": _curve(by_following(tokens, g)),
    }


def _rows(
    data: Data, tokens: Tokens, options: PEAROptions, g: np.ndarray, tokenizer: PreTrainedTokenizerBase, rows: int
) -> list[dict[str, Any]]:
    judged, ratio, has = judge(tokens, g), log_ratios(tokens), tokens.has_ratio
    by_level = {level: weights(tokens, at_level(options, level)) for level in LEVELS}
    found = []
    for number, reasons in choose(tokens, judged, rows).items():
        row, begin, end = data.rows[number], int(tokens.starts[number]), int(tokens.starts[number + 1])
        length = end - begin
        shown = np.arange(length)
        if length > HEAD + TAIL:
            shown = np.concatenate([shown[:HEAD], shown[-TAIL:]])
        ids = row.input_ids[row.mask].tolist()
        first = int(row.mask.argmax())
        before = row.input_ids[max(0, first - CONTEXT) : first].tolist()
        texts = token_texts(tokenizer, ids)
        spans = np.arange(length) if row.spans is None else row.spans
        found.append(
            {
                "line": row.line,
                "reasons": reasons,
                "policy": "none" if row.policy is None else str(row.policy),
                "estimated": row.estimated,
                "right": row.right,
                "tokens": length,
                "mean_weight": float(judged.mean_weight[number]),
                "mean_log_ratio": _number(judged.mean_log_ratio[number]),
                "trains": float(judged.trains[number]),
                "before": "".join(token_texts(tokenizer, before)),
                "left_out": length - len(shown),
                "position": shown.tolist(),
                "text": [texts[t] for t in shown],
                "span": spans[shown].tolist(),
                "log_ratio": [_number(ratio[begin + t]) for t in shown],
                "logprob": [_number(tokens.logprobs[begin + t]) for t in shown],
                "behavior_logprob": [
                    _number(tokens.logprobs[begin + t] - ratio[begin + t]) if has[begin + t] else None for t in shown
                ],
                "weight": {level: [_number(values[begin + t]) for t in shown] for level, values in by_level.items()},
            }
        )
    return found


def _number(x: float) -> float | None:
    """Five digits are enough to look at, and keep the page small."""
    return float(f"{x:.5g}") if np.isfinite(x) else None
