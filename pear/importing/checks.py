"""What is checked of imported log-probs, counted in a form that side files and reports can carry (JSON)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pear.importing import sampling
from pear.importing.generation import Generation, Reject
from pear.io import MAX_FLOAT32, MAX_LOGPROB

FLOOR = -9999.0  # what OpenAI and vLLM write for "less likely than I can say"
_MANY = 100  # values below which nothing is said about their grid

# The checks with a yes and a no, and what a "no" means.
CHECKS = {
    "ids are the text": "the ids do not spell the text",
    "completion re-encodes to the ids": "the policy wrote tokens that its tokenizer would have cut otherwise (as "
    "sampling does at times); the log-probs are of the tokens as written",
    "prompt re-encodes to the ids": "the policy saw a prompt of other tokens than --tokenizer makes of the row's: "
    "another chat template, system prompt or start token",
    "prompt tokens as the server counted": "the server counted another number of prompt tokens than the row has: "
    "another chat template, system prompt or start token",
    "sum is the cumulative log-prob": "the log-probs do not add up to the total beside them",
    "every row's spans": "text and tokens cannot be matched by bytes, so a student with another tokenizer cannot use "
    "them",
}


def check_logprobs(generation: Generation, floored: bool = False) -> list[float]:
    """The log-probs as floats; with `floored`, those at the floor of -9999 may stay.

    Raises:
        Reject: one is missing, no number, NaN, infinite, above 0 by more than rounding, or the floor of -9999; their
            sum is not the source's total.
    """
    values = []
    for number, token in enumerate(generation.tokens):
        value = token.logprob
        if type(value) not in (int, float):
            raise Reject(f"no log-prob of token {number}: got {value!r:.60}", again=True)
        if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
            raise Reject(f"the log-prob of token {number} is {value!r:.60}", again=True)
        if value > MAX_LOGPROB:
            raise Reject(f"the log-prob of token {number} is {value!r}, above 0: is it a logit or a probability?")
        if value <= FLOOR and not floored:
            raise Reject(f"the log-prob of token {number} is {value!r}: a floor that the server writes, not the value")
        values.append(float(value))
    total = generation.total
    if type(total) in (int, float) and abs(total) <= MAX_FLOAT32:
        own = math.fsum(values)
        if abs(own - total) > 0.01 + 1e-3 * len(values):
            raise Reject(
                f"the log-probs add up to {own:.4f}, `cumulative_logprob` says {total:.4f}: some are missing, or of "
                "other tokens"
            )
    return values


def grid(values: Sequence[float]) -> dict[str, Any]:
    """Counts by which rounded or floored log-probs show; `add` joins those of several rows."""
    inside = np.array([value for value in values if value != 0.0], dtype=np.float64)
    bits = inside.astype(np.float32).view(np.uint32)
    lowest = float(inside.min()) if inside.size else 0.0
    return {
        "values": int(inside.size),
        "zeros": len(values) - int(inside.size),
        "near 0": int((inside > -0.01).sum()),
        "bfloat16": int(((bits & 0xFFFF) == 0).sum()),
        "decimals": int((np.abs(inside * 1000 - np.rint(inside * 1000)) < 1e-6).sum()),  # three
        "lowest": {"value": lowest, "count": int((inside == lowest).sum())},
    }


def grid_in_words(found: dict[str, Any]) -> list[str]:
    """Notes on log-probs that look rounded or floored."""
    if not found:
        return []
    said, values, zeros, lowest = [], found["values"], found["zeros"], found["lowest"]
    if values >= _MANY and found["bfloat16"] >= 0.99 * values:
        said.append(
            "the log-probs look rounded to bfloat16 (off by up to 0.4%): errors add up along a response. Serve with "
            "float32 log-probs if you can"
        )
    elif values >= _MANY and found["decimals"] >= 0.99 * values:
        said.append("the log-probs look rounded to three decimals or fewer: errors add up along a response")
    if lowest["count"] >= 3 and lowest["value"] < -5:
        said.append(
            f"the lowest log-prob, {lowest['value']:g}, stands {lowest['count']} times: it may be a floor, not a value"
        )
    if sampling.renormalised_zeros(zeros, found.get("near 0", zeros), values + zeros):
        said.append(
            f"{zeros} of {values + zeros} log-probs are exactly 0 and only {found['near 0']} lie within 0.01 below: "
            "they look renormalised over what top-p kept, which makes each delta too low by the log of the kept mass. "
            "Say how they were made (--top_p, --top_k, --logprobs_of processed), or import log-probs taken before "
            "truncation (vLLM: logprobs_mode=raw_logprobs)"
        )
    elif zeros >= max(_MANY, 0.5 * (values + zeros)):
        said.append(
            f"{zeros} of {values + zeros} log-probs are exactly 0: of greedy decoding by processed "
            "log-probs, perhaps, or values that are missing"
        )
    return said


def listed(generation: Generation, noted: dict[str, Any]) -> dict[str, Any]:
    """Counts of what the source lists beside the log-probs: `add` joins those of several rows. {} if it lists nothing.

    `whole`: places where the listed probabilities add up to 1; `kept`: the sum of the masses that sampling kept, over
    the places `estimated`.
    """
    found = {"places": 0, "whole": 0, "estimated": 0, "kept": 0.0}
    for token in generation.tokens:
        values = tuple(value for value in token.listed if value > FLOOR)
        if not token.listed or any(math.isnan(value) for value in values):
            continue
        whole = math.fsum(math.exp(min(value, 0.0)) for value in values) >= 1 - 1e-3
        found["places"] += 1
        found["whole"] += whole
        if (mass := sampling.kept(values, noted)) is not None:
            found["estimated"] += 1
            found["kept"] += mass
    return found if found["places"] else {}


def listed_in_words(found: dict[str, Any], settings: list[dict[str, Any]]) -> list[str]:
    """Notes on what the listed log-probs say of truncation; `settings` are those that rows were sampled with."""
    said = []
    cut = [each for each in settings if sampling.truncated(each)]
    if not found or found["places"] < 20:
        return said
    if found["whole"] == found["places"]:
        if not cut or any(each.get("logprobs") != "processed" for each in cut):
            said.append(
                f"the log-probs listed at each place add up to 1 at all {found['places']} places, so they were "
                "renormalised over the tokens that top-k or top-p kept: each delta is too low by the log of the kept "
                "mass. Say so (--logprobs_of processed, --top_p, --top_k), or import log-probs taken before truncation"
            )
    elif found["estimated"]:
        mass = found["kept"] / found["estimated"]
        said.append(
            f"by the log-probs listed at {found['estimated']} places, sampling kept {mass:.3f} of the probability on "
            f"average ({math.log(mass):+.3f} nats a token): what was drawn came from that part alone"
        )
    return said


def answer(value: bool | None, why: str | None = None) -> dict[str, Any]:
    """One row's answer to a check: yes, no, or not checkable and why."""
    if value is None:
        return {"not checkable": {why or "": 1}}
    return {"yes" if value else "no": 1}


def add(total: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Join two counts, in place: numbers add up, dicts join; `lowest` keeps the lower value."""
    for key, value in more.items():
        if key == "lowest":
            before = total.get(key)
            if before is None or value["count"] and (not before["count"] or value["value"] < before["value"]):
                total[key] = dict(value)
            elif value["count"] and value["value"] == before["value"]:
                before["count"] += value["count"]
        elif isinstance(value, dict):
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value
    return total
