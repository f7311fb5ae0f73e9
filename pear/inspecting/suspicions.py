"""Behaviour log-probs that look wrong, whatever the options: each check looks for one mistake that people made."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from pear.health import COPY_MAX_RATIO
from pear.importing import sampling
from pear.inspecting.data import Row
from pear.inspecting.finding import Finding, count, listed, share
from pear.inspecting.tokens import Tokens, log_ratios
from pear.scored_summary import FEW_SHARED

# log(softmax + eps), and numbers that servers write for "not among the top k"
FLOORS = {f"log(softmax + 1e-{k})": -k * math.log(10) for k in (5, 6, 7, 8, 9, 10, 12, 15, 16, 20, 30, 38)} | {
    f"a filler of {value:g}": float(value) for value in (-50, -100, -1000, -9999, -10000, -100000)
}
HUGE = 5.0  # nats: a log-ratio that no two models have at a token that both know
TOO_LIKELY = 0.01  # nats a token above 0, beyond what chance explains
LAGS = (-3, -2, -1, 1, 2, 3)
MISSING, MOST_MISSING = 0.01, 0.4  # probability that top-p or top-k cuts off
COPY_MEAN = 0.02  # nats a token: half precision moves log-probs by less, on average
FEW_DISTINCT = 32  # values, too few to say how numbers were rounded


class View(NamedTuple):
    """What the checks look at."""

    rows: list[Row]
    tokens: Tokens
    ratio: np.ndarray  # (N,) as `log_ratios`
    single: np.ndarray  # (N,) bool: the log-prob of one token as it was scored, not a sum over a span
    half: bool  # the student ran in half precision
    special: frozenset[int]  # ids that are no text
    show: Callable[[int], str]  # a token's text

    def of_rows(self, chosen: np.ndarray) -> "View":
        """What there is to see of some rows: (S,) bool."""
        at = chosen[self.tokens.rows]
        rows = [row for row, is_one in zip(self.rows, chosen, strict=True) if is_one]
        return self._replace(
            rows=rows, tokens=self.tokens.of_rows(chosen), ratio=self.ratio[at], single=self.single[at]
        )


def view(rows: list[Row], tokens: Tokens, half: bool, special: Iterable[int], show: Callable[[int], str]) -> View:
    single = [
        row.policy is not None and (row.spans is None or not (np.diff(row.spans[row.spans >= 0]) == 0).any())
        for row in rows
    ]
    single = np.array(single)[tokens.rows] & tokens.has_ratio
    return View(rows, tokens, log_ratios(tokens), single, half, frozenset(special), show)


def suspicions(seen: View) -> Iterator[Finding]:
    """Everything that looks wrong, and nothing else."""
    parts = by_policy(seen)
    for check in (_zeros, _copy, _too_likely, _outliers, _sampled, _estimated):
        if (found := check(seen)) is not None:
            yield found
    # each policy may have been scored in another way
    for check in (_floored, _quantised, _renormalised, _shifted, _template):
        for name, part in parts.items():
            if (found := check(part)) is not None:
                yield found if len(parts) == 1 else found._replace(text=f"{name}: {found.text}")


def by_policy(seen: View) -> dict[str, View]:
    """The rows of each behaviour policy that has a ratio anywhere."""
    rated = _per_row(seen.tokens.has_ratio, seen.tokens) > 0
    names = [row.policy if has else None for row, has in zip(seen.rows, rated, strict=True)]
    return {
        name: seen.of_rows(np.array([n == name for n in names])) for name in dict.fromkeys(names) if name is not None
    }


def _zeros(seen: View) -> Finding | None:
    """Rows whose log-probs are all 0."""
    has = seen.tokens.has_ratio
    ratios = _per_row(has, seen.tokens)
    zeros = _per_row(has & (seen.tokens.behavior_logprobs == 0), seen.tokens)
    if seen.tokens.spans is not None:  # a span's total stands at its first token alone
        zeros = np.where(_per_row(has & (seen.tokens.behavior_logprobs != 0), seen.tokens) == 0, ratios, 0)
    lines = [row.line for row, z, n in zip(seen.rows, zeros, ratios, strict=True) if n >= 3 and z == n]
    surely = any(n >= 8 and z == n for z, n in zip(zeros, ratios, strict=True))  # a short answer may be that certain
    if not lines or not surely and len(lines) < 0.05 * len(seen.rows):
        return None
    return Finding(
        "zeros",
        "problem",
        f"{count(len(lines), 'row')} of {len(seen.rows)} have a behaviour log-prob of exactly 0 at every token "
        f"({listed(lines)}): a policy that was certain of everything. That is what greedy decoding, a server that "
        "reports processed log-probs, or a column that was never filled leaves behind. Score the rows with the model "
        "that wrote them (`pear score --model`; without --model it keeps log-probs that are sealed); or take all keys "
        "but `prompt` and `completion` out of them, and `pear score --fallback none` gives them weight 1.",
    )


def _floored(seen: View) -> Finding | None:
    """Many log-probs on a number that is some program's bound."""
    values = seen.tokens.behavior_logprobs[seen.single]
    if not len(values):
        return None
    lowest = values.min()
    for what, floor in FLOORS.items():
        # p + eps is a little above eps; a tail that ends there by chance is no pile
        pile = np.count_nonzero(values <= floor + 0.05)
        if floor - 1e-2 <= lowest <= floor + 0.05 and pile >= 3 and pile > np.count_nonzero(values <= floor + 1) - pile:
            return Finding(
                "floored",
                "problem",
                f"{count(int(pile), 'behaviour log-prob')} of {len(values)} "
                f"({share(pile / len(values))}) lie at {lowest:.2f} and none lies below: {what}. The true ones are "
                "lower, so these tokens' ratios are too low. Score the data with `pear score --model`, or import "
                "log-probs of the tokens that were drawn and not of the top k.",
            )
    return None


def _narrow(seen: View) -> tuple[str, float] | None:
    """The dtype that all behaviour log-probs are numbers of, and by what share of itself each may be off."""
    values = _distinct(seen)
    tensor = torch.from_numpy(values.astype(np.float32))
    for name, dtype, error in (("bfloat16", torch.bfloat16, 2.0**-9), ("float16", torch.float16, 2.0**-12)):
        if len(values) >= FEW_DISTINCT and torch.equal(tensor.to(dtype).float(), tensor):
            return name, error
    return None


def _distinct(seen: View) -> np.ndarray:
    values = np.unique(seen.tokens.behavior_logprobs[seen.single])
    return values[values != 0]


def _quantised(seen: View) -> Finding | None:
    """Numbers that went through a narrow dtype or were rounded."""
    values = _distinct(seen)
    if len(values) < FEW_DISTINCT:
        return None
    if (narrow := _narrow(seen)) is not None:
        name, error = narrow
        nats = error * float(np.abs(seen.tokens.behavior_logprobs[seen.single]).mean())
        return Finding(
            "half_precision",
            "warning",
            f"Every behaviour log-prob is a {name} number: they were computed or stored in half precision, each off by "
            f"up to {error:.2%} of itself (of this data about {nats:.1g} nats a token), and errors add up over all "
            "later tokens of a response. Take the log-softmax in float32, as `pear score` does.",
        )
    for places in (1, 2, 3):
        if np.allclose(values, np.round(values, places), rtol=0, atol=1e-6 + 1e-7 * np.abs(values).max()):
            return Finding(
                "rounded",
                "warning",
                f"Every behaviour log-prob is rounded to {count(places, 'decimal')}: errors of up to "
                f"{0.5 * 10**-places:g} nats a token, against a clip of about a tenth. Import them unrounded, or score "
                "the data.",
            )
    return None


def _renormalised(seen: View) -> Finding | None:
    """Log-probs of the tokens that top-p or top-k kept, made to add up to 1 again, of which nothing tells."""
    untold = np.array(
        [
            row.policy is not None
            and not row.estimated
            and not (row.sampling.get("logprobs") == "processed" and sampling.truncated(row.sampling))
            for row in seen.rows
        ]
    )
    zero = np.array([not row.behavior_logprobs.any() for row in seen.rows])
    if not (untold & ~zero).any():
        return None
    part = seen.of_rows(untold & ~zero)
    values = part.tokens.behavior_logprobs[part.single]
    zeros, near = int((values > -1e-6).sum()), int(((values > -0.01) & (values <= -1e-6)).sum())
    told = []
    coarse = _quantised(part) is not None  # rounding makes zeros too
    if not coarse and sampling.renormalised_zeros(zeros, near, len(values)):
        told.append(
            f"{zeros} of {len(values)} behaviour log-probs are exactly 0 (a token that was kept alone) and only {near} "
            "lie within 0.01 below, where a model's own distribution has many"
        )
    plain = np.array([not sampling.changed(row.sampling) for row in part.rows])
    mass = _mean_ratio(part.of_rows(plain)) if plain.any() else None
    if mass is not None:
        told.append(
            f"pi / pi_b is {mass:.3f} on average, where it is 1 for text drawn from pi_b, and lies below 1 far more "
            f"than above: log-probs are too high by about {-math.log(mass):.3f} nats a token"
        )
    if not told:
        return None
    return Finding(
        "renormalised",
        "warning",
        f"The behaviour log-probs look renormalised after top-p or top-k: {'; '.join(told)}. Each delta is then too "
        "low by the log of the kept mass, and that adds up along a response. Import log-probs taken before truncation "
        "(vLLM: logprobs_mode=raw_logprobs), score the rows with `pear score --model`, or draw without top-p and "
        "top-k; --center true takes a constant shift away.",
    )


def _mean_ratio(seen: View) -> float | None:
    """The mean of pi / pi_b where it is below 1 by more than chance and more than two policies explain, else None.

    Of y ~ q, E[pi(y) / q(y)] is the mass that pi has where q draws: 1 without truncation, and about the kept mass for
    renormalised log-probs. With log-probs of the whole distribution, ratios lie on both sides of 1.
    """
    ratio, counted = np.exp(np.minimum(np.where(seen.single, seen.ratio, 0.0), 50.0)) - 1, seen.single
    counts = _per_row(counted, seen.tokens)
    total = int(counts.sum())
    if (counts > 0).sum() < 5 or total < 200:
        return None
    sums = np.add.reduceat(np.where(counted, ratio, 0.0), seen.tokens.starts[:-1])
    mean = sums.sum() / total
    # rows are independent, tokens of one row are not
    error = math.sqrt(np.square(sums - mean * counts).sum()) / total
    surely = -mean - 4 * error
    sizes = float(np.abs(ratio[counted]).mean())
    return 1 + mean if surely > MISSING and surely > 0.5 * sizes and -mean < MOST_MISSING else None


def _shifted(seen: View) -> Finding | None:
    """The student's log-probs go with those of a neighbouring token."""
    here = _correlation(seen, 0)
    if here is None:
        return None
    found = {lag: value for lag in LAGS if (value := _correlation(seen, lag)) is not None}
    lag = max(found, key=lambda lag: found[lag], default=0)
    if not found or found[lag] < 0.5 or found[lag] - here < 0.3:
        return None
    return Finding(
        "shifted",
        "problem",
        f"The behaviour log-probs stand {count(abs(lag), 'token')} too {'late' if lag > 0 else 'early'}: the student's "
        f"go with those {count(abs(lag), 'position')} {'after' if lag > 0 else 'before'} (correlation "
        f"{found[lag]:.2f}) and not with those of the same token ({here:.2f}). Two tokenisations or templates were "
        "mixed up, or logits were not shifted by one. Score or import the data again.",
    )


def _correlation(seen: View, lag: int, least: int = 100) -> float | None:
    """Of the student's log-prob at t and the behaviour policy's at t + lag, over all rows; None for too few tokens."""
    n = len(seen.ratio)
    a, b = np.arange(max(0, -lag), n - max(0, lag)), np.arange(max(0, lag), n - max(0, -lag))
    rows = seen.tokens.rows
    pair = (rows[a] == rows[b]) & seen.single[a] & seen.single[b]
    x = np.maximum(seen.tokens.logprobs[a][pair], -20.0)
    y = np.maximum(seen.tokens.behavior_logprobs[b][pair], -20.0)
    if len(x) < least or x.std() < 1e-6 or y.std() < 1e-6:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _copy(seen: View) -> Finding | None:
    """Policies that are the student itself."""
    parts, copies = by_policy(seen), {}
    for name, part in parts.items():
        has = part.tokens.has_ratio
        off, allowed = np.abs(part.ratio[has]), COPY_MAX_RATIO["half" if seen.half else "full"]
        if (narrow := _narrow(part)) is not None:  # a number that was rounded lies so far from the student's
            allowed = allowed + 2 * narrow[1] * np.abs(part.tokens.behavior_logprobs[has])
        if (off < allowed).all() and off.mean() < COPY_MEAN:
            copies[name] = off
    if not copies:
        return None
    part = sum(map(len, copies.values())) / seen.tokens.has_ratio.sum()
    most = max(off.max() for off in copies.values())
    named = ", ".join(list(copies)[:3]) + (", ..." if len(copies) > 3 else "")
    return Finding(
        "copy",
        "problem" if part > 0.5 else "warning",
        f"The behaviour policy is a copy of the student ({named}; {share(part)} of the tokens with a ratio): every "
        f"log-ratio is near 0, the largest {most:.1e}. Only gamma is left in the weights: PEAR does nothing. Score the "
        "data with the model that wrote it; if the student wrote it, plain SFT (--weighting none) is the same and "
        "cheaper.",
    )


def _too_likely(seen: View) -> Finding | None:
    """Policies whose text the student finds likelier than they do: of what pi_b drew, E[log pi - log pi_b] is -KL."""
    told = []
    for name, part in by_policy(seen).items():
        has = part.tokens.has_ratio
        counts = _per_row(has, part.tokens)
        sums = np.add.reduceat(np.where(has, part.ratio, 0.0), part.tokens.starts[:-1])
        if len(counts) < 5 or counts.sum() < 100 or any(row.estimated for row in part.rows):
            continue
        mean = sums.sum() / counts.sum()
        # rows are independent, tokens of one row are not
        error = math.sqrt(np.square(sums - mean * counts).sum()) / counts.sum()
        if mean - 4 * error > TOO_LIKELY:
            told.append(f"{name} ({mean:+.3f} a token, give or take {2 * error:.3f})")
    if not told:
        return None
    return Finding(
        "too_likely",
        "warning",
        f"The student finds text likelier than the policy that is said to have written it: {', '.join(told[:3])}. Of "
        "what a policy draws from its own distribution, no other model does so on average. So another model wrote it, "
        "or the same one at other settings of sampling, or these are not its log-probs; or the student was trained on "
        "this very text.",
    )


def _template(seen: View) -> Finding | None:
    """Tokens at the ends of responses, or that are no text, with ratios unlike those of all others."""
    has, lengths = seen.tokens.has_ratio, seen.tokens.lengths
    if not has.any():
        return None
    usual = float(np.median(np.abs(seen.ratio[has])))
    ids = np.concatenate([row.input_ids[row.mask] for row in seen.rows])
    following = seen.tokens.following
    before = np.repeat(lengths, lengths) - 1 - following
    long = np.repeat(lengths >= 8, lengths) & has
    found = []
    places = [(before, k, _ordinal(k)) for k in range(3)] + [(following, k, _ordinal_from_end(k)) for k in range(3)]
    for where, k, name in places:
        at = long & (where == k)
        if at.sum() >= 3 and _unlike(median := float(np.median(seen.ratio[at])), usual):
            token, times = Counter(ids[at].tolist()).most_common(1)[0]
            which = f" ({seen.show(token)!r} in {share(times / at.sum())})" if times >= 0.2 * at.sum() else ""
            found.append(f"the {name} token of the responses{which} has a median log-ratio of {median:+.1f}")
    taken = " ".join(found)
    for token in sorted(seen.special & set(ids[has].tolist())):
        at = has & (ids == token)
        name = repr(seen.show(token))
        if at.sum() >= 3 and name not in taken and _unlike(median := float(np.median(seen.ratio[at])), usual):
            found.append(f"the token {name} ({count(int(at.sum()), 'time')}) has a median log-ratio of {median:+.1f}")
    if not found:
        return None
    # an answer that begins in words the student would not choose is no sign of a template
    marks = seen.special & set(ids[before == 0].tolist())
    start_alone = len(found) == 1 and "the first token" in found[0] and not marks
    return Finding(
        "template",
        "note" if start_alone else "warning",
        f"Some structural tokens do not fit: {'; '.join(found[:4])}; half of all tokens are within {usual:.2g}. So it "
        "looks when the data was scored under another chat template or tokenizer than it was written with, when the "
        "student does not know a marker, or would begin otherwise. Each counts as no more than the clip, but look at "
        "them in the rows, and compare both templates.",
    )


def _unlike(median: float, usual: float) -> bool:
    return abs(median) > HUGE and abs(median) > 5 * usual


def _ordinal(k: int) -> str:
    return ("first", "second", "third")[k]


def _ordinal_from_end(k: int) -> str:
    return ("last", "last but one", "last but two")[k]


def _outliers(seen: View) -> Finding | None:
    """A few rows that another model than the named one seems to have written."""
    has = seen.tokens.has_ratio
    counts = _per_row(has, seen.tokens)
    sums = np.add.reduceat(np.where(has, seen.ratio, 0.0), seen.tokens.starts[:-1])
    enough = counts >= 16
    if enough.sum() < 8:
        return None
    means = sums / np.maximum(counts, 1)
    usual = float(np.median(means[enough]))
    odd = enough & (np.abs(means) > 3) & (np.abs(means - usual) > 10 * max(abs(usual), 0.1))
    if not odd.any():
        return None
    lines = [row.line for row, is_odd in zip(seen.rows, odd, strict=True) if is_odd]
    return Finding(
        "outliers",
        "warning",
        f"{count(len(lines), 'row')} of {len(seen.rows)} are unlike the others ({listed(lines)}): a mean log-ratio "
        f"beyond 3 nats a token, against {usual:+.2f} in the usual row. Another model than the named one may have "
        "written them, or their text was changed after it was written. Look at them, and leave them out if so.",
    )


def _sampled(seen: View) -> Finding | None:
    """Settings that changed the distribution that tokens were drawn from, where the log-probs do not tell of them."""
    found: Counter[tuple[str, str]] = Counter()
    for row in seen.rows:
        if (why := sampling.bias(row.sampling)) is not None:
            found[sampling.in_words(row.sampling), why] += 1
    if not found:
        return None
    told = "; ".join(f"{settings} ({count(rows, 'row')}): {why}" for (settings, why), rows in found.most_common(3))
    masses = [mass for row in seen.rows if type(mass := row.sampling.get("kept_mass")) is float and 0 < mass <= 1]
    if masses:
        mean = float(np.mean(masses))
        told += f"; by what was listed beside the log-probs, sampling kept {mean:.3f} ({math.log(mean):+.3f} nats)"
    return Finding(
        "sampling",
        "warning",
        f"{count(sum(found.values()), 'row')} of {len(seen.rows)} were not drawn from the model's own distribution. "
        f"{told}. Draw at temperature 1 without truncation, or import log-probs of the distribution that was drawn "
        "from.",
    )


def _estimated(seen: View) -> Finding | None:
    rows = [row for row in seen.rows if row.estimated]
    if not rows:
        return None
    names = ", ".join(sorted({str(row.policy) for row in rows})[:3])
    return Finding(
        "estimated",
        "note",
        f"The log-probs of {count(len(rows), 'row')} of {len(seen.rows)} are an estimate by {names}, which did not "
        "write them. Their ratios say how the student differs from that model, and no more.",
    )


def unaligned(
    rows: list[Row],
    tokens: Tokens,
    g: np.ndarray,  # (N,) weights
    left_out: dict[int, str],  # lines, and why
) -> Iterator[Finding]:
    """Rows and tokens that could not be brought onto the student's tokens, and those that nobody scored."""
    seen = len(rows) + len(left_out)
    if left_out:
        reasons = Counter(left_out.values()).most_common(2)
        yield Finding(
            "unaligned",
            "problem" if len(left_out) > 0.1 * seen else "warning",
            f"{count(len(left_out), 'row')} of {seen} cannot be aligned with the student's tokens ("
            f"{listed(list(left_out))}) and are not looked at here; `pear sft` refuses them, or leaves them out with "
            "--unaligned skip. Most often: " + "; ".join(f"{reason} ({times})" for reason, times in reasons) + ".",
        )
    aligned = [row for row in rows if row.aligned]
    shared = [float(np.mean(row.spans >= 0)) for row in aligned]
    if aligned and (mean := float(np.mean(shared))) < 0.85:
        lines = [row.line for row, value in zip(aligned, shared, strict=True) if value < FEW_SHARED]
        yield Finding(
            "few_shared",
            "warning" if mean < FEW_SHARED else "note",
            f"Only {share(mean)} of the tokens of {count(len(aligned), 'row')} of another tokenizer carry a ratio; the "
            "others are left out on both sides."
            + (f" Rows with less than half: {listed(lines)}." if lines else "")
            + " Markers that both sides write differently can be matched by role: --roles.",
        )
    human = sum(row.policy is None for row in rows)
    if human == len(rows):
        yield Finding(
            "no_policy",
            "warning",
            "No row has a behaviour policy: every weight is 1, and this is plain SFT. Score the rows with the "
            "model that wrote them, or with --fallback MODEL for an estimate, if PEAR is what you want.",
        )
    elif human:
        yield _beside_human_text(rows, tokens, g)


def _beside_human_text(rows: list[Row], tokens: Tokens, g: np.ndarray) -> Finding:
    """Weights of 1 beside others, which may be far smaller or larger."""
    nobody = np.array([row.policy is None for row in rows])
    mine = nobody[tokens.rows]
    others = float(g[~mine].mean())
    text = (
        f"{count(int(nobody.sum()), 'row')} of {len(rows)} ({share(float(mine.mean()))} of the tokens) have no "
        f"behaviour policy: their weight is 1, as in plain SFT. The mean weight of the others is {others:.3g}"
    )
    if 0.1 <= others <= 10:
        return Finding("some_without_policy", "note", f"{text}.")
    part = float(g[mine].sum() / g.sum())
    return Finding(
        "some_without_policy",
        "warning",
        f"{text}, so that rows without one have {share(part)} of all weight. At levels token and block, --normalize "
        "sequence puts all rows on a mean weight of 1; or train on the two kinds apart.",
    )


def _per_row(values: np.ndarray, tokens: Tokens) -> np.ndarray:
    """(S,) how many of the (N,) are true in each row."""
    return np.add.reduceat(values.astype(np.int64), tokens.starts[:-1])
