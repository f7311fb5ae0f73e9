"""Tokens of string completions in their text, in every family of tokenizers, against other programs' offsets."""

import unicodedata

import pytest
from families import FAMILIES, family, sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from unicode_text import texts, texts_with_tokens

from pear.align import Unaligned, align, spans_of
from pear.align.spans import JOINT, NO_BYTES
from pear.rows import tokenize_row

PROMPTS = st.sampled_from(["", "Q: 1 + 1?\n", "x ", "ein ", "e", "日"])
names = pytest.mark.parametrize("name", FAMILIES)


def spans_in(tokenizer, prompt: str, completion: str):
    row = {"prompt": prompt, "completion": completion}
    tokenized = tokenize_row(row, tokenizer, "row")
    ids = [i for i, bit in zip(tokenized.input_ids, tokenized.completion_mask, strict=True) if bit]
    return spans_of(row, tokenized, tokenizer), ids, tokenized


def can_spell(name: str, text: str) -> bool:
    """SmolLM2 has no tokens for some bytes, as control characters; `▁` is a space to SentencePiece and its like."""
    if name != "smollm2":
        return name in ("qwen", "llama3") or "▁" not in text
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return set(in_bytes[0][0]) <= family(name).get_vocab().keys()


@names
@settings(max_examples=80)
@given(completion=texts)
def test_it_raises_where_the_tokens_do_not_decode_to_the_text(name, completion):
    tokenizer = family(name)
    row = {"prompt": "x", "completion": completion}
    tokenized = tokenize_row(row, tokenizer, "row")
    ids = [token for token in tokenized.input_ids[:-1] if token != tokenizer.bos_token_id]
    if name == "sentencepiece":  # transformers' own does not put bytes together
        decoded = tokenizer.sp_model.decode(ids)
    else:
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    text = "x" + completion
    faithful = decoded == (unicodedata.normalize("NFC", text) if name == "qwen" else text)
    try:
        spans_of(row, tokenized, tokenizer)
    except Unaligned:
        assert not faithful
    else:
        assert faithful


@names
@settings(max_examples=60)
@given(prompt=PROMPTS, completion=texts_with_tokens)
def test_tokens_part_the_text(name, prompt, completion):
    """Every byte belongs to one token, but those of a token that joins them with the prompt's, or before the first."""
    assume(can_spell(name, completion))
    spans, ids, tokenized = spans_in(family(name), prompt, completion)
    assert len(spans.extents) == len(ids)
    at = 0
    for i, (begin, end) in enumerate(spans.extents):
        mark = spans.marks.get(i)
        assert (mark is not None) == (begin == end)
        if begin != at:  # a row's first token is never predicted, so a row without a prompt has bytes before
            assert i == 0 and tokenized.completion_mask[:2] == [0, 1]
        at = end
        if mark is not None and mark.startswith(JOINT):
            at += int(mark[len(JOINT) :].split(":")[0])
    assert at == len(completion.encode())
    assert [m for m in spans.marks.values() if not m.startswith((JOINT, NO_BYTES))] in (["end_of_turn"], [])


@names
@settings(max_examples=60)
@given(prompt=PROMPTS, completion=texts_with_tokens)
def test_one_tokenizer_twice_is_the_token_level(name, prompt, completion):
    assume(can_spell(name, completion))
    spans, ids, _ = spans_in(family(name), prompt, completion)
    logprobs = [-0.5 * i for i in range(len(ids))]
    both = align(spans, spans, logprobs)
    assert both.block_ids.tolist() == list(range(len(ids)))
    assert both.behavior_logprobs.tolist() == logprobs
    assert both.shared == 1 and both.left_out == 0


@pytest.mark.parametrize("name", ["smollm2", "qwen", "llama3", "llama2", "metaspace", "gemma"])
@settings(max_examples=60)
@given(text=texts)
def test_against_the_offsets_of_tokenizers(name, text):
    """`tokenizers` has offsets of its own, in characters; it may leave out white space at a token's ends."""
    assume(can_spell(name, text))
    tokenizer = family(name)
    text = unicodedata.normalize("NFC", text)
    spans, ids, _ = spans_in(tokenizer, "", text)
    encoding = tokenizer.backend_tokenizer.encode(text + tokenizer.eos_token)
    assert encoding.ids[-len(ids) :] == ids
    data, matched = text.encode(), 0
    for (begin, end), (first, last) in zip(spans.extents, encoding.offsets[-len(ids) :], strict=True):
        try:
            own = data[begin:end].decode()
        except UnicodeDecodeError:
            continue  # part of a character
        if begin < end:
            assert own.strip() == text[first:last].strip()
            matched += 1
    assert matched or not text.isascii() or len(ids) < 3


@pytest.mark.parametrize("rule", ["identity", "nfkc"])
@settings(max_examples=60)
@given(text=texts.filter(lambda text: "▁" not in text))
def test_against_the_offsets_of_sentencepiece(rule, text):
    """SentencePiece says which characters of the text before normalization a piece is; a byte of several is nothing."""
    tokenizer = sentencepiece_with(rule)
    prompt = "x"
    spans, ids, tokenized = spans_in(tokenizer, prompt, text)
    pieces = tokenizer.sp_model.encode(prompt + text, return_type="offset_mapping")
    assert pieces["ids"] == [token for token in tokenized.input_ids[:-1] if token != tokenizer.bos_token_id]
    spelled = prompt + text
    bytes_before = [len(spelled[:i].encode()) - len(prompt) for i in range(len(spelled) + 1)]
    offsets = pieces["offsets"][len(pieces["ids"]) + 1 - len(ids) :]
    for token, (begin, end), (_, last) in zip(ids[:-1], spans.extents[:-1], offsets, strict=True):
        if begin < end and not tokenizer.sp_model.is_byte(token):
            assert end == bytes_before[last]


_SENTENCEPIECE = {}


def sentencepiece_with(rule: str):
    if rule not in _SENTENCEPIECE:
        _SENTENCEPIECE[rule] = sentencepiece(normalization_rule_name=rule)
    return _SENTENCEPIECE[rule]


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


def test_nfc_cluster_belongs_to_the_token_that_ends_it():
    """`e` and U+0301 are read as é, whose two bytes are two tokens; they have no boundary within the text's 3 bytes."""
    tokenizer = family("qwen")
    spans, ids, _ = spans_in(tokenizer, "Q\n", "ze\u0307z")  # ė: no word of the corpus has it
    assert tokenizer.convert_ids_to_tokens(ids) == ["z", "ÄĹ"[0], "ÄĹ"[1], "z", "<|im_end|>"]
    assert spans.extents == [(0, 1), (1, 1), (1, 4), (4, 5), (5, 5)]
    assert spans.marks == {1: NO_BYTES + "\\xc4", 4: "end_of_turn"}
