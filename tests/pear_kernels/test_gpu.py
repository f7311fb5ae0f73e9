"""The same answers on an accelerator. Run with `pytest -m gpu` on a machine that has one."""

import pytest
import torch
from problems import gradients, make_problem, relative_error, workspace

from pear_kernels import linear_pear_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_matches_the_naive_loss(level, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    problem = make_problem((40, 1, 0, 90, 30), V=301, D=64, dtype=dtype, level=level, bias=True, softcap=8.0)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in problem.leaves()]
    options = {**problem.options, "bias": leaves[2], "workspace_bytes": workspace(33, 301)}
    out = linear_pear_loss(
        *leaves[:2],
        problem.target.cuda(),
        problem.behavior_logprobs.cuda(),
        cu_seqlens=problem.cu_seqlens.cuda(),
        **options,
    )
    (loss, _, weights), exact_leaves = problem.naive()
    assert relative_error(out.loss.cpu(), loss) < tolerance
    assert relative_error(out.weights.cpu(), weights) < 10 * tolerance
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours.cpu(), exact) < tolerance
