"""From a data row (text or chat) to token ids and the mask of its completion, as TRL's SFTTrainer does it."""

import json
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pear.io import DataError

_FORMS = (
    'a row is {"prompt": str, "completion": str}, the same two keys as lists of chat messages, '
    'or {"messages": [...]} that ends with the assistant\'s message'
)


class TokenizedRow(NamedTuple):
    input_ids: list[int]  # (L,) prompt, then completion
    completion_mask: list[int]  # (L,) 1 where a token of the completion is predicted, so never at position 0
    prompt_cut: int  # tokens at the prompt's end that change once the completion follows; 0 almost always


def prompt_and_completion(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with the keys `prompt` and `completion`, taken from `messages` where it has that; other keys stay.

    Raises:
        DataError: neither form, mixed types, no completion, or `messages` that do not end with the assistant.
    """
    if "prompt" in row or "completion" in row:
        row = dict(row)
    elif "messages" in row:
        messages = row["messages"]
        _check_messages(messages, "messages", where)
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: no completion: the last of `messages` must be the assistant's, got role "
                f"{messages[-1]['role']!r}"
            )
        row = {k: v for k, v in row.items() if k != "messages"}
        row |= {"prompt": messages[:-1], "completion": messages[-1:]}
    else:
        raise DataError(f"{where}: no `completion`: {_FORMS}. Keys found: {sorted(row)}")

    for key in ("prompt", "completion"):
        if row.get(key) is None:
            raise DataError(f"{where}: no `{key}`: {_FORMS}. Keys found: {sorted(row)}")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError(f"{where}: no completion: `completion` is an empty string")
    elif isinstance(prompt, list) and isinstance(completion, list):
        _check_messages(prompt, "prompt", where)
        _check_messages(completion, "completion", where)
        if not any(message.get("content") or message.get("tool_calls") for message in completion):
            raise DataError(f"{where}: no completion: no message of `completion` has any content")
    else:
        raise DataError(
            f"{where}: `prompt` and `completion` must both be strings or both lists of messages, got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    return row


def _check_messages(messages: Any, key: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else type(messages).__name__
        none = "no completion: " if key != "prompt" else ""
        raise DataError(f"{where}: {none}`{key}` must be a list of at least one chat message, got {what}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: `{key}[{i}]` must be a message with a `role`, got {message!r:.100}")


def tokenize_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> TokenizedRow:
    """Token ids of a row with `prompt` and `completion` (see `prompt_and_completion`).

    The rules are those of TRL's `SFTTrainer`, so that both see one sequence: EOS is added to a completion given as a
    string, chats go through the chat template (with the row's `tools` and `chat_template_kwargs`, if any), and the
    completion starts where the ids of prompt and of prompt + completion part. One thing differs: the first token of a
    row never counts as completion, since there is nothing before it to predict it from.

    Raises:
        DataError: the chat template is missing or refuses the row, or no token of the completion is left.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        if tokenizer.eos_token is None:
            raise DataError(f"{where}: the tokenizer has no EOS token to end a completion; set `eos_token` in it")
        prompt_ids = tokenizer(text=prompt)["input_ids"]
        ids = tokenizer(text=rendered(row, tokenizer))["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise DataError(f"{where}: the row is a chat, but the tokenizer has no chat template")
        kwargs = {**template_arguments(row), "tokenize": True, "return_dict": True}
        try:
            prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)["input_ids"]
            ids = tokenizer.apply_chat_template(prompt + completion, **kwargs)["input_ids"]
        except Exception as error:  # templates are code of the tokenizer's authors; they raise what they like
            raise DataError(f"{where}: the chat template cannot render this row: {error}") from error

    start = _common_prefix_length(prompt_ids, ids)
    mask = [0] * start + [1] * (len(ids) - start)
    if mask:
        mask[0] = 0
    if 1 not in mask:
        raise DataError(f"{where}: no completion: the tokens of prompt and of prompt + completion are the same")
    return TokenizedRow(list(ids), mask, len(prompt_ids) - start)


def is_bare_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a row is strings, none of them rendered by a chat template, and the tokenizer has one."""
    text = row.get("prompt")
    if not isinstance(text, str) or not tokenizer.chat_template:
        return False
    return not any(token in text for token in tokenizer.all_special_tokens)


def bare_text_in_words(count: int, rows: int) -> str:
    return (
        f"{count} of {rows} rows are text (`prompt` and `completion` are strings), and the tokenizer has a chat "
        "template. Text is tokenised as it stands, without the template, while `pear rl --task` and `pear eval` put "
        "their questions through it. For a model that is to answer these, give rows as chats (lists of messages)"
    )


def prompt_cut_in_words(count: int) -> str:
    return (
        f"{count} rows: the end of the prompt becomes other tokens once the completion follows; the completion was "
        "taken to start where they differ (as in TRL)"
    )


def rendered(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that `tokenize_row` tokenizes: prompt, completion and EOS, or what the chat template makes of a chat."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        return prompt + completion + ("" if completion.endswith(eos) else eos)
    return tokenizer.apply_chat_template(prompt + completion, **{**template_arguments(row), "tokenize": False})


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What a row itself gives to the chat template: its `tools` (a list, or one as JSON) and `chat_template_kwargs`."""
    tools = row.get("tools")
    return {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }


def _common_prefix_length(a: list[int], b: list[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def check_same_tokens(
    row: dict[str, Any], own: TokenizedRow, tokenizer: PreTrainedTokenizerBase, where: str, *, whose: str
) -> None:
    """Raise unless a scored row has the tokens `own` that `tokenizer` makes of its text; `whose` is "the student", say.

    Raises:
        DataError: the first position that differs and both tokens, or both starts of the completion.
    """
    stored = row["input_ids"]
    for t in range(max(len(stored), len(own.input_ids))):
        pair = [ids[t] if t < len(ids) else None for ids in (stored, own.input_ids)]
        if pair[0] != pair[1]:
            raise DataError(
                f"{where}: {whose}'s tokenizer is not the one the row was scored with: at position {t} the file "
                f"has {_show_token(pair[0], tokenizer, whose)}, {whose} {_show_token(pair[1], tokenizer, whose)}. A "
                f"log-ratio of different tokens means nothing; score data of a policy with {whose}'s tokenizer."
            )
    if list(map(int, row["completion_mask"])) != own.completion_mask:
        raise DataError(
            f"{where}: {whose}'s tokenizer or chat template starts the completion at position "
            f"{own.completion_mask.index(1)}, the scored row at {row['completion_mask'].index(1)}. Score the data "
            f"again with a behaviour policy of {whose}'s tokenizer and chat template."
        )


def _show_token(token: int | None, tokenizer: PreTrainedTokenizerBase, whose: str) -> str:
    if token is None:
        return "no more tokens"
    if token >= len(tokenizer):
        return f"token {token} (not in {whose}'s vocabulary of {len(tokenizer)})"
    return f"token {token} ({tokenizer.convert_ids_to_tokens(token)!r} to {whose})"
