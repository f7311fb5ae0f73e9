"""linear_pear_loss of right and wrong sequences on the kernels against the naive float64 loss on full logits."""

import math

import pytest
import torch
from kernel_problems import (
    DEVICE,
    HEADS,
    LEVELS,
    PRODUCTS,
    TOLERANCE,
    assert_matches_naive,
    chunk_bytes,
    kernel_problem,
    naive,
)  # fmt: skip
from problems import gradients, relative_error

from pear_kernels.backends.triton import tiles

LENGTHS = (9, 1, 0, 13, 5)
RIGHT = (True, False, True, False, True)


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


def mixed_problem(lengths=LENGTHS, *, right=RIGHT, logprob_floor: float = -12.0, **options):
    """Log-probs lie on both sides of the floor, none of them so near that rounding takes it across."""
    label = torch.tensor(right)
    problem = kernel_problem(lengths, sequence_label=label, logprob_floor=logprob_floor, **options)
    wrong = ~problem.options["sequence_label"].repeat_interleave(problem.cu_seqlens.diff()) & (problem.target >= 0)
    logprobs = naive(problem)[0][1]
    assert ((logprobs[wrong] - logprob_floor).abs() > 1e-3).all()
    return problem


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("right", [RIGHT, (False, True, True, True, False), (True,) * 5, (False,) * 5])
@pytest.mark.parametrize("rows", [6, 40])
def test_levels_over_chunks(level, right, rows):
    problem = mixed_problem(level=level, right=right, block_size=3)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, rows))


def test_chunks_of_one_row():
    problem = mixed_problem((4, 1, 0, 5, 3), logprob_floor=-9.0)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head", HEADS)
def test_heads(level, head, product):
    problem = mixed_problem(level=level, reduction="sequence_mean", logprob_floor=-9.0, **HEADS[head])
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 12))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("logprob_floor", [0.0, -8.0, -math.inf])
def test_floors(level, logprob_floor):
    problem = mixed_problem(level=level, logprob_floor=logprob_floor, negative_lambda=0.7)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 12))


@pytest.mark.parametrize("level", LEVELS)
def test_sequences_longer_than_a_chunk(level, product):
    problem = mixed_problem((14, 15, 11), right=(False, True, False), V=40, level=level, ignored=0.0, bias=True)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 5))


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_stays_close(level):
    problem = mixed_problem(level=level, dtype=torch.bfloat16, bias=True)
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
    (loss, logprobs, weights), exact_leaves = naive(problem)
    assert abs(out.loss.item() - loss.item()) < 2e-5 * max(1.0, abs(loss.item()))
    assert relative_error(out.logprobs, logprobs) < TOLERANCE and relative_error(out.weights, weights) < 1e-4
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == torch.bfloat16 and relative_error(ours, exact) < 8e-3


@pytest.mark.parametrize("level", LEVELS)
def test_statistics(level):
    """Those of both backends: what they are is tested on the other one."""
    problem = mixed_problem(level=level, **HEADS["all"], drift=0.01)
    out, _ = problem.ours(workspace_bytes=chunk_bytes(problem, 6))
    expected, _ = problem.ours(backend="torch")
    assert set(out.stats) == set(expected.stats) and "wrong_nll" in out.stats
    for name in expected.stats:
        assert out.stats[name].item() == pytest.approx(expected.stats[name].item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("level", LEVELS)
def test_bitwise_repeatable(level):
    problem = mixed_problem(level=level, bias=True)
    problem.target[::3] = 5  # many tokens share a row of dW
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_all_ignored(level):
    problem = mixed_problem(level=level, ignored=1.0)
    problem.hidden.fill_(torch.nan)
    out, leaves = problem.ours()
    assert out.loss.item() == 0.0 and all(value.isfinite() for value in out.stats.values())
    assert all(not gradient.any() for gradient in gradients(out.loss, leaves))
    assert out.logprobs.device == DEVICE
