"""Tokens that come as bytes, from an API, a vocabulary of tiktoken's among them; what a scored row holds of spans."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
from families import QWEN_PATTERN, family, qwen_cut, qwen_ranks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_align_merge import check_alignment, cut_texts
from unicode_text import texts

from pear.align import Spans, Unaligned, spans_of, spans_of_text
from pear.io import DataError
from pear.rows import tokenize_row


@pytest.fixture(scope="module")
def qwen_encoding():
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=qwen_ranks(), special_tokens={})


def bytes_in(encoding, text: str) -> list[bytes]:
    ids = encoding.encode(text, disallowed_special=())
    return [encoding.decode_single_token_bytes(token) for token in ids]


@settings(max_examples=60)
@given(text=texts, seed=st.integers(0, 9))
def test_qwen_in_tiktoken_beside_smollm2(qwen_encoding, text, seed):
    """The real vocabularies of both: bytes from tiktoken on one side, ids on the other."""
    tokens = bytes_in(qwen_encoding, text)
    behavior = spans_of_text([*tokens, b"<|im_end|>"], text)
    assert [text.encode()[b:e] for b, e in behavior.extents[:-1]] == tokens
    assert behavior.marks == {len(tokens): "end_of_turn"}
    row = {"prompt": "Q:\n", "completion": text}
    try:
        student = spans_of(row, tokenize_row(row, family("smollm2"), "row"), family("smollm2"))
    except Unaligned:
        return  # SmolLM2 has no tokens for some bytes
    check_alignment(student, behavior, -np.random.default_rng(seed).exponential(size=len(behavior.extents)))


@pytest.fixture(scope="module")
def both_ways():
    tiktoken = pytest.importorskip("tiktoken")
    ranks, tokenizer = qwen_cut()
    return tiktoken.Encoding("cut", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={}), tokenizer


@settings(max_examples=60)
@given(text=texts)
def test_one_vocabulary_in_tiktoken_and_in_tokenizers(both_ways, text):
    """With NFC before the one and within the other; for a text that is NFC already, the same spans both ways."""
    encoding, tokenizer = both_ways
    row = {"prompt": "Q\n", "completion": text}
    tokenized = tokenize_row(row, tokenizer, "row")
    assume(not unicodedata.combining(unicodedata.normalize("NFD", text)[0]) and not text[0].isspace())
    composed = unicodedata.normalize("NFC", text)
    tokens = [*bytes_in(encoding, composed), b"<|im_end|>"]
    spans = spans_of(row, tokenized, tokenizer)
    if composed == text:
        assert spans == spans_of_text(tokens, text)
    before = b""
    for token, (begin, end) in zip(tokens[:-1], spans.extents[:-1], strict=True):
        before += token
        if begin < end:  # those without bytes are the first parts of what this one ends
            try:
                own = text.encode()[begin:end].decode()
            except UnicodeDecodeError:  # a part of a character, as it is
                assert before == text.encode()[begin:end]
            else:
                assert before.decode() == unicodedata.normalize("NFC", own)
            before = b""


@settings(max_examples=100)
@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 40)), end=st.booleans())
def test_bytes_of_any_cut(text, cuts, end):
    data = text.encode()
    cuts = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    tokens = [data[a:b] for a, b in itertools.pairwise(cuts)] + ([b"</s>"] if end else [])
    spans = spans_of_text(tokens, text)
    assert spans.extents == [*itertools.pairwise(cuts), *([(len(data),) * 2] if end else [])]


@pytest.mark.parametrize(
    ("tokens", "contents", "extents", "marks"),
    [
        (["<think>", "\n", "a", "b", "\n", "</think>", "\n\n", "It", " is", "<|im_end|>"], ["ab", "It is"],
         [(0, 0), (0, 0), (0, 1), (1, 2), (2, 2), (2, 2), (2, 2), (2, 4), (4, 7), (7, 7)],
         {0: "think_open", 1: "\n", 4: "\n", 5: "think_close", 6: "\n\n", 9: "end_of_turn"}),
        ([" It", " is"], "It is", [(0, 0), (2, 5)], {0: "joint 2:  It"}),
        (["It", b"", " is"], "It is", [(0, 2), (2, 2), (2, 5)], {1: "no bytes: "}),
        (["<think>", "a", "</think>"], "<think>a</think>", [(0, 7), (7, 8), (8, 16)], {}),
    ],
)  # fmt: skip
def test_tokens_of_a_server(tokens, contents, extents, marks):
    spans = spans_of_text(tokens, contents)
    assert spans.extents == extents and spans.marks == marks


@pytest.mark.parametrize(
    ("tokens", "contents", "reason"),
    [
        (["It", " was"], "It is", "they have 'was' where it has 'is', at byte 3"),
        (["It"], "It is", "where it has ' is', at byte 2"),
        (["It", " is", " so"], "It is", "they have ' so' where it has '', at byte 5"),
        (["\n", "\n", "</s>"], "\n", "in more than one way"),
        ([b"\xff"], "y", r"they have '\\\\xff' where it has 'y'"),
    ],
)
def test_tokens_that_spell_something_else(tokens, contents, reason):
    with pytest.raises(Unaligned, match=reason):
        spans_of_text(tokens, contents)


# ---------------------------------------------------------------------------------------------------------------------
# In a scored row


@settings(max_examples=60)
@given(spans=cut_texts())
def test_json_and_back(spans):
    value = json.loads(json.dumps(spans.to_json()))
    assert Spans.from_json(value, "data.jsonl:1") == spans
    assert Spans.from_json(value | {"logprobs": [-1.0]}, "data.jsonl:1") == spans


def test_a_problem_in_a_row_is_raised():
    with pytest.raises(Unaligned) as raised:
        Spans.from_json({"problem": "text is lost"}, "data.jsonl:1")
    assert raised.value.reason == "text is lost"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be an object, got NoneType"),
        ({}, "must have a list `bytes`"),
        ({"bytes": [], "marks": []}, "an object `marks`"),
        ({"bytes": [[0, 1], [1]]}, r"`behavior_spans.bytes\[1\]` must be \[begin, end\], got \[1\]"),
        ({"bytes": [[0, True]]}, r"bytes\[0\]` must be \[begin, end\]"),
        ({"bytes": [[0, 2], [1, 3]]}, "must not start before 2"),
        ({"bytes": [[3, 2]]}, "nor end before it starts"),
        ({"bytes": [[0, 2]], "marks": {"0": "x"}}, "for one of 1 tokens that has no bytes"),
        ({"bytes": [[0, 0]], "marks": {"1": "x"}}, r"marks\['1'\]"),
        ({"bytes": [[0, 0]], "marks": {"-1": "x"}}, r"marks\['-1'\]"),
        ({"bytes": [[0, 0]], "marks": {"0": 3}}, "must be a string"),
    ],
)
def test_what_is_no_spans(value, message):
    with pytest.raises(DataError, match=r"^data.jsonl:4: .*" + message):
        Spans.from_json(value, "data.jsonl:4")
