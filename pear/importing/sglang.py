"""Offline outputs of SGLang: `Engine.generate(..., return_logprob=True)`, or the server's `/generate`.

A record is that dict, with the `prompt` it answers (or `messages`) put beside: `text`, `output_ids`, `meta_info` with
`output_token_logprobs`, for each token `[logprob, id, text or null]`, `prompt_tokens`, `completion_tokens` and
`finish_reason`. `input_token_logprobs` hold the prompt's ids where they start at 0 (`logprob_start_len=0`).
`sampling_params` may stand beside.

Log-probs are of the tempered distribution (logits / temperature, before top-p and top-k) unless the engine ran with
SGLANG_RETURN_ORIGINAL_LOGPROB=1; then say `--logprobs_of raw`.
"""

from collections.abc import Iterator
from typing import Any

from pear.importing import sampling
from pear.importing.generation import Generation, Reject, Token, each, ids_of, need, numbers_of

_KNOWN = {"text", "output_ids", "meta_info", "prompt", "messages", "input_ids", "sampling_params", "behavior_policy"}


def generations(record: dict[str, Any]) -> Iterator[Generation | Reject]:
    """The one response of a record."""
    yield from each([record], _read)


def _read(record: dict[str, Any]) -> Generation:
    text = need(record, "text", str, "the record")
    meta = need(record, "meta_info", dict, "the record")
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list):
        raise Reject("no `output_token_logprobs` in `meta_info`: generate with return_logprob=True")
    tokens = [_token(entry) for entry in entries]
    top = meta.get("output_top_logprobs")
    if isinstance(top, list) and len(top) == len(tokens):
        tokens = [token._replace(listed=_listed(token, place)) for token, place in zip(tokens, top, strict=True)]
    output_ids = record.get("output_ids")
    if output_ids is not None and ids_of(output_ids, "`output_ids`") != [token.id for token in tokens]:
        raise Reject(f"`output_ids` ({len(output_ids)}) are not the ids of `output_token_logprobs` ({len(tokens)})")
    count = meta.get("completion_tokens")
    if type(count) is int and count != len(tokens):
        raise Reject(f"{len(tokens)} log-probs for {count} tokens (`completion_tokens`)", again=True)
    prompt_ids = _prompt_ids(record, meta)
    prompt = record.get("messages") or record.get("prompt")
    if prompt is None and prompt_ids is None:
        raise Reject("no `prompt` and no `messages`: SGLang's output does not have it, put it beside")
    finish = meta.get("finish_reason")
    prompt_count = meta.get("prompt_tokens")
    return Generation(
        prompt=prompt,
        completion=[{"role": "assistant", "content": text}] if isinstance(prompt, list) else text,
        tokens=tokens,
        prompt_ids=prompt_ids,
        prompt_count=prompt_count if type(prompt_count) is int else None,
        policy=record.get("behavior_policy"),
        sampling=sampling.settings(record.get("sampling_params") or {}),
        stage="tempered",
        finish=finish.get("type") if isinstance(finish, dict) else finish,
        cut=isinstance(finish, dict) and isinstance(finish.get("matched"), str),
        extra={key: value for key, value in record.items() if key not in _KNOWN},
    )


def _token(entry: Any) -> Token:
    if not isinstance(entry, (list, tuple)) or len(entry) < 2 or type(entry[1]) is not int:
        raise Reject(f"an entry of `output_token_logprobs` must be [logprob, id, text], got {entry!r:.100}")
    text = entry[2] if len(entry) > 2 else None
    return Token(entry[0], text.encode() if isinstance(text, str) else None, entry[1])


def _listed(token: Token, place: Any) -> tuple[float, ...]:
    """The log-probs of the most likely tokens at a place, and of the one that was written."""
    entries = [entry for entry in place or () if isinstance(entry, (list, tuple)) and len(entry) >= 2]
    own = [] if any(entry[1] == token.id for entry in entries) else [token.logprob]
    return numbers_of([*own, *(entry[0] for entry in entries)])


def _prompt_ids(record: dict[str, Any], meta: dict[str, Any]) -> list[int] | None:
    """Of `input_ids`, or of `input_token_logprobs` where these are the whole prompt."""
    if record.get("input_ids") is not None:
        return ids_of(record["input_ids"], "`input_ids`")
    entries = meta.get("input_token_logprobs")
    if not entries or len(entries) != meta.get("prompt_tokens"):
        return None
    return ids_of([entry[1] for entry in entries], "ids of `input_token_logprobs`")
