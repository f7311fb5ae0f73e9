"""Offline outputs of vLLM: `LLM.generate` and `LLM.chat` give RequestOutput objects; `from_vllm` makes records of them.

A record is a RequestOutput as a JSON object: `prompt`, `prompt_token_ids`, `outputs` with for each response `text`,
`token_ids`, `logprobs` (for each token `{id: {"logprob", "rank", "decoded_token"}}`, the sampled token among them),
`cumulative_logprob`, `finish_reason`. Beside them may stand `messages` (the chat that the prompt was made of),
`sampling_params`, `behavior_policy` and keys of the user's. A record with `completion` and `prompt_logprobs` is a text
that was scored: `prompt_token_ids` are then prompt and completion, and the first of `prompt_logprobs` is None.

Log-probs are raw by default (`logprobs_mode="raw_logprobs"`: before temperature and penalties); `processed_logprobs`
are what was drawn from.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pear.importing import sampling
from pear.importing.generation import Generation, Reject, Token, each, ids_of, need, numbers_of

_KNOWN = {
    "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics", "lora_request",
    "encoder_prompt", "encoder_prompt_token_ids", "num_cached_tokens", "kv_transfer_params", "kv_transfer_params_list",
    "ec_transfer_params", "prompt_embeds", "messages", "completion", "sampling_params", "behavior_policy",
    "logprobs_mode",
}  # fmt: skip
_STAGES = {"raw_logprobs": "raw", "processed_logprobs": "processed"}


def from_vllm(
    outputs: Iterable[Any],
    sampling_params: Any = None,
    *,
    policy: str | None = None,
    logprobs_mode: str = "raw_logprobs",
) -> Iterator[dict[str, Any]]:
    """Records for `pear import --source vllm`, from what `LLM.generate` returned.

        write_jsonl("outputs.jsonl", from_vllm(llm.generate(prompts, params), params, policy="Qwen/Qwen3-32B"))

    Of each position the token that was written is kept, and of its `logprobs=k` neighbours the log-probs (`others`).

    Args:
        outputs: vLLM's RequestOutput objects; `SamplingParams(logprobs=1)` is enough.
        sampling_params: the SamplingParams they were sampled with, or one for each; noted in each record.
        policy: the model's name.
        logprobs_mode: that of the engine.
    """
    outputs = list(outputs)
    params = list(sampling_params) if isinstance(sampling_params, (list, tuple)) else [sampling_params] * len(outputs)
    for output, param in zip(outputs, params, strict=True):
        record: dict[str, Any] = {
            "prompt": output.prompt,
            "prompt_token_ids": None if output.prompt_token_ids is None else list(output.prompt_token_ids),
            "outputs": [
                {
                    "index": choice.index,
                    "text": choice.text,
                    "token_ids": list(choice.token_ids),
                    "logprobs": _written(choice.logprobs, choice.token_ids),
                    "cumulative_logprob": choice.cumulative_logprob,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
                for choice in output.outputs
            ],
        }
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = _written(output.prompt_logprobs, output.prompt_token_ids)
        if param is not None:
            record["sampling_params"] = sampling.settings(param)
        if policy is not None:
            record["behavior_policy"] = policy
        yield record | {"logprobs_mode": logprobs_mode}


def _written(positions: Any, ids: Any) -> list[dict[str, Any] | None] | None:
    """Of each position the entry of the token that stands there, as JSON."""
    if positions is None:
        return None
    kept: list[dict[str, Any] | None] = []
    for entries, token in zip(positions, ids, strict=False):
        entry = None if entries is None else entries.get(token)
        if entry is None:
            kept.append(None)
        else:
            own = {"logprob": float(entry.logprob), "decoded_token": entry.decoded_token}
            if len(entries) > 1:  # what they add up to tells of truncation
                own["others"] = [float(other.logprob) for number, other in entries.items() if number != token]
            kept.append({str(token): own})
    return kept


def generations(record: dict[str, Any]) -> Iterator[Generation | Reject]:
    """The responses of a record, one for each of `outputs`."""
    try:
        common = _common(record)
        if "completion" in record:
            choices: list[Any] = [_scored(record)]
        else:
            choices = need(record, "outputs", list, "the record")
    except Reject as reason:
        yield reason
        return
    yield from each(choices, lambda choice: choice if isinstance(choice, Generation) else _read(choice, common))


def _common(record: dict[str, Any]) -> dict[str, Any]:
    ids = record.get("prompt_token_ids")
    if ids is not None:
        ids_of(ids, "`prompt_token_ids`")
    prompt = record.get("messages") or record.get("prompt")
    if prompt is None and ids is None:
        raise Reject("the record has neither `prompt` nor `prompt_token_ids`")
    return {
        "prompt": prompt,
        "prompt_ids": ids,
        "policy": record.get("behavior_policy"),
        "sampling": sampling.settings(record.get("sampling_params") or {}),
        "stage": _STAGES.get(record.get("logprobs_mode", "raw_logprobs")),
        "extra": {key: value for key, value in record.items() if key not in _KNOWN},
    }


def _read(choice: Any, common: dict[str, Any]) -> Generation:
    text = need(choice, "text", str, "an entry of `outputs`")
    ids = ids_of(need(choice, "token_ids", list, "an entry of `outputs`"), "`token_ids`")
    if choice.get("logprobs") is None:
        raise Reject("no `logprobs` in `outputs`: sample with SamplingParams(logprobs=1)")
    entries = choice["logprobs"]
    if not isinstance(entries, list) or len(entries) != len(ids):
        found = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise Reject(f"{found} log-probs for {len(ids)} tokens", again=True)
    chat = isinstance(common["prompt"], list)
    return Generation(
        completion=[{"role": "assistant", "content": text}] if chat else text,
        tokens=[token_of(entry, token) for entry, token in zip(entries, ids, strict=True)],
        total=choice.get("cumulative_logprob"),
        finish=choice.get("finish_reason"),
        cut=isinstance(choice.get("stop_reason"), str),
        **common,
    )


def token_of(entry: Any, token: int) -> Token:
    """The token's own entry among `{id: {"logprob", "decoded_token"}}`; ids are strings where JSON made them so."""
    if not isinstance(entry, dict):
        return Token(entry, id=token)
    found = entry.get(str(token), entry.get(token))
    if found is None:
        raise Reject(f"no log-prob of token {token} among those at its place ({', '.join(map(str, entry))})")
    if not isinstance(found, dict):
        return Token(found, id=token)
    decoded = found.get("decoded_token")
    others = found.get("others")
    if not isinstance(others, list):
        others = [other.get("logprob") for other in entry.values() if isinstance(other, dict) and other is not found]
    listed = numbers_of([found.get("logprob"), *others])
    return Token(found.get("logprob"), decoded.encode() if isinstance(decoded, str) else None, token, listed)


def _scored(record: dict[str, Any]) -> Generation:
    ids = ids_of(need(record, "prompt_token_ids", list, "the record"), "`prompt_token_ids`")
    entries = need(record, "prompt_logprobs", list, "the record (it has `completion`, so it is a text that was scored)")
    common = _common(record)
    if common["prompt"] is None:
        raise Reject("the record has `completion` but no `prompt`")
    del common["prompt_ids"]
    tokens = prompt_tokens(ids, entries)
    return Generation(completion=record["completion"], tokens=tokens, written=False, whole=True, **common)


def prompt_tokens(ids: list[int], entries: Any) -> list[Token]:
    """Tokens of a text that was given to the model: prompt and completion. Nothing predicts the first."""
    if not isinstance(entries, list) or len(entries) != len(ids):
        found = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise Reject(f"{found} entries in `prompt_logprobs` for {len(ids)} tokens", again=True)
    return [
        Token(None, id=ids[0]),
        *(token_of(entry, token) for entry, token in zip(entries[1:], ids[1:], strict=True)),
    ]
