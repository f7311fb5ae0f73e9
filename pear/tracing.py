"""What a model's trunk keeps in memory, moment by moment: its own code, forward and backward, on tensors without data.

The trunk runs on PyTorch's meta device, where tensors have shapes and no memory, while every operation's results are
counted from when they are made until they are let go. So the formula of the activations is the model's own code: the
copies in float32 of its norms, what its MLP saves, what is made again where layers are checkpointed.

Two things stand in for what a GPU runs. Attention keeps what FlashAttention 2 keeps and makes what it makes, L being
tokens, H and K heads of queries and of keys, d their size: q (L, H, d), k and v (L, K, d), the output (L, H, d) and a
log-sum-exp (H, L) in float32; backward dq, dk and dv, a sum of dq in float32 (L, H, d), a row sum (H, L), and where
K < H dk and dv once more for each head (L, H, d). Autocast casts the operands of each linear layer, and keeps the
weights' copies until the forward pass ends.

None of it knows the length by heart: two lengths give each moment's line over the tokens, and a step's memory at any
length is the highest of the lines.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pear.io import DataError

ATTENTION = "pear_planning"
LENGTHS = 1024, 2048  # multiples of what attention kernels round lengths to
GRADIENTS, STATES, OTHER = range(3)  # kinds of memory: of parameters; hidden states between layers; all else


class Trace(NamedTuple):
    """Bytes of the kinds after each operation of a trunk's step: `fixed + a_token * tokens`, both (rows, 3)."""

    fixed: np.ndarray
    a_token: np.ndarray
    head: int  # the row after those of the forward pass: what the trunk holds when the loss's backward pass begins

    def at(self, tokens: int) -> np.ndarray:
        """(rows, 3) bytes."""
        return self.fixed + self.a_token * tokens


def trace(model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> Trace:
    """Of one step on one row, from its ids to all gradients, without the head.

    Args:
        model: of `model_without_data`, a PEFT adapter inside where there is one, set up as for training.
        autocast: to which dtype the operands of linear layers are cast; None: to none.

    Raises:
        DataError: the model's code looks at values (as a mixture of experts that counts tokens does), or does not
            take memory in proportion to the tokens.
    """
    try:
        short, long = (_run(model, tokens, autocast) for tokens in LENGTHS)
    except Exception as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"{type(model).__name__}: its decoder cannot be run on tensors without data, which is how memory is "
            f"planned: {type(error).__name__}: {said:.300} (Mixtures of experts may need dtype bfloat16.)"
        ) from error
    if short[0].shape == long[0].shape and short[1] == long[1]:
        a_token = (long[0] - short[0]) / (LENGTHS[1] - LENGTHS[0])
        fixed = short[0] - a_token * LENGTHS[0]
        if fixed.min() > -1024:  # where memory grows with the square of the length, it would be far below 0
            return Trace(fixed, a_token, short[1])
    raise DataError(
        f"{type(model).__name__}: the memory of its decoder does not grow in proportion to the tokens (attention that "
        "makes all scores, or layers that go through a row step by step); it is not planned"
    )


def model_without_data(config: PretrainedConfig, dtype: torch.dtype, checkpointing: bool) -> PreTrainedModel:
    """A causal language model of `config` on the meta device, for `trace`: training, layers checkpointed or not.

    Raises:
        DataError: transformers has no causal language model of this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except KeyError as error:  # of classes of attention by name, as in Falcon
        raise DataError(
            f"model type {config.model_type!r}: its attention cannot be replaced; it is not planned"
        ) from error
    except ValueError as error:
        raise DataError(
            f"model type {config.model_type!r} is no causal language model: {' '.join(str(error).split()):.150}..."
        ) from error
    if checkpointing:
        # its name from transformers 6 on, and before
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        # no state of random numbers, which the meta device has none of
        enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train()


def _run(model: PreTrainedModel, tokens: int, autocast: torch.dtype | None) -> tuple[np.ndarray, int]:
    """(rows, 3) bytes after each operation, and how many of them are the forward pass."""
    counter = _Counter()
    held = [*model.parameters(), *model.buffers()]  # the weights are counted elsewhere
    for tensor in held:
        counter.ignore(tensor)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(_hooks(model, counter))
        hooks.callback(model.zero_grad, set_to_none=True)
        with counter:
            ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
            with _autocast(autocast, keep=True):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            forward = len(counter.rows)
            counter.rows.append(tuple(counter.live))  # autocast's copies are gone, and no gradient is made yet
            for parameter in model.get_output_embeddings().parameters():  # made by the head, before the trunk's
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    counter.tag(parameter.grad, GRADIENTS)
            with _autocast(autocast, keep=False):
                hidden.backward(torch.empty_like(hidden))
        return np.array(counter.rows, dtype=np.float64), forward


@contextlib.contextmanager
def _hooks(model: PreTrainedModel, counter: "_Counter") -> Iterator[None]:
    """Tell the counter of hidden states between layers, and of parameters' gradients."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=())
    handles = [
        layer.register_forward_hook(lambda module, args, out: counter.tag(tree_leaves(out)[0], STATES))
        for layer in layers
    ]
    for layer in layers[:1]:
        handles.append(layer.register_forward_pre_hook(lambda module, args: counter.tag(args[0], STATES)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda held: counter.tag(held.grad, GRADIENTS)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still held, by kind."""

    def __init__(self):
        super().__init__()
        self.live = [0, 0, 0]
        self.known: dict[int, list[int]] = {}  # storage -> its bytes and kind
        self.rows: list[tuple[int, ...]] = []

    def ignore(self, tensor: Tensor) -> None:
        self.known[tensor.untyped_storage()._cdata] = [0, OTHER]

    def tag(self, tensor: Tensor, kind: int) -> None:
        if (known := self.known.get(tensor.untyped_storage()._cdata)) is not None:
            self.live[known[1]] -= known[0]
            self.live[kind] += known[0]
            known[1] = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = [storage.nbytes(), OTHER]
                    self.live[OTHER] += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.rows.append(tuple(self.live))
        return out

    def _gone(self, storage: int) -> None:
        count, kind = self.known.pop(storage)
        self.live[kind] -= count


@contextlib.contextmanager
def _autocast(dtype: torch.dtype | None, keep: bool) -> Iterator[None]:
    """Autocast of linear layers, which PyTorch does not have on the meta device, in place of `F.linear`.

    In the forward pass the copies of weights are kept to its end (`keep`); where a layer is run again, nothing but the
    graph holds them.
    """
    linear, cache = F.linear, {}

    def cast(tensor: Tensor) -> Tensor:
        if not (keep and tensor.is_leaf and tensor.requires_grad and tensor.dtype != dtype):
            return tensor.to(dtype)
        if tensor not in cache:
            cache[tensor] = tensor.to(dtype)
        return cache[tensor]

    if dtype is not None:
        F.linear = lambda *args: linear(*(None if arg is None else cast(arg) for arg in args))
    try:
        yield
    finally:
        F.linear = linear


class _Flash(torch.autograd.Function):
    """What FlashAttention 2 holds and makes (see the top of this file); no values."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, H, L, d), (B, K, L, d), (B, K, L, d)
        B, H, L, _ = query.shape
        out = query.new_empty(B, L, H, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(B, H, L, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, log_sum = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        scratch = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(log_sum)]
        if key.shape[1] != query.shape[1]:
            scratch += [x.new_empty(*query.shape[:3], x.shape[-1]) for x in (key, value)]
        del scratch
        return of_query, of_key, of_value


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, None]:
    return _Flash.apply(query.to(value.dtype), key.to(value.dtype), value), None  # autocast casts to the lowest


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
