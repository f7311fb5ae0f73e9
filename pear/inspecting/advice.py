"""What the numbers mean, in words: which failure of PEAR's weights they show, and what each way out would change."""

import functools
import math
from collections.abc import Iterator

import numpy as np

from pear.health import FEW, MOST, clipped_in_words
from pear.inspecting.data import Data
from pear.inspecting.finding import Finding, count, listed, share, worst_first
from pear.inspecting.statistics import TRAINS, summarize
from pear.inspecting.suspicions import suspicions, unaligned
from pear.inspecting.tokens import weights
from pear.inspecting.ways_out import LARGE, Case, drift, ways_out, wider
from pear.sft_data import WRONG_TO_RIGHT
from pear_kernels.options import LabelOptions, PEAROptions

SOME = 0.1  # a share of tokens that is worth a warning where it should be none
DATA_IS_WRONG = ("zeros", "floored", "shifted")  # whatever the weights do then, is no fault of theirs


def advise(case: Case) -> list[Finding]:
    """Everything worth saying, the worst first; if there is nothing to warn of, that it looks fine."""
    g = weights(case.tokens, case.options)
    found = [*unaligned(case.data.rows, case.tokens, g, case.data.unaligned), *suspicions(case.seen)]
    wrong = [finding.kind for finding in found if finding.kind in DATA_IS_WRONG]
    if (weighted := _weighted(case)) is not None:
        found += _weights(weighted, first_repair=bool(wrong))
    found += _negatives(case)
    if case.tokens.aligned is not None and case.tokens.aligned.any() and case.options.level == "block":
        found.append(_needs_clip_blocks())
    if case.data.too_long:
        found.append(_too_long(case.data))
    if not any(finding.severity in ("problem", "warning") for finding in found):
        found.append(_fine(case))
    return worst_first(found)


def _weighted(case: Case) -> Case | None:
    """The rows that these options weight: right answers with a ratio. Those of 1 say nothing about theirs."""
    rated = np.add.reduceat(case.tokens.has_ratio.astype(np.int64), case.tokens.starts[:-1]) > 0
    chosen = rated & [row.right for row in case.data.rows]
    if chosen.all() or not chosen.any():
        return case if chosen.all() else None
    seen = case.seen.of_rows(chosen)
    rows, tokens = seen.rows, seen.tokens

    predict = functools.cache(lambda options: summarize(tokens, options))
    return Case(
        case.data._replace(rows=rows), tokens, seen, case.options, predict(case.options), predict, int((~chosen).sum())
    )


def _weights(case: Case, first_repair: bool) -> Iterator[Finding]:
    """What the weights do; where every ratio is clipped, whatever else there is to say."""
    found = list(_shapes(case, first_repair))
    clipped = clipped_in_words(
        case.summary.clipped_low or 0.0, case.summary.clipped_high or 0.0, case.options.log_ratio_clip
    )
    if clipped is None:
        yield from found
    elif found:
        yield found[0]._replace(text=f"{found[0].text} {clipped}")
        yield from found[1:]
    else:
        text = (
            f"{clipped} Check that the log-probs are of this text, take data from a closer policy, or widen the clip."
        )
        if first_repair:
            yield _finding(case, "clipped", "warning", text, first_repair)
        else:
            yield Finding("clipped", "warning", f"{text} Options, before the first step:", tuple(wider(case)))


def _shapes(case: Case, first_repair: bool) -> Iterator[Finding]:
    summary = case.summary
    few = summary.trains < MOST
    last = float((case.tokens.following < 0.1 * np.repeat(case.tokens.lengths, case.tokens.lengths)).mean())
    if summary.floor > MOST or few and summary.floor > 0.2:
        yield _finding(case, "floor", "problem", _floor_text(case), first_repair)
    elif few and drift(case) < 0 and summary.last_tenth > max(0.3, 2 * last):
        yield _finding(case, "last_tokens", "warning", _last_tokens_text(case), first_repair)
    elif few or summary.ess < FEW:
        yield _finding(case, "few", "warning", _few_text(case), first_repair)
    elif summary.floor > SOME:
        yield _finding(case, "floor", "warning", _floor_text(case), first_repair)
    if summary.ceiling > SOME or summary.weight_mean > LARGE:
        severity = "problem" if summary.ceiling > MOST else "warning"
        yield _finding(case, "ceiling", severity, _ceiling_text(case), first_repair)


def _finding(case: Case, kind: str, severity: str, text: str, first_repair: bool) -> Finding:
    """The text with the options that help, each with what it is predicted to change."""
    if case.left_out:
        text += (
            f" (Of right answers with a behaviour policy; {count(case.left_out, 'other row')} are not counted here.)"
        )
    if first_repair:
        text += " The behaviour log-probs look wrong (see above), and that may be all of it: repair them first."
        return Finding(kind, severity, text)
    options, vain = ways_out(case)
    if vain:
        text += f" Of little help here: {', '.join(vain)}."
    if options:
        text += " Options, with what they would change before the first step:"
    else:
        text += " No single option of the loss repairs that: take shorter responses, or data from a closer policy."
    return Finding(kind, severity, text, tuple(options))


# ---------------------------------------------------------------------------------------------------------------------
# In words


def _floor_text(case: Case) -> str:
    summary, options = case.summary, case.options
    text = (
        f"{share(summary.floor)} of the tokens will sit on the floor, exp({options.log_weight_clip[0]:g}), and "
        f"{share(summary.trains)} will train (have at least {TRAINS:g} of the mean weight)."
    )
    if options.center:
        pass  # delta is 0 on average then
    elif (summary.delta_mean or 0.0) < 0:
        few = " almost everywhere" if _negative(case) > 0.8 else " on average"
        text += (
            f" delta is negative{few} (mean {summary.delta_mean:+.3f} a token, {share(summary.clipped_low)} at the low "
            "end of its clip), as when a much larger or more confident teacher wrote the data."
        )
    elif options.gamma < 1 and options.level != "sequence":
        text += f" delta is not to blame (mean {summary.delta_mean:+.3f} a token): gamma = {options.gamma:g} is."
    return text + _reached(case, options.log_weight_clip[0], "floor")


def _ceiling_text(case: Case) -> str:
    summary, options = case.summary, case.options
    text = (
        f"{share(summary.ceiling)} of the tokens will sit on the ceiling, exp({options.log_weight_clip[1]:g}); the "
        f"mean weight is {summary.weight_mean:.3g}, and gradients are so many times as large (Adam hides it; SGD and a "
        "clip of their norm do not)."
    )
    if (summary.delta_mean or 0.0) > 0:
        text += (
            f" delta is positive on average (mean {summary.delta_mean:+.3f} a token, {share(summary.clipped_high)} at "
            "the high end of its clip): the student is surer of this data than the policy that wrote it, as after "
            "training on it, or when it was drawn at a high temperature or by a weaker model."
        )
    return text + _reached(case, options.log_weight_clip[1], "ceiling")


def _last_tokens_text(case: Case) -> str:
    summary = case.summary
    middle = int(np.median(case.tokens.lengths))
    return (
        f"Only {share(summary.trains)} of the tokens will train: the last tenth of each response has "
        f"{share(summary.last_tenth)} of all weight. The median response has {middle} tokens, and log G loses "
        f"{-drift(case):.3g} a token on its way to the front (delta {summary.delta_mean:+.4f}"
        + (f", gamma {math.log(case.options.gamma):+.4f}" if case.options.level != "sequence" else "")
        + ")."
    )


def _few_text(case: Case) -> str:
    summary, tokens = case.summary, case.tokens
    per_row = np.add.reduceat(weights(tokens, case.options), tokens.starts[:-1])
    ordered = np.sort(per_row)[::-1].cumsum()
    rows = int(np.searchsorted(ordered, ordered[-1] / 2)) + 1
    return (
        f"Few tokens carry the gradient: half of all weight lies on {share(summary.half)} of the tokens, in "
        f"{rows} of {count(len(per_row), 'row')}; {share(summary.trains)} of the tokens will train, and the effective "
        f"sample size is {share(summary.ess)}."
        + (" A few rows outweigh all others." if rows < 0.25 * len(per_row) else "")
    )


def _reached(case: Case, bound: float, name: str) -> str:
    """After how many tokens, and how long responses are."""
    middle, longest = int(np.median(case.tokens.lengths)), int(case.tokens.lengths.max())
    rate = drift(case)
    if case.options.level == "sequence":
        return f" A weight is the whole response's here; the median response has {middle} tokens."
    if rate * bound <= 0 or not math.isfinite(bound / rate):
        return f" The median response has {middle} tokens, the longest {longest}."
    return (
        f" At this rate ({rate:+.3f} a token with gamma) the {name} comes after {math.ceil(bound / rate)} tokens; "
        f"the median response has {middle}, the longest {longest}."
    )


def _negative(case: Case) -> float:
    ratio = case.seen.ratio[case.tokens.has_ratio]
    return float((ratio < 0).mean())


def _fine(case: Case) -> Finding:
    summary = case.summary
    ratio = "no token has a ratio" if summary.delta_mean is None else f"mean delta {summary.delta_mean:+.4f} a token"
    return Finding(
        "fine",
        "fine",
        f"Looks fine: {share(summary.trains)} of the tokens will train, the effective sample size is "
        f"{share(summary.ess)}, {share(summary.floor)} of the weights lie on the floor and {share(summary.ceiling)} on "
        f"the ceiling; {ratio}, mean weight {summary.weight_mean:.3g}.",
    )


def _too_long(data: Data) -> Finding:
    return Finding(
        "too_long",
        "note",
        f"{count(len(data.too_long), 'row')} longer than --max_length are not looked at ({listed(data.too_long)}); "
        "`pear sft` with the same --max_length leaves them out too.",
    )


def _needs_clip_blocks() -> Finding:
    return Finding(
        "clip_blocks",
        "note",
        "Some rows are of another tokenizer, so at level block the sum of each block is clipped here, and `pear sft` "
        "wants --clip_blocks true; or take level token, where their blocks are the shared spans just as well.",
    )


def _negatives(case: Case) -> Iterator[Finding]:
    """Wrong answers beside right ones."""
    right = np.array([row.right for row in case.data.rows])
    if right.all():
        return
    of_token = right[case.tokens.rows]
    wrong_tokens, right_tokens = int((~of_token).sum()), int(of_token.sum())
    # right ones at the level asked for, wrong ones by the weight of the whole response
    pull = float(weights(case.tokens, case.options)[of_token].sum())
    at_sequence = PEAROptions(
        level="sequence",
        log_ratio_clip=case.options.log_ratio_clip,
        log_weight_clip=case.options.log_weight_clip,
        clip_blocks=case.options.clip_blocks,
    )
    push = float(weights(case.tokens, at_sequence)[~of_token].sum())
    text = (
        f"{count(int((~right).sum()), 'row')} of {len(right)} are wrong answers: {wrong_tokens} tokens against "
        f"{right_tokens} of right ones. Trained with --negatives, their weights sum to {push:.4g} against "
        f"{pull:.4g}; at --negative_lambda {LabelOptions.negative_lambda:g} "
    )
    if case.options.normalize == "batch":
        text = "`pear sft` refuses --normalize batch beside --negatives; take --normalize sequence. " + text
    outweigh = LabelOptions.negative_lambda * push > pull
    if wrong_tokens > WRONG_TO_RIGHT * right_tokens or outweigh:
        text += (
            "the wrong ones push harder than the right ones pull."
            if outweigh
            else "the wrong ones are held back, yet the student is mostly told what not to say."
        )
        if pull:
            text += (
                f" At --negative_lambda {0.5 * pull / push:.2g} they would push half as hard as the right ones pull."
            )
        text += " Add right answers, or leave wrong ones out."
        yield Finding("negatives", "problem" if outweigh else "warning", text)
    else:
        yield Finding("negatives_present", "note", text + "the right ones prevail. `pear sft` wants --negatives.")
