"""Random text for hypothesis: whatever Unicode has that tokenizers treat in ways of their own."""

from hypothesis import strategies as st

_WORDS = ["the ", " quick", "answer", "ein schöner ", "def f(x):", "naïve", "日本語", "한국어", "العربية", "русский "]
_CHARACTERS = [
    st.sampled_from("abcXYZ .,;:'\"()"),
    st.sampled_from(" \n\t\r\u00a0\u3000\u2028"),
    st.sampled_from("0123456789"),
    st.sampled_from("éöñÅçß"),
    st.sampled_from("\u0301\u0308\u0303\u0327\u0338\u0345"),  # combining marks, U+0327 and U+0338 below others
    st.sampled_from("日本語中文ｶﾞ"),
    st.sampled_from("한국각\u1100\u1161\u11a8\u1175"),  # Hangul, whole and in jamo
    st.sampled_from("😀👩\u200d👧🏽\ufe0f🇩🇪"),
    st.sampled_from("العبي\u064b\u0651"),
    st.sampled_from("\x00\x07\x1b\u200b\ufeff\u202e"),
    st.sampled_from("ﬁ①½Ωſıİς\u0344\u0958"),  # characters with other forms
    st.characters(exclude_categories=["Cs"]),
]
_TOKENS = ["<think>", "</think>", "<|im_end|>", "</s>", "<s>", "<unk>", "<0x41>", "<eos>"]

words = st.sampled_from(_WORDS)
characters = st.one_of(_CHARACTERS)
texts = st.lists(st.one_of(words, characters, characters, characters), min_size=1, max_size=24).map("".join)
texts_with_tokens = st.lists(st.one_of(words, characters, st.sampled_from(_TOKENS)), min_size=1, max_size=16).map(
    "".join
)
