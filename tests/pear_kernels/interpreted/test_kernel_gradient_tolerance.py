"""`gradient_tolerance` on the kernels: what the torch backend leaves out, and gradients as close to float64."""

import pytest
import torch
from kernel_problems import DEVICE, HEADS, PRODUCTS, chunk_bytes, kernel_problem
from problems import gradients, relative_error

from pear_kernels.backends.triton import gradients as kernels
from pear_kernels.backends.triton import tiles
from pear_kernels.backends.triton.launch import launch


def peaked(**options):
    """A problem in which some columns and some rows are light."""
    problem = kernel_problem((19, 1, 0, 37, 15), seed=4, **options)
    problem.hidden.mul_(torch.linspace(0.5, 2, len(problem.hidden), device=DEVICE)[:, None])
    return problem


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", (30, 1000))
def test_it_leaves_out_what_torch_leaves_out(head, product, rows, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, product)
    problem, options = peaked(**HEADS[head]), {"gradient_tolerance": 0.2}
    found, leaves = problem.ours(**options, workspace_bytes=chunk_bytes(problem, rows))
    row_bytes = 4 * len(problem.weight) * min(rows, len(problem.target))
    right, right_leaves = problem.ours(**options, backend="torch", workspace_bytes=row_bytes)
    assert found.stats["gradient_left_out"] <= 0.2
    if rows == 1000:  # chunks are cut alike
        assert found.stats["gradient_kept"] == right.stats["gradient_kept"]
        for ours, theirs in zip(gradients(found.loss, leaves), gradients(right.loss, right_leaves), strict=True):
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    """No worse than the exact pass in this dtype and what the same tolerance costs in float32."""
    problem = peaked(dtype=dtype, bias=True)
    out, leaves = problem.ours(gradient_tolerance=0.1)
    dense, dense_leaves = problem.ours()
    assert 0 < out.stats["gradient_left_out"] <= 0.1 and out.stats["gradient_kept"] < 0.6
    assert torch.equal(out.loss, dense.loss)
    for ours, exact in zip(gradients(out.loss, leaves), gradients(dense.loss, dense_leaves), strict=True):
        assert relative_error(ours, exact) < 0.12


@pytest.mark.parametrize("kept", (1, 5, 1024, 1500, 2049))
def test_columns_are_compacted_in_place(kept):
    """Fewer columns than a block, one block, several; rows with a stride; the next row is not touched."""
    whole = torch.arange(3 * 2064, dtype=torch.float32, device=DEVICE).view(3, 2064)
    e, before = whole[:, :2050], whole.clone()
    columns = torch.randperm(2050, generator=torch.Generator().manual_seed(kept))[:kept].sort().values.to(DEVICE)
    launch(kernels.compact_columns, (3,), e, e.stride(0), columns, kept, BLOCK_K=1024)
    assert torch.equal(e[:, :kept], before[:, :2050][:, columns])
    assert torch.equal(whole[:, kept:], before[:, kept:])
