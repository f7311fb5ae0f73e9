"""What liger-kernel's layers hold and make, for a trace on tensors without data; no values.

N being tokens, D a norm's width, I the MLP's: RMSNorm keeps its input (N, D) and a float32 a row, and its gradient
takes the place of the output's; SwiGLU keeps gate and up (N, I), and their gradients take their places; rotary
embedding turns queries and keys where they are, forward and backward (liger-kernel 0.8.5: `ops/rms_norm.py`,
`ops/swiglu.py`, `ops/rope.py`).
"""

import contextlib
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pear.io import DataError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers are no others than these


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.empty_like(ctx.saved_tensors[1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.saved_tensors


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


@contextlib.contextmanager
def liger_layers(model: PreTrainedModel) -> Iterator[None]:
    """In place of the model's norms, MLPs and rotary embedding, while this lasts.

    Raises:
        DataError: a model type whose layers are not known here.
    """
    if model.config.model_type not in MODEL_TYPES:
        raise DataError(
            f"use_liger_kernel is not planned for model type {model.config.model_type!r}, but for "
            f"{', '.join(MODEL_TYPES)}; leave it out, and less will be held than was planned"
        )
    with contextlib.ExitStack() as patches:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                forward = lambda x, norm=module: _Norm.apply(x, norm.weight)  # noqa: E731
            elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
                forward = lambda x, mlp=module: mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # noqa: E731
            else:
                continue
            patches.enter_context(patch.object(module, "forward", forward))
        code = sys.modules[type(model).__module__]
        turn = lambda query, key, *_, **__: _Rope.apply(query, key)  # noqa: E731
        patches.enter_context(patch.object(code, "apply_rotary_pos_emb", turn))
        yield
