"""What a transformers model's forward does to its logits between head and loss: measured, not read from its config.

Names of such constants differ (`logit_scale`, `logits_scaling`, `final_logit_softcapping`, ...), and one name means a
factor in one family and a divisor in another. So the forward runs once without its trunk: its head hands on numbers,
and its loss function sees what they became.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pear_kernels.huggingface.lm_head import forward_replaced, innermost

OWN_LOSS = "makes its loss by itself instead of handing its logits to `loss_function`"
ADVICE = (
    "Run its decoder yourself, and give the hidden states and the head's weight to linear_pear_loss or "
    "linear_weighted_loss."
)
PROBES = tuple(2.0**power for power in range(-10, 14))  # logits, each twice the one before


class Treatment(NamedTuple):
    """softcap * tanh(z / softcap) / temperature of z = hidden @ weight.T + bias, or z / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    rows: int | None = None  # of the head, that have a logit: the others pad it. None: all

    def options(self) -> dict[str, float]:
        """Of the losses, those that are not their defaults."""
        options = {"temperature": self.temperature, "softcap": self.softcap}
        return {name: value for name, value in options.items() if value is not None and value != 1.0}

    def rows_of(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head's (V, D) and (V,) without its padding."""
        if self.rows is None:
            return weight, bias
        return weight[: self.rows], None if bias is None else bias[: self.rows]

    def apply(self, logits: Tensor) -> Tensor:
        """Of logits as the head makes them."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


def measure_treatment(model: nn.Module) -> Treatment:
    """That of a causal LM of transformers. Its trunk and head are not run, so it may be anywhere, and of any size. The
    instance's attributes `forward` and `_loss_function` are set afterwards (see `forward_replaced`).

    Raises:
        ValueError: by the model's class and with the reason: its forward does not take its logits from its head to
            `loss_function`, or does something else to them than a scale and a soft cap.
    """
    name = type(model).__name__
    check_loss(model)
    head, trunk = innermost(model.get_output_embeddings()), _trunk(model)
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    columns = torch.arange(max(rows, len(PROBES))) % len(PROBES)  # as wide as logits, so that a cut of them shows
    probes = torch.tensor(PROBES, dtype=torch.float64)[columns].expand(1, 2, -1).clone()
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    width = getattr(model.config.get_text_config(), "hidden_size", head.weight.shape[1])
    hidden = torch.zeros(1, 2, width, dtype=head.weight.dtype, device=head.weight.device)
    calls = []

    def take(hidden: Tensor) -> Tensor:
        calls.append(hidden)
        return probes

    try:
        with (
            torch.no_grad(),
            forward_replaced(trunk, lambda *_, **__: _Hidden(hidden)),
            forward_replaced(head, take),
            loss_replaced(model, _stop),
        ):
            model.forward(input_ids=ids, labels=ids)
    except _Reached as reached:
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
            name, "does more to its logits than a positive scale, a soft cap and a cut of padding, which our pass has"
        )
    return fit._replace(rows=cut)


def check_loss(model: nn.Module) -> None:
    """ValueError where a model's loss is another than that of transformers' causal LMs, which ours is to replace."""
    loss = getattr(model.loss_function, "__name__", None)
    if loss != "ForCausalLMLoss":
        loss = loss or type(model.loss_function).__name__
        raise refusal(type(model).__name__, f"makes its loss by {loss}, and not by transformers' ForCausalLMLoss")


def refusal(name: str, why: str) -> ValueError:
    return ValueError(f"{name} cannot be patched: its forward {why}. {ADVICE}")


def _trunk(model: nn.Module) -> nn.Module:
    """The module of hidden states: `base_model`, or where a class names another, the one child that is a model too."""
    if model.base_model is not model:
        return model.base_model
    models = [child for child in model.children() if hasattr(child, "config") and hasattr(child, "base_model")]
    if len(models) != 1:
        raise refusal(type(model).__name__, "has no decoder trunk of its own (`base_model`) to call")
    return models[0]


class _Hidden:
    """What a trunk returns, with nothing in it but hidden states."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _Reached(Exception):
    """A forward has come to its loss."""


def _stop(logits: Tensor, labels: Tensor, *_, **__) -> None:
    raise _Reached(logits, labels)


@contextlib.contextmanager
def loss_replaced(model: nn.Module, loss):
    """Within it, `model.loss_function` is `loss`; see `forward_replaced`."""
    before = model.loss_function
    model._loss_function = loss
    try:
        yield
    finally:
        model._loss_function = before


def fit_treatment(before: Tensor, after: Tensor) -> Treatment | None:
    """The treatment that made `after` (..., n) of the positive logits `before` (..., n), each twice the one before;
    None if none did."""
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
    """Without the last digits, which the fit leaves over: 30.000000000000007 is 30."""
    return float(f"{value:.14g}")
