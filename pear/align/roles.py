"""Which structural tokens of different tokenizers mean the same: the rule as a table, and overrides from a file."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pear.io import DataError, read_yaml

Roles = Mapping[str, tuple[str, ...]]  # a role and the tokens that play it, by their text

END_OF_TURN = "end_of_turn"
THINK = ("think_open", "think_close")

# Tokens in one line mean the same thing to different models, so their log-probs are compared. The token that a
# tokenizer itself calls its EOS has the first role, wherever it stands here. What stands nowhere is compared with
# itself alone: its role is its own text.
ROLES: Roles = MappingProxyType(
    {
        "end_of_turn": (
            *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|return|>"),
            *("<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|end_of_role|>", "<|im_sep|>"),
            *("</s>", "<eos>", "<|eos|>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
        ),
        "start_of_turn": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start|>", "<|start_of_role|>"),
        "start_of_text": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<｜begin▁of▁sentence｜>"),
        "think_open": ("<think>", "<|begin_of_thought|>", "<seed:think>", "[THINK]", "◁think▷"),
        "think_close": ("</think>", "<|end_of_thought|>", "</seed:think>", "[/THINK]", "◁/think▷"),
        "tool_call_open": (
            "<tool_call>",
            "<|tool_call|>",
            "<|tool_call_begin|>",
            "<｜tool▁call▁begin｜>",
            "[TOOL_CALLS]",
        ),
        "tool_call_close": ("</tool_call>", "<|tool_call_end|>", "<｜tool▁call▁end｜>", "[/TOOL_CALLS]"),
        "tool_output_open": ("<tool_response>", "<｜tool▁output▁begin｜>", "[TOOL_RESULTS]"),
        "tool_output_close": ("</tool_response>", "<｜tool▁output▁end｜>", "[/TOOL_RESULTS]"),
    }
)


def read_roles(path: str | Path) -> Roles:
    """`ROLES` with what a YAML file says otherwise: `role: [token, ...]`, one line a role.

    A role in the file has the tokens that the file gives it and no others, an empty list takes the role away, and a
    token that stood in another role leaves that one. Names that are not in `ROLES` are new roles.

    Raises:
        DataError: no such file, no YAML, no map of lists of strings, or a token that the file names twice.
    """
    path = Path(path)
    given = read_yaml(path, "YAML, `role: [token, ...]`")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise DataError(f"{path}: expected `role: [token, ...]`, got {type(given).__name__}")
    owner: dict[str, str] = {}
    for role, tokens in given.items():
        _check_role(path, role, tokens)
        for token in tokens:
            if token in owner:
                raise DataError(f"{path}: token {token!r} stands under `{owner[token]}` and under `{role}`; keep one")
            owner[token] = role
    kept = {role: tuple(t for t in tokens if t not in owner) for role, tokens in ROLES.items() if role not in given}
    return MappingProxyType(kept | {role: tuple(tokens) for role, tokens in given.items()})


def _check_role(path: Path, role: Any, tokens: Any) -> None:
    if not isinstance(role, str) or not role:
        raise DataError(f"{path}: the name of a role must be a string, got {role!r}")
    if not isinstance(tokens, list) or not all(isinstance(token, str) and token for token in tokens):
        raise DataError(
            f"{path}: role `{role}` must have a list of tokens (strings that are not empty), got {tokens!r}"
        )


def names_of(roles: Roles, eos_token: str | None = None) -> dict[str, str]:
    """From a token's text to its role, the first that has it. `eos_token` ends a turn unless it has another role."""
    names: dict[str, str] = {}
    for role, tokens in roles.items():
        for token in tokens:
            names.setdefault(token, role)
    if eos_token:
        names.setdefault(eos_token, END_OF_TURN)
    return names
