"""The rule of structural tokens, and a file that changes it."""

import pytest
from families import family

from pear.align import ROLES, align, read_roles, spans_of
from pear.align.roles import names_of
from pear.io import DataError
from pear.rows import tokenize_row


def test_no_token_has_two_roles():
    tokens = [token for names in ROLES.values() for token in names]
    assert len(tokens) == len(set(tokens))


def test_eos_ends_a_turn_unless_it_is_named():
    assert names_of(ROLES, "<end>")["<end>"] == "end_of_turn"
    assert names_of({"stop": ("</s>",)}, "</s>")["</s>"] == "stop"


def test_a_file_changes_what_it_names(tmp_path):
    path = tmp_path / "roles.yaml"
    path.write_text("think_open: ['<reason>', '<|im_start|>']\nthink_close: []\nquote: ['<q>']\n")
    roles = read_roles(path)
    assert roles["think_open"] == ("<reason>", "<|im_start|>")
    assert roles["think_close"] == () and roles["quote"] == ("<q>",)
    assert "<|im_start|>" not in roles["start_of_turn"] and "<start_of_turn>" in roles["start_of_turn"]
    assert roles["end_of_turn"] == ROLES["end_of_turn"]
    assert names_of(roles)["<|im_start|>"] == "think_open" and "</think>" not in names_of(roles)
    path.write_text("")
    assert read_roles(path) == ROLES


def test_a_role_taken_away_leaves_its_tokens_out(tmp_path):
    path = tmp_path / "roles.yaml"
    path.write_text("end_of_turn: []\nturn_a: ['<|im_end|>']\nturn_b: ['<|eot_id|>']\n")
    row = {"prompt": "Q:\n", "completion": "It is 7."}
    for roles, matched in ((ROLES, True), (read_roles(path), False)):
        student, behavior = (
            spans_of(row, tokenize_row(row, family(name), "row"), family(name), roles) for name in ("llama3", "qwen")
        )
        found = align(student, behavior, [-1.0] * len(behavior.extents), roles)
        assert (found.block_ids[-1] >= 0) == matched
        assert found.left_out == (0 if matched else -1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "expected `role: .token, ...."),
        ("a: b: c", "not YAML"),
        ("think_open: <think>", "role `think_open` must have a list of tokens"),
        ("think_open: ['']", "strings that are not empty"),
        ("think_open: [3]", "strings that are not empty"),
        ("3: ['<think>']", "the name of a role must be a string, got 3"),
        ("a: ['<t>']\nb: ['<t>']", "token '<t>' stands under `a` and under `b`"),
    ],
)
def test_files_that_are_no_roles(tmp_path, text, message):
    path = tmp_path / "roles.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_roles(path)
    assert str(path) in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_roles(tmp_path / "roles.yaml")
