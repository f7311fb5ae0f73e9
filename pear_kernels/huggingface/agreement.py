"""When a model is patched: compare the fused log-probs with the model's own logits on one short row.

`treatment.py` measures what a forward does to logits, with known numbers in place of logits and without the trunk. Here
the whole model runs once, on a few tokens. The fused log-probs of the hidden states that its head receives must then
agree with its own logits.
"""

import contextlib
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pear_kernels.huggingface.lm_head import CausalLM, accepted, check_linear, head_and_loss_replaced, innermost
from pear_kernels.huggingface.positions import position_limit
from pear_kernels.huggingface.treatment import Treatment, measure_treatment, refusal
from pear_kernels.losses import linear_logprobs
from pear_kernels.options import HeadOptions

ROW = 5  # tokens
TARGETS = 16  # columns of the head whose log-probs are compared, evenly spaced from the first to the last
LARGEST_STATE = 1 << 20  # elements; larger buffers are tables (masks, quantised weights), which a forward only reads


def checked_treatment(model: CausalLM, backend: str | None = None) -> Treatment:
    """Check a causal LM's head, measure the treatment of its logits, and compare both on a short row.

    Attributes of modules, buffers, training flags and random states are afterwards as before.

    The row is skipped where parameters are not whole: on the meta device, or sharded by DeepSpeed or FSDP. If the model
    cannot run a row of text (because its attention needs a GPU and the model is not on one yet, for example), a warning
    reports that nothing was compared.

    Raises:
        ValueError: naming the model's class and the reason; see `check_linear`, `measure_treatment`, `check_row`.
    """
    if not isinstance(getattr(model, "forward", None), types.MethodType):
        name = type(model).__name__
        raise ValueError(f"{name}.forward was replaced before (by a device_map's hooks, say); load the model without")
    check_linear(model)
    with as_before(model), torch.no_grad():
        model.eval()
        treatment = measure_treatment(model)
        if _is_whole(model):
            with torch.autocast(model.get_output_embeddings().weight.device.type, enabled=False):
                check_row(model, treatment, backend)
    return treatment


def _is_whole(model: CausalLM) -> bool:
    """Whether all parameters are here: not on the meta device, nor sharded by DeepSpeed, as DTensors or by FSDP."""
    shards = ("ds_id", "full_tensor")
    whole = not any(p.is_meta or any(hasattr(p, name) for name in shards) for p in model.parameters())
    wrapped = any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    return whole and not wrapped and innermost(model.get_output_embeddings()).weight.dim() == 2


def check_row(model: CausalLM, treatment: Treatment, backend: str | None = None) -> None:
    """Raise ValueError unless fused log-probs and the model's logits agree within the rounding of its dtype.

    The tolerance is relative to the largest logit. Logits that are not finite (damaged weights) are not compared.
    """
    name, leaf = type(model).__name__, innermost(model.get_output_embeddings())
    weight, bias = treatment.rows_of(leaf.weight, getattr(leaf, "bias", None))
    multiply = leaf.forward
    calls: list[tuple[Tensor, Tensor]] = []  # the head's input and output
    given: list[Tensor] = []  # logits that the loss received
    length = min(ROW, position_limit(model.config) or ROW)
    ids = (torch.arange(2, 2 + length, device=weight.device) % len(weight))[None]

    def head(hidden: Tensor) -> Tensor:
        hidden = hidden.to(weight.dtype)  # as autocast does if the two differ
        calls.append((hidden, multiply(hidden)))
        return calls[-1][1]

    def loss(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        given.append(logits)
        return logits.new_zeros(())

    try:
        with head_and_loss_replaced(model, head, loss):
            more = accepted(model.forward, use_cache=False, return_dict=True)
            output = model.forward(input_ids=ids, labels=ids, **more)
    except Exception as error:
        warnings.warn(
            f"{name}: its log-probs were not compared with its own logits, since a row of text does not run on it "
            f"here ({type(error).__name__}: {' '.join(str(error).split()):.200})",
            stacklevel=2,
        )
        return
    logits = output.logits if getattr(output, "logits", None) is not None else given[0]
    if len(calls) != 1 or logits.shape != (1, length, len(weight)):
        raise refusal(name, f"gives logits of {tuple(logits.shape)} for {length} tokens and {len(weight)} rows")
    [(hidden, raw)] = calls
    expected = treatment.apply(raw[..., : len(weight)].double())
    if not bool(expected.isfinite().all()):
        return
    size = 1 + float(expected.abs().max())
    rounding = max(torch.finfo(x.dtype).eps for x in (raw, logits, weight))
    if not bool(((expected - logits).abs() <= 4 * max(rounding, 1e-6) * size).all()):
        raise refusal(name, "does more to its logits than the fused losses repeat, as a short row shows")
    target = torch.linspace(0, len(weight) - 1, TARGETS, device=weight.device).long()  # (n,)
    row = hidden[0, -1].expand(TARGETS, -1)
    backend = backend if weight.device.type == "cuda" else None
    options = HeadOptions(temperature=treatment.temperature, softcap=treatment.softcap, backend=backend)
    fused = linear_logprobs(row, weight, target, bias=bias, options=options)
    assert isinstance(fused, Tensor)  # without return_entropy
    own = logits[0, -1].double().log_softmax(-1)[target]
    least = 1e-5 if weight.device.type == "cpu" else 1e-3  # other devices may round float32 products to TF32
    if not bool(((fused - own).abs() <= 8 * max(rounding, least) * size).all()):
        far = float((fused - own).abs().max())
        raise refusal(name, f"gives other log-probs than the fused losses, by {far:.2g} on a short row")


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """A context after which attributes and buffers of all modules, and random states, are what they were before."""
    held = []
    for module in model.modules():
        buffers = dict(module._buffers)
        states = [b for b in buffers.values() if b is not None and not b.is_meta and b.numel() <= LARGEST_STATE]
        held.append((module, dict(module.__dict__), buffers, [(state, state.clone()) for state in states]))
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, attributes, buffers, copies in held:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
                for state, values in copies:
                    if not torch.equal(state, values):
                        state.copy_(values)
