"""A teacher held in memory beside the student: what the two must have in common, and its hidden states of a batch."""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from pear.fused_head import COLUMNS, IGNORE, check_model, head_states, shift_left, shift_right
from pear.io import DataError
from pear.models import load_model, load_tokenizer, tokenizer_fingerprint
from pear_kernels import Teacher, linear_logprobs

logger = get_logger(__name__)


class HeldTeacher:
    """A frozen model whose distributions the student is trained towards. It is no part of the student's checkpoints.

    Models of one family pad their heads differently. Of a teacher's longer head the rows are used that the student has
    too, so that its distribution is that of these tokens.

    Args:
        model: changed in place: no gradients, no dropout, on `device`
        student: of the same vocabulary
        tokenizer: of both

    Raises:
        DataError: another vocabulary, a head that our pass cannot repeat, or parameters that are sharded
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ):
        if is_deepspeed_zero3_enabled():
            raise DataError(
                "a teacher in memory does not go with DeepSpeed ZeRO-3, which shards whatever is loaded; write its "
                "top-k log-probs into the data instead, by `pear score --column none --top_k K` (for weighting asft: "
                "`pear score --column ref_logprobs`), and pass no teacher"
            )
        if model is student:
            raise DataError("teacher: this is the student itself; load the model a second time to distil from it")
        self.model = model.requires_grad_(False).eval().to(device)
        treatment = check_model(model)
        own, others = (each.get_output_embeddings().weight.shape[0] for each in (model, student))
        self.treatment = treatment._replace(rows=_common_rows(treatment.rows or own, others, tokenizer))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Teacher:
        """Hidden states (B, T, D') of a batch as the student gets it, laid out alike, with the head they belong to."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", *COLUMNS)}
        head = self.model.get_output_embeddings()
        hidden = head_states(self.model, **given).to(head.weight.dtype)
        weight, bias = self.treatment.rows_of(head.weight, getattr(head, "bias", None))
        return Teacher(hidden, weight, bias, **self.treatment.options())


def _common_rows(teacher: int, student: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the head to use, of two heads of these sizes: the student's, all of them."""
    if teacher == student:
        return student
    sizes = (
        f"teacher and student must have one vocabulary: the teacher's head has {teacher} tokens, the student's "
        f"{student}"
    )
    if teacher < student:
        raise DataError(
            f"{sizes}, of which it cannot judge the last {student - teacher}. Give a teacher with a head of at least "
            "that size, or distil from its top-k log-probs, whose head may be shorter: `pear score --column none "
            "--top_k K`."
        )
    tokens = max(tokenizer.get_vocab().values()) + 1  # not len(), which is less where ids are left out
    if tokens > student:
        raise DataError(
            f"{sizes}, but the tokenizer {tokens}, so more than padding would be cut off the teacher's. Give a student "
            "whose head has a row for every token."
        )
    logger.warning(
        f"The teacher's head has {teacher} rows and the student's {student}, for a tokenizer of {tokens} tokens: the "
        f"last {teacher - student} of the teacher's, which are padding, are left out."
    )
    return student


def target_logprobs(teacher: Teacher, labels: torch.Tensor, workspace_bytes: int | None = None) -> torch.Tensor:
    """log p (B, T) that a teacher gives to `labels`, laid out like them; 0 where they are -100. One product."""
    hidden, weight, bias, temperature, softcap = teacher
    return shift_right(
        linear_logprobs(
            hidden,
            weight,
            shift_left(labels, IGNORE),
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            workspace_bytes=workspace_bytes,
        )
    )


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
    """The model `name`, in float32 on a CPU and as stored elsewhere; `kwargs` go to `load_model`.

    Raises:
        DataError: ids do not mean the same tokens as in the student's `tokenizer`
    """
    check_same_vocabulary(load_tokenizer(name), tokenizer, name)
    return load_model(name, dtype=teacher_dtype(), **kwargs)


def teacher_dtype() -> str | torch.dtype:
    """What a teacher's weights are loaded in: as stored, but in float32 on a CPU."""
    return "auto" if torch.accelerator.is_available() else torch.float32


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
