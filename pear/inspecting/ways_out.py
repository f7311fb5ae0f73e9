"""Options of `pear sft` against weights that collapse or grow, each tried on the data itself."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pear.inspecting.data import Data
from pear.inspecting.finding import Option, share
from pear.inspecting.statistics import Summary, at_level
from pear.inspecting.suspicions import View
from pear.inspecting.tokens import Tokens, log_ratios
from pear_kernels.options import PEAROptions

LARGE = 10.0  # a mean weight that most learning rates cannot bear
GAIN = 0.1  # what an option must add to `_works` to be worth its name
ENOUGH = 0.9  # of what the strongest of a kind would do: then a milder one is named
# How strongly an option is tried, mildest first.
CLIP_LENGTHS = (512, 256, 128, 64, 32, 16)
NARROWER = (2, 4, 8, 16, 32)
GAMMAS = (0.998, 0.995, 0.99, 0.98, 0.9999, 1.0)  # against weights that rise, and against those that fall


class Case(NamedTuple):
    """What is judged."""

    data: Data
    tokens: Tokens
    seen: View
    options: PEAROptions
    summary: Summary
    predict: Callable[[PEAROptions], Summary]  # the same numbers under other options
    left_out: int = 0  # rows without a ratio


def drift(case: Case) -> float:
    """What log G changes by with each token further from the end, on average."""
    gamma = 0.0 if case.options.level == "sequence" else math.log(case.options.gamma)
    return gamma + (0.0 if case.options.center else case.summary.delta_mean or 0.0)


def ways_out(case: Case) -> tuple[list[Option], list[str]]:
    """Options that help, the best first; and those that were tried and do not."""
    now = _works(case.summary)
    helpful, vain = [], []
    for tried in _families(case, rising=drift(case) > 0):
        best = max(_works(case.predict(options)) for _, options in tried)
        flags, options = next(one for one in tried if _works(case.predict(one[1])) >= ENOUGH * best)
        summary = case.predict(options)
        if _works(summary) >= now + GAIN:
            helpful.append(
                (_works(summary), Option(flags, _effect(summary, case.summary), summary.trains, summary.ess))
            )
        else:
            vain.append(f"{flags} ({share(summary.trains)} would train)")
    return [option for _, option in sorted(helpful, key=lambda one: -one[0])], vain


def wider(case: Case) -> Iterator[Option]:
    """A clip that holds nine tenths of the ratios, alone and with `center`: wide clips drift further."""
    ratios = log_ratios(case.tokens, case.options)
    low, high = np.quantile(ratios[case.tokens.has_ratio], (0.05, 0.95))
    clip = _two_digits(min(low, case.options.log_ratio_clip[0])), _two_digits(max(high, case.options.log_ratio_clip[1]))
    options = case.options.replace(log_ratio_clip=clip)
    tried = {f"--log_ratio_clip {_plain(clip[0])} {_plain(clip[1])}": options}
    if not options.center and options.level != "sequence":
        tried |= {f"{flags} --center true": options.replace(center=True) for flags in list(tried)}
    for flags, options in tried.items():
        summary = case.predict(options)
        inside = 1 - (summary.clipped_low or 0.0) - (summary.clipped_high or 0.0)
        effect = f"{share(inside)} of the ratios inside the clip, {_effect(summary, case.summary)}"
        yield Option(flags, effect, summary.trains, summary.ess)


def _families(case: Case, rising: bool) -> Iterator[list[tuple[str, PEAROptions]]]:
    """Each way out, at several strengths where it has one, mildest first; `rising`: log G grows towards the front."""
    options = case.options
    low, high = options.log_ratio_clip
    if not options.center and options.level != "sequence":
        yield [("--center", options.replace(center=True))]
    lengths = [n for n in CLIP_LENGTHS if options.clip_length is None or n < options.clip_length]
    if lengths:
        yield [(f"--clip_length {n}", options.replace(clip_length=n)) for n in lengths]
    clips = [(_two_digits(low / k), _two_digits(high / k)) for k in NARROWER]
    yield [(f"--log_ratio_clip {_plain(a)} {_plain(b)}", options.replace(log_ratio_clip=(a, b))) for a, b in clips]
    if options.normalize is None and options.level != "sequence":
        yield [("--normalize sequence", options.replace(normalize="sequence"))]
    if options.normalize is None and all(row.right for row in case.data.rows):  # negatives refuse it
        yield [("--normalize batch", options.replace(normalize="batch"))]
    if options.level != "sequence" and (rising or options.gamma < 1):
        if gammas := [g for g in GAMMAS if (g < options.gamma) == rising and g != options.gamma]:
            yield [(f"--gamma {g:g}", options.replace(gamma=g)) for g in gammas]
    if options.level == "token":
        flags = "--level block" + (" --clip_blocks true" if options.clip_blocks else "")
        yield [(flags, options.replace(level="block"))]
    if options.level == "sequence":
        yield [("--level token", at_level(options, "token"))]


def _works(summary: Summary) -> float:
    """How much of the data trains, off the bounds and not by far too much; 1 at best."""
    return min(1.0, LARGE / summary.weight_mean) * summary.trains * (1 - summary.floor) * (1 - summary.ceiling)


def _effect(then: Summary, now: Summary) -> str:
    text = (
        f"{share(then.trains)} of the tokens train (now {share(now.trains)}), effective sample size {share(then.ess)}"
    )
    text += f" (now {share(now.ess)})"
    for name in ("floor", "ceiling"):
        if getattr(now, name) > 0.01 or getattr(then, name) > 0.01:
            text += f", {share(getattr(then, name))} on the {name}"
    return text + f", mean weight {then.weight_mean:.2g}"


def _two_digits(x: float) -> float:
    return float(f"{x:.1g}") if abs(float(f"{x:.1g}") - x) < 0.1 * abs(x) else float(f"{x:.2g}")


def _plain(x: float) -> str:
    """Without an exponent: argparse takes -3.1e-05 for the name of an option."""
    return np.format_float_positional(x, trim="-")
