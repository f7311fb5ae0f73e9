"""From a data row (text or chat) to token ids and the mask of its completion, as TRL's SFTTrainer does it."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pear.chat import ASSISTANT, Renderer, assistant_mask, common_prefix, is_assistant, parsed_messages
from pear.io import DataError
from pear.notes import CALLS, REASONING, notes_of

_FORMS = (
    'a row is {"prompt": str, "completion": str}, the same two keys as lists of chat messages, '
    'or {"messages": [...]} that ends with the assistant\'s message'
)


class TokenizedRow(NamedTuple):
    input_ids: list[int]  # (L,) prompt, then completion
    # (L,) 1 where a token of the completion is predicted, so never at position 0, nor where a tool or the user speaks
    completion_mask: list[int]
    prompt_cut: int  # tokens at the prompt's end that change once the completion follows; 0 almost always
    notes: tuple[str, ...] = ()  # what one may not expect of the row, see `pear.notes`


def prompt_and_completion(row: dict[str, Any], where: str, all_turns: bool = False) -> dict[str, Any]:
    """The row with the keys `prompt` and `completion`, taken from `messages` where it has that; other keys stay.

    The completion of `messages` is the last one; with `all_turns` (`--assistant_only_loss`), all from the assistant's
    first answer on. What others say among them has mask 0.

    Raises:
        DataError: neither form, mixed types, no completion, or `messages` that do not end with the assistant.
    """
    if "prompt" in row or "completion" in row:
        row = dict(row)
    elif "messages" in row:
        messages = row["messages"]
        _check_messages(messages, "messages", where)
        last = len(messages) - 1
        if not is_assistant(messages[last]) and not all_turns:
            raise DataError(
                f"{where}: no completion: the last of `messages` must be the assistant's, got role "
                f"{messages[last]['role']!r:.100}"
            )
        at = next((i for i in range(1, last) if is_assistant(messages[i])), last) if all_turns else last
        row = {k: v for k, v in row.items() if k != "messages"}
        row |= {"prompt": messages[:at], "completion": messages[at:]}
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
        row["prompt"], row["completion"] = (parsed_messages(row[key], key, where) for key in ("prompt", "completion"))
        said = list(filter(is_assistant, row["completion"]))
        if not said:
            roles = ", ".join(sorted({repr(message["role"])[:100] for message in completion})[:5])
            raise DataError(
                f"{where}: no completion: no message of `completion` has role {ASSISTANT[0]!r}, got {roles}"
            )
        if not any(message.get(key) for message in said for key in ("content", *REASONING, *CALLS)):
            raise DataError(f"{where}: no completion: no message of the assistant's in `completion` has any content")
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
    completion starts where the ids of prompt and of prompt + completion part. Two things differ. The first token of a
    row never counts as completion, since there is nothing before it to predict it from. And within a completion, what
    a tool or the user says has mask 0 (`pear.chat.assistant_mask`).

    Raises:
        DataError: the chat template is missing, refuses the row or leaves out all that the completion says, or no
            token of the completion is left.
    """
    prompt, completion = row["prompt"], row["completion"]
    chat = None
    if isinstance(prompt, str):
        if tokenizer.eos_token is None:
            raise DataError(f"{where}: the tokenizer has no EOS token to end a completion; set `eos_token` in it")
        text = rendered(row, tokenizer)
        prompt_ids, ids = (list(tokenizer(text=each)["input_ids"]) for each in (prompt, text))
    else:
        chat = Renderer(row, tokenizer, where)
        text = chat.text(prompt + completion)
        prompt_ids, ids = chat.ids(chat.text(prompt, add_generation_prompt=True)), chat.ids(text)

    start = common_prefix(prompt_ids, ids)
    mask = [0] * start + [1] * (len(ids) - start)
    if chat is not None and not all(map(is_assistant, completion)):
        mask = assistant_mask(prompt, completion, text, ids, start, chat)
    if mask:
        mask[0] = 0
    if 1 not in mask:
        raise DataError(f"{where}: no completion: the tokens of prompt and of prompt + completion are the same")
    return TokenizedRow(ids, mask, len(prompt_ids) - start, notes_of(row, ids, tokenizer, where, text))


def is_bare_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a row is strings, none of them rendered by a chat template, and the tokenizer has one."""
    text = row.get("prompt")
    if not isinstance(text, str) or not tokenizer.chat_template:
        return False
    return not any(token in text for token in tokenizer.all_special_tokens)


def bare_text_in_words(count: int, rows: int, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        question = [{"role": "user", "content": "..."}]
        sample = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template is code of the tokenizer's authors
        sample = ""
    return (
        f"{count} of {rows} rows are text (`prompt` and `completion` are strings), and the tokenizer has a chat "
        f"template{f' ({sample!r:.120})' if sample else ''}. Text is tokenised as it stands, without the template, "
        "while `pear rl --task` and `pear eval` put their questions through it. For a model that is to answer these, "
        "give rows as chats (lists of messages)"
    )


def prompt_cut_in_words(count: int) -> str:
    return (
        f"{count} rows: the end of the prompt becomes other tokens once the completion follows; the completion was "
        "taken to start where they differ (as in TRL)"
    )


def rendered(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "row") -> str:
    """The text that `tokenize_row` tokenizes: prompt, completion and EOS, or what the chat template makes of a chat."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        return prompt + completion + ("" if completion.endswith(eos) else eos)
    return Renderer(row, tokenizer, where).text(prompt + completion)


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
    pairs = zip(map(int, row["completion_mask"]), own.completion_mask, strict=True)
    if (t := next((t for t, (bit, own_bit) in enumerate(pairs) if bit != own_bit), None)) is not None:
        starts = row["completion_mask"].index(1), own.completion_mask.index(1)
        what = f"has mask {own.completion_mask[t]} at position {t}, the scored row {int(row['completion_mask'][t])}"
        if starts[0] != starts[1]:
            what = f"starts the completion at position {starts[1]}, the scored row at {starts[0]}"
        raise DataError(
            f"{where}: {whose}'s tokenizer or chat template {what}. Score the data again with a behaviour policy of "
            f"{whose}'s tokenizer and chat template."
        )


def _show_token(token: int | None, tokenizer: PreTrainedTokenizerBase, whose: str) -> str:
    if token is None:
        return "no more tokens"
    if token >= len(tokenizer):
        return f"token {token} (not in {whose}'s vocabulary of {len(tokenizer)})"
    return f"token {token} ({tokenizer.convert_ids_to_tokens(token)!r} to {whose})"
