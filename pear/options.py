"""What the commands of both trainers do with a command line: parse it, find the model's name, and load it safely."""

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from trl import ModelConfig, TrlParser, get_peft_config

from pear.command_line import unknown_option, with_underscores
from pear.io import DataError, WriteError, read_yaml
from pear.models import whole_models

if TYPE_CHECKING:
    from peft import PeftConfig


class Parser(TrlParser):
    """TRL's parser: options in full, switches alone or with a value, and a mistake is a DataError of one line."""

    def __init__(self, kinds: tuple[type, ...], command: str) -> None:
        super().__init__(kinds, prog=command, allow_abbrev=False)
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:  # default None
                action.nargs, action.const = "?", True
            if action.dest == "resume_from_checkpoint":  # alone: from the newest checkpoint
                action.nargs, action.const = "?", "true"

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            if unknown[0].startswith("--"):
                self.error(unknown_option(unknown[0].partition("=")[0], self._option_string_actions))
            self.error(f"{unknown[0]!r} belongs to no option: an option is written --name value")
        return found, unknown

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        known = {action.dest for action in self._actions}
        for key in config:
            if key not in known:
                self.error(f"of the configuration file: {unknown_option(key, known)}")
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        raise DataError(message)


def parse(kinds: tuple[type, ...], command: str, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """An instance of each of `kinds` (dataclasses) from flags and `--config`; `argv` None is the process's own.

    Raises:
        DataError: an option that is unknown or wrong, or a configuration file that cannot be read.
    """
    parser = Parser(kinds, command)
    line = with_underscores(sys.argv[1:] if argv is None else argv)
    line = [part for word in line for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in line[-1:] or line.count("--config") > 1:
        raise DataError(f"options of {command}: --config takes the path of one YAML file")
    if "--config" in line:
        path = line[line.index("--config") + 1]
        config = read_yaml(path, "YAML of options, `name: value`")
        if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
            raise DataError(f"{path}: expected YAML of options, `name: value`, got {config!r:.100}")
    try:
        with warnings.catch_warnings():
            # TRL's configs set gradient_checkpointing, whose new name no user's command line can answer for
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            found = parser.parse_args_and_config(line)
    except ZeroDivisionError as error:
        raise DataError(f"options of {command}: a batch size or num_generations is 0; give at least 1") from error
    except (ValueError, TypeError, FileNotFoundError, ImportError, yaml.YAMLError) as error:
        raise DataError(f"options of {command}: {error}") from error
    for args in found:
        if isinstance(args, TrainingArguments):
            check_ranges(args)
    return found


def _least(low: float) -> tuple[str, Callable[[float], bool]]:
    return f"at least {low} and finite", lambda value: low <= value < math.inf


# What options must be that transformers, torch and datasets check when the model is loaded, or never.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _least(1)),
    **dict.fromkeys(("gradient_accumulation_steps", "max_completion_length"), _least(1)),
    **dict.fromkeys(("dataset_num_proc", "dataloader_num_workers"), _least(0)),
    **dict.fromkeys(("seed", "data_seed"), ("at least 0 and below 2**32", lambda value: 0 <= value < 2**32)),
    **dict.fromkeys(("learning_rate", "weight_decay", "num_train_epochs", "adam_epsilon"), _least(0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("at least 0 and below 1", lambda value: 0 <= value < 1)),
    **dict.fromkeys(("temperature", "repetition_penalty"), ("above 0 and finite", lambda value: 0 < value < math.inf)),
    "top_p": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("at least 0 and at most 1", lambda value: 0 <= value <= 1),
}


def check_ranges(args: TrainingArguments) -> None:
    """DataError, before anything is loaded, for a number that no training can be done with."""
    for name, (wanted, holds) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not holds(value):
            raise DataError(f"{name} must be {wanted}, got {value}")


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


# Of trackers that transformers calls otherwise than their packages: whose is_..._available tells, what pip installs.
TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
}


def check_trackers(args: TrainingArguments) -> None:
    """DataError, before any model is loaded, where a tracker of `report_to` is unknown or not installed."""
    for name in args.report_to or []:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(("none", "all", *integration_utils.INTEGRATION_TO_CALLBACK))
            raise DataError(f"report_to: no tracker {name!r}; known are {known}")
        called, package = TRACKERS.get(name, (name, name))
        available = getattr(integration_utils, f"is_{called}_available", lambda: True)
        if not available():
            raise DataError(f"report_to: {name} is not installed: pip install {package}, or give another report_to")


def adapter_options(model_args: ModelConfig) -> dict[str, Any]:
    """Of the model's options, those that decide what is trained: the adapter's, and the revision."""
    names = ("use_peft", "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit", "model_revision")
    return {name: value for name, value in vars(model_args).items() if name in names or name.startswith("lora_")}


def adapter_config(model_args: ModelConfig) -> "PeftConfig | None":
    """TRL's LoRA config, in which a single module's name is a name, as each of several is, and not a pattern.

    Raises:
        DataError: PEFT refuses the options
    """
    with trainer_refusals():
        config = get_peft_config(model_args)
    targets = model_args.lora_target_modules
    if config is not None and isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        config.target_modules = {targets}
    return config


@contextlib.contextmanager
def trainer_refusals() -> Iterator[None]:
    """While a trainer is made: what TRL, PEFT and transformers refuse of the options is a DataError of one line."""
    try:
        with whole_models():
            yield
    except (DataError, WriteError):
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise DataError(" ".join(str(error).split()) or repr(error)) from error
