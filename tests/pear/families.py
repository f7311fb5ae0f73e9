"""Tokenizers of every family that chat models have, small ones trained here and real ones from packages."""

import base64
import functools
import importlib.util
import io
import tempfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pear.models import load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "What is 12 plus 34? It is 46, and 46 is even. Let us think step by step.",
    "def f(x):\n    return x  +  1\n\n\nprint(f(41))\n",
    "Ein schöner Tag, naïve café, Ångström, ﬁne; 日本語のテキスト、한국어 텍스트, русский текст, العربية",
    "<think>\nFirst we add.\n</think>\n\nThe answer is 7.",
]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")


def _byte_level(pattern: str, special: list[str], vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def qwen() -> PreTrainedTokenizerBase:
    """Byte-level BPE after NFC; <think> is an added token that is not special."""
    backend = _byte_level(QWEN_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 420)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def llama3() -> PreTrainedTokenizerBase:
    """Byte-level BPE as it is, BOS in front of a text, turns that end in <|eot_id|>."""
    from tokenizers import processors

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = _byte_level(LLAMA3_PATTERN, special, 360)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")
    tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer


def _byte_fallback(vocab_size: int, special: list[str], normalizer, pre_tokenizer) -> Tokenizer:
    """BPE over characters, with `▁` for a space and bytes for what it has no token for."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    import json

    trained = json.loads(backend.to_str())
    trained["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    trained["added_tokens"] = [token for token in trained["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(trained))


_SPM_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def llama2() -> PreTrainedTokenizerBase:
    """SentencePiece as Llama 2's is written for `tokenizers`: a space is put before everything, by a normalizer."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = _byte_fallback(520, ["<unk>", "<s>", "</s>"], normalizer, None)
    backend.decoder = _SPM_DECODER
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA2_TEMPLATE
    return tokenizer


def metaspace() -> PreTrainedTokenizerBase:
    """The same by `Metaspace`, which puts the space before a text that has none, at its very start."""
    backend = _byte_fallback(
        480, ["<unk>", "<s>", "</s>"], None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    )
    backend.decoder = _SPM_DECODER
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = ZEPHYR_TEMPLATE
    return tokenizer


def gemma() -> PreTrainedTokenizerBase:
    """`▁` for a space and no dummy prefix."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = _byte_fallback(
        540, special, normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", behavior="merged_with_previous")
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end_of_turn>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def sentencepiece(**options) -> PreTrainedTokenizerBase:
    """A model of the real sentencepiece, trained here, in the tokenizer of transformers that runs it."""
    spm = pytest.importorskip("sentencepiece")
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    model = io.BytesIO()
    defaults = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        vocab_size=380,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **(defaults | options),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return SentencePieceBackend(
            vocab_file=str(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
        )


def wordpiece() -> PreTrainedTokenizerBase:
    """BERT's: lower case, accents and white space lost."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def qwen_ranks() -> dict[bytes, int]:
    """The vocabulary of Qwen, 151,643 byte strings by rank, from the tiktoken file in the package dashscope."""
    spec = importlib.util.find_spec("dashscope")
    path = spec and Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    if not path or not path.is_file():
        pytest.skip("the package dashscope, which carries Qwen's vocabulary, is not installed")
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def qwen_cut(size: int = 6000) -> tuple[dict[bytes, int], PreTrainedTokenizerBase]:
    """The first tokens of Qwen's vocabulary, a vocabulary as well: as ranks, and with merges for `tokenizers`."""
    ranks = {token: rank for token, rank in qwen_ranks().items() if rank < size}
    character = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    def parts(token: bytes) -> list[bytes]:
        """The two tokens whose merge this one is: what BPE makes of it by the merges before."""
        found = [token[i : i + 1] for i in range(len(token))]
        while len(found) > 2:
            pairs = [ranks.get(a + b, size) for a, b in zip(found, found[1:], strict=False)]
            i = pairs.index(min(pairs))
            found[i : i + 2] = [found[i] + found[i + 1]]
        return found

    merges = [tuple(map(spell, parts(token))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return ranks, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


FAMILIES = {
    "smollm2": lambda: load_tokenizer("smollm2"),
    "qwen": qwen,
    "llama3": llama3,
    "llama2": llama2,
    "metaspace": metaspace,
    "gemma": gemma,
    "sentencepiece": sentencepiece,
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerBase:
    return {**FAMILIES, "wordpiece": wordpiece}[name]()


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates, cut from those of the models

QWEN_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "assistant" %}
{%- set content = message.content %}
{%- set reasoning_content = "" %}
{%- if message.reasoning_content is string %}
{%- set reasoning_content = message.reasoning_content %}
{%- elif "</think>" in content %}
{%- set reasoning_content = content.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
{%- set content = content.split("</think>")[-1].lstrip("\\n") %}
{%- endif %}
{{- "<|im_start|>assistant\\n" }}
{%- if loop.last or reasoning_content %}
{{- "<think>\\n" + reasoning_content.strip("\\n") + "\\n</think>\\n\\n" }}
{%- endif %}
{{- content.lstrip("\\n") }}
{%- for call in message.tool_calls or [] %}
{{- "\\n<tool_call>\\n" + call.function | tojson + "\\n</tool_call>" }}
{%- endfor %}
{{- "<|im_end|>\\n" }}
{%- else %}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" }}
{%- endif %}"""

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}"""

LLAMA2_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "user" %}
{{- bos_token + "[INST] " + message.content | trim + " [/INST]" }}
{%- else %}
{{- " " + message.content | trim + " " + eos_token }}
{%- endif %}
{%- endfor %}"""

ZEPHYR_TEMPLATE = """\
{%- for message in messages %}
{{- "<|" + message.role + "|>\\n" + message.content + eos_token + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|assistant|>\\n" }}
{%- endif %}"""

GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- "<start_of_turn>" + message.role + "\\n" + message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<start_of_turn>model\\n" }}
{%- endif %}"""

# DeepSeek R1's drops what stands before </think>
R1_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "assistant" %}
{{- "<|im_start|>assistant\\n" + message.content.split("</think>")[-1] + "<|im_end|>" }}
{%- else %}
{{- "<|im_start|>user\\n" + message.content + "<|im_end|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" }}
{%- endif %}"""
