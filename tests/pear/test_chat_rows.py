"""Which tokens of a chat count: others' messages, what the template leaves out, BOS or EOS twice, and loops."""

import json

import numpy as np
import pytest
import torch
from test_score import logprobs_from_logits, trl_rows
from tiny import CHAT_TEMPLATE, make_model, make_tokenizer
from tokenizers import processors

import pear.chat
from pear.importing.run import import_logprobs
from pear.inspecting import inspect
from pear.io import DataError, read_jsonl
from pear.notes import Notes
from pear.rl import check_prompts
from pear.rows import TokenizedRow, prompt_and_completion, tokenize_row
from pear.score import score
from pear.scored import load_scored
from pear.seal import write_scored
from pear.sft import PEARSFTTrainer
from pear.sft_config import PEARSFTConfig
from pear.tokenizer_options import changed_tokenizer
from pear_kernels.reference import naive_pear_loss

MARKED = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
)
# As Qwen3's: the reasoning of a turn is there only where no user speaks after it.
FORGETFUL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 5}}}]


def say(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def with_template(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def counted(tokens: TokenizedRow, tokenizer) -> str:
    return tokenizer.decode([i for i, bit in zip(tokens.input_ids, tokens.completion_mask, strict=True) if bit])


TOOL = {
    "prompt": [say("user", "weather?")],
    "completion": [say("assistant", "I look."), say("tool", "rain and hail"), say("assistant", "It rains.")],
}
TALK = {
    "messages": [
        say("system", "Be brief."),
        say("user", "one?"),
        say("assistant", "First.", reasoning_content="hm"),
        say("user", "two?"),
        say("assistant", "Second.", reasoning_content="so"),
    ]
}


# ---------------------------------------------------------------------------------------------------------------------
# Others in a completion


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED, FORGETFUL], ids=["plain", "marked", "forgetful"])
def test_what_others_say_in_a_completion_has_mask_0(template):
    tokenizer = with_template(template)
    found = counted(tokenize_row(TOOL, tokenizer, "f:1"), tokenizer).replace("<think></think>", "")
    assert found == "I look.<|im_end|>It rains.<|im_end|>\n"
    with pytest.raises(DataError, match="no message of `completion` has role 'assistant', got 'tool'"):
        prompt_and_completion({"prompt": TOOL["prompt"], "completion": [say("tool", "rain")]}, "f:1")


def test_all_turns_are_those_that_a_template_marks():
    """TRL's masks for `assistant_only_loss`, of a template with `{% generation %}`, but for the last line end."""
    tokenizer = with_template(MARKED)
    theirs = tokenizer.apply_chat_template(TALK["messages"], return_dict=True, return_assistant_tokens_mask=True)
    for template in (MARKED, CHAT_TEMPLATE):
        tokens = tokenize_row(prompt_and_completion(TALK, "f:1", True), with_template(template), "f:1")
        assert tokens.input_ids == theirs["input_ids"]
        assert tokens.completion_mask[:-1] == theirs["assistant_masks"][:-1] and sum(theirs["assistant_masks"]) > 4
    forgetful = tokenize_row(prompt_and_completion(TALK, "f:1", True), with_template(FORGETFUL), "f:1")
    assert counted(forgetful, tokenizer) == "First.<|im_end|><think>so</think>Second.<|im_end|>\n"
    assert forgetful.notes == ("left out: reasoning_content",)  # of the first turn
    assert counted(tokenize_row(prompt_and_completion(TALK, "f:1"), tokenizer, "f:1"), tokenizer).startswith("Second.")


@pytest.mark.parametrize(
    ("change", "first", "wanted"),
    [  # a turn that the template leaves out, one that it leaves reasoning out of, and parts that it writes by Python
        ("{% for message in messages if message.content %}", "", "Nine.<|im_end|>\n"),
        (
            "{% for message in messages %}{% if not loop.last %}"
            "{% set message = dict(message, content=message.content.split('</think>')[-1]) %}{% endif %}",
            "<think>one</think>7",
            "7<|im_end|><think>two</think>Nine.<|im_end|>\n",
        ),
        (
            "{% for message in messages %}",
            [{"type": "text", "text": "7"}],
            "f:1: the chat template takes `content` for",
        ),
    ],
)
def test_earlier_turns_that_templates_shorten(change, first, wanted):
    template = CHAT_TEMPLATE.replace("{% for message in messages %}", change)
    tokenizer = with_template(template.replace("message['content']", "message['content'] | trim"))
    last = "<think>two</think>Nine." if "think" in first else "Nine."
    row = {
        "prompt": [say("user", "q")],
        "completion": [say("assistant", first), say("user", "r"), say("assistant", last)],
    }
    if isinstance(first, list):
        with pytest.raises(DataError, match="f:1: the chat template takes `content` for a string"):
            tokenize_row(row, tokenizer, "f:1")
    else:
        assert counted(tokenize_row(row, tokenizer, "f:1"), tokenizer) == wanted


def test_a_template_that_hides_its_turns_is_refused():
    """It writes how many messages there are into every one of them."""
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'] ~ messages | length")
    with pytest.raises(
        DataError, match="f:1: the completion has messages of others .tool., and the chat template does"
    ):
        tokenize_row(TOOL, with_template(template), "f:1")


def test_masks_with_holes_from_score_to_loss(tokenizer, model, jsonl, tmp_path):
    """Log-probs by the model's own logits; PEAR's loss against a float64 loop over the tokens that count alone."""
    scored = tmp_path / "s.jsonl"
    found = score(
        model, jsonl([TOOL, TALK]), scored, tokenizer=tokenizer, progress=False, assistant_only_loss=True, top_k=3
    )
    assert any("2 rows have messages of others" in note for note in found["notes"])
    for _, row in read_jsonl(scored):
        expected = logprobs_from_logits(model, row["input_ids"], row["completion_mask"])
        assert row["behavior_logprobs"] == pytest.approx(expected, abs=1e-4)
        assert [bool(ids) for ids in row["top_k_ids"]] == [bit == 1 for bit in row["completion_mask"]]
        assert len(row["behavior_spans"]["bytes"]) == sum(row["completion_mask"])
        assert row["completion_mask"] != sorted(row["completion_mask"])

    student = make_model(tokenizer, seed=1)
    args = PEARSFTConfig(
        str(tmp_path / "out"), gamma=0.9, level="block", block_size=3, report_to="none", per_device_train_batch_size=2,
        shuffle_dataset=False, assistant_only_loss=True,
    )  # fmt: skip
    dataset = load_scored(scored, tokenizer, options=args.pear_options(), all_turns=True)
    trainer = PEARSFTTrainer(student, args, train_dataset=dataset, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    student.eval()
    with torch.no_grad():
        ours = trainer.compute_loss(student, batch).item()
    flat = [loss_without_holes(student, dataset[i], args) for i in range(2)]
    assert ours == pytest.approx(sum(flat) / sum(map(sum, dataset["completion_mask"])), rel=1e-5)


def test_masks_with_holes_under_another_tokenizer(tokenizer, jsonl, tmp_path):
    """No log-prob is lost in the alignment, and no block reaches into what others say."""
    other = make_tokenizer(vocab_size=300)
    score(
        make_model(other), jsonl([TOOL, TALK]), tmp_path / "s.jsonl", tokenizer=other, progress=False,
        assistant_only_loss=True,
    )  # fmt: skip
    dataset = load_scored(tmp_path / "s.jsonl", tokenizer)
    for row, (_, scored) in zip(dataset, read_jsonl(tmp_path / "s.jsonl"), strict=True):
        assert [block >= 0 for block in row["block_ids"]] == [bit == 1 for bit in row["completion_mask"]]
        assert sum(row["behavior_logprobs"]) == pytest.approx(sum(scored["behavior_logprobs"]), rel=1e-6)
        assert row["input_ids"] != scored["input_ids"]


def test_rows_in_which_others_count_must_be_scored_again(tokenizer, model, jsonl, tmp_path):
    """As versions before this rule wrote them."""
    score(model, jsonl([TOOL]), tmp_path / "s.jsonl", tokenizer=tokenizer, progress=False)
    row = next(row for _, row in read_jsonl(tmp_path / "s.jsonl"))
    start = row["completion_mask"].index(1)
    row["completion_mask"][start:] = [1] * (len(row["completion_mask"]) - start)
    write_scored(tmp_path / "old.jsonl", [row])
    with pytest.raises(DataError, match="old.jsonl:1: an older version scored this row: in `completion_mask` what"):
        load_scored(tmp_path / "old.jsonl", tokenizer)


@torch.no_grad()
def loss_without_holes(student, row: dict, args: PEARSFTConfig) -> float:
    """The reference's sum over the counted tokens, as a sequence in which there are no others."""
    at = np.flatnonzero(row["completion_mask"])
    hidden = student.model(torch.tensor([row["input_ids"]])).last_hidden_state[0].double()
    loss, _, _ = naive_pear_loss(
        hidden[at - 1], student.get_output_embeddings().weight.double(), torch.tensor(row["input_ids"])[at],
        torch.tensor(row["behavior_logprobs"])[at].double(), reduction="sum", **args.pear_options().asdict(),
    )  # fmt: skip
    return loss.item()


# ---------------------------------------------------------------------------------------------------------------------
# What the template leaves out


@pytest.mark.parametrize(
    ("change", "message", "notes"),
    [
        ("message['content'].split('</think>')[-1]", say("assistant", "<think>Alpha.</think>\n\nSeven."), "content"),
        ("message['content']", say("assistant", "Seven.", reasoning_content="Alpha."), "reasoning_content"),
        ("message['content']", say("assistant", "Seven.", thinking="Alpha."), "thinking"),
        ("message['content']", say("assistant", "I add.", tool_calls=CALL), "tool_calls"),
        ("message['content']", say("assistant", "I add.", tool_calls=json.dumps(CALL)), "tool_calls"),
        ("(message.tool_calls | map(attribute='function.name') | join if message.tool_calls else message['content'])",
         say("assistant", "", tool_calls=CALL), "tool_calls"),  # the name, and no arguments
        ("message['content'] | trim", say("assistant", " Seven. \n"), None),
        ("(message['tool_calls'] | tojson(indent=4) if message.tool_calls else message['content'])",
         say("assistant", "", tool_calls=CALL), None),
        ("(message['reasoning_content'] or '') ~ message['content']", say("assistant", "7", reasoning="Alpha."), None),
        ("(message.tool_calls[0].function.name ~ message.tool_calls[0].function.arguments if message.tool_calls else "
         "message['content'])", say("assistant", "", tool_calls=CALL), "as Python"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_noted(change, message, notes):
    tokenizer = with_template(CHAT_TEMPLATE.replace("message['content']", change))
    row = prompt_and_completion({"prompt": [say("user", "2 + 5?")], "completion": [message]}, "f:1")
    assert tokenize_row(row, tokenizer, "f:1").notes == {None: (), "as Python": (notes,)}.get(
        notes, (f"left out: {notes}",)
    )


@pytest.mark.parametrize(
    "more", [{"content": "", "tool_calls": CALL}, {"content": None, "reasoning_content": "Alpha."}]
)
def test_a_row_of_which_nothing_is_left_is_refused(tokenizer, more):
    template = CHAT_TEMPLATE.replace("message['content']", "(message['content'] or '')")
    row = prompt_and_completion({"prompt": [say("user", "x")], "completion": [{"role": "assistant", **more}]}, "f:1")
    with pytest.raises(DataError, match=f"f:1: nothing is left of the completion: .* leaves out its `{list(more)[1]}`"):
        tokenize_row(row, with_template(template), "f:1")


def test_every_command_says_what_is_left_out(tokenizer, save_model, jsonl, tmp_path, caplog, capsys):
    """score, inspect, sft and import, each with the number of rows and their lines."""
    rows = [{"prompt": [say("user", "x")], "completion": [say("assistant", "Seven.", reasoning_content="A.")]}] * 2
    folder, scored = save_model(), tmp_path / "s.jsonl"
    rows.append({"prompt": [say("user", "x")], "completion": [say("assistant", "Seven.")]})
    score(str(folder), data := jsonl(rows), scored)
    assert "of 2 rows the chat template leaves out `reasoning_content`" in " ".join(capsys.readouterr().err.split())
    report = inspect(scored, str(folder))
    load_scored(scored, tokenizer)
    imported = [{"prompt": row["prompt"], "completion": row["completion"], "logprobs": [-1.0] * 4} for row in rows[:2]]
    count = sum(tokenize_row(rows[0], tokenizer, "f:1").completion_mask)
    for row in imported:
        row["logprobs"] = [-1.0] * count
    found = import_logprobs(
        "jsonl", jsonl(imported, "i.jsonl"), tmp_path / "o.jsonl", tokenizer=str(folder), policy="p", settings={}
    )
    for said in (report["data"]["notes"], [record.getMessage() for record in caplog.records], found["warnings"]):
        assert any("of 2 rows the chat template leaves out `reasoning_content` of the completion" in s for s in said), (
            said
        )
        assert any("(lines 1, 2)" in sentence for sentence in said)
    assert data.is_file()


# ---------------------------------------------------------------------------------------------------------------------
# BOS and EOS


def test_doubled_bos_and_eos_are_counted_and_ids_stay(tokenizer):
    twice = make_tokenizer()
    twice.add_special_tokens({"bos_token": "<|im_start|>"})
    twice.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    rows = [
        {"prompt": "<|im_start|>user\nhi", "completion": "yo<|im_end|>\n"},
        {"prompt": "hi", "completion": "yo<|im_end|>"},
    ]
    found = [tokenize_row(row, twice, "f:1") for row in rows]
    assert [tokens.notes for tokens in found] == [("BOS", "EOS"), ()]
    assert [tokens.input_ids for tokens in found] == [row["input_ids"] for row in trl_rows(rows, twice)]
    notes = Notes()
    for line, tokens in enumerate(found, start=1):
        notes.add(line, tokens.notes, tokens.completion_mask)
    assert [said[:34] for said in notes.in_words()] == [
        "1 row start with BOS twice (line 1", "1 row end with EOS twice (line 1):"
    ]  # fmt: skip


def test_prompts_of_rl_with_two_bos_or_a_closing_eos(caplog):
    closing = make_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    check_prompts(["2 + 5 ="], closing, None, None)
    assert any("1 row end with an EOS that the tokenizer adds (line 1)" in r.getMessage() for r in caplog.records)


# ---------------------------------------------------------------------------------------------------------------------
# Types, and templates that loop


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tools", "no json", "f:1: `tools` is a string that is no JSON"),
        ("tools", {"name": "f"}, "f:1: `tools` must be a list of JSON schemas .* got dict"),
        ("tools", ["f"], "f:1: `tools` must be a list of JSON schemas .* got a list with str"),
        ("chat_template_kwargs", "x", "f:1: `chat_template_kwargs` must be an object, .* got str"),
        (
            "chat_template_kwargs",
            {"tokenize": True},
            "f:1: `chat_template_kwargs` has 'tokenize', which is no variable",
        ),
    ],
)
def test_arguments_of_the_template_of_another_type(tokenizer, key, value, message):
    row = {"prompt": [say("user", "x")], "completion": [say("assistant", "y")], key: value}
    with pytest.raises(DataError, match=message):
        tokenize_row(row, tokenizer, "f:1")


@pytest.mark.parametrize("calls", ["no json", {"name": "f"}, ["f"]])
def test_tool_calls_of_another_type(calls):
    row = {"prompt": [say("user", "x")], "completion": [say("assistant", "y", tool_calls=calls)]}
    with pytest.raises(
        DataError, match=r"f:1: `completion\[0\].tool_calls` (is a string that is no JSON|must be a list)"
    ):
        prompt_and_completion(row, "f:1")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "more than 0.2 seconds"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.2 seconds"),
        ("{{ 'x' * 10**10 }}", "more than 2 GiB"),
    ],
)
def test_a_template_that_loops_ends_in_one_line(template, what, monkeypatch):
    monkeypatch.setattr(pear.chat, "RENDER_SECONDS", 0.2)
    row = {"prompt": [say("user", "x")], "completion": [say("assistant", "y")]}
    with pytest.raises(DataError, match=f"f:1: the chat template takes {what} for one conversation"):
        tokenize_row(row, with_template(template), "f:1")
    with pytest.raises(DataError, match="the chat template takes"):
        check_prompts([row["prompt"]], with_template(template), None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Options of the tokenizer


def test_rows_of_another_template_than_the_options_are_refused(tokenizer, model, jsonl, tmp_path):
    template = tmp_path / "new.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<|im_start|>' + message['role'] + '\n", "[' + message['role'] + '] "))
    data = jsonl([{"prompt": [say("user", "x")], "completion": [say("assistant", "y")]}])
    changed = changed_tokenizer(tokenizer, chat_template_path=str(template))
    score(model, data, tmp_path / "old.jsonl", tokenizer=tokenizer, progress=False)
    with pytest.raises(
        DataError, match="old.jsonl:1: scored with the model's own chat template and EOS, and --chat_temp"
    ):
        load_scored(tmp_path / "old.jsonl", changed, unchanged=tokenizer)
    score(model, data, tmp_path / "new.jsonl", tokenizer=tokenizer, progress=False, chat_template_path=str(template))
    dataset = load_scored(tmp_path / "new.jsonl", changed, unchanged=tokenizer)
    own = changed.apply_chat_template([say("user", "x"), say("assistant", "y")], return_dict=True)["input_ids"]
    assert dataset[0]["input_ids"] == own and tokenizer.decode(own).startswith("[user] x")
    args = PEARSFTConfig(str(tmp_path / "out"), chat_template_path=str(template), report_to="none")
    with pytest.raises(
        DataError, match="chat_template_path = .* changes the tokenizer, and the data is in tokens already"
    ):
        PEARSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    PEARSFTTrainer(model, args, train_dataset=dataset, processing_class=changed)
    for options, message in (
        ({"eos_token": "nope"}, "eos_token = 'nope' is not in the tokenizer's vocabulary"),
        ({"chat_template_path": str(tmp_path / "none.jinja")}, "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            changed_tokenizer(tokenizer, **options)
