"""What every source is read into: one response with the log-probs that came with it; and why one could not be."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pear.io import MAX_FLOAT32

Messages = list[dict[str, Any]]

# How far the sampler had come when it wrote a log-prob down (docs/import.md): the model's own distribution; divided by
# the temperature; or what was drawn from, after top-p and the rest.
STAGES = ("raw", "tempered", "processed")
# Finish reasons of a response that the policy did not end: nothing that it drew stands behind the text.
UNFINISHED = ("length", "abort", "content_filter")


class Reject(ValueError):
    """This row cannot be imported; the message says why. `again`: another answer of the server may be better."""

    def __init__(self, reason: str, *, again: bool = False):
        super().__init__(reason)
        self.again = again


class Token(NamedTuple):
    """One token of a response, as far as the source tells."""

    logprob: Any  # whatever stood there; `checks.check_logprobs` looks at it
    data: bytes | None = None  # what it stands for in the text
    id: int | None = None
    listed: tuple[float, ...] = ()  # log-probs that the source lists at this place, its own among them; () if none


@dataclass
class Generation:
    """One response. `tokens` are those that the policy wrote or was asked about, the end-of-turn token among them."""

    prompt: str | Messages | None  # None: the source has ids alone
    completion: str | Messages
    tokens: list[Token]
    prompt_ids: list[int] | None = None  # the very ids that the policy saw
    prompt_count: int | None = None  # how many they were, by the server's account
    policy: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # settings as `sampling.KEYS`
    stage: str | None = None  # one of STAGES, where the source tells
    total: float | None = None  # the sum of the log-probs, by the source's account
    finish: str | None = None  # "stop", "length", ...
    cut: bool = False  # a stop string ended it: tokens may stand behind the text's end
    written: bool = True  # False: a given text, scored
    whole: bool = False  # `tokens` are those of prompt and completion; nothing predicts the first
    extra: dict[str, Any] = field(default_factory=dict)  # the user's own keys, `label` and `tools`


def completion_pieces(completion: str | Messages) -> list[str]:
    """The completion's text, in order: the string, or each message's `reasoning_content` and `content`."""
    if isinstance(completion, str):
        return [completion]
    return [message[key] for message in completion for key in ("reasoning_content", "content") if message.get(key)]


def completion_text(completion: str | Messages) -> str:
    return "".join(completion_pieces(completion))


def read_all(found: Iterable[Any]) -> list[Any]:
    """The generations and rejects of a record. What a source did not foresee in it is a reject too, not a crash."""
    items: list[Any] = []
    try:
        items.extend(found)
    except Reject as reason:
        items.append(reason)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        items.append(Reject(f"not of the form that this source's records have ({error!r:.200})", again=True))
    return items


def each(choices: Iterable[Any], read: Any) -> Iterator[Generation | Reject]:
    """`read(choice)` of each; one that cannot be read does not keep the others away."""
    for choice in choices:
        try:
            yield read(choice)
        except Reject as reason:
            yield reason


def need(record: Any, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """`record[key]`, which must be of `kind`; `what` names the record in the message."""
    if not isinstance(record, dict):
        raise Reject(f"{what} must be a JSON object, got {type(record).__name__}", again=True)
    if record.get(key) is None:
        raise Reject(f"{what} has no `{key}`; keys found: {', '.join(sorted(map(str, record))) or 'none'}", again=True)
    if not isinstance(record[key], kind):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise Reject(f"`{key}` of {what} must be {names}, got {type(record[key]).__name__}", again=True)
    return record[key]


def numbers_of(values: Iterable[Any]) -> tuple[float, ...]:
    """Those of the values that are numbers; what a source lists beside a log-prob is read as far as it goes."""
    return tuple(float(value) for value in values if type(value) in (int, float) and abs(value) <= MAX_FLOAT32)


def ids_of(values: Any, what: str) -> list[int]:
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise Reject(f"{what} must be a list of token ids >= 0, got {values!r:.100}")
    return values
