"""The models that score: given loaded, or by name and then loaded when their turn comes."""

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.fused_head import add_fused_head
from pear.io import DataError
from pear.models import check_ids, embedding_rows, load_config, load_model, load_tokenizer, tokenizer_fingerprint
from pear.scored_rows import Reader
from pear_kernels.huggingface.positions import position_limit

DTYPES = ("auto", "float32", "bfloat16")


class Policy:
    """A model that scores rows; its tokenizer and config are there from the start, its weights while they are used."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        dtype: str,
        device: torch.device | None,
    ):
        """`device` None: where a loaded model is. `max_length` None: the model's own context length, if it tells."""
        if dtype not in DTYPES:
            raise DataError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._device, self._given = device, None
        if isinstance(model, str):
            self.name = model
            self.tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
            config = load_config(model)
            self._dtype = "float32" if dtype == "auto" and device.type == "cpu" else dtype
        else:
            self.name = model.config.name_or_path or type(model).__name__
            if tokenizer is None:
                raise DataError("tokenizer: a loaded model needs its tokenizer; pass tokenizer=load_tokenizer(name)")
            self._given, self.tokenizer, config = model, tokenizer, model.config
        self.vocabulary = embedding_rows(model, config) if isinstance(model, str) else _vocabulary(model)
        self.fingerprint = tokenizer_fingerprint(self.tokenizer)
        context = position_limit(config)
        if max_length is not None and context is not None and max_length > context:
            raise DataError(
                f"max_length = {max_length} tokens, but model {self.name!r} has positions for {context} "
                f"(max_position_embeddings). Give max_length {context} or less, or none, which is that; or RoPE "
                "scaling in the model's config.json, if it can be trusted that far."
            )
        self.max_length = context if max_length is None else max_length

    @functools.cached_property
    def reader(self) -> Reader:
        return Reader(self.tokenizer)

    def check_ids(self, ids: Sequence[int], where: str) -> None:
        """Raise where the model has no embedding for one of a row's tokens."""
        check_ids(ids, self.vocabulary, where, self.name, self.tokenizer)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[PreTrainedModel]:
        """The model, ready to score; of one that came by name, memory is free again afterwards."""
        if self._given is not None:
            model = self._given if self._device is None else self._given.to(self._device)
        else:
            dtype = self._dtype if self._dtype == "auto" else getattr(torch, self._dtype)
            model = load_model(self.name, dtype=dtype).to(self._device)
        self.vocabulary = _vocabulary(model)
        add_fused_head(model)
        was_training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(was_training)
            del model
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.memory.empty_cache()


def _vocabulary(model: PreTrainedModel) -> int:
    """Rows of a loaded model's embedding, or of its head where that has fewer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(end.weight.shape[0] for end in ends if end is not None)


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """Tells models of one name apart: a hash of the config, and of 16 values spread over each parameter; the dtype."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 16)][:16]
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return {"weights": digest.hexdigest(), "dtype": str(model.dtype)}
