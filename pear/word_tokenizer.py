"""A tokenizer of whole words, for models trained from nothing on a task with a small vocabulary."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["<pad>", "<eos>", "<unk>"]


def word_tokenizer(words: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    """One token for each of `words`, after those for padding, end and unknown, whose ids are 0, 1 and 2.

    Its `prompt_format` tells `pear eval` to word problems compactly for models that have this tokenizer.

    Args:
        words: each must be one match of `pattern`, or it will never be found in a text
        pattern: regular expression of a word; what lies between its matches is dropped

    Raises:
        ValueError: a word stands twice
    """
    words = [*_SPECIAL, *words]
    vocabulary = {word: i for i, word in enumerate(words)}
    if len(vocabulary) < len(words):
        repeated = next(word for i, word in enumerate(words) if vocabulary[word] != i)
        raise ValueError(f"words must all be different, got {repeated!r} twice")
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", prompt_format="compact"
    )
