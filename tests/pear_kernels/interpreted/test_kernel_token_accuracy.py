"""`token_accuracy` and `entropy` of the kernels against full float64 logits."""

import pytest
import torch
from accuracy import expected, hit_and_miss
from kernel_problems import DEVICE, PRODUCTS, on_device

from pear_kernels import linear_weighted_loss
from pear_kernels.backends.triton import tiles


@pytest.fixture
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)


# heads that leave row scales have two variants of product 1, and the others one
@pytest.mark.parametrize(
    "kind, product",
    [("pear", "fused"), ("pear", "plain"), ("teacher", "plain"), ("top-k", "plain")],
    indirect=["product"],
)
def test_it_is_argmax_of_full_logits(kind, product):
    problem = hit_and_miss(kind, D=24, V=75, dtype=torch.float32, bias=True, temperature=0.7)
    accuracy, entropy = expected(problem)
    options = {} if kind == "top-k" else {"return_entropy": True}
    problem = on_device(problem)
    if "teacher" in problem.options:
        teacher = problem.options["teacher"]
        moved = (x.to(DEVICE) if torch.is_tensor(x) else x for x in teacher)
        problem.options["teacher"] = type(teacher)(*moved)
    out, _ = problem.ours(**options)
    assert out.stats["token_accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    if options:
        assert out.stats["entropy"].item() == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("product", PRODUCTS, indirect=True)
def test_a_tie_is_a_miss(product):
    weight, hidden = torch.randn(40, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)
    target = torch.arange(3, device=DEVICE)
    out = linear_weighted_loss(hidden, weight, target, weighting="none", backend="triton")
    assert out.stats["token_accuracy"] == 0
