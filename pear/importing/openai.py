"""Answers of OpenAI-compatible servers: /v1/chat/completions and /v1/completions with log-probs.

A record is `{"request": {...}, "response": {...}}`, or `{"messages" or "prompt", "response"}`; `body` inside either, as
in batch files, is looked into. Each of the response's `choices` is one response. Where the log-probs stand:

    chat            logprobs.content[] = {"token", "logprob", "bytes"}, of reasoning in logprobs.reasoning_content[]
    completions     logprobs = {"tokens", "token_logprobs", "text_offset"}, with `echo` the prompt's in front
    llama.cpp       logprobs.content[] for both, with "id"
    vLLM            beside these `token_ids`, `prompt_token_ids` (return_token_ids), tokens as "token_id:5", and
                    `prompt_logprobs`, as offline (vllm.py)

A record with `prompt` and `completion` of its own is a text that was scored: the server was given prompt + completion.
"""

from collections.abc import Iterator
from typing import Any

from pear.importing import sampling, vllm
from pear.importing.generation import Generation, Reject, Token, completion_text, each, ids_of, need, numbers_of

_KNOWN = {"request", "response", "prompt", "messages", "completion", "custom_id", "behavior_policy", "error"}


def generations(record: dict[str, Any], stage: str | None = None) -> Iterator[Generation | Reject]:
    """The responses of a record, one for each of `choices`; `stage` of generation.STAGES where the server is known."""
    try:
        request = _body(need(record, "request", dict, "the record") if record.get("request") is not None else {})
        response = _body(need(record, "response", dict, "the record"))
        choices = need(response, "choices", list, "the response")
        prompt = record.get("messages") or record.get("prompt") or request.get("messages") or request.get("prompt")
        if not isinstance(prompt, (str, list)):
            raise Reject("no `messages` and no `prompt`, neither in `request` nor beside `response`")
        if not choices:
            raise Reject("the response has no choices", again=True)
    except Reject as reason:
        yield reason
        return
    usage = response.get("usage") if isinstance(response.get("usage"), dict) else {}
    common = {
        "policy": record.get("behavior_policy") or response.get("model") or request.get("model"),
        "sampling": sampling.settings(request),
        "stage": stage,
        "prompt_count": usage.get("prompt_tokens") if type(usage.get("prompt_tokens")) is int else None,
        "extra": {key: value for key, value in record.items() if key not in _KNOWN},
    }
    for key in ("tools", "chat_template_kwargs"):
        if request.get(key) and key not in common["extra"]:
            common["extra"][key] = request[key]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], dict):
        yield Reject("`prompt` is a list of ids or of several prompts: put the text, or `messages`, beside `response`")
        return

    def read(choice: Any) -> Generation:
        if "completion" in record:
            return _scored(choice, response, prompt, record["completion"], common)
        ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids") if isinstance(choice, dict) else None
        seen = {
            "prompt_ids": ids_of(ids, "`prompt_token_ids`") if ids else None,
            "cut": _stopped(choice, request),
        }
        if isinstance(prompt, str):
            return _text_choice(choice, prompt, bool(request.get("echo")), common | seen)
        return _chat_choice(choice, prompt, common | seen)

    yield from each(choices, read)


def _stopped(choice: Any, request: dict[str, Any]) -> bool:
    """Whether a stop string may have ended a choice; vLLM (`stop_reason`) and SGLang (`matched_stop`) tell."""
    for key in ("stop_reason", "matched_stop"):
        if isinstance(choice, dict) and key in choice:
            return isinstance(choice[key], str)
    return bool(request.get("stop"))


def _body(value: dict[str, Any]) -> dict[str, Any]:
    return value["body"] if isinstance(value.get("body"), dict) else value


def _chat_choice(choice: Any, messages: list[dict[str, Any]], common: dict[str, Any]) -> Generation:
    message = need(choice, "message", dict, "a choice")
    if message.get("tool_calls") or message.get("function_call"):
        raise Reject("the answer calls a tool: the text that the log-probs are of is not in it")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content") or ""
    if not content and not reasoning:
        raise Reject("an empty answer", again=True)
    completion = {"role": message.get("role") or "assistant", "content": content}
    if reasoning:
        completion["reasoning_content"] = reasoning
    return Generation(
        prompt=messages,
        completion=[completion],
        tokens=_tokens(choice),
        finish=choice.get("finish_reason"),
        **common,
    )


def _text_choice(choice: Any, prompt: str, echo: bool, common: dict[str, Any]) -> Generation:
    text = need(choice, "text", str, "a choice")
    tokens = _tokens(choice)
    if echo and text.startswith(prompt):
        start = _after(tokens, prompt)
        tokens, text = tokens[start:], text[len(prompt) :]
    if not text:
        raise Reject("an empty answer", again=True)
    return Generation(prompt=prompt, completion=text, tokens=tokens, finish=choice.get("finish_reason"), **common)


def _tokens(choice: dict[str, Any]) -> list[Token]:
    """The choice's tokens, in whichever form its log-probs stand."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise NoLogprobs
    if isinstance(logprobs.get("content"), list) or isinstance(logprobs.get("reasoning_content"), list):
        entries = [*(logprobs.get("reasoning_content") or []), *(logprobs.get("content") or [])]
        tokens = [_chat_token(entry) for entry in entries]
    else:
        texts = need(logprobs, "tokens", list, "`logprobs`")
        values = need(logprobs, "token_logprobs", list, "`logprobs`")
        if len(texts) != len(values):
            raise Reject(f"{len(values)} log-probs for {len(texts)} tokens", again=True)
        tokens = [_token(text, value) for text, value in zip(texts, values, strict=True)]
        top = logprobs.get("top_logprobs")
        if isinstance(top, list) and len(top) == len(tokens):
            places = [place if isinstance(place, dict) else {} for place in top]
            tokens = [
                token._replace(listed=numbers_of(({text: token.logprob} | place).values()) if place else ())
                for token, text, place in zip(tokens, texts, places, strict=True)
            ]
    if not tokens:
        raise Reject("no log-probs in the answer: its list of tokens is empty", again=True)
    ids = choice.get("token_ids")
    if ids:
        if len(ids_of(ids, "`token_ids`")) > len(tokens):
            raise Reject(f"{len(tokens)} log-probs for {len(ids)} tokens", again=True)
        if len(ids) == len(tokens):  # otherwise the prompt's are in front (echo), and have no ids
            tokens = [token._replace(id=id) for token, id in zip(tokens, ids, strict=True)]
    return tokens


def _chat_token(entry: Any) -> Token:
    if not isinstance(entry, dict):
        raise Reject(f"an entry of `logprobs.content` must be an object, got {entry!r:.100}", again=True)
    token = _token(entry.get("token"), entry.get("logprob"))
    top = [other for other in entry.get("top_logprobs") or () if isinstance(other, dict)]
    if top:
        own = [] if any(other.get("token") == entry.get("token") for other in top) else [entry.get("logprob")]
        token = token._replace(listed=numbers_of([*own, *(other.get("logprob") for other in top)]))
    data, number = entry.get("bytes"), entry.get("id")
    if isinstance(data, list):
        try:
            token = token._replace(data=bytes(data))
        except (TypeError, ValueError):
            raise Reject(f"`bytes` of a token must be numbers from 0 to 255, got {data!r:.100}") from None
    return token._replace(id=number) if type(number) is int and number >= 0 else token


def _token(text: Any, logprob: Any) -> Token:
    if not isinstance(text, str):
        raise Reject(f"a token must be a string, got {text!r:.100}", again=True)
    if text.startswith("token_id:") and text[9:].isdigit():  # vLLM, with return_tokens_as_token_ids
        return Token(logprob, id=int(text[9:]))
    if text.startswith("bytes:\\x"):  # OpenAI's completions, for pieces of a character
        return Token(logprob, text[6:].encode().decode("unicode_escape").encode("latin-1"))
    return Token(logprob, text.encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------------------------------------------------
# A text that was scored


def _scored(choice: Any, response: dict[str, Any], prompt: Any, completion: Any, common: dict[str, Any]) -> Generation:
    """The completion's tokens among those of prompt + completion. With ids, all tokens: `rows` finds the start."""
    if not isinstance(choice, dict):
        raise Reject(f"a choice must be a JSON object, got {type(choice).__name__}", again=True)
    common = common | {"written": False, "sampling": {}, "prompt": prompt, "completion": completion}
    entries = choice.get("prompt_logprobs") or response.get("prompt_logprobs")
    ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
    if entries is not None and ids:
        tokens = vllm.prompt_tokens(ids_of(ids, "`prompt_token_ids`"), entries)
        return Generation(tokens=tokens, whole=True, **common)
    if not isinstance(prompt, str):
        raise Reject("a chat that was scored needs `prompt_logprobs` and `prompt_token_ids`")
    tokens = _tokens(choice)
    if entries is None and len(tokens) <= 1 < len(completion_text(completion)):
        raise NotOffered
    if common["prompt_count"] is not None:
        tokens = tokens[: common["prompt_count"]]  # behind them stands what had to be generated
    return Generation(tokens=tokens[_after(tokens, prompt) :], **common)


def scored_ids(answer: dict[str, Any], prompt: Any, completion: Any, ids: list[int]) -> Generation:
    """The answer to a request that gave `ids`, those of prompt and completion, with `prompt_logprobs` or `echo`.

    Raises:
        Reject: fewer log-probs than ids, or of other ids, or of more: a server that puts a start token in front.
        NotOffered: no log-probs of the ids at all.
    """
    choices = need(answer, "choices", list, "the response")
    choice = choices[0] if choices else {}
    entries = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    common = {"prompt": prompt, "completion": completion, "written": False, "whole": True}
    if entries is not None:
        told = choice.get("prompt_token_ids") or answer.get("prompt_token_ids") or ids
        return Generation(tokens=vllm.prompt_tokens(ids_of(told, "`prompt_token_ids`"), entries), **common)
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict) or len(tokens := _tokens(choice)) <= 1 < len(ids):
        raise NotOffered
    usage = answer.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if type(counted) is int and counted != len(ids):
        raise Reject(f"the server was given {len(ids)} tokens and counted {counted}: it has put others beside them")
    return Generation(tokens=[token._replace(id=None) for token in tokens], **common)


class NoLogprobs(Reject):
    """An answer without any log-probs; nothing tells whether the server ever gives some."""

    def __init__(self) -> None:
        super().__init__("no log-probs in the answer: ask with `logprobs` (chat: true, completions: 1)", again=True)


class NotOffered(Reject):
    """The server gives log-probs of what it writes, not of what it is given."""

    def __init__(self) -> None:
        super().__init__("the server gives no log-probs of a text that it is given")


def _after(tokens: list[Token], prompt: str) -> int:
    """How many tokens the prompt takes; none may stand for its end and the completion's start."""
    wanted, found = prompt.encode(), b""
    for number, token in enumerate(tokens):
        if found == wanted:
            return number
        if token.data is None or len(found) > len(wanted):
            break
        found += token.data
    if found == wanted:
        return len(tokens)
    raise Reject("the prompt does not end where a token ends, so the completion's log-probs cannot be told apart")
