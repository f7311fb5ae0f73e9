"""JSONL with columns of any names: a prompt, a completion, and a log-prob for each of its tokens."""

from collections.abc import Callable, Iterator
from typing import Any

from pear.importing.generation import Generation, Reject, Token, each, ids_of
from pear.io import DataError


def reader(
    *,
    prompt: str | None = None,
    completion: str = "completion",
    logprobs: str = "logprobs",
    ids: str | None = None,
    tokens: str | None = None,
    policy: str | None = None,
) -> Callable[[dict[str, Any]], Iterator[Generation | Reject]]:
    """A source that reads these columns; `ids` or `tokens` (strings, or lists of bytes) are one a log-prob.

    Without `prompt`, that is a chat in `messages`, or else the column "prompt". With neither `ids` nor `tokens` the
    completion is tokenised again, which needs the policy's tokenizer and equal counts.
    """
    if ids is not None and tokens is not None:
        raise DataError("--ids_column and --tokens_column: give one; ids are exact, so that one if you have both")
    chat, prompt = prompt is None, prompt or "prompt"
    taken = {prompt, completion, logprobs, ids, tokens, policy, "behavior_policy", "messages"}

    def column(record: dict[str, Any], name: str) -> Any:
        if record.get(name) is None:
            raise Reject(f"no column `{name}`; columns found: {', '.join(sorted(record)) or 'none'}")
        return record[name]

    def read(record: dict[str, Any]) -> Generation:
        values = column(record, logprobs)
        if not isinstance(values, list):
            raise Reject(f"`{logprobs}` must be a list of log-probs, got {type(values).__name__}")
        if ids is not None:
            pieces = [Token(None, id=token) for token in ids_of(column(record, ids), f"`{ids}`")]
        elif tokens is not None:
            found = column(record, tokens)
            if not isinstance(found, list):
                raise Reject(f"`{tokens}` must be a list, got {type(found).__name__}")
            pieces = [Token(None, _data(piece, tokens)) for piece in found]
        else:
            pieces = [Token(None)] * len(values)
        if len(pieces) != len(values):
            raise Reject(f"{len(values)} log-probs for {len(pieces)} tokens")
        text, asked = column(record, completion), (chat and record.get("messages")) or column(record, prompt)
        if isinstance(text, str) and isinstance(asked, list):
            text = [{"role": "assistant", "content": text}]
        return Generation(
            prompt=asked,
            completion=text,
            tokens=[piece._replace(logprob=value) for piece, value in zip(pieces, values, strict=True)],
            policy=column(record, policy) if policy is not None else record.get("behavior_policy"),
            extra={key: value for key, value in record.items() if key not in taken},
        )

    return lambda record: each([record], read)


def _data(piece: Any, name: str) -> bytes:
    if isinstance(piece, str):
        return piece.encode("utf-8", "surrogatepass")
    try:
        return bytes(piece if isinstance(piece, list) else None)  # bytes(n) would be n zeros
    except (TypeError, ValueError):
        raise Reject(f"an entry of `{name}` must be a string or a list of bytes, got {piece!r:.100}") from None
