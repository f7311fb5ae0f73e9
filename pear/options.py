"""What the commands of both trainers do with a command line: parse it, find the model's name, and load it safely."""

import sys
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from pear.io import DataError


def parse(kinds: tuple[type, ...], command: str, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """An instance of each of `kinds` (dataclasses) from flags and `--config`; `argv` None is the process's own.

    Raises:
        DataError: an option that is unknown or wrong, or a configuration file that cannot be read.
    """
    parser = TrlParser(kinds, prog=command)
    try:
        return parser.parse_args_and_config(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, TypeError, FileNotFoundError, yaml.YAMLError) as error:
        raise DataError(f"options of {command}: {error}") from error


def model_name(model: str | None, model_args: ModelConfig) -> str:
    """`--model`, or TRL's name for it; DataError if neither is given."""
    name = model or model_args.model_name_or_path
    if name is None:
        raise DataError("no model given: pass --model (smollm2, a transformers folder or a hub name)")
    return name


def model_init_kwargs(args: TrainingArguments, model_args: ModelConfig) -> dict[str, Any]:
    """How the trainer loads the model: as asked for, and from safetensors alone."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,
        **(args.model_init_kwargs or {}),
    }
