"""Tokens of a response that a stop string ended, or that a server spelled: as many, and as, the text has them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear.align import ROLES, Roles
from pear.align.pieces import pieces_of
from pear.align.roles import END_OF_TURN
from pear.importing.generation import Reject


def kept_of(data: Sequence[bytes], text: str, cut: bool, ends: Sequence[str] = ROLES[END_OF_TURN]) -> int:
    """How many tokens the text has. All; but where a stop string may have `cut` it, the tokens of that stand behind it.

    An end of turn there is none, but the policy's own.

    Raises:
        Reject: the stop string began inside a token.
    """
    wanted = text.encode("utf-8", "surrogatepass")
    joined = b"".join(data)
    at = joined.find(wanted)
    behind = joined[at + len(wanted) :].strip()
    if not cut or at < 0 or not behind or behind.decode("utf-8", "replace") in ends:
        return len(data)
    end = 0
    for number, token in enumerate(data, start=1):
        end += len(token)
        if end == at + len(wanted):
            return number
        if end > at + len(wanted):
            raise Reject(
                f"the text ends inside token {number - 1} ({token.decode('utf-8', 'replace')!r}): a stop string cut it"
            )
    return len(data)


def spelled(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, contents: Sequence[str]
) -> tuple[list[bytes], set[int]]:
    """The bytes of each token as the text has them; and the tokens that stand within the text but are not part of it.

    Servers leave special tokens out of the text (`skip_special_tokens`), wherever the policy wrote them.
    """
    pieces = pieces_of(tokenizer)
    data = [pieces.surface(token) for token in ids]
    wanted = [content.encode("utf-8", "surrogatepass") for content in contents]
    special = {token for token, added in pieces.added.items() if added.special}
    hidden = {number for number, token in enumerate(ids) if token in special}
    silent = [b"" if number in hidden else surface for number, surface in enumerate(data)]
    loud, quiet = b"".join(data), b"".join(silent)
    if not all(content in loud for content in wanted) and all(content in quiet for content in wanted):
        return silent, hidden
    return data, set()


def check_all_there(data: Sequence[bytes], text: str) -> None:
    """Raise a Reject where the tokens are the text's first and there are none of the rest of it."""
    joined, wanted = b"".join(data), text.encode("utf-8", "surrogatepass")
    if len(joined) < len(wanted) and wanted.startswith(joined):
        raise Reject(
            f"fewer log-probs than tokens: those of {len(data)} tokens, which are {len(joined)} of the text's "
            f"{len(wanted)} bytes",
            again=True,
        )


def check_prompt_ids(
    given: Sequence[int], own: Sequence[int], prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise a Reject where the policy's `given` ids of a prompt, other than `own`, are not those of its text.

    Another chat template, a start token, a prompt whose beginning was cut off: all these are what the policy saw. But a
    string must be there, and of a chat its last message if it is the user's; white space and added tokens aside.
    """
    if isinstance(prompt, str):
        wanted = own
    elif prompt[-1]["role"] == "user" and isinstance(prompt[-1].get("content"), str):
        wanted = tokenizer(text=prompt[-1]["content"], add_special_tokens=False)["input_ids"]
    else:
        return
    said, text = _words(given, tokenizer), _words(wanted, tokenizer)
    cut = isinstance(prompt, str) and said and text.endswith(said)
    if text not in said and not cut:
        raise Reject(
            "the ids of the prompt do not spell the prompt: is --tokenizer that of the behaviour policy, and the "
            f"prompt the one that it saw? They spell {said[-60:].decode('utf-8', 'replace')!r}"
        )


def _words(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bytes:
    pieces = pieces_of(tokenizer)
    if (largest := max(ids, default=0)) >= len(tokenizer):
        raise Reject(f"token {largest} of the prompt is not in the vocabulary of {len(tokenizer)}")
    return b"".join(b"".join(b"" if token in pieces.added else pieces.surface(token) for token in ids).split())


def without_dummy_prefix(data: Sequence[bytes], text: str, prompt: Any) -> list[bytes]:
    """SentencePiece's first token says a space that the text does not start with; nor is it the end of the `prompt`."""
    data = list(data)
    joined = isinstance(prompt, str) and prompt.endswith(" ")
    if data and data[0][:1] == b" " and not text.startswith(" ") and not joined:
        data[0] = data[0][1:]
    return data


def roles_of(tokenizer: PreTrainedTokenizerBase) -> Roles:
    """`pear.align`'s roles, with the tokenizer's own EOS and every other of its added tokens, under its own name."""
    named = {token for tokens in ROLES.values() for token in tokens}
    roles = dict(ROLES)
    eos = tokenizer.eos_token
    if eos and eos not in named:
        roles["end_of_turn"] = (*roles["end_of_turn"], eos)
        named.add(eos)
    for token in tokenizer.added_tokens_decoder.values():
        if token.content not in named and token.content.strip():
            roles[token.content] = (token.content,)
    return roles
