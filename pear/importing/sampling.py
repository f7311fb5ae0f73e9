"""How a response was sampled: the settings a source tells, and what they mean for a ratio of log-probs."""

import math
from typing import Any

from pear.importing.generation import STAGES
from pear.io import MAX_FLOAT32

# Each setting with the values that leave the model's distribution as it is.
KEYS: dict[str, tuple[float, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
RENORMALISED = 0.05  # a share of log-probs that are exactly 0, beside few just below: what top-p leaves
_TRUNCATES = ("top_p", "top_k", "min_p", "typical_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NAMES = {"repeat_penalty": "repetition_penalty", "typ_p": "typical_p"}  # llama.cpp's


def settings(source: Any) -> dict[str, float]:
    """The settings of KEYS that a request, or an object such as vLLM's SamplingParams, tells."""
    found = {}
    for name in (*KEYS, *_NAMES):
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if type(value) in (int, float) and abs(value) <= MAX_FLOAT32:
            found[_NAMES.get(name, name)] = value
    return found


def changed(sampling: dict[str, Any]) -> dict[str, float]:
    """The settings that make what is drawn another distribution than the model's."""
    return {key: sampling[key] for key, neutral in KEYS.items() if key in sampling and sampling[key] not in neutral}


def in_words(sampling: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in changed(sampling).items())


def truncated(sampling: dict[str, Any]) -> list[str]:
    """The settings that cut off what is least likely."""
    found = changed(sampling)
    return [key for key in _TRUNCATES if key in found]


def kept(listed: tuple[float, ...], sampling: dict[str, Any]) -> float | None:
    """The probability that top-k and top-p keep at a place, by the log-probs that are listed there, not renormalised.

    None where the list is too short to tell, where other settings decide, or where a temperature comes in between.
    """
    found = changed(sampling)
    top_k, top_p = found.get("top_k"), found.get("top_p")
    tempers = "temperature" in found and sampling.get("logprobs") != "tempered"
    known = sampling.get("logprobs") in ("raw", "tempered")
    if not known or tempers or not truncated(sampling) or not found.keys() <= {"top_p", "top_k", "temperature"}:
        return None
    probabilities, within = sorted((math.exp(min(value, 0.0)) for value in listed), reverse=True), 1.0
    if top_k is not None:
        if len(probabilities) < top_k:
            return None
        probabilities = probabilities[: int(top_k)]
        within = min(math.fsum(probabilities), 1.0)
    if top_p is None:
        return within
    total = 0.0
    for probability in probabilities:  # top-p is of what top-k has left
        total += probability
        if total >= top_p * within:
            return min(total, 1.0)
    return None


def renormalised_zeros(zeros: int, near: int, values: int) -> bool:
    """Whether log-probs look renormalised over what top-p kept: `near` are those in (-0.01, 0).

    A token that was kept alone has a log-prob of exactly 0, and hardly any has one just below: one that is not alone
    leaves a share to others. A model's own distribution has both.
    """
    return zeros >= max(20, RENORMALISED * values) and near < 0.1 * zeros and zeros < values


def bias(sampling: dict[str, Any]) -> str | None:
    """What is wrong with log-ratios of responses that were sampled so; None where nothing is known to be."""
    found = changed(sampling)
    if not found:
        return None
    stage = sampling.get("logprobs")
    tempered = "temperature" in found
    cut = truncated(sampling)
    penalized = [key for key in _PENALTIES if key in found]
    words = []
    if stage not in STAGES:
        words.append(
            "nothing tells whether the log-probs are of the model's own distribution or of the one that was drawn "
            "from: say --logprobs_of raw, tempered or processed"
        )
    if stage == "raw" and (tempered or cut or penalized):
        words.append(
            "the log-probs are of the model at temperature 1, and what was drawn came from a narrower distribution: "
            "ratios are those of two models, not of the data"
        )
    elif stage == "tempered" and (cut or penalized):
        words.append(
            f"the log-probs are tempered but were taken before {', '.join(cut + penalized)}: each is too low by "
            "the log of what was cut away"
        )
    elif stage == "processed" and cut:
        most = f", at most {-math.log(found['top_p']):.2g} a token" if cut == ["top_p"] else ""
        words.append(
            f"the log-probs were renormalised over what {', '.join(cut)} kept: each delta is too low by the log of the "
            f"kept mass{most}, if the student is to match the whole distribution"
        )
    if cut:
        words.append(
            f"{', '.join(cut)} cut tokens off that the policy would have written at times: no weight brings those back"
        )
    return "; ".join(words) or None
