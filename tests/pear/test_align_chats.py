"""Contents of chats in what different chat templates make of them, and structural tokens by role."""

import re
from pathlib import Path

import pytest
import trl
from families import R1_TEMPLATE, family
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from unicode_text import texts

from pear.align import Unaligned, align, spans_of
from pear.align.contents import contents_of
from pear.align.pieces import pieces_of
from pear.align.spans import JOINT, NO_BYTES
from pear.io import DataError
from pear.rows import tokenize_row

USER = [{"role": "user", "content": "What is 3 + 4?"}]
TEMPLATES = ["smollm2", "qwen", "llama3", "llama2", "metaspace", "gemma"]  # each with a template of its own


def chat(*completion, **keys):
    messages = [{"role": "assistant", "content": m} if isinstance(m, str) else m for m in completion]
    return {"prompt": USER, "completion": messages, **keys}


def spans_in(name, row, template=None):
    tokenizer = family(name)
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or kept
        tokenized = tokenize_row(row, tokenizer, "row")
        spans = spans_of(row, tokenized, tokenizer)
    finally:
        tokenizer.chat_template = kept
    ids = [i for i, bit in zip(tokenized.input_ids, tokenized.completion_mask, strict=True) if bit]
    return spans, tokenizer.convert_ids_to_tokens(ids)


def text_of(row) -> bytes:
    return "".join(contents_of(row["completion"])).encode()


def covered(row, spans) -> str:
    """The text, with a dot for each byte that no token of text has."""
    text = text_of(row)
    data = bytearray(b"." * len(text))
    for begin, end in spans.extents:
        data[begin:end] = text[begin:end]
    return data.decode(errors="replace")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plain_answer(name):
    row = chat("It is 7, naïve as it is.")
    spans, tokens = spans_in(name, row)
    text = covered(row, spans)
    if name == "llama2":  # its template writes a space first, and this tokenizer joins it to the text
        assert text.lstrip(".") == row["completion"][0]["content"][len(text) - len(text.lstrip(".")) :]
    else:
        assert text == row["completion"][0]["content"]
    named = {i: mark for i, mark in spans.marks.items() if not mark.startswith((JOINT, NO_BYTES))}
    assert "end_of_turn" in named.values()
    assert all(spans.extents[i] == (len(text_of(row)),) * 2 for i, mark in named.items() if mark == "end_of_turn")


@pytest.mark.parametrize("pair", [("smollm2", "llama3"), ("qwen", "gemma"), ("llama3", "metaspace")], ids="-".join)
def test_ends_of_turn_match_across_templates(pair):
    row = chat("It is 7.")
    student, behavior = (spans_in(name, row)[0] for name in pair)
    end, other = (next(i for i, m in s.marks.items() if m == "end_of_turn") for s in (student, behavior))
    logprobs = [0.0] * len(behavior.extents)
    logprobs[other] = -5.0
    found = align(student, behavior, logprobs)
    assert found.behavior_logprobs[end] == -5 and (found.block_ids == found.block_ids[end]).sum() == 1


def test_the_newline_after_the_end_matches_where_both_have_it():
    row = chat("It is 7.")
    smollm2, tokens = spans_in("smollm2", row)
    assert tokens[-2:] == ["<|im_end|>", "Ċ"]
    qwen, llama3 = spans_in("qwen", row)[0], spans_in("llama3", row)[0]
    assert align(smollm2, qwen, [0.0] * len(qwen.extents)).block_ids[-1] >= 0
    assert align(smollm2, llama3, [0.0] * len(llama3.extents)).block_ids[-1] == -1


THOUGHT = "<think>\nThree and four.\n</think>\n\nIt is 7."


def test_think_tags_in_a_content_are_its_bytes_on_both_sides():
    """Added tokens to Qwen, plain text to SmolLM2; Qwen's template takes the content apart and joins it again."""
    row = chat(THOUGHT)
    qwen, tokens = spans_in("qwen", row)
    smollm2, _ = spans_in("smollm2", row)
    assert covered(row, qwen) == covered(row, smollm2) == THOUGHT
    assert qwen.extents[tokens.index("<think>")] == (0, 7)
    found = align(qwen, smollm2, [-1.0] * len(smollm2.extents))
    assert (found.block_ids >= 0).all()
    assert found.left_out == 0


def test_white_space_that_a_template_changes_is_no_bytes():
    row = chat("<think>Three and four.</think>It is 7.\n")
    qwen, tokens = spans_in("qwen", row)  # writes a newline around each tag
    assert covered(row, qwen) == "<think>Three and four.</think>It is 7.\n"
    newlines = [qwen.marks[i] for i, token in enumerate(tokens) if token == "Ċ" and i in qwen.marks]
    assert newlines[:2] == ["\n", "\n"]
    smollm2, _ = spans_in("smollm2", row)
    assert align(smollm2, qwen, [-1.0] * len(qwen.extents)).shared > 0.8


def test_a_content_that_ends_in_its_thoughts():
    row = chat("<think>Three and four</think>")
    spans, tokens = spans_in("qwen", row)
    assert covered(row, spans) == "<think>Three and four</think>"
    assert spans.extents[tokens.index("</think>")] == (21, 29)
    assert spans.marks[tokens.index("</think>") - 1] == "\n"


def test_which_of_two_tags_is_shown_is_not_guessed():
    spans, _ = spans_in("qwen", chat("<think>a</think></think>b"))
    assert covered(chat("<think>a</think></think>b"), spans) == "<think>a" + "." * 16 + "b"


def test_reasoning_in_a_key_of_its_own():
    """Qwen's template writes it between tags, which are structural then; SmolLM2's leaves it out."""
    row = chat({"role": "assistant", "reasoning_content": "Three and four.", "content": "It is 7."})
    qwen, tokens = spans_in("qwen", row)
    assert covered(row, qwen) == "Three and four.It is 7."
    at = tokens.index("</think>")
    assert qwen.marks[tokens.index("<think>")] == "think_open" and qwen.marks[at] == "think_close"
    assert qwen.extents[at] == (15, 15)
    smollm2, _ = spans_in("smollm2", row)
    assert covered(row, smollm2) == "." * 15 + "It is 7."
    found = align(smollm2, qwen, [-1.0] * len(qwen.extents))
    assert found.shared == 1 and found.left_out < -10


def test_a_template_that_drops_the_reasoning():
    row = chat(THOUGHT)
    spans, _ = spans_in("qwen", row, R1_TEMPLATE)
    assert covered(row, spans).endswith("It is 7.") and "Three" not in covered(row, spans)
    smollm2, _ = spans_in("smollm2", row)
    found = align(smollm2, spans, [-1.0] * len(spans.extents))
    assert 0 < found.shared < 0.6


def test_a_template_that_trims():
    row = chat(" It is 7. \n")
    llama3, _ = spans_in("llama3", row)
    assert covered(row, llama3) == ".It is 7..."
    smollm2, _ = spans_in("smollm2", row)
    assert covered(row, smollm2) == " It is 7. \n"
    found = align(llama3, smollm2, [-1.0] * len(smollm2.extents))
    assert found.block_ids[-1] >= 0  # both ends of turn stand at the text's end


def test_a_token_over_two_contents():
    """`th` and `e` are written side by side, as one token; in the second row they stand so in the text as well."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.reasoning_content or '') | trim + m.content }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    row = chat({"role": "assistant", "reasoning_content": "th\n", "content": "e dog"})
    spans, tokens = spans_in("smollm2", row, template)
    assert tokens[0] == "the" and spans.marks[0] == "joint 3: the"
    assert spans.extents[:2] == [(0, 0), (4, 8)]
    row = chat({"role": "assistant", "reasoning_content": "th", "content": "e dog"})
    assert spans_in("smollm2", row, template)[0].extents[:2] == [(0, 3), (3, 7)]


def test_several_turns_with_a_tool():
    row = chat(
        {"role": "assistant", "content": "Let me add."},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "assistant"},  # as the header of its turn
    )
    for name in ("smollm2", "qwen", "llama3", "gemma"):
        spans, _ = spans_in(name, row)
        assert covered(row, spans) == "Let me add..assistant"  # the tool's 7 is no token of the policy's
        ends = [spans.extents[i][0] for i, m in spans.marks.items() if m == "end_of_turn"]
        assert ends == [11, 21]


def test_tool_calls_are_structural():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    row = chat({"role": "assistant", "content": "Let me add.", "tool_calls": [call]})
    spans, tokens = spans_in("qwen", row)
    assert covered(row, spans) == "Let me add."
    assert spans.marks[tokens.index("<tool_call>")] == "tool_call_open"


def test_a_list_of_parts():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    parts = [{"type": "text", "text": "It is"}, {"type": "text", "text": " 7."}]
    row = chat({"role": "assistant", "content": parts})
    spans, _ = spans_in("smollm2", row, template)
    assert covered(row, spans) == "It is 7."
    with pytest.raises(Unaligned, match="part 0 of `content` of completion message 0 is no text"):
        contents_of([{"role": "assistant", "content": [{"type": "image"}]}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("m.content | upper", "rewrites"),
        ("m.content | replace('7', 'seven')", "rewrites"),
        ("m.content ~ m.content", "rewrites"),
        ("m.content | reverse | join", "rewrites"),
    ],
)
def test_a_template_that_rewrites_is_an_error(change, reason):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'user' %}{{ m.content }}{% else %}{{ CHANGE }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ).replace("CHANGE", change)
    with pytest.raises(Unaligned, match=f"the chat template {reason} the completion's contents"):
        spans_in("smollm2", chat("It is 7."), template)


def test_a_template_that_leaves_out_the_whole_answer_is_an_error():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + (m.content if m.role == 'user' else 'no') }}{% endfor %}"
    )
    with pytest.raises(
        DataError, match="nothing is left of the completion: the chat template leaves out its `content`"
    ):
        spans_in("smollm2", chat("It is 7."), template)


def test_contents_out_of_order_are_an_error():
    template = (
        "{% for m in messages | reverse %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    with pytest.raises(Unaligned, match="rewrites"):
        spans_in("smollm2", chat("It is", "seven"), template)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(contents=st.lists(texts, min_size=1, max_size=3), reasoning=st.booleans())
def test_any_content(name, contents, reasoning):
    """What is covered is the content's own; a tokenizer's side of it, twice, is the token level."""
    messages = [{"role": "assistant", "content": content} for content in contents]
    if reasoning:
        messages[-1]["reasoning_content"] = "".join(contents)
    row = chat(*messages)
    try:
        spans, _ = spans_in(name, row)
    except Unaligned as error:
        assert "rewrites" not in error.reason or name == "qwen" and "</think>" in "".join(contents)
        assume(False)
    shown = covered(row, spans)
    lost = shown.count(".") - text_of(row).count(b".")
    white = sum(len(c.encode()) for content in contents_of(messages) for c in content if c.isspace())
    joints = sum(int(m[len(JOINT) :].split(":")[0]) for m in spans.marks.values() if m.startswith(JOINT))
    left_out = len(messages[-1].get("reasoning_content", "").encode()) if name != "qwen" else 0
    blank = sum(len(content.encode()) for content in contents_of(messages) if not content.strip())
    assert lost <= white + joints + left_out + blank
    found = align(spans, spans, [0.0] * len(spans.extents))
    assert found.block_ids.tolist() == list(range(len(spans.extents)))


# ---------------------------------------------------------------------------------------------------------------------
# The chat templates of many models, as TRL carries them

REAL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CONTENTS = [
    "It is 7, naïve as it is.",
    THOUGHT,
    "<think>Three and four.</think>It is 7.",
    "</think> \n\n<think>\nassistant\n</think>final",
    "<think>Three and four.</think>",
    "Three.\n\n</think>",
    " assistant\n",
]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_templates(path):
    """Every token of text spells its bytes; a plain answer is whole, unless the template takes no plain strings."""
    template, pieces = path.read_text(), pieces_of(family("llama3"))
    for content in CONTENTS:
        row = chat(content, {"role": "user", "content": "assistant"}, {"role": "assistant", "content": "Bye."})
        try:
            spans, tokens = spans_in("llama3", row, template)
        except (DataError, Unaligned) as error:  # templates of vision models take lists of parts
            assert re.search("cannot render|leaves out|does not show which tokens are the assistant's", str(error))
            continue
        data = text_of(row)
        for token, (begin, end) in zip(tokens, spans.extents, strict=True):
            if begin < end:
                assert pieces.surface(family("llama3").convert_tokens_to_ids(token)) == data[begin:end]
        assert covered(row, spans).endswith(".........Bye.")  # what the user says is no token of the policy's
        if "think" not in content:
            assert covered(row, spans)[: -len("assistantBye.")].strip(". \n") == content.strip(". \n")


def test_thinking_that_the_prompt_has_begun():
    """Some generation prompts end in <think>: then it is the prompt's, and the completion's text starts behind it."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    spans, tokens = spans_in("qwen", chat(THOUGHT), template)
    assert spans.extents[0][0] == len("<think>\n") and spans.extents[0][1] > spans.extents[0][0]
    smollm2, _ = spans_in("smollm2", chat(THOUGHT))
    found = align(smollm2, spans, [-1.0] * len(spans.extents))
    assert found.block_ids[-1] >= 0 and found.left_out == 0 and 0.8 < found.shared < 1


def test_thousands_of_messages():
    turns = [{"role": role, "content": f" {i} "} for i in range(1500) for role in ("assistant", "user")]
    row = chat(*turns, {"role": "assistant", "content": "Bye."})
    for name in ("smollm2", "gemma"):
        spans, _ = spans_in(name, row)
        assert covered(row, spans).endswith("Bye.")
        of_user = sum(len(turn["content"].strip()) for turn in turns if turn["role"] == "user")
        assert of_user <= covered(row, spans).count(".") <= 2 * len(turns) + 1 + of_user
