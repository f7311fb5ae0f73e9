"""How a response was sampled: the settings a source tells, and what they mean for a ratio of log-probs."""

import math
from typing import Any

from pear.importing.generation import STAGES

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
_TRUNCATES = ("top_p", "top_k", "min_p", "typical_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NAMES = {"repeat_penalty": "repetition_penalty", "typ_p": "typical_p"}  # llama.cpp's


def settings(source: Any) -> dict[str, float]:
    """The settings of KEYS that a request, or an object such as vLLM's SamplingParams, tells."""
    found = {}
    for name in (*KEYS, *_NAMES):
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if type(value) in (int, float) and math.isfinite(value):
            found[_NAMES.get(name, name)] = value
    return found


def changed(sampling: dict[str, Any]) -> dict[str, float]:
    """The settings that make what is drawn another distribution than the model's."""
    return {key: sampling[key] for key, neutral in KEYS.items() if key in sampling and sampling[key] not in neutral}


def in_words(sampling: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in changed(sampling).items())


def bias(sampling: dict[str, Any]) -> str | None:
    """What is wrong with log-ratios of responses that were sampled so; None where nothing is known to be."""
    found = changed(sampling)
    if not found:
        return None
    stage = sampling.get("logprobs")
    tempered = "temperature" in found
    truncated = [key for key in _TRUNCATES if key in found]
    penalized = [key for key in _PENALTIES if key in found]
    words = []
    if stage not in STAGES:
        words.append(
            "nothing tells whether the log-probs are of the model's own distribution or of the one that was drawn "
            "from: say --logprobs_of raw, tempered or processed"
        )
    if stage == "raw" and (tempered or truncated or penalized):
        words.append(
            "the log-probs are of the model at temperature 1, and what was drawn came from a narrower distribution: "
            "ratios are those of two models, not of the data"
        )
    elif stage == "tempered" and (truncated or penalized):
        words.append(
            f"the log-probs are tempered but were taken before {', '.join(truncated + penalized)}: each is too low by "
            "the log of what was cut away"
        )
    if truncated:
        words.append(
            f"{', '.join(truncated)} cut tokens off that the policy would have written at times: no weight brings "
            "those back"
        )
    return "; ".join(words) or None
