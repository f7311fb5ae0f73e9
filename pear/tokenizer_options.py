"""Options that change a tokenizer: its chat template, EOS and padding token. They apply before any data is read."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.io import DataError
from pear.models import load_tokenizer, tokenizer_fingerprint

OPTIONS = ("chat_template_path", "eos_token", "pad_token")
TEMPLATE_FILES = (".jinja", ".j2")  # as TRL's


def changed_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer as these options of `pear score`, `pear sft` and `pear inspect` want it; without any, the same one.

    `chat_template_path` is a file (.jinja, .j2), or a model whose template and EOS are taken. A model with tokens that
    the tokenizer does not have is refused: they would need new rows in the embeddings.

    Raises:
        DataError: no such file or model, a token that is not in the vocabulary.
    """
    if chat_template_path is None and eos_token is None and pad_token is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if chat_template_path is not None:
        template, own_eos = _read_template(chat_template_path, tokenizer)
        tokenizer.chat_template = template
        eos_token = own_eos if eos_token is None else eos_token
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise DataError(
                f"{name} = {token!r} is not in the tokenizer's vocabulary of {len(tokenizer)} tokens: give one of "
                f"them, such as {tokenizer.eos_token!r}"
            )
        setattr(tokenizer, name, token)
    return tokenizer


def check_applied(args: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """DataError where `args` (SFTConfig) would change a trainer's tokenizer after the data was made with it."""
    changes = {name: getattr(args, name) for name in OPTIONS[:2] if getattr(args, name) is not None}
    if not changes:
        return
    if tokenizer is not None:
        changed = changed_tokenizer(tokenizer, **changes)
        if tokenizer_fingerprint(changed) == tokenizer_fingerprint(tokenizer):
            return
    name = next(iter(changes))
    raise DataError(
        f"{name} = {changes[name]!r} changes the tokenizer, and the data is in tokens already: make it with "
        "pear.tokenizer_options.changed_tokenizer(tokenizer, ...), and give it to load_scored and, as "
        "processing_class, to the trainer"
    )


def _read_template(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """The chat template, and the EOS that belongs to it, if it comes from a model."""
    if path.endswith(TEMPLATE_FILES):
        if not Path(path).is_file():
            raise DataError(f"chat_template_path = {path!r}: no such file")
        try:
            return Path(path).read_text(encoding="utf-8-sig"), None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template_path = {path!r} cannot be read: {error}") from None
    if Path(path).is_file():
        raise DataError(
            f"chat_template_path = {path!r}: a file of a template must end in {' or '.join(TEMPLATE_FILES)}; anything "
            "else is the name of a model"
        )
    source = load_tokenizer(path)
    if source.chat_template is None:
        raise DataError(f"chat_template_path = {path!r}: its tokenizer has no chat template")
    vocabulary = tokenizer.get_vocab()
    if new := sorted(t.content for t in source.added_tokens_decoder.values() if t.content not in vocabulary):
        raise DataError(
            f"chat_template_path = {path!r}: its tokenizer has {len(new)} tokens that the model's lacks ({new[0]!r}, "
            "say), which would need new rows in the embeddings. Give the template as a .jinja file, in tokens that the "
            "model has"
        )
    return source.get_chat_template(), source.eos_token
