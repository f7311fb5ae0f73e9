"""The formulas of one head's activation and of one row's softmax, beside autograd and a wider number format."""

import itertools
import math

import pytest
import torch

from pear_kernels.formulas import softmax
from pear_kernels.formulas.activation import Activation, slope_of_tanh_

GRID = list(itertools.product((0.5, 1.0, 2.0), (None, 3.0, 30.0)))


@pytest.mark.parametrize(("temperature", "softcap"), GRID)
def test_activation_and_both_of_its_slopes(temperature, softcap):
    raw = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    (capped / temperature).sum().backward()
    activation, z = Activation(temperature, softcap), raw.detach().clone()
    tanh = activation.apply_(z)
    torch.testing.assert_close(z, (capped / temperature).detach(), rtol=1e-15, atol=1e-15)
    shifted = activation.slope(z - 2.5, 2.5)  # what is left of logits of which a shift was subtracted
    if softcap is None:
        assert tanh is None and shifted is None
        assert torch.equal(raw.grad, torch.full_like(z, 1 / temperature))
    else:
        for slope in (slope_of_tanh_(tanh), activation.slope(z), shifted):
            torch.testing.assert_close(slope / temperature, raw.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("below", [0.0, 1e-8, -1.5, -40.0, -700.0, 30.0])
@pytest.mark.parametrize("S", [0.0, 1e-300, 1e-20, 1e-3, 1.0, 1e6])
def test_log_p_keeps_its_digits_at_both_ends(S, below):
    e_y = math.exp(below)
    exact = math.log1p(S / e_y) if S / e_y < 1e200 else math.log(S) - below  # no log(S + e_y), which would cancel
    found = softmax.nll(torch.tensor([S], dtype=torch.float64), torch.tensor([below], dtype=torch.float64))
    torch.testing.assert_close(found.item(), exact, rtol=1e-13, atol=0)


def test_entropy_of_a_row():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exp = (logits - logits.amax(1, keepdim=True)).exp()
    Z, p = exp.sum(1), torch.softmax(logits, 1)
    found = softmax.entropy(Z.log(), (exp * exp.log()).sum(1), Z)
    torch.testing.assert_close(found, -(p * p.log()).sum(1), rtol=1e-13, atol=0)


def test_floors_do_what_they_promise():
    for dtype, bound in softmax.MAX_EXPONENT.items():
        value = torch.tensor(bound, dtype=dtype).exp()
        assert value.isfinite() and value.reciprocal() > torch.finfo(dtype).tiny
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        p = torch.tensor(softmax.MIN_LOG, dtype=dtype).exp()
        assert p == 0 and p * softmax.MIN_LOG == 0
