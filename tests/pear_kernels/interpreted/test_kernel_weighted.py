"""linear_weighted_loss on the kernels against the naive float64 loss on full logits."""

import pytest
import torch
from kernel_problems import (
    DEVICE,
    HEADS,
    PRODUCTS,
    TOLERANCE,
    assert_matches_naive,
    chunk_bytes,
    hard_problem,
    naive,
    on_device,
)  # fmt: skip
from problems import WeightedProblem, gradients, make_weighted_problem, relative_error

from pear_kernels.backends.triton import tiles
from pear_kernels.engine.walk import Walk
from pear_kernels.objectives.weighted import WEIGHTED_STATS

NAMES = ["none", "dft", "iw-sft", "psft", "asft", "idft"]
WEIGHTINGS = ["tensor", *NAMES]
LENGTHS = (9, 1, 0, 13)


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


def weighted_problem(lengths=LENGTHS, *, D: int = 24, V: int = 75, dtype=torch.float32, size=0.5, **options):
    """Log-probs of some tens as random heads give them would leave nothing of p or of exp(mean): hence `size`."""
    problem = on_device(make_weighted_problem(lengths, D=D, V=V, dtype=dtype, **options))
    problem.weight.mul_(size)
    if "ref_logprobs" in problem.options:
        ref = naive(problem)[0][1].float() + 0.3 * torch.sin(torch.arange(sum(lengths), device=DEVICE))
        problem.options["ref_logprobs"] = ref.clamp(max=0).masked_fill(problem.target < 0, torch.nan)
    return problem


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rows", [6, 40])
def test_weightings_over_chunks(weighting, rows, scored):
    problem = weighted_problem(weighting=weighting)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, rows))
    assert len(scored) > 2 or rows == 40


@pytest.mark.parametrize("weighting", ["iw-sft", "idft"])
def test_chunks_of_one_row(weighting):
    problem = weighted_problem((4, 1, 0, 5), weighting=weighting)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 1))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_heads(weighting, head, product):
    problem = weighted_problem(weighting=weighting, reduction="sequence_mean", **HEADS[head])
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 12))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
def test_reductions_and_scales(weighting, reduction):
    scale = torch.tensor([0.5, 2.0, 7.0, 0.8], device=DEVICE)
    problem = weighted_problem(weighting=weighting, reduction=reduction, sequence_scale=scale)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 12))
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 12), denominator=3.0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_model(head, dtype):
    problem = weighted_problem(weighting="anchored", dtype=dtype, **HEADS[head])
    reference = problem.options["reference"]
    problem.options["reference"] = type(reference)(
        *(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in reference)
    )
    if dtype == torch.float32:
        assert_matches_naive(problem, 2e-5, workspace_bytes=2 * chunk_bytes(problem, 6))
        return
    out, leaves = problem.ours(workspace_bytes=2 * chunk_bytes(problem, 6))
    (loss, _, _), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < 2e-5
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == dtype and relative_error(ours, exact) < 8e-3


@pytest.mark.parametrize("index", [False, True])
def test_functions(index):
    problem = weighted_problem()

    def of_logprobs(logprobs):
        return torch.sin(3 * logprobs)

    def of_both(logprobs, places):
        return torch.cos(logprobs) * (places % 5 - 2)

    problem.options["weights"] = of_both if index else of_logprobs
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 6))


@pytest.mark.parametrize("V", [37, 301])
@pytest.mark.parametrize("weighting", ["tensor", "asft", "idft"])
def test_vocabularies_that_are_no_multiple_of_a_tile(V, weighting, product):
    problem = weighted_problem((7, 5), V=V, D=16, weighting=weighting, bias=True)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 5))


def test_sequences_of_iw_sft_longer_than_a_chunk(scored):
    """Chunks of 5: the first long sequence is seen once, of the second all but the chunk that completes it twice."""
    problem = weighted_problem((14, 15), V=40, weighting="iw-sft", ignored=0.0, bias=True)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 5))
    assert sum(end - begin for begin, end in scored) == 29 + 10


@pytest.mark.parametrize("weighting", NAMES)
@pytest.mark.parametrize("kind, level", [("peaked", 1e-9), ("peaked", 1e-4), ("unlikely", -12.0)])
def test_where_the_target_is_certain_or_unlikely(weighting, kind, level):
    problem = hard_problem(kind, level, lengths=(12, 9))
    (_, logprobs, _), _ = naive(problem)
    nudge = 0.2 * torch.sin(torch.arange(21, device=DEVICE))
    ref = (logprobs * nudge.exp() if kind == "peaked" else logprobs + nudge).float()
    tensors = problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens
    problem = WeightedProblem(*tensors, {"backend": "triton", "weighting": weighting, "ref_logprobs": ref})
    out, leaves = problem.ours()
    (loss, _, _), exact_leaves = naive(problem)
    # float64's own log-softmax has lost 1e-7 of a log-prob of -1e-9
    assert relative_error(out.loss, loss) < 2e-5
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 2e-5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_bfloat16_stays_close(weighting, product):
    # E and the scaled rows of product 3 are rounded; logits and log-probs are those of the rounded operands
    problem = weighted_problem(weighting=weighting, dtype=torch.bfloat16, bias=True)
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
    (loss, logprobs, weights), exact_leaves = naive(problem)
    assert abs(out.loss.item() - loss.item()) < 2e-5 * max(1.0, abs(loss.item()))
    assert relative_error(out.logprobs, logprobs) < TOLERANCE
    assert relative_error(out.weights, weights) < 1e-4
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == torch.bfloat16 and relative_error(ours, exact) < 8e-3


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_whatever_is_trained(weighting, trained):
    problem = weighted_problem(weighting=weighting, bias=True)
    names = ("hidden", "weight", "bias")
    leaves = [x.requires_grad_(name == trained) for name, x in zip(names, problem.leaves(), strict=True)]
    out = problem.loss(
        *leaves[:2], problem.target, None, cu_seqlens=problem.cu_seqlens, workspace_bytes=chunk_bytes(problem, 6),
        **{**problem.options, "bias": leaves[2]},
    )  # fmt: skip
    (loss, _, _), exact_leaves = naive(problem)
    place = names.index(trained)
    (ours,), exact = gradients(out.loss, [leaves[place]]), gradients(loss, exact_leaves)[place]
    assert relative_error(ours, exact) < TOLERANCE


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_statistics(weighting, product):
    """Those of both backends: what they are is tested on the other one."""
    problem = weighted_problem(weighting=weighting, **HEADS["all"])
    out, _ = problem.ours(workspace_bytes=chunk_bytes(problem, 6))
    expected, _ = problem.ours(backend="torch")
    for name in WEIGHTED_STATS:
        assert out.stats[name].item() == pytest.approx(expected.stats[name].item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("weighting", ["tensor", "iw-sft", "asft", "idft"])
def test_bitwise_repeatable(weighting):
    problem = weighted_problem(weighting=weighting, bias=True)
    problem.target[::3] = 5  # many tokens share a row of dW
    for name in ("weights", "ref_logprobs"):
        if name in problem.options:
            problem.options[name] = problem.options[name].nan_to_num(-1.0)
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_all_ignored(weighting):
    problem = on_device(make_weighted_problem(LENGTHS, weighting=weighting, ignored=1.0, dtype=torch.float32))
    problem.hidden.fill_(torch.nan)
    out, leaves = problem.ours()
    assert out.loss.item() == 0.0 and all(value.isfinite() for value in out.stats.values())
    assert all(not gradient.any() for gradient in gradients(out.loss, leaves))
    assert out.logprobs.device == DEVICE


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_token(weighting):
    assert_matches_naive(weighted_problem((1,), weighting=weighting, ignored=0.0))
