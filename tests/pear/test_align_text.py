"""Tokens of string completions in their text, in every family of tokenizers, against other programs' offsets."""

import functools
import gc
import unicodedata
import weakref

import pytest
from families import FAMILIES, family, llama3, qwen, sentencepiece, wordpiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from unicode_text import texts, texts_with_tokens

from pear.align import Unaligned, align, spans_of
from pear.align.pieces import pieces_of
from pear.align.spans import JOINT, NO_BYTES
from pear.io import DataError
from pear.rows import TokenizedRow, tokenize_row

PROMPTS = st.sampled_from(["", "Q: 1 + 1?\n", "x ", "ein ", "e", "日"])
names = pytest.mark.parametrize("name", FAMILIES)


def spans_in(tokenizer, prompt: str, completion: str):
    row = {"prompt": prompt, "completion": completion}
    try:
        tokenized = tokenize_row(row, tokenizer, "row")
    except DataError:  # an EOS alone, say: no token is left to predict
        assume(False)
    ids = [i for i, bit in zip(tokenized.input_ids, tokenized.completion_mask, strict=True) if bit]
    return spans_of(row, tokenized, tokenizer), ids, tokenized


def can_spell(name: str, text: str) -> bool:
    """SmolLM2 has no tokens for some bytes, as control characters; `▁` is a space to SentencePiece and its like."""
    if name != "smollm2":
        return name in ("qwen", "llama3") or "▁" not in text
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return set(in_bytes[0][0]) <= tokens_of_smollm2()


@functools.cache
def tokens_of_smollm2() -> set[str]:
    return set(family("smollm2").get_vocab())


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


def test_a_token_that_ends_within_a_cluster_makes_no_boundary():
    """`a` and the first byte of é are one token here: `a` has no boundary of its own behind it."""
    characters = bytes_to_unicode()
    vocabulary = {character: byte for byte, character in characters.items()} | {"aÃ": 256}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "Ã")]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    spans, ids, _ = spans_in(tokenizer, "Q\n", "ae\u0301b")
    assert tokenizer.convert_ids_to_tokens(ids) == ["aÃ", "©", "b", "<end>"]
    assert spans.extents == [(0, 0), (0, 4), (4, 5), (5, 5)]
    assert spans.marks == {0: NO_BYTES + "a\\xc3", 3: "end_of_turn"}


def test_bytes_shared_with_the_prompt_are_no_tokens():
    """각 over the prompt's end: two of its bytes are the prompt's tokens, the third is of all that it is made of."""
    tokenizer = family("qwen")
    spans, ids, _ = spans_in(tokenizer, "Q\n가", "\u11a8z")
    assert len(ids) == 3 and spans.extents == [(0, 0), (3, 4), (4, 4)]
    assert spans.marks == {0: "joint 3: \\x81", 2: "end_of_turn"}
    spans, ids, _ = spans_in(tokenizer, "", "e\u0307z")  # the first half of ė is the row's first token, never predicted
    assert len(ids) == 3 and spans.extents == [(0, 0), (3, 4), (4, 4)]
    assert spans.marks == {0: "joint 3: \\x97", 2: "end_of_turn"}


def test_case_is_no_other_text():
    """A tokenizer that reads lower case has the same characters."""
    tokenizer = sentencepiece_with("nmt_nfkc_cf")
    spans, ids, _ = spans_in(tokenizer, "x", "STRASSE ﬁ")
    assert tokenizer.sp_model.decode(ids).startswith("strasse fi")
    assert all(b < e or i in spans.marks for i, (b, e) in enumerate(spans.extents))
    assert [e for b, e in spans.extents if b < e][-1] == len("STRASSE ﬁ".encode())


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("naïve", "the tokenizer writes 'i' for 'ï': text is lost"),
        ("a\nb", r"the tokenizer writes ' ' for '\\n': text is lost"),
        ("a\u200bb", r"the tokenizer writes '' for '\\u200b': text is lost"),
        ("the  dog", "the tokens do not spell the text"),
        ("dog.", "the tokens do not spell the text"),
    ],
)
def test_wordpiece_says_what_it_loses(completion, reason):
    with pytest.raises(Unaligned, match=reason):
        spans_in(family("wordpiece"), "x", " " + completion)


def test_wordpiece_where_it_loses_nothing():
    spans, ids, _ = spans_in(family("wordpiece"), "the", " Lazy dog")
    assert family("wordpiece").decode(ids[:-1]) == "lazy dog"
    assert [" Lazy dog"[b:e] for b, e in spans.extents if b < e][0].startswith(" ")
    assert "".join(" Lazy dog"[b:e] for b, e in spans.extents) == " Lazy dog"


def test_text_lost_before_the_first_token_is_said():
    """A row's first token is not predicted, but what is before the second must be the first's."""
    with pytest.raises(Unaligned, match="it has ' ' where they have ''"):
        spans_in(family("wordpiece"), "", "  the dog")
    with pytest.raises(Unaligned, match="do not spell the text"):
        spans_in(family("wordpiece"), "the", "  ")
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.convert_tokens_to_ids("[CLS]"))]
    )
    assert spans_in(tokenizer, "", "the dog")[0].extents[0] == (0, 3)
    with pytest.raises(Unaligned, match="do not spell the text"):
        spans_in(tokenizer, "", "  the dog")


def test_unknown_tokens_are_said():
    with pytest.raises(Unaligned, match="token for unknown text"):
        spans_in(family("wordpiece"), "the", " \u1e9e")


def test_lone_surrogates_are_said():
    tokenizer = family("llama3")
    with pytest.raises(Unaligned, match="lone surrogate"):
        spans_of({"prompt": "a", "completion": "b\ud800"}, TokenizedRow([0, 1], [0, 1], 0), tokenizer)


def test_tokens_of_another_text_are_said():
    tokenizer = family("llama3")
    tokenized = tokenize_row({"prompt": "Q: ", "completion": "It is 7."}, tokenizer, "row")
    with pytest.raises(Unaligned, match="it has 'Q: It is 8' where they have 'It is 7'"):
        spans_of({"prompt": "Q: ", "completion": "It is 8."}, tokenized, tokenizer)


def test_the_mask_must_end_the_row():
    with pytest.raises(Unaligned, match="not the last ones"):
        spans_of({"prompt": "a", "completion": "b"}, TokenizedRow([0, 1, 2], [0, 1, 0], 0), family("llama3"))


def test_other_ids_for_the_same_text():
    """What a server sampled need not be what the tokenizer would choose, and may end before EOS."""
    tokenizer = family("qwen")
    row = {"prompt": "Q\n", "completion": "the quick"}
    tokenized = tokenize_row(row, tokenizer, "row")
    start = tokenized.completion_mask.index(1)
    single = [tokenizer.convert_tokens_to_ids(c) for c in "theĠquick"]
    own = TokenizedRow(tokenized.input_ids[:start] + single, [0] * start + [1] * len(single), 0)
    assert spans_of(row, own, tokenizer).extents == [(i, i + 1) for i in range(9)]


def test_added_tokens_that_strip_have_the_white_space():
    tokenizer = _byte_level_with([AddedToken("<a>", lstrip=True, special=True), AddedToken("<b>", rstrip=True)])
    completion = "the  <a> dog<b> \n quick"
    spans, ids, _ = spans_in(tokenizer, "Q\n", completion)
    shown = {tokenizer.convert_ids_to_tokens(i): completion[b:e] for i, (b, e) in zip(ids, spans.extents, strict=True)}
    assert shown["<a>"] == "  <a>" and shown["<b>"] == "<b> \n "
    assert "".join(completion[b:e] for b, e in spans.extents) == completion


def _byte_level_with(added):
    tokenizer = qwen()
    tokenizer.add_tokens(added)
    return tokenizer


def test_tokens_that_the_tokenizer_appends_are_marks():
    tokenizer = llama3()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>", special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
    )
    spans, ids, _ = spans_in(tokenizer, "", "dog")
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|eot_id|>", "<|end_of_text|>"]
    assert spans.extents[-2:] == [(3, 3), (3, 3)] and list(spans.marks.values()) == ["end_of_turn"] * 2


def test_a_vocabulary_that_grows_is_read_anew():
    tokenizer = qwen()
    assert spans_in(tokenizer, "Q\n", "dog<é>")[0].extents[-2] == (6, 7)
    tokenizer.add_tokens(["<é>"])
    assert spans_in(tokenizer, "Q\n", "dog<é>")[0].extents[-2] == (3, 7)


def test_pieces_do_not_keep_a_tokenizer_alive():
    tokenizer = qwen()
    spans_in(tokenizer, "Q\n", "dog")
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["qwen", "sentencepiece"])
def test_ids_that_no_token_has_are_said(name):
    with pytest.raises(Unaligned, match="token 99999 is not in the tokenizer's vocabulary"):
        spans_of({"prompt": "a", "completion": "b"}, TokenizedRow([0, 99_999], [0, 1], 0), family(name))


def test_a_completion_that_has_eos_itself():
    spans, _, _ = spans_in(family("llama3"), "Q\n", "dog<|eot_id|>")
    assert spans.extents[-1] == (3, 13) and not spans.marks


def test_a_token_across_the_prompts_end_is_a_mark():
    """Its log-prob is of the prompt's space as well; the other side has one too, or it is left out of both."""
    spans, ids, _ = spans_in(family("smollm2"), "Q: ", "It is")
    assert spans.extents[0] == (0, 0) and spans.marks[0] == "joint 2:  It" and spans.extents[1] == (2, 5)


def test_a_long_row_takes_linear_time():
    """Ten times the text: with anything quadratic a hundred times the calls. Counted, not timed."""
    calls = []
    tokenizer = family("qwen")
    pieces = pieces_of(tokenizer)
    kept, pieces.normalizer = pieces.normalizer, lambda text: calls.append(len(text)) or kept(text)
    try:
        for size in (100, 1000):
            spans_in(tokenizer, "Q\n", "cafe\u0301 au lait, " * size)
    finally:
        pieces.normalizer = kept
    assert sum(calls) < 12 * (len("cafe\u0301 au lait, ") * 1100)
