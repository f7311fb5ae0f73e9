"""linear_policy_loss on the kernels against the naive float64 losses on full logits."""

import pytest
import torch
from kernel_problems import DEVICE, HEADS, PRODUCTS, TOLERANCE, chunk_bytes, naive, on_device
from problems import gradients, make_policy_problem, relative_error

from pear_kernels.backends.triton import tiles
from pear_kernels.engine.walk import Walk
from pear_kernels.objectives.policy import POLICY_STATS
from pear_kernels.options import OBJECTIVES

OPTIONS = dict(clip_low=0.1, clip_high=0.15)  # a sequence's ratio leaves these too


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


@pytest.fixture
def scored(monkeypatch):
    """[begin, end) of the chunks whose softmax was made, in order."""
    seen, softmax = [], Walk.softmax

    def watched(self, begin, end, **options):
        seen.append((begin, end))
        return softmax(self, begin, end, **options)

    monkeypatch.setattr(Walk, "softmax", watched)
    return seen


def policy_problem(lengths=(9, 1, 0, 13), *, D: int = 24, V: int = 75, dtype=torch.float32, **options):
    return on_device(make_policy_problem(lengths, D=D, V=V, dtype=dtype, **OPTIONS, **options))


def assert_matches_naive(problem, tolerance: float = TOLERANCE, **overrides):
    out, leaves = problem.ours(**overrides)
    (loss, logprobs), exact_leaves = naive(problem, **overrides)
    scale = max(loss.abs().item(), 0.1)  # losses of advantages of both signs cancel
    assert abs(out.loss.item() - loss.item()) < tolerance * scale
    assert relative_error(out.logprobs, logprobs) < tolerance
    pairs = zip(gradients(-3.7 * out.loss, leaves), gradients(-3.7 * loss, exact_leaves), strict=True)
    for ours, exact in pairs:
        assert relative_error(ours, exact) < tolerance
    return out


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("by_token", [False, True])
def test_objectives_over_several_chunks(objective, by_token, scored):
    problem = policy_problem(objective=objective, by_token=by_token)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 6))
    assert len(scored) > 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_option_at_once(objective):
    problem = policy_problem(objective=objective, ref=True, sampler=True, sampler_clip=1.1, dual_clip=1.3)
    assert_matches_naive(
        problem, workspace_bytes=chunk_bytes(problem, 6), beta=0.2, sampler_level="sequence", unbiased_kl=True
    )


@pytest.mark.parametrize("objective", ["grpo", "gspo", "gspo_token"])
def test_entropy_bonus(objective, product):
    problem = policy_problem(objective=objective, ref=True, beta=0.2, **HEADS["all"])
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 8), entropy_coef=0.3)


@pytest.mark.parametrize("objective", ["gspo", "gspo_token"])
@pytest.mark.parametrize("beta, rows_scored", [(0.0, 29 + 10), (0.2, 29 + 9 + 10)])
def test_ratios_of_sequences_longer_than_a_chunk(objective, beta, rows_scored, scored):
    """Chunks of 5: the second long sequence is seen twice but for one of them; with a KL the first is, too."""
    problem = policy_problem((14, 15), D=24, V=40, objective=objective, ignored=0.0, ref=True, bias=True)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 5), beta=beta)
    assert sum(end - begin for begin, end in scored) == rows_scored


@pytest.mark.parametrize("sampler_level", ["token", "sequence"])
def test_the_samplers_correction(sampler_level):
    problem = policy_problem(objective="gspo", sampler=True, sampler_level=sampler_level, sampler_clip=1.1)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 6))


def test_without_old_logprobs():
    problem = policy_problem(objective="gspo")
    problem.behavior_logprobs = None
    out = assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 6))
    assert out.stats["ratio_max"] == 1


def test_statistics(product):
    """Those of both backends: what they are is tested on the other one."""
    problem = policy_problem(objective="gspo", ref=True, sampler=True, sampler_clip=1.05, **HEADS["all"])
    out, _ = problem.ours(workspace_bytes=chunk_bytes(problem, 6))
    expected, _ = problem.ours(backend="torch")
    for name in POLICY_STATS:
        assert out.stats[name].item() == pytest.approx(expected.stats[name].item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("objective", ["grpo", "gspo", "cispo", "sapo"])
def test_bfloat16_stays_close(objective):
    # E and the scaled rows of product 3 are rounded; logits and log-probs are those of the rounded operands
    problem = policy_problem(objective=objective, dtype=torch.bfloat16, ref=True, beta=0.1)
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
    (loss, logprobs), exact_leaves = naive(problem)
    assert abs(out.loss.item() - loss.item()) < 1e-5 and relative_error(out.logprobs, logprobs) < TOLERANCE
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == torch.bfloat16 and relative_error(ours, exact) < 8e-3


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_bitwise_repeatable(objective, entropy_coef):
    problem = policy_problem(objective=objective, ref=True, beta=0.1, entropy_coef=entropy_coef, bias=True)
    problem.target[::3] = 5  # many tokens share a row of dW
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_ignored(objective):
    problem = policy_problem(objective=objective, ignored=1.0, ref=True, beta=0.1, sampler=True)
    problem.hidden.fill_(torch.nan)
    for entropy_coef in (0.0, 0.1):
        out, leaves = problem.ours(entropy_coef=entropy_coef)
        assert out.loss.item() == 0.0 and all(value.isfinite() for value in out.stats.values())
        assert all(not gradient.any() for gradient in gradients(out.loss, leaves))
        assert out.logprobs.device == DEVICE
