"""What an import found: the lines of its summary, and the JSON beside the scored file."""

import json
from typing import Any

from pear.importing import checks, sampling
from pear.notes import Notes


def report(counts: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The report: `facts` of the run, and what `counts` (joined by `checks.add`) say: checks, sampling and warnings."""
    rows, tokens, floored = (counts.get(key, 0) for key in ("rows", "tokens", "without a value"))
    listed = []
    for name, means in checks.CHECKS.items():
        found = counts.get("checks", {}).get(name)
        if found:
            unknown = found.get("not checkable", {})
            entry: dict[str, Any] = {"check": name, "yes": found.get("yes", 0), "no": found.get("no", 0)}
            entry["not checkable"] = sum(unknown.values())
            if unknown:
                entry["why not"] = unknown
            if entry["no"]:
                entry["means"] = means
            listed.append(entry)
    return {
        **facts,
        "rows": rows,
        "tokens": tokens,
        "mean_logprob": counts["logprob"] / (tokens - floored) if tokens > floored else None,
        "kinds": counts.get("kinds", {}),
        "policies": counts.get("policies", {}),
        "special_tokens": counts.get("marks", {}),
        "cut_at_their_length": counts.get("cut at their length", 0),
        "tokens_behind_a_stop_string": counts.get("behind a stop string", 0),
        "checked_in_every_row": [
            "as many log-probs as tokens",
            "each log-prob a finite number, at most 0, and not the floor of -9999 (of byte rows: left out)",
            "the tokens' bytes add up to the text, or the ids to what the tokenizer makes of it",
        ],
        "checks": listed,
        "sampling": _settings(counts),
        "warnings": _warnings(counts, listed),
    }


def _settings(counts: dict[str, Any]) -> list[dict[str, Any]]:
    found = counts.get("sampling", {})
    return [{"settings": None if key == "unknown" else json.loads(key), "rows": n} for key, n in sorted(found.items())]


def _warnings(counts: dict[str, Any], listed: list[dict[str, Any]]) -> list[str]:
    said = [f"{entry['no']} rows: {entry['means']}" for entry in listed if entry["no"]]
    for entry in _settings(counts):
        if entry["settings"] is None:
            said.append(
                f"{entry['rows']} rows: the data does not tell how they were sampled; give --temperature, --top_p and "
                "the others if they were not 1 or off, and --logprobs_of (raw, tempered or processed: renormalised "
                "after top-p or top-k), since ratios depend on it"
            )
        elif words := sampling.bias(entry["settings"]):
            said.append(f"{entry['rows']} rows sampled with {sampling.in_words(entry['settings'])}: {words}")
    told = [entry["settings"] for entry in _settings(counts) if entry["settings"] is not None]
    said += checks.listed_in_words(counts.get("listed", {}), told)
    said += checks.grid_in_words(counts.get("grid", {}))
    if floored := counts.get("without a value"):
        said.append(
            f"{floored} of {counts['tokens']} log-probs are -9999, which says no more than unlikely: those tokens are "
            "left out of every ratio"
        )
    if behind := counts.get("behind a stop string"):
        said.append(f"{behind} tokens behind the end of the texts (stop strings) were left off")
    return said + noted(counts).in_words()


def noted(counts: dict[str, Any]) -> Notes:
    """What the rows' tokens have that one may not expect, by line of the data."""
    notes = Notes()
    for note, lines_of in counts.get("notes", {}).items():
        for line in sorted(map(int, filter(str.isdigit, lines_of))):
            notes.add(line, (note,))
    return notes


def lines(found: dict[str, Any]) -> list[str]:
    """The report in lines for a terminal: what was checked, what could not be, warnings."""
    said = []
    for entry in found["checks"]:
        parts = [f"{entry[key]} {key}" for key in ("yes", "no", "not checkable") if entry[key]]
        why = f" ({'; '.join(entry['why not'])})" if "why not" in entry else ""
        said.append(f"  {entry['check']}: {', '.join(parts)}{why}")
    return said + [f"warning: {warning}" for warning in found["warnings"]]
