"""Whether our pass gives a model's own log-probs: what is done when a model is patched, on one short row.

`treatment.py` measures what a forward does to logits, with numbers in place of logits and without the trunk. Here the
whole model runs once on a few tokens. What its head was given, through our pass, must then agree with its own logits.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pear_kernels.huggingface.lm_head import accepted, check_head, forward_replaced, innermost
from pear_kernels.huggingface.positions import position_limit
from pear_kernels.huggingface.treatment import Treatment, loss_replaced, measure_treatment, refusal
from pear_kernels.losses import linear_logprobs

ROW = 5  # tokens
TARGETS = 16  # columns of the head that are compared with our pass, from the first to the last


def checked_treatment(model: nn.Module, backend: str | None = None) -> Treatment:
    """The treatment of a causal LM's logits, once its head can be read and a short row agrees with the model's logits.

    The model is as before afterwards: attributes of modules, buffers, training flags and random states.

    The row is left out where parameters are not whole: on the meta device, or sharded by DeepSpeed or FSDP. Where
    the model cannot run a row of text by itself (attention that runs on a GPU alone, before the model is there), a
    warning says so.

    Raises:
        ValueError: by the model's class and with the reason; see `check_head`, `measure_treatment`, `check_row`.
    """
    check_head(model)
    with as_before(model), torch.no_grad():
        model.eval()
        treatment = measure_treatment(model)
        if _is_whole(model):
            with torch.autocast(model.get_output_embeddings().weight.device.type, enabled=False):
                check_row(model, treatment, backend)
    return treatment


def _is_whole(model: nn.Module) -> bool:
    """Whether all parameters are here and nobody's shards: DeepSpeed's, DTensors, what FSDP flattened."""
    shards = ("ds_id", "full_tensor")
    whole = not any(p.is_meta or any(hasattr(p, name) for name in shards) for p in model.parameters())
    wrapped = any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    return whole and not wrapped and innermost(model.get_output_embeddings()).weight.dim() == 2


def check_row(model: nn.Module, treatment: Treatment, backend: str | None = None) -> None:
    """ValueError unless our pass of what the head is given agrees with the model's logits, in its dtype's rounding.

    The tolerance is relative to the largest logit. Logits that are not finite (damaged weights) say nothing.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    leaf = innermost(head)
    weight, bias = treatment.rows_of(leaf.weight, getattr(leaf, "bias", None))
    multiply, calls, given = leaf.forward, [], []
    length = min(ROW, position_limit(model.config) or ROW)
    ids = (torch.arange(2, 2 + length, device=weight.device) % len(weight))[None]

    def take(hidden: Tensor) -> Tensor:
        hidden = hidden.to(weight.dtype)  # which autocast does where the two differ
        calls.append((hidden, multiply(hidden)))
        return calls[-1][1]

    def loss(logits: Tensor, *_, **__) -> Tensor:
        given.append(logits)
        return logits.new_zeros(())

    try:
        with forward_replaced(leaf, take), loss_replaced(model, loss):
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
    hidden, raw = calls[-1]
    if len(calls) != 1 or logits.shape != (1, length, len(weight)):
        raise refusal(name, f"gives logits of {tuple(logits.shape)} for {length} tokens and {len(weight)} rows")
    expected = treatment.apply(raw[..., : len(weight)].double())
    if not bool(expected.isfinite().all()):
        return
    size = 1 + float(expected.abs().max())
    rounding = max(torch.finfo(x.dtype).eps for x in (raw, logits, weight))
    if not bool(((expected - logits).abs() <= 4 * max(rounding, 1e-6) * size).all()):
        raise refusal(name, "does more to its logits than our pass can repeat, as a short row shows")
    target = torch.linspace(0, len(weight) - 1, TARGETS, device=weight.device).long()  # (n,)
    row = hidden[0, -1].expand(TARGETS, -1)
    where = {"backend": backend if weight.device.type == "cuda" else None, **treatment.options()}
    ours = linear_logprobs(row, weight, target, bias=bias, **where)
    theirs = logits[0, -1].double().log_softmax(-1)[target]
    least = 1e-5 if weight.device.type == "cpu" else 1e-3  # products of float32 may round to TF32 elsewhere
    if not bool(((ours - theirs).abs() <= 8 * max(rounding, least) * size).all()):
        far = float((ours - theirs).abs().max())
        raise refusal(name, f"gives other log-probs than our pass, by {far:.2g} on a short row")


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards the attributes and buffers of all modules are those of before, and so are the random states."""
    held = []
    for module in model.modules():
        buffers = {name: (b, b.clone() if _is_state(b) else None) for name, b in module._buffers.items()}
        held.append((module, dict(module.__dict__), buffers))
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, attributes, buffers in held:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._buffers.clear()
                for name, (buffer, values) in buffers.items():
                    if values is not None and not torch.equal(buffer, values):
                        buffer.copy_(values)
                    module._buffers[name] = buffer


def _is_state(buffer: Tensor | None) -> bool:
    """Whether a forward might write a buffer: large ones are tables (masks, quantised weights) that it reads."""
    return buffer is not None and not buffer.is_meta and buffer.numel() <= 1 << 20
