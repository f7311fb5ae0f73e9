"""Rows through a server: prompts get responses with log-probs, and given completions get log-probs alone."""

import threading
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.chat import TemplateLimit
from pear.importing import openai
from pear.importing.client import Client, Failed, ServerError
from pear.importing.generation import Generation, Reject, read_all
from pear.importing.openai import NoLogprobs, NotOffered
from pear.importing.rows import Converter
from pear.io import DataError
from pear.rows import prompt_and_completion, tokenize_row
from pear.strict_json import unwritable

# By the `owned_by` of a server's /models: what it adds by itself unless it is told not to; the stage of its log-probs.
NEUTRAL = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0},
}
STAGE_OF = {"vllm": "raw", "sglang": "tempered", "llamacpp": "raw"}
OURS = ("model", "prompt", "messages", "n", "stream", "logprobs", "top_logprobs", "echo", "prompt_logprobs")


class Live:
    """A server and what it is asked for.

    Args:
        model: what the server calls its model; None takes the one that it lists, if it is one.
        sampling: `temperature`, `top_p`, `max_tokens`, `seed` (of row i: seed + i) as the API names them.
        n: responses for each prompt.
        extra: further fields of a request, such as {"top_k": 20} or {"stop": ["\\n"]}; None takes a field away.
    """

    def __init__(
        self,
        client: Client,
        model: str | None,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        sampling: dict[str, Any],
        n: int = 1,
        extra: dict[str, Any] | None = None,
    ):
        if n < 1:
            raise DataError(f"--n must be at least 1, got {n}")
        if taken := sorted(set(extra or {}) & set(OURS)):
            raise DataError(f"--extra_body must not hold {', '.join(taken)}: the command itself sets it")
        self.client, self.tokenizer, self.n = client, tokenizer, n
        self.kind, self.model = self._look(model)
        self.sampling = {**sampling, **NEUTRAL.get(self.kind, {}), **(extra or {})}
        self.stage = STAGE_OF.get(self.kind)
        self.seen = False  # an answer with log-probs
        self._one = threading.Lock()  # tokenizers are not made for several threads at once

    def _look(self, model: str | None) -> tuple[str, str]:
        """Which program the server is, and its model's name. A server without /models is asked all the same."""
        try:
            once = None if model is None else 0  # with a name given, only the kind of server is to be learned
            listed = self.client.ask("GET", "/models", None, lambda answer: answer.get("data"), once)
        except ServerError as error:
            if error.status not in (404, 405):
                raise
            listed = None
        except Failed as error:
            if model is None:
                raise DataError(
                    f"{self.client.url}/models: {error}. Is the server running, and --url right? If it cannot list its "
                    "models, name one: --server_model."
                ) from None
            listed = None
        except Reject as error:
            raise DataError(f"{self.client.url}/models: {error}") from None
        listed = listed if isinstance(listed, list) else []
        models = [item for item in listed if isinstance(item, dict) and isinstance(item.get("id"), str)]
        kinds = [item.get("owned_by") for item in models if item["id"] == model] or [m.get("owned_by") for m in models]
        if model is None:
            if len(models) != 1:
                names = ", ".join(item["id"] for item in models[:20]) or "none"
                raise DataError(f"--server_model: name the model to ask; the server lists {names}")
            model = models[0]["id"]
        return next((kind for kind in NEUTRAL if kind in kinds), "openai"), model

    def settings(self) -> dict[str, Any]:
        """What decides the answers: part of what names the side file."""
        return {"url": self.client.url, "server_model": self.model, "n": self.n, **self.sampling}

    # -----------------------------------------------------------------------------------------------------------------

    def rows(self, row: dict[str, Any], line: int, converter: Converter, where: str) -> list[Any]:
        """For each response wanted: a scored row with its counts, or a Reject.

        Raises:
            ServerError, DataError: no row can be had from this server.
            Stopped: the client was.
        """
        latest: list[Any] = []

        def read(answer: dict[str, Any]) -> list[Any]:
            latest[:] = [self._convert(found, converter, where) for found in answers(answer)]
            for found in latest:
                if isinstance(found, NotOffered):
                    raise found
                if isinstance(found, Reject) and found.again:
                    raise found
            self.seen = True
            return latest

        if reason := unwritable(row):
            return [Reject(f"the row cannot be written as JSON: {reason}")]
        try:
            own = self._own_keys(row, converter)
            if "completion" in row or _last_role(row) == "assistant":
                path, body, answers = self._score(row, own, where)
            else:
                path, body, answers = self._generate(row, own, line)
            return self.client.ask("POST", path, body, read)
        except NotOffered as error:
            raise DataError(
                f"{self.client.url}: {error} (asked for prompt_logprobs or echo), so the completion of {where} cannot "
                "be scored there. Score them by `pear score --model`, or serve the model with vLLM."
            ) from None
        except ServerError as error:
            hint = "(It was asked for log-probs, which not every server gives.)"
            raise ServerError(f"{error} {hint}", error.status) from None
        except NoLogprobs as error:
            if not self.seen:
                raise DataError(
                    f"{self.client.url}: {error}. It was asked so, and has given none to any row: does this server "
                    "give log-probs at all? (transformers serve does not.) Score its texts by `pear score --model`."
                ) from None
            return [error]
        except Reject as error:
            if any(not isinstance(found, Reject) for found in latest):
                return latest  # the good ones of n
            return [error]

    def _convert(self, found: Generation | Reject, converter: Converter, where: str) -> Any:
        if isinstance(found, Reject):
            return found
        try:
            with self._one:
                return converter.row(found, where)
        except Reject as error:
            return error

    def _own_keys(self, row: dict[str, Any], converter: Converter) -> dict[str, Any]:
        for key in ("messages", "prompt"):
            found = row.get(key)
            if isinstance(found, list) and not all(map(_is_message, found)):
                raise Reject(f"each of `{key}` must be a message with a `role`, got {found!r:.100}")
        named, policy = row.get("behavior_policy"), converter.policy or self.model
        if named is not None and named != policy:
            raise Reject(f"the row's behavior_policy is {named!r}, the server's model {policy!r} (--policy renames it)")
        return {key: value for key, value in row.items() if key not in ("prompt", "completion", "messages")}

    def _of_row(self, found: Generation | Reject, own: dict[str, Any]) -> Generation | Reject:
        if isinstance(found, Generation):
            found.extra, found.policy = own, None  # the converter's
        return found

    def _generate(self, row: dict[str, Any], own: dict[str, Any], line: int) -> tuple[str, dict[str, Any], Any]:
        prompt = row.get("messages") or row.get("prompt")
        if not isinstance(prompt, (str, list)) or not prompt:
            raise Reject("a row to generate from has `prompt`, a string or messages, or `messages`, a list")
        body: dict[str, Any] = {"model": self.model, "n": self.n, "stream": False, **self.sampling}
        if body.get("seed") is not None:
            body["seed"] += line
        for key in ("tools", "chat_template_kwargs"):
            if row.get(key):
                body[key] = row[key]
        body = {key: value for key, value in body.items() if value is not None}  # `extra` takes a field away by null
        if isinstance(prompt, str):
            path = "/completions"
            body |= {"prompt": prompt, "logprobs": 1}
        else:
            path = "/chat/completions"
            body |= {"messages": prompt, "logprobs": True, "top_logprobs": 1}

        def answers(answer: dict[str, Any]) -> list[Any]:
            found = read_all(openai.generations({"request": body, "response": answer}, self.stage))
            found = [self._of_row(item, own) for item in found]
            missing = self.n - len(found)
            if missing > 0:
                found.append(Reject(f"{len(found)} responses instead of {self.n}", again=True))
            return found[: self.n + 1] if missing > 0 else found[: self.n]

        return path, body, answers

    def _score(self, row: dict[str, Any], own: dict[str, Any], where: str) -> tuple[str, dict[str, Any], Any]:
        try:
            row = prompt_and_completion(row, where)
            with self._one:
                tokens = None if self.tokenizer is None else tokenize_row(row, self.tokenizer, where)
        except TemplateLimit:
            raise
        except DataError as error:
            raise Reject(str(error).removeprefix(f"{where}: ")) from None
        if tokens is None and not isinstance(row["prompt"], str):
            raise Reject("a chat is scored by its tokens: give --tokenizer")
        asked: Any = row["prompt"] + row["completion"] if tokens is None else tokens.input_ids
        body: dict[str, Any] = {"model": self.model, "prompt": asked, "max_tokens": 1, "temperature": 0}
        if self.kind == "vllm" and tokens is not None:
            body |= {"prompt_logprobs": 0, "return_token_ids": True}
        else:
            body |= {"echo": True, "logprobs": 1}

        def answers(answer: dict[str, Any]) -> list[Any]:
            record = {"prompt": row["prompt"], "completion": row["completion"], "request": body, "response": answer}
            if tokens is None:
                found = read_all(openai.generations(record))
            else:
                found = read_all(
                    openai.scored_ids(answer, row["prompt"], row["completion"], ids) for ids in [tokens.input_ids]
                )
            return [self._of_row(item, own) for item in found][:1]

        return "/completions", body, answers


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _last_role(row: dict[str, Any]) -> str | None:
    messages = row.get("messages")
    return messages[-1]["role"] if isinstance(messages, list) and messages else None
