"""What makes a training run this run and no other: model, data, objective; kept in its checkpoints as pear.json."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from pear.io import DataError, write_json
from pear.models import resolve_model
from pear.runs import json_safe

RECORD = "pear.json"
FORMAT = 1
# Of TrainingArguments: what decides which rows come next, or what the optimizer's state is of. Those of a schedule are
# among them since the checkpoint's own would go on whatever they say. Free to change: lengths of the run (max_steps,
# num_train_epochs), saving, logging, evaluation, devices, precision, and batch sizes whose product stays the same.
DECISIVE = (
    *("seed", "data_seed", "train_sampling_strategy", "optim", "optim_args", "optim_target_modules", "learning_rate"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor", "neftune_noise_alpha"),
)
# Of TRL's options and ours: all but these, which change speed, memory, or what is shown.
FREE = (
    *("model_init_kwargs", "trust_remote_code", "dataset_num_proc", "pad_to_multiple_of", "activation_offloading"),
    *("workspace_bytes", "strict_length", "keep_samples", "ds3_gather_for_generation", "cache_implementation"),
    *("num_generations_eval", "eval_packing", "num_completions_to_print", "cast_lm_head_to_fp32", "log_entropy"),
    *("log_multimodal", "log_unique_prompts"),
)
FREE_PREFIXES = ("vllm_", "log_completions", "use_vllm", "use_transformers", "transformers_")
PARTS = ("model", "data")  # written as a name, for people, and a hash that is compared
SAMPLES, BYTES = 16, 4096  # of each file of weights


def identity(
    command: str, model: str, data: Mapping[str, Any], args: TrainingArguments, others: Mapping[str, Any]
) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        model: the name that it starts from
        data: what its rows depend on: paths, which are replaced by hashes of the files, or settings
        args: the trainer's
        others: the command's options beside them that decide what is trained
    """
    own = {field.name for field in dataclasses.fields(args)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    names = [name for name in own if name not in FREE and not name.startswith(FREE_PREFIXES)]
    settings = {name: getattr(args, name) for name in (*DECISIVE, *sorted(names)) if hasattr(args, name)}
    world = int(os.environ.get("WORLD_SIZE") or 1)
    settings["rows of a step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    found = {name: _file_hash(value) if _is_path(value) else value for name, value in data.items()}
    return json_safe(
        {
            "format": FORMAT,
            "command": command,
            "model": {"name": model, "hash": _model_hash(model)},
            "data": {"name": {name: value for name, value in data.items() if value is not None}, "hash": _hash(found)},
            "length": {name: getattr(args, name) for name in ("num_train_epochs", "max_steps")},
            "settings": settings | {name: _file_hash(v) if _is_path(v) else v for name, v in others.items()},
        }
    )


def write(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / RECORD, record)


def check(checkpoint: str, now: dict[str, Any]) -> bool:
    """Whether the checkpoint says of which run it is.

    Raises:
        DataError: it is another run's; it says in what
    """
    path = Path(checkpoint) / RECORD
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        differ = _differences(then, now)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); give another checkpoint") from None
    if differ:
        raise DataError(
            f"resume_from_checkpoint: {checkpoint} is of another run: {'; '.join(differ)}. "
            "Give the same settings to go on, or another output_dir for a new run"
        )
    return True


def is_the_same(folder: str | os.PathLike, now: dict[str, Any]) -> bool:
    """Whether the model in a folder is what a run that is `now`, of the same length, ended with."""
    try:
        then = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        return then["length"] == now["length"] and not _differences(then, now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    if then["command"] != now["command"]:
        return [f"`pear {then['command']}` made it, this is `pear {now['command']}`"]
    for part in PARTS:
        if then[part]["hash"] != now[part]["hash"]:
            names = [json.dumps(each[part]["name"], ensure_ascii=False) for each in (then, now)]
            same = "of the same name with other contents" if names[0] == names[1] else f"{names[0]} there"
            found.append(f"its {part} is {same}, {names[1]} now" if names[0] != names[1] else f"its {part} is {same}")
    for name in then["settings"].keys() & now["settings"].keys():  # versions of TRL know different ones
        a, b = then["settings"][name], now["settings"][name]
        if a != b:
            found.append(f"{name} is {json.dumps(a)} there, {json.dumps(b)} now")
    return sorted(found)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.path.isfile(value)


def _file_hash(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(json_safe(value), sort_keys=True).encode()).hexdigest()[:32]


def _model_hash(name: str) -> str:
    """Of a folder, wherever it lies: its config, and bytes here and there in each file of weights; else of the name."""
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        return _hash(name)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                digest.update(file.read(BYTES))
    for file_name in ("config.json", "adapter_config.json"):
        if (folder / file_name).is_file():
            digest.update((folder / file_name).read_bytes())
    return digest.hexdigest()[:32]
