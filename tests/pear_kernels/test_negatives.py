"""linear_pear_loss of right and wrong sequences against the naive float64 loss, and what keeps it from running away."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Problem,
    assert_matches_naive,
    count_products,
    gradients,
    make_problem,
    relative_error,
    workspace,
)  # fmt: skip

from pear_kernels import linear_pear_loss
from pear_kernels.objectives.pear import STATS

LEVELS = ["token", "block", "sequence"]
OF_WRONG = ("wrong_nll", "wrong_weight_mean", "wrong_below_floor", "wrong_tokens")
RIGHT = (True, False, True, False, True)  # of the default five sequences, of which the third is empty
UNBOUNDED = dict(negative_lambda=1.0, logprob_floor=-math.inf)


def mixed_problem(lengths=(7, 1, 0, 12, 5), *, right=RIGHT, **options) -> Problem:
    """`make_problem` with labels. Its log-probs lie on both sides of the floor."""
    return make_problem(lengths, sequence_label=torch.tensor(right), **options)


def wrong_tokens(problem) -> torch.Tensor:
    """(N,) bool: the tokens of wrong sequences that count."""
    of_token = problem.options["sequence_label"].repeat_interleave(problem.cu_seqlens.diff())
    return ~of_token & (problem.target >= 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
@pytest.mark.parametrize("right", [RIGHT, (False, True, True, True, False), (True,) * 5, (False,) * 5])
def test_chunk_sweep(level, rows, right):
    problem = mixed_problem(level=level, block_size=3, right=right)
    assert_matches_naive(problem, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}],
)
def test_heads_and_reductions(level, reduction, head):
    scale = torch.tensor([0.5, 2.0, 7.0, 1.5, 0.0], dtype=torch.float64)
    problem = mixed_problem(level=level, reduction=reduction, workspace_bytes=workspace(4, 37), **head)
    for sequence_scale in (None, scale):
        assert_matches_naive(problem, sequence_scale=sequence_scale)
        assert_matches_naive(problem, sequence_scale=sequence_scale, denominator=11.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("negative_lambda", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logprob_floor", [0.0, -3.0, -8.0, -math.inf])
def test_options(level, negative_lambda, logprob_floor):
    problem = mixed_problem(level=level, negative_lambda=negative_lambda, logprob_floor=logprob_floor)
    for rows in (3, 40):
        assert_matches_naive(problem, workspace_bytes=workspace(rows, 37))


@pytest.mark.parametrize("level", LEVELS)
def test_clips_hold_for_both(level):
    problem = mixed_problem(level=level, log_ratio_clip=(-0.5, 0.9), log_weight_clip=(-1.0, 0.5), gamma=0.9)
    assert_matches_naive(problem)
    weights = problem.ours()[0].weights[wrong_tokens(problem)]
    assert (-weights).max() <= 0.1 * math.exp(0.5) * (1 + 1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias", "weight bias", "hidden weight bias"])
@pytest.mark.parametrize("rows", [1, 20, 60])
def test_whatever_is_trained(level, trained, rows):
    problem = mixed_problem((0, 40, 1, 49, 30, 0), right=(True, False, False, True, False, False), bias=True, D=4)
    names = ("hidden", "weight", "bias")
    leaves = [x.requires_grad_(name in trained.split()) for name, x in zip(names, problem.leaves(), strict=True)]
    options = {**problem.options, "bias": leaves[2], "level": level}
    out = linear_pear_loss(
        *leaves[:2], problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
        workspace_bytes=workspace(rows, 37), **options,
    )  # fmt: skip
    (loss, _, _), exact_leaves = problem.naive(level=level)
    exact = dict(zip(names, gradients(loss, exact_leaves), strict=True))
    ours = dict(zip(trained.split(), gradients(out.loss, [x for x in leaves if x.requires_grad]), strict=True))
    for name, gradient in ours.items():
        assert relative_error(gradient, exact[name]) < 1e-12, name


@given(
    sequences=st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=6),
    level=st.sampled_from(LEVELS),
    block_size=st.integers(1, 20),
    negative_lambda=st.sampled_from([0.0, 0.1, 2.0]),
    logprob_floor=st.sampled_from([-2.0, -5.0, -math.inf]),
    reduction=st.sampled_from(["mean", "sum", "sequence_mean"]),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    drift=st.sampled_from([-0.5, 0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_random_packs(sequences, rows, vocabulary, **options):
    lengths, right = zip(*sequences, strict=True)
    problem = mixed_problem(lengths, right=right, V=vocabulary, **options)
    if (problem.target >= 0).any():
        assert_matches_naive(problem, tolerance=1e-10, workspace_bytes=workspace(rows, vocabulary))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("V", [37, 301])
def test_float32(level, V):
    problem = mixed_problem(
        (40, 3, 200, 90), right=(False, True, True, False), V=V, D=32, dtype=torch.float32, level=level, bias=True,
        logprob_floor=-20.0,
    )  # fmt: skip
    out, _ = problem.ours(workspace_bytes=workspace(70, V, 4))
    assert out.loss.dtype == out.logprobs.dtype == out.weights.dtype == torch.float32
    assert_matches_naive(problem, tolerance=5e-6, workspace_bytes=workspace(70, V, 4))


# ---- what a label does


@pytest.mark.parametrize("level", LEVELS)
def test_right_sequences_alone_are_as_before(level):
    problem = make_problem(level=level, bias=True)
    (plain, leaves), (labelled, theirs) = problem.ours(), problem.ours(sequence_label=torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(labelled.loss, plain.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(labelled.weights, plain.weights, rtol=1e-13, atol=0)
    torch.testing.assert_close({name: labelled.stats[name] for name in plain.stats}, plain.stats, rtol=1e-13, atol=0)
    for ours, exact in zip(gradients(labelled.loss, theirs), gradients(plain.loss, leaves), strict=True):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_wrong_sequences_alone_are_the_sequence_level_turned_round(level):
    problem = make_problem(ignored=0.2, block_size=3)
    wrong = torch.zeros(5, dtype=torch.bool)
    plain, leaves = problem.ours(level="sequence")
    turned, theirs = problem.ours(level=level, sequence_label=wrong, negative_lambda=0.7, logprob_floor=-math.inf)
    torch.testing.assert_close(turned.loss, -0.7 * plain.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(turned.weights, -0.7 * plain.weights, rtol=1e-12, atol=0)
    for ours, exact in zip(gradients(turned.loss, theirs), gradients(plain.loss, leaves), strict=True):
        assert relative_error(ours, -0.7 * exact) < 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_a_label_changes_its_own_sequence_alone(level):
    problem = mixed_problem((9, 8, 7), right=(True, True, True), level=level, ignored=0.1, reduction="sum")
    before, leaves = problem.ours()
    after, theirs = problem.ours(sequence_label=torch.tensor([True, False, True]))
    others = torch.ones(24, dtype=torch.bool)
    others[9:17] = False
    torch.testing.assert_close(after.weights[others], before.weights[others], rtol=1e-13, atol=0)
    here, there = gradients(before.loss, leaves)[0], gradients(after.loss, theirs)[0]
    torch.testing.assert_close(there[others], here[others], rtol=1e-12, atol=1e-15)
    assert (after.weights[9:17] <= 0).all() and (after.weights[9:17] < 0).any()


def test_below_the_floor_nothing_pushes():
    problem = mixed_problem((9, 8, 7), right=(True, False, False), ignored=0.0, logprob_floor=-4.0)
    out, leaves = problem.ours()
    below = wrong_tokens(problem) & (out.logprobs <= -4)
    above = wrong_tokens(problem) & (out.logprobs > -4)
    assert below.any() and above.any()
    assert (out.weights[below] == 0).all() and (out.weights[above] < 0).all()
    grad_hidden = gradients(out.loss, leaves)[0]
    assert not grad_hidden[below].any() and (grad_hidden[above].norm(dim=1) > 0).all()
    # the loss counts it as -floor all the same, so that it does not jump as a token passes
    factors = problem.ours(logprob_floor=-math.inf)[0].weights
    nll = torch.where(wrong_tokens(problem), (-out.logprobs).clamp(max=4.0), -out.logprobs)
    torch.testing.assert_close(out.loss, (factors * nll).sum() / 24, rtol=1e-12, atol=0)


def test_lambda_of_zero_trains_the_right_alone():
    problem = mixed_problem((9, 8, 7), right=(True, False, True), ignored=0.0, reduction="sum", negative_lambda=0.0)
    out, leaves = problem.ours()
    grads = gradients(out.loss, leaves)
    assert not grads[0][9:17].any()
    keep = torch.cat([torch.arange(9), torch.arange(17, 24)])
    theirs = problem.leaves()
    alone = linear_pear_loss(
        theirs[0][keep], theirs[1], problem.target[keep], problem.behavior_logprobs[keep],
        cu_seqlens=torch.tensor([0, 9, 16]), reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(out.loss, alone.loss, rtol=1e-12, atol=0)
    for ours, exact in zip(grads, gradients(alone.loss, theirs), strict=True):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_flows_through_the_weights(level):
    problem = mixed_problem(level=level, reduction="sum")
    problem.behavior_logprobs.requires_grad_()
    out, leaves = problem.ours(workspace_bytes=workspace(5, 37))
    theirs = problem.leaves()
    nll = F.cross_entropy(F.linear(*theirs), problem.target, reduction="none")
    for ours, exact in zip(gradients(out.loss, leaves), gradients((out.weights * nll).sum(), theirs), strict=True):
        assert relative_error(ours, exact) < 1e-12
    assert torch.autograd.grad(problem.ours()[0].loss, problem.behavior_logprobs, allow_unused=True) == (None,)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("logprob_floor", [-5.0, -math.inf])
def test_by_finite_differences(level, logprob_floor):
    # of the loss with its G fixed, which are the weights of a call without a floor
    problem = mixed_problem((6, 5), right=(True, False), V=11, D=4, level=level, ignored=0.0, reduction="sum")
    out, leaves = problem.ours(logprob_floor=logprob_floor)
    factors = problem.ours(logprob_floor=-math.inf)[0].weights
    wrong, step = wrong_tokens(problem), 1e-6
    rng = torch.Generator().manual_seed(1)
    for leaf, gradient in zip(leaves, gradients(out.loss, leaves), strict=True):
        direction = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)

        def at(s, leaf=leaf, direction=direction):
            moved = [(x + s * direction if x is leaf else x).detach() for x in leaves]
            nll = F.cross_entropy(F.linear(*moved), problem.target, reduction="none")
            return (factors * torch.where(wrong, nll.clamp(max=-logprob_floor), nll)).sum().item()

        slope = (at(step) - at(-step)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


# ---- a training run: more wrong sequences than right ones


def train(optimizer, lr, steps, seed, **options):
    """Losses, and mean NLL of right and of wrong tokens, step by step: 2 right and 6 wrong sequences that share states.

    Every hidden state is the embedding of the token before, so what pushes one sequence away moves others.
    """
    rng = torch.Generator().manual_seed(seed)
    V, D, S, T, right = 16, 8, 8, 6, 2
    ids = torch.randint(V, (S, T + 1), generator=rng)
    embedding, weight = (0.5 * torch.randn(V, D, generator=rng, dtype=torch.float64) for _ in range(2))
    leaves = [embedding.requires_grad_(), weight.requires_grad_()]
    label = torch.arange(S) < right
    behavior = -F.cross_entropy((embedding[ids[:, :-1]] @ weight.T).mT, ids[:, 1:], reduction="none").detach()
    step = optimizer(leaves, lr=lr)
    history = []
    for _ in range(steps):
        out = linear_pear_loss(embedding[ids[:, :-1]], weight, ids[:, 1:], behavior, sequence_label=label, **options)
        history.append((out.loss.item(), -out.logprobs[label].mean().item(), -out.logprobs[~label].mean().item()))
        step.zero_grad()
        out.loss.backward()
        step.step()
    return zip(*history, strict=True)


@pytest.mark.parametrize("optimizer, lr, seed", [(torch.optim.Adam, 0.05, 0), (torch.optim.SGD, 1.0, 1)])
def test_the_defaults_stay_bounded_where_a_plain_penalty_runs_away(optimizer, lr, seed):
    losses, right, wrong = train(optimizer, lr, 200, seed, **UNBOUNDED)
    assert losses[-1] < -20 and losses[-1] < losses[100] < losses[50]  # faster and faster
    assert right[-1] > 2 * right[0]  # and what was to be learnt is lost
    losses, right, wrong = train(optimizer, lr, 200, seed)
    assert min(losses) > -0.5
    assert right[-1] < 0.3 * right[0]
    assert wrong[-1] > 5 and max(wrong) < 20  # pushed off to the floor, and not much further by what else is learnt


# ---- layouts and edges


@pytest.mark.parametrize("level", LEVELS)
def test_packing_order_changes_nothing(level):
    lengths, right = (7, 4, 12, 5), (True, False, False, True)
    pack = mixed_problem(lengths, right=right, level=level)
    bounds, order = pack.cu_seqlens.tolist(), [2, 0, 3, 1]
    index = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in order])
    shuffled = mixed_problem([lengths[s] for s in order], right=[right[s] for s in order], level=level)
    shuffled.hidden, shuffled.target = pack.hidden[index], pack.target[index]
    shuffled.behavior_logprobs, shuffled.weight = pack.behavior_logprobs[index], pack.weight
    a, b = pack.ours()[0], shuffled.ours()[0]
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.weights[index], b.weights, rtol=1e-12, atol=0)


# ---- what it costs: rows that go through each product


@pytest.fixture
def products(monkeypatch):
    return count_products(monkeypatch)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "neither"])
def test_products_of_sequences_within_a_chunk(products, level, trained):
    problem = mixed_problem((19, 20, 11, 17), right=(True, False, False, True), level=level)
    n = int((problem.target >= 0).sum())
    hidden = problem.hidden.requires_grad_(trained in ("both", "hidden"))
    weight = problem.weight.requires_grad_(trained in ("both", "weight"))
    linear_pear_loss(
        hidden, weight, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
        workspace_bytes=workspace(20, 37), **problem.options,
    )  # fmt: skip
    assert n < 67
    assert products == {"logits": n, "hidden": n * hidden.requires_grad, "weight": n * weight.requires_grad}


@pytest.mark.parametrize("level", LEVELS)
def test_products_of_long_sequences(products, level):
    problem = mixed_problem((50, 60), right=(True, False), level=level, ignored=0.0)
    problem.ours(workspace_bytes=workspace(20, 37))
    assert products["hidden"] == products["weight"] == 110
    assert 110 <= products["logits"] <= 200  # seen twice at most, but for each sequence's last chunk


# ---- statistics, faces


@pytest.mark.parametrize("level", LEVELS)
def test_statistics_are_what_their_names_say(level):
    problem = mixed_problem(
        (300, 200, 100), right=(True, False, False), drift=-0.02, ignored=0.2, log_weight_clip=(-3.0, 1.0),
        level=level, negative_lambda=0.4,
    )  # fmt: skip
    out, _ = problem.ours(workspace_bytes=workspace(70, 37))
    assert set(out.stats) == {*STATS, *OF_WRONG, "token_accuracy"}
    bad = wrong_tokens(problem)
    right = (problem.target >= 0) & ~bad
    p, q, w = out.logprobs[right].numpy(), problem.behavior_logprobs[right].numpy(), out.weights[right].numpy()
    G = problem.naive(level="sequence", sequence_label=None)[0][2][bad]
    expected = {
        "nll": -p.mean(),
        "log_ratio_mean": (p - q).mean(),
        "ratio_clipped_low": (p - q < -0.08).mean(),
        "ratio_clipped_high": (p - q > 0.3).mean(),
        "weight_mean": w.mean(),
        "weight_floor": (abs(w - math.exp(-3)) < 1e-12).mean(),
        "weight_ceiling": (abs(w - math.exp(1)) < 1e-12).mean(),
        "effective_sample_size": w.sum() ** 2 / (w.size * (w**2).sum()),
        "tokens": w.size,
        "wrong_nll": -out.logprobs[bad].mean().item(),
        "wrong_weight_mean": G.mean().item(),
        "wrong_below_floor": (out.logprobs[bad] <= -5).double().mean().item(),
        "wrong_tokens": bad.sum().item(),
    }
    assert 0 < expected["wrong_below_floor"] < 1
    for name, value in expected.items():
        assert not out.stats[name].requires_grad and out.stats[name].dim() == 0
        assert out.stats[name].item() == pytest.approx(value, rel=1e-11), name


def test_statistics_without_labels_are_those_of_before():
    assert tuple(make_problem().ours()[0].stats) == (*STATS, "token_accuracy")


def test_statistics_without_a_wrong_sequence():
    out, _ = mixed_problem(right=(True,) * 5).ours()
    assert all(out.stats[name].item() == 0 for name in OF_WRONG)
