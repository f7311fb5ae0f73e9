"""Measure what a transformers model's forward does to its logits between the head and the loss.

Config names of such constants differ between families (`logit_scale`, `logits_scaling`, `final_logit_softcapping`,
...), and one name means a factor in one family and a divisor in another. So the forward runs once without its trunk:
its head returns known numbers, and what its loss function receives shows how they were changed. Then the whole model
runs once, on a few tokens: fused log-probs of the hidden states that its head receives must agree with its own logits.
"""

import contextlib
import math
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pear_kernels.formulas.activation import Activation
from pear_kernels.huggingface import lm_head
from pear_kernels.huggingface.lm_head import CausalLM, innermost
from pear_kernels.huggingface.positions import position_limit
from pear_kernels.losses import linear_logprobs
from pear_kernels.options import HeadOptions

OWN_LOSS = "makes its loss by itself instead of handing its logits to `loss_function`"
ADVICE = (
    "Run its decoder yourself, and give the hidden states and the head's weight to linear_pear_loss or "
    "linear_weighted_loss."
)
PROBES = tuple(2.0**power for power in range(-10, 14))  # logits, each twice the one before
ROW = 5  # tokens
TARGETS = 16  # columns of the head whose log-probs are compared, evenly spaced from the first to the last
LARGEST_STATE = 1 << 20  # elements; larger buffers are tables (masks, quantised weights), which a forward only reads


class Treatment(NamedTuple):
    """What a forward makes of z = hidden @ weight.T + bias: softcap * tanh(z / softcap) / temperature.

    Without a soft cap that is z / temperature.
    """

    temperature: float = HeadOptions.temperature
    softcap: float | None = HeadOptions.softcap
    rows: int | None = None  # number of the head's rows that have a logit, the rest being padding; None: all

    def options(self) -> dict[str, float | None]:
        """The losses' options that differ from their defaults."""
        given = {"temperature": self.temperature, "softcap": self.softcap}
        return {name: value for name, value in given.items() if value != getattr(HeadOptions, name)}

    def rows_of(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head's weight (V, D) and bias (V,) without padding."""
        if self.rows is None:
            return weight, bias
        return weight[: self.rows], None if bias is None else bias[: self.rows]

    def apply(self, logits: Tensor) -> Tensor:
        """The model's logits, from the head's."""
        activated = logits.clone()
        Activation(self.temperature, self.softcap).apply_(activated)
        return activated


def checked_treatment(model: CausalLM, backend: str | None = HeadOptions.backend) -> Treatment:
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
    lm_head.check_linear(model)
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


def measure_treatment(model: CausalLM) -> Treatment:
    """Measure the treatment of a transformers causal LM.

    Neither trunk nor head runs, so the model may be on any device and of any size. Afterwards `forward` and
    `_loss_function` are attributes of the instances; see `forward_replaced`.

    Raises:
        ValueError: naming the model's class and the reason: its forward does not pass the logits of its head to
            `loss_function`, or changes them by more than a scale, a soft cap and a cut of padding.
    """
    name = type(model).__name__
    check_loss(model)
    head = innermost(model.get_output_embeddings())
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    columns = torch.arange(max(rows, len(PROBES))) % len(PROBES)  # as many columns as the head's, to see padding cut
    probes = torch.tensor(PROBES, dtype=torch.float64)[columns].expand(1, 2, -1).clone()
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    width = getattr(model.config.get_text_config(), "hidden_size", head.weight.shape[1])
    output = _TrunkOutput(torch.zeros(1, 2, width, dtype=head.weight.dtype, device=head.weight.device))
    calls = []

    def give_probes(hidden: Tensor) -> Tensor:
        calls.append(hidden)
        return probes

    def stop(logits: Tensor, labels: Any, *_: Any, **__: Any) -> Tensor:
        raise _LossReached(logits, labels)

    try:
        with (
            torch.no_grad(),
            lm_head.forward_replaced(_trunk(model), lambda *_, **__: output),
            lm_head.head_and_loss_replaced(model, give_probes, stop),
        ):
            model.forward(input_ids=ids, labels=ids)
    except _LossReached as reached:
        after, labels = reached.args
    except Exception as error:
        why = OWN_LOSS if calls else "does not come from its trunk's hidden states to its output embeddings"
        raise refusal(name, f"{why} ({type(error).__name__}: {error})") from error
    else:
        raise refusal(name, OWN_LOSS)
    if len(calls) != 1:
        raise refusal(name, f"calls its output embeddings {len(calls)} times, where a causal LM calls them once")
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        raise refusal(name, "changes the labels before its loss")
    cut = after.shape[-1] if len(PROBES) <= after.shape[-1] < rows else None
    same = after.shape == probes[..., :cut].shape and torch.equal(after, after[..., columns[:cut]])
    fit = fit_treatment(probes[..., : len(PROBES)], after[..., : len(PROBES)]) if same else None
    if fit is None:
        raise refusal(
            name,
            "does more to its logits than a positive scale, a soft cap and a cut of padding, which is all that the "
            "fused losses repeat",
        )
    return fit._replace(rows=cut)


def check_loss(model: CausalLM) -> None:
    """Raise ValueError if the model's loss is not transformers' `ForCausalLMLoss`, which the fused loss replaces."""
    loss = getattr(model.loss_function, "__name__", None)
    if loss != "ForCausalLMLoss":
        loss = loss or type(model.loss_function).__name__
        raise refusal(type(model).__name__, f"makes its loss by {loss}, and not by transformers' ForCausalLMLoss")


def refusal(name: str, why: str) -> ValueError:
    return ValueError(f"{name} cannot be patched: its forward {why}. {ADVICE}")


def _trunk(model: CausalLM) -> nn.Module:
    """The module that makes hidden states: `base_model`, or the only child that is a model itself."""
    if model.base_model is not model:
        return model.base_model
    models = [child for child in model.children() if hasattr(child, "config") and hasattr(child, "base_model")]
    if len(models) != 1:
        raise refusal(type(model).__name__, "has no decoder trunk of its own (`base_model`) to call")
    return models[0]


class _TrunkOutput:
    """A trunk's output that holds hidden states alone: every other field is None."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _LossReached(Exception):
    """Raised with (logits, labels) when the forward calls its loss function."""


def fit_treatment(before: Tensor, after: Tensor) -> Treatment | None:
    """The treatment that maps `before` (..., n), positive logits of which each is twice the previous, to `after`.

    None if no treatment does.
    """
    if bool((after != after[:1, :1]).any()):
        return None
    z, y = before[0, 0].double(), after[0, 0].double()
    if not bool(((y > 0) & y.isfinite()).all()):
        return None
    tolerance = 1e-12 if after.dtype == torch.float64 else 1e-5
    slope = float((y / z).median())
    if bool(((y / z / slope - 1).abs() <= tolerance).all()):
        return Treatment(_tidy(1 / slope))
    squared = 2 * y[:-1] / y[1:] - 1  # tanh(x)^2, since tanh(2x) = 2 tanh(x) / (1 + tanh(x)^2)
    at = int((squared - 0.5).abs().argmin())
    tanh = math.sqrt(max(float(squared[at]), 0.0))
    if not 0 < tanh < 1:
        return None
    softcap, amplitude = float(z[at]) / math.atanh(tanh), float(y[at]) / tanh
    if not bool(((amplitude * torch.tanh(z / softcap) / y - 1).abs() <= 100 * tolerance).all()):
        return None
    return Treatment(_tidy(softcap / amplitude), _tidy(softcap))


def _tidy(value: float) -> float:
    """Drop the last digits, which carry rounding errors of the fit: 30.000000000000007 becomes 30."""
    return float(f"{value:.14g}")


def check_row(model: CausalLM, treatment: Treatment, backend: str | None = HeadOptions.backend) -> None:
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
        with lm_head.head_and_loss_replaced(model, head, loss):
            more = lm_head.accepted(model.forward, use_cache=False, return_dict=True)
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
