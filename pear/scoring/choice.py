"""What becomes of a row: who scores it, or why nobody does."""

from typing import Any, Literal, NamedTuple

from pear.io import DataError

NONE = "none"  # as `behavior_policy`: nobody's words, human text say


class Choice(NamedTuple):
    what: Literal["score", "none", "pass"]
    policy: str = ""  # whose name `load_model` knows; of "score"
    estimated: bool = False  # by a policy that did not write the row


def behavior_choice(row: dict[str, Any], where: str, model: str | None, fallback: str | None) -> Choice | None:
    """What becomes of the row's behaviour log-probs; None: the row does not tell, and no fallback says.

    With a `model`, it is the one that wrote every row that names no policy. A row that names a policy is scored by that
    one or not at all. Log-probs that are there and sealed pass; a seal must have been checked before.

    Raises:
        DataError: a row of another policy than `model`; log-probs that contradict what the row names or have no seal.
    """
    named = row.get("behavior_policy")
    if named is not None and (not isinstance(named, str) or not named):
        raise DataError(f"{where}: `behavior_policy` must be a model's name, or {NONE!r}, got {named!r:.100}")
    if named == NONE:
        if has_logprobs(row):
            raise DataError(
                f"{where}: `behavior_policy` is {NONE!r}, but there are behaviour log-probs. Take them out, or name "
                "the policy that they are of."
            )
        return Choice("none")
    if model is not None:
        if named not in (None, model):
            raise DataError(
                f"{where}: the row names {named!r:.200} as its behaviour policy, and the model is {model!r}. Leave out "
                "--model, and each row is scored by the policy that it names; or, if both are one, give the model by "
                "the name that the row has, or take `behavior_policy` and `scored` out of the rows."
            )
        return Choice("score", model, named is not None and row.get("behavior_estimated") is True)
    if has_logprobs(row) and row.get("scored") is not None:
        return Choice("pass")
    if named is not None:
        return Choice("score", named, row.get("behavior_estimated") is True)
    if has_logprobs(row):
        raise DataError(
            f"{where}: behaviour log-probs that nobody has sealed (an older version wrote them, or another program), "
            "of a policy that the row does not name. Name it as `behavior_policy`, and the row is scored again; or "
            "take the log-probs out."
        )
    if fallback is None:
        return None
    return Choice("none") if fallback == NONE else Choice("score", fallback, estimated=True)


def has_logprobs(row: dict[str, Any]) -> bool:
    """Whether there are behaviour log-probs, by tokens or by bytes."""
    return row.get("behavior_logprobs") is not None or has_byte_logprobs(row)


def has_byte_logprobs(row: dict[str, Any]) -> bool:
    """Whether an API wrote them that told no ids."""
    spans = row.get("behavior_spans")
    return isinstance(spans, dict) and spans.get("logprobs") is not None
