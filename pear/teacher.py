"""A teacher held in memory beside the student: what the two must have in common, and its hidden states of a batch."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from pear.fused_head import COLUMNS, check_head, logit_options
from pear.io import DataError
from pear.models import load_model, load_tokenizer, tokenizer_fingerprint
from pear_kernels import Teacher


class HeldTeacher:
    """A frozen model whose distributions the student is trained towards. It is no part of the student's checkpoints.

    Args:
        model: changed in place: no gradients, no dropout, on `device`
        student: of the same vocabulary

    Raises:
        DataError: another vocabulary, a head that our pass cannot repeat, or parameters that are sharded
    """

    def __init__(self, model: PreTrainedModel, student: PreTrainedModel, device: torch.device):
        if is_deepspeed_zero3_enabled():
            raise DataError(
                "a teacher in memory does not go with DeepSpeed ZeRO-3, which shards whatever is loaded; write its "
                "top-k log-probs into the data instead, by `pear score --column none --top-k K`, and pass no teacher"
            )
        if model is student:
            raise DataError("teacher: this is the student itself; load the model a second time to distil from it")
        check_head(model)
        own, others = (each.get_output_embeddings().weight.shape[0] for each in (model, student))
        if own != others:
            raise DataError(
                f"teacher and student must have one vocabulary: the teacher's head has {own} tokens, the student's "
                f"{others}. Give a teacher with a head of that size."
            )
        self.options = logit_options(model.config.get_text_config())
        self.model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Teacher:
        """Hidden states (B, T, D') of a batch as the student gets it, laid out alike, with the head they belong to."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", *COLUMNS)}
        head = self.model.get_output_embeddings()
        hidden = self.model.base_model(**given, use_cache=False).last_hidden_state.to(head.weight.dtype)
        return Teacher(hidden, head.weight, getattr(head, "bias", None), **self.options)


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
    """The model `name`, in float32 on a CPU and as stored elsewhere; `kwargs` go to `load_model`.

    Raises:
        DataError: ids do not mean the same tokens as in the student's `tokenizer`
    """
    check_same_vocabulary(load_tokenizer(name), tokenizer, name)
    dtype = "auto" if torch.accelerator.is_available() else torch.float32
    return load_model(name, dtype=dtype, **kwargs)


def check_same_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, name: str) -> None:
    """Raise unless every id is one token to both. Chat templates may differ: the teacher is given ids, not text."""
    tokens, others = teacher.get_vocab(), student.get_vocab()
    if tokens == others:
        return
    by_id = [{id: token for token, id in vocabulary.items()} for vocabulary in (tokens, others)]
    first = min(id for id in by_id[0].keys() | by_id[1].keys() if by_id[0].get(id) != by_id[1].get(id))
    raise DataError(
        f"the teacher {name!r} has another tokenizer than the student: {len(tokens)} and {len(others)} tokens, "
        f"fingerprints {tokenizer_fingerprint(teacher)} and {tokenizer_fingerprint(student)}, and id {first} is "
        f"{by_id[0].get(first)!r} to the teacher and {by_id[1].get(first)!r} to the student. Give a teacher of the "
        "student's tokenizer."
    )
