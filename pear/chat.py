"""What a chat template makes of a row: rendered in bounded time and memory, and which of it are the assistant's turns.

A chat template is code that comes with a model. It may raise, loop or write gigabytes; each of these is a DataError.
"""

import contextlib
import json
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pear.io import DataError

try:
    import resource
except ImportError:  # Windows
    resource = None

Messages = list[dict[str, Any]]
ASSISTANT = ("assistant", "model")  # roles that the policy writes; the others are the user's, a tool's or the system's
RENDER_SECONDS = 10.0  # for one conversation
RENDER_CHARACTERS = 1 << 26  # of one conversation
RENDER_BYTES = 2 << 30  # of memory that one rendering may take beyond what the process has
# What `apply_chat_template` takes for itself, so that a row cannot give it to the template.
_TAKEN = (
    *("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    "sanitize_control_tokens",
)


class TemplateLimit(DataError):
    """A chat template took too long or made too much. It is the template's fault, not the row's: every row would."""


def is_assistant(message: dict[str, Any]) -> bool:
    return message["role"] in ASSISTANT


# ---------------------------------------------------------------------------------------------------------------------
# What a row gives to the template


def template_arguments(row: dict[str, Any], where: str = "row") -> dict[str, Any]:
    """What a row itself gives to the chat template: its `tools` (a list, or one as JSON) and `chat_template_kwargs`.

    Raises:
        DataError: one of them has another type.
    """
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        tools = _from_json(tools, "tools", where)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        found = type(tools).__name__
        if isinstance(tools, list):
            found = "a list with " + next(type(tool).__name__ for tool in tools if not isinstance(tool, dict))
        raise DataError(
            f"{where}: `tools` must be a list of JSON schemas (objects with `type` and `function`), or such a list as "
            f"JSON text, got {found}"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise DataError(
            f'{where}: `chat_template_kwargs` must be an object, such as {{"enable_thinking": false}}, got '
            f"{type(kwargs).__name__}"
        )
    if taken := [name for name in _TAKEN if name in (kwargs or {})]:
        raise DataError(
            f"{where}: `chat_template_kwargs` has {taken[0]!r}, which is no variable of the template but an option of "
            "the rendering. Take it out."
        )
    return {"tools": tools, **(kwargs or {})}


def parsed_messages(messages: Messages, key: str, where: str) -> Messages:
    """The messages, with `tool_calls` that are JSON text as the list that it holds.

    `arguments` stay what they are, an object or JSON text: chat templates tell the two apart.

    Raises:
        DataError: `tool_calls` that are no list of objects, or no JSON.
    """
    made = []
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if isinstance(calls, str):
            calls = _from_json(calls, f"{key}[{i}].tool_calls", where)
            message = message | {"tool_calls": calls}
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise DataError(
                f"{where}: `{key}[{i}].tool_calls` must be a list of calls (objects with a `function`), got "
                f"{json.dumps(calls, ensure_ascii=True, default=str):.100}"
            )
        made.append(message)
    return made


def _from_json(text: str, key: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: `{key}` is a string that is no JSON ({error}): {text!r:.100}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


class Renderer:
    """Renders the conversations of one row by a tokenizer's chat template.

    Raises (all methods):
        DataError: the template is missing, refuses the messages or exceeds a limit (`TemplateLimit`).
    """

    def __init__(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "row"):
        if tokenizer.chat_template is None:
            raise DataError(
                f"{where}: the row is a chat, but the tokenizer has no chat template. Give one by "
                "--chat_template_path, or rows with `prompt` and `completion` as text."
            )
        self.tokenizer, self.where = tokenizer, where
        self.arguments = template_arguments(row, where)

    def text(self, messages: Messages, **options: Any) -> str:
        """The rendered conversation; `options` are `apply_chat_template`'s, `add_generation_prompt` say."""
        arguments = self.arguments | options | {"tokenize": False}
        try:
            with bounded(self.where):
                text = self.tokenizer.apply_chat_template(messages, **arguments)
        except TemplateLimit:
            raise
        except MemoryError:
            raise TemplateLimit(_limit_message(self.where, f"takes more than {RENDER_BYTES >> 30} GiB")) from None
        except Exception as error:  # templates are code of the tokenizer's authors; they raise what they like
            raise DataError(f"{self.where}: the chat template cannot render this row: {error}") from error
        if len(text) > RENDER_CHARACTERS:
            raise TemplateLimit(_limit_message(self.where, f"makes {len(text)} characters"))
        if any(isinstance(parts := message.get("content"), list) and str(parts) in text for message in messages):
            raise DataError(
                f"{self.where}: the chat template takes `content` for a string and writes a list of parts as Python "
                "does ([{'type': 'text', ...}]): give `content` as a string"
            )
        return text

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered conversation: `apply_chat_template(tokenize=True)` adds no special tokens either."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def marked(self, messages: Messages, chat_template: str | None) -> tuple[list[int], list[int]]:
        """Ids, and 1 where a template says `{% generation %}` (of `chat_template`, or the tokenizer's own)."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        if chat_template is not None:
            options["chat_template"] = chat_template
        try:
            with bounded(self.where):
                found = self.tokenizer.apply_chat_template(messages, **(self.arguments | options))
        except TemplateLimit:
            raise
        except Exception as error:
            raise DataError(f"{self.where}: the chat template cannot render this row: {error}") from error
        return list(found["input_ids"]), list(found["assistant_masks"])


def _limit_message(where: str, what: str) -> str:
    return (
        f"{where}: the chat template {what} for one conversation: it loops, or repeats itself. Give another template "
        "by --chat_template_path, or mend `chat_template.jinja` in the model's folder."
    )


@contextlib.contextmanager
def bounded(where: str) -> Iterator[None]:
    """Within, a template ends by an error after RENDER_SECONDS, or where it takes more than RENDER_BYTES of memory.

    Time is bounded in the main thread of a system with SIGALRM, memory on Linux.
    """
    with _less_memory(), _less_time(where):
        yield


@contextlib.contextmanager
def _less_time(where: str) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TemplateLimit(_limit_message(where, f"takes more than {RENDER_SECONDS:g} seconds"))

    before = signal.signal(signal.SIGALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, left, every)


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    try:
        with open("/proc/self/statm", "rb") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + RENDER_BYTES
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (OSError, AttributeError, ValueError):
        yield
        return
    if any(bound != resource.RLIM_INFINITY and bound <= limit for bound in (soft, hard)):
        yield  # bounded more tightly already
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---------------------------------------------------------------------------------------------------------------------
# The assistant's turns


class _Turn(NamedTuple):
    before: str  # what others say before it
    header: str  # what asks for it: the generation prompt
    body: str | None  # the turn, as it is written where it is the conversation's last; None: not found yet
    core: str  # a part of the body that is there wherever the turn is


class _NotFound(Exception):
    """The template writes an earlier part of the conversation in another way once more follows."""


def assistant_turns(prompt: Messages, completion: Messages, text: str, renderer: Renderer) -> list[tuple[int, int]]:
    """The parts `[begin, end)` of `text`, prompt and completion rendered, that the assistant has written of completion.

    Each turn (messages of the assistant with none of others between) is found by rendering the conversation up to it,
    with the generation prompt, and up to its end. Templates may leave out the front of an earlier turn, its reasoning,
    where more follows. White space behind a turn's last special token belongs to no turn but the last one.

    Raises:
        DataError, _NotFound: the template writes earlier messages otherwise where more follows.
    """
    messages = prompt + completion
    runs = _runs(messages, len(prompt))
    try:  # most templates write a message alike wherever it stands, so a few messages show what a turn is
        turns = _turns(messages, runs[:1], renderer)
        for number, (first, end) in enumerate(runs[1:], 1):
            start = runs[number - 2][1] if number > 1 else 0
            near = [(a - start, b - start) for a, b in (runs[number - 1], (first, end))]
            turns += _turns(messages[start:end], near, renderer)[1:]
        places = _walk(text, turns)
    except TemplateLimit:
        raise
    except (_NotFound, DataError):
        places = _walk(text, _turns(messages, runs, renderer))
    special = tuple(token.content for token in renderer.tokenizer.added_tokens_decoder.values())
    trimmed = []
    for begin, end in zip(places[1::2], places[2::2], strict=True):
        shown = text[begin:end].rstrip()
        trimmed.append((begin, begin + len(shown) if end < len(text) and shown.endswith(special) else end))
    return trimmed


def _turns(messages: Messages, runs: list[tuple[int, int]], renderer: Renderer) -> list[_Turn]:
    """The turns that these runs of messages are, each as it is written where it is the conversation's last."""
    turns: list[_Turn] = []
    for first, end in runs:
        so_far = renderer.text(messages[:first])
        asked = renderer.text(messages[:first], add_generation_prompt=True)
        shared = common_prefix(so_far, asked)
        turn = _Turn(so_far[_walk(so_far, turns)[-1] : shared], asked[shared:], None, "")
        done = renderer.text(messages[:end])
        turns.append(turn._replace(body=done[_walk(done, [*turns, turn])[-1] :], core=_core(messages[end - 1])))
    return turns


def _runs(messages: Messages, start: int) -> list[tuple[int, int]]:
    """`[first, end)` of each run of messages of the assistant's from `start` on."""
    edges = [
        i
        for i in range(start, len(messages) + 1)
        if (i < len(messages) and is_assistant(messages[i])) != (i > start and is_assistant(messages[i - 1]))
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _core(message: dict[str, Any]) -> str:
    from pear.align.roles import ROLES, THINK  # which imports this module

    content = message.get("content")
    if isinstance(content, str) and content.strip():
        for tag in ROLES[THINK[1]]:  # templates leave out reasoning of earlier turns, also what `content` has of it
            content = content.rpartition(tag)[2]
        return content.strip()[-16:]
    calls = message.get("tool_calls") or ()
    names = [(call.get("function") or call).get("name") for call in calls if isinstance(call, dict)]
    return str(names[-1]) if names else ""


def _walk(text: str, turns: Sequence[_Turn]) -> list[int]:
    """Where in a rendered conversation each turn begins and ends: 0, begin, end, begin, end, ...

    The last turn may lack its body, if it has none yet.
    """
    places, at = [0], 0
    for turn in turns:
        if not text.startswith(turn.before, at):
            raise _NotFound
        at += len(turn.before)
        at += common_prefix(text[at : at + len(turn.header)], turn.header)
        places.append(at)
        if turn.body is None:
            continue
        if not turn.body:  # a template that leaves out messages without content
            places.append(at)
            continue
        lengths = (n for n in range(len(turn.body), 0, -1) if text.startswith(turn.body[len(turn.body) - n :], at))
        length = next(lengths, 0)
        if not length or (length < len(turn.body) and turn.core not in turn.body[len(turn.body) - length :]):
            raise _NotFound
        at += length
        places.append(at)
    return places


def common_prefix(a: Sequence, b: Sequence) -> int:
    """How many of the first items two sequences share."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def assistant_mask(
    prompt: Messages, completion: Messages, text: str, ids: list[int], start: int, renderer: Renderer
) -> list[int]:
    """1 for each of `ids`, the tokens of `text`, from `start` on that the assistant has written.

    By `assistant_turns`; where the template does not allow that, by its `{% generation %}` marks, or by those of the
    training template that TRL has for it, if that gives the same ids.

    Raises:
        DataError: neither is possible.
    """
    try:
        mask = [0] * len(ids)
        turns = assistant_turns(prompt, completion, text, renderer)
        edges = iter(_tokens_before([at for turn in turns for at in turn], text, ids, renderer))
        for first, end in zip(edges, edges, strict=True):
            first = max(first, start)
            mask[first:end] = [1] * max(end - first, 0)
        return mask
    except (_NotFound, DataError) as error:
        if isinstance(error, TemplateLimit):
            raise
    for template in _marking_templates(renderer.tokenizer):
        with contextlib.suppress(DataError):
            own, marks = renderer.marked(prompt + completion, template)
            if own == ids:
                return [0] * start + marks[start:]
    others = sorted({message["role"] for message in completion if not is_assistant(message)})
    raise DataError(
        f"{renderer.where}: the completion has messages of others ({', '.join(others)}), and the chat template does "
        "not show which tokens are the assistant's: it writes earlier messages otherwise once more follow. Give a "
        "template with {% generation %} marks by --chat_template_path, or a row for each answer of the assistant."
    )


def _tokens_before(edges: list[int], text: str, ids: list[int], renderer: Renderer) -> list[int]:
    """How many of `ids` end at or before each of these characters of `text`, ascending."""
    from pear.align.errors import Unaligned  # which imports this module
    from pear.align.locate import locate
    from pear.align.pieces import pieces_of

    try:
        ends = [place.end for place in locate(ids, 0, text, pieces_of(renderer.tokenizer))]
    except Unaligned:  # a tokenizer that loses text: the tokens of the beginning, as TRL finds a prompt's
        return [common_prefix(renderer.ids(text[:at]), ids) if at < len(text) else len(ids) for at in edges]
    found, count, size, at = [], 0, 0, 0
    for edge in edges:
        size, at = size + len(text[at:edge].encode()), edge
        while count < len(ends) and ends[count] <= size:
            count += 1
        found.append(count)
    return found


def _marking_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[str | None]:
    """Templates with `{% generation %}` marks; None is the tokenizer's own."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    with contextlib.suppress(Exception):  # of named templates without a default, or one that cannot be tried out
        if has_generation_markers(tokenizer.chat_template):
            yield None
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (template := get_training_chat_template(tokenizer)) is not None:
            yield template
