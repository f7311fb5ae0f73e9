"""What one may not expect of a row's tokens: text left out by the chat template, doubled BOS and EOS, others' turns.

`notes_of` finds it for one row; `Notes` counts it over a file, for the commands to print.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.chat import ASSISTANT, Messages, Renderer, TemplateLimit, is_assistant
from pear.io import DataError, line_list

REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers gives any of them to the template
CALLS = ("tool_calls", "function_call")
LEFT_OUT = "left out: "
BOS, EOS, CLOSED, ENCODED, REWRITTEN, PROMPT = "BOS", "EOS", "closed", "encoded", "rewritten", "prompt"
AS_PYTHON = "as Python"
_AGAIN = (
    "Give a template that shows it (--chat_template_path, or `chat_template.jinja` in the model's folder), move it "
    "into `content`, or give rows whose `prompt` and `completion` are the whole text"
)


def notes_of(
    row: dict[str, Any],
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    where: str = "row",
    text: str | None = None,
) -> tuple[str, ...]:
    """Kinds of notes on a row with `prompt` and `completion`, whose tokens are `ids` and whose rendered text is `text`.

    Raises:
        DataError: the chat template leaves out all that the completion says.
    """
    found = doubled(ids, tokenizer)
    if isinstance(row["completion"], list):
        found += _left_out(row, Renderer(row, tokenizer, where), text)
    return tuple(found)


def doubled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, whole: bool = True) -> list[str]:
    """BOS where the row starts with two of them, EOS where it ends with two of them, white space between or not.

    Not `whole`: the ids are of a prompt, which is to be continued; then CLOSED where it ends with an EOS that the
    tokenizer adds to every text.
    """
    found = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        found.append(BOS)
    if not whole:
        added = eos is not None and eos != bos and list(tokenizer(text="a")["input_ids"])[-1:] == [eos]
        return [*found, CLOSED] if added and list(ids[-1:]) == [eos] else found
    if eos is not None and len(ids) > 1 and ids[-1] == eos:
        at = len(ids) - 2
        while at and ids[at] != eos and not tokenizer.decode([ids[at]]).strip():
            at -= 1
        if ids[at] == eos:
            found.append(EOS)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What the chat template leaves out


def _left_out(row: dict[str, Any], renderer: Renderer, text: str | None) -> list[str]:
    prompt, completion = row["prompt"], row["completion"]
    if text is None:
        text = renderer.text(prompt + completion)
    found: dict[str, None] = {}  # in order
    shown = missing = 0  # strings and calls of the assistant's
    for key, is_shown in _contents(prompt, completion, text, renderer):
        found |= {} if is_shown is True else {REWRITTEN if is_shown is None else LEFT_OUT + key: None}
        shown, missing = shown + (is_shown is not False), missing + (is_shown is False)
    for key, is_shown in _calls(prompt, completion, renderer):
        found |= {} if is_shown else {LEFT_OUT + key: None}
        shown, missing = shown + is_shown, missing + (not is_shown)
    if missing and not shown:
        raise DataError(
            f"{renderer.where}: nothing is left of the completion: the chat template leaves out its {_listed(found)}. "
            f"{_AGAIN}."
        )
    if _encoded_twice(completion, text):
        found[ENCODED] = None
    if any(isinstance(value, dict) and value and str(value) in text for value in _arguments(completion)):
        found[AS_PYTHON] = None
    if renderer.arguments["tools"] and _same(renderer, prompt + completion, text, {"tools": None}):
        found[LEFT_OUT + "tools"] = None
    for number, message in enumerate(prompt + completion):
        content = message.get("content")
        if not is_assistant(message) and isinstance(content, str) and content.strip() and content.strip() not in text:
            if not _shows(prompt + completion, number, {"content": _STAND_IN}, text, renderer):
                found[PROMPT] = None
    return list(found)


def _contents(
    prompt: Messages, completion: Messages, text: str, renderer: Renderer
) -> Iterable[tuple[str, bool | None]]:
    """Of each string of the assistant's messages: its key, and whether `text` has it; False also for a part of it.

    None: it is there, but not as it was.
    """
    from pear.align.contents import find_contents, leaves_of
    from pear.align.errors import Unaligned
    from pear.align.roles import ROLES, THINK

    try:
        leaves = [
            leaf for leaf in leaves_of(completion) if is_assistant(completion[leaf.message]) and leaf.text.strip()
        ]
        at = len(renderer.text(prompt)) if leaves else 0
    except (Unaligned, DataError):  # content that is no text, or a template that wants more than the prompt
        return
    for leaf in leaves:  # mostly they stand there in order
        at = text.find(leaf.text.strip(), at)
        if at < 0:
            break
        at += len(leaf.text.strip())
    else:
        yield from ((str(leaf.keys[0]), True) for leaf in leaves)
        yield from _other_reasoning(prompt, completion, text, renderer)
        return
    tags = [token for role in THINK for token in ROLES[role]]
    try:
        regions = find_contents(completion, text, lambda messages: renderer.text(prompt + messages), tags)
        covered = [(region.at, region.at + region.end - region.begin) for region in regions]
    except Unaligned:
        covered = None
    for leaf in leaves:
        key = str(leaf.keys[0])
        if covered is None:
            value = _STAND_IN if len(leaf.keys) == 1 else [{"type": "text", "text": _STAND_IN}]
            is_shown = _shows(prompt + completion, len(prompt) + leaf.message, {key: value}, text, renderer)
            yield key, None if is_shown else False
            continue
        has = set()
        for begin, end in covered:
            has.update(range(max(begin, leaf.at), min(end, leaf.at + len(leaf.text))))
        lost = [i for i, character in enumerate(leaf.text, leaf.at) if i not in has and not character.isspace()]
        yield key, not lost
        if lost and has:  # a part of it is there
            yield key, True
    yield from _other_reasoning(prompt, completion, text, renderer)


def _other_reasoning(
    prompt: Messages, completion: Messages, text: str, renderer: Renderer
) -> Iterable[tuple[str, bool]]:
    """Reasoning under other names than `reasoning_content`."""
    for number, message in enumerate(completion):
        key = next((key for key in REASONING if message.get(key) is not None), None)
        if is_assistant(message) and key in REASONING[1:] and str(message[key]).strip():
            yield key, _shows(prompt + completion, len(prompt) + number, {key: _STAND_IN}, text, renderer)


_STAND_IN = "Qzxjvkq"  # letters, which no template escapes


def _shows(messages: Messages, number: int, keys: dict[str, Any], text: str, renderer: Renderer) -> bool:
    """Whether the rendering `text` changes with these values of a message's keys, or the template refuses them."""
    changed = [*messages[:number], messages[number] | keys, *messages[number + 1 :]]
    try:
        return renderer.text(changed) != text
    except TemplateLimit:
        raise
    except DataError:
        return True


def _same(renderer: Renderer, messages: Messages, text: str, options: dict[str, Any]) -> bool:
    try:
        return renderer.text(messages, **options) == text
    except TemplateLimit:
        raise
    except DataError:
        return False


def _calls(prompt: Messages, completion: Messages, renderer: Renderer) -> Iterable[tuple[str, bool]]:
    """Of each call of the assistant's, its name and its arguments: the key, and whether the template shows it."""
    changed, places = copy.deepcopy(completion), []
    for message in changed:
        for key in CALLS if is_assistant(message) else ():
            value = message.get(key)
            calls = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
            for call in calls:
                holder = call["function"] if isinstance(call.get("function"), dict) else call
                for part in ("name", "arguments"):
                    if holder.get(part) and holder[part] not in ("{}", "null"):
                        places.append((key, holder, part, holder[part]))
    if not places:
        return
    words = [_STAND_IN + "".join(chr(ord("a") + int(digit)) for digit in str(i)) + "z" for i in range(len(places))]
    for word, (_, holder, part, was) in zip(words, places, strict=True):
        holder[part] = word if part == "name" else f'{{"{word}": "{word}"}}' if isinstance(was, str) else {word: word}
    try:
        shown = renderer.text(prompt + changed).lower()
    except TemplateLimit:
        raise
    except DataError:  # the template looks for arguments of its own
        return
    for word, (key, *_) in zip(words, places, strict=True):
        yield key, word.lower() in shown


def _encoded_twice(completion: Messages, text: str) -> bool:
    """Whether arguments that are JSON text stand there as a JSON string: `"{\\"a\\": 2}"`."""
    for arguments in _arguments(completion):
        if isinstance(arguments, str) and '"' in arguments and arguments not in text:
            if json.dumps(arguments, ensure_ascii=False) in text or json.dumps(arguments) in text:
                return True
    return False


def _arguments(completion: Messages) -> Iterable[Any]:
    for message in completion:
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            yield (function if isinstance(function, dict) else call).get("arguments")


# ---------------------------------------------------------------------------------------------------------------------
# Counted over a file


class Notes:
    """Lines of a file by what there is to say of them."""

    def __init__(self) -> None:
        self.lines: dict[str, list[int]] = {}
        self.others: list[int] = []  # rows with messages of others in the completion
        self.masked = 0  # tokens of theirs
        self.earlier: list[int] = []  # conversations of which the last turn alone is the completion
        self.in_prompt: list[int] = []  # rows whose prompt has turns of the assistant's, where all are asked for
        self.turns = 0  # how many those are

    def add(self, line: int, notes: Iterable[str], mask: Sequence[int] = ()) -> None:
        """What was found of the row on this line, and its `completion_mask`."""
        for note in notes:
            self.lines.setdefault(note, []).append(line)
        if 1 in mask:
            count = len(mask) - mask.index(1) - sum(mask)
            if count:
                self.others.append(line)
                self.masked += count

    def add_earlier(self, line: int, row: dict[str, Any], all_turns: bool = False) -> None:
        """A row as it came, for turns of the assistant's that are not trained on.

        Of `messages`, those before the last. With `all_turns` (--assistant_only_loss), those that somebody put into the
        prompt, as `pear score` does without that option.
        """
        split = "prompt" in row or "completion" in row
        if split == all_turns and isinstance(earlier := row.get("prompt" if split else "messages"), list):
            earlier = earlier if split else earlier[:-1]
            if count := sum(isinstance(each, dict) and each.get("role") in ASSISTANT for each in earlier):
                (self.in_prompt if split else self.earlier).append(line)
                self.turns += count

    def in_words(self) -> list[str]:
        """A sentence for each kind of note, with the number of rows and their lines."""
        said = []
        completion = {note: lines for note, lines in self.lines.items() if note.startswith(LEFT_OUT)}
        tools = completion.pop(LEFT_OUT + "tools", [])
        for note, lines in completion.items():
            said.append(
                f"of {_rows(lines)} the chat template leaves out `{note.removeprefix(LEFT_OUT)}` of the completion, "
                f"all of it or a part ({line_list(lines)}): what is left out is neither scored nor trained on. {_AGAIN}"
            )
        if tools:
            said.append(
                f"of {_rows(tools)} the chat template leaves out `tools` ({line_list(tools)}): the prompt does not "
                "name the functions that may be called"
            )
        if lines := self.lines.get(PROMPT):
            said.append(
                f"of {_rows(lines)} the chat template leaves out a message of the system, the user or a tool "
                f"({line_list(lines)}): the model answers without it"
            )
        if lines := self.lines.get(REWRITTEN):
            said.append(
                f"of {_rows(lines)} the chat template changes the completion's content ({line_list(lines)}): another "
                "text than the row's is scored and trained on"
            )
        if lines := self.lines.get(ENCODED):
            said.append(
                f"of {_rows(lines)} the chat template writes the arguments of tool calls, which are JSON text, as a "
                f"JSON string, with escaped quotes ({line_list(lines)}): give `arguments` as an object"
            )
        if lines := self.lines.get(AS_PYTHON):
            said.append(
                f"of {_rows(lines)} the chat template writes the arguments of tool calls, which are objects, as Python "
                f"does and not as JSON ({line_list(lines)}): give `arguments` as JSON text"
            )
        if lines := self.lines.get(BOS):
            said.append(
                f"{_rows(lines)} start with BOS twice ({line_list(lines)}): the text begins with it, and the tokenizer "
                "adds it again. Take it out of the text, which a chat template has made, say; or give chat messages"
            )
        if lines := self.lines.get(EOS):
            said.append(
                f"{_rows(lines)} end with EOS twice ({line_list(lines)}): the completion has it, before a line end "
                "perhaps, or the tokenizer adds one (add_eos_token), and it is added again, since a completion is text "
                "without EOS. Take EOS and what is behind it out of the text; or give chat messages"
            )
        if lines := self.lines.get(CLOSED):
            said.append(
                f"{_rows(lines)} end with an EOS that the tokenizer adds ({line_list(lines)}): the model is asked to "
                "go on where a text has ended. Turn off add_eos_token in tokenizer_config.json, or the "
                "post-processor's EOS"
            )
        if self.others:
            said.append(
                f"{_rows(self.others)} have messages of others (a tool, the user) in the completion "
                f"({line_list(self.others)}): their {self.masked} tokens have mask 0, so no loss, no log-ratio and no "
                "position"
            )
        if self.earlier:
            said.append(
                f"{_rows(self.earlier)} of `messages` have {self.turns} earlier turns of the assistant's "
                f"({line_list(self.earlier)}), which are not scored or trained on: the completion is the last message. "
                "Pass --assistant_only_loss to have all turns"
            )
        if self.in_prompt:
            said.append(
                f"{_rows(self.in_prompt)} have {self.turns} turns of the assistant's in the prompt "
                f"({line_list(self.in_prompt)}), which are not trained on: assistant_only_loss has all turns where the "
                "data is `messages`, scored by `pear score --assistant_only_loss`"
            )
        return said


def _rows(lines: Sequence[int]) -> str:
    return f"{len(lines)} row" + ("" if len(lines) == 1 else "s")


def _listed(found: Iterable[str]) -> str:
    return ", ".join(f"`{note.removeprefix(LEFT_OUT)}`" for note in found if note.startswith(LEFT_OUT))
