"""linear_policy_loss against the naive float64 losses on full logits, and what must not change it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    categorical,
    count_products,
    gradients,
    make_policy_problem,
    relative_error,
    workspace,
)  # fmt: skip
from test_static import NoSync, as_on_a_device

from pear_kernels import linear_policy_loss
from pear_kernels.backends.torch.head import Head
from pear_kernels.backends.torch.logits_head import LogitsHead
from pear_kernels.engine import packing
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.engine.schedule import Coupling, Wanted, schedule
from pear_kernels.engine.walk import LogitsWalk, Walk
from pear_kernels.formulas.pear_weights import PEARWeights as TorchWeights
from pear_kernels.objectives.base import Problem as LossProblem
from pear_kernels.objectives.policy import POLICY_STATS, PolicyObjective
from pear_kernels.options import OBJECTIVES, CallOptions, PolicyOptions, PolicyReduction

OF_SEQUENCES = ["gspo", "gspo_token"]
CLIPPED = ["ppo", "grpo", "dapo", "bnpo", "dr_grpo", *OF_SEQUENCES]
UPSTREAM = 3.7  # the loss is one term of many, so its upstream gradient is not 1
CLIPS = dict(clip_low=0.1, clip_high=0.15)  # a sequence's ratio leaves these too


def assert_matches_naive(problem, tolerance=1e-12, **overrides):
    out, leaves = problem.ours(**overrides)
    (loss, logprobs), exact_leaves = problem.naive(**overrides)
    scale = max(loss.abs().item(), 0.1)  # losses of advantages of both signs cancel
    assert abs(out.loss.item() - loss.item()) < tolerance * scale
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(out.loss * UPSTREAM, leaves), gradients(loss * UPSTREAM, exact_leaves), strict=True)
    for ours, exact in pairs:
        assert (ours - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 25, None])
@pytest.mark.parametrize("by_token", [False, True])
def test_chunk_sweep(objective, rows, by_token):
    problem = make_policy_problem(objective=objective, by_token=by_token, **CLIPS)
    assert_matches_naive(problem, workspace_bytes=rows and workspace(rows, 37))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "options",
    [
        {"ref": True, "beta": 0.3},
        {"ref": True, "beta": 0.3, "unbiased_kl": True},
        {"dual_clip": 1.3},
        {"sampler": True},
        {"sampler": True, "sampler_clip": 1.1},
        {"sampler": True, "sampler_level": "sequence"},
        {"sampler": True, "sampler_level": "sequence", "sampler_clip": 1.1},
        {"entropy_coef": 0.2},
        {"sapo_temperatures": (0.7, 2.5)},
        {"ref": True, "beta": 0.3, "dual_clip": 1.3, "sampler": True, "sampler_clip": 1.1, "entropy_coef": -0.2},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
@pytest.mark.parametrize("by_token", [False, True])
def test_options(objective, options, by_token):
    problem = make_policy_problem(objective=objective, by_token=by_token, bias=True, drift=0.1, **options)
    for rows in (4, 40):
        assert_matches_naive(problem, workspace_bytes=workspace(rows, 37), **CLIPS)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", [None, "mean", "sum", "sequence_mean", "constant_length"])
@pytest.mark.parametrize("max_length", [None, 40])
def test_reductions(objective, reduction, max_length):
    scale = torch.tensor([0.5, 2.0, 7.0, -1.0, 0.0], dtype=torch.float64)
    problem = make_policy_problem(
        objective=objective, reduction=reduction, max_length=max_length, workspace_bytes=workspace(4, 37)
    )
    for sequence_scale in (None, scale):
        assert_matches_naive(problem, sequence_scale=sequence_scale)
        assert_matches_naive(problem, sequence_scale=sequence_scale, denominator=11.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "head",
    [{"bias": True}, {"temperature": 0.7}, {"softcap": 2.5}, {"bias": True, "temperature": 1.6, "softcap": 4.0}],
)
def test_heads(objective, head):
    problem = make_policy_problem(objective=objective, ref=True, workspace_bytes=workspace(4, 37), **head)
    assert_matches_naive(problem)
    assert_matches_naive(problem, beta=0.1, entropy_coef=0.1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_whatever_is_trained(objective, trained, entropy_coef):
    problem = make_policy_problem((0, 40, 1, 49, 10, 0), objective=objective, bias=True, D=4, ref=True)
    names = ("hidden", "weight", "bias")
    for beta in (0.0, 0.2):
        leaves = [x.requires_grad_(name in trained.split()) for name, x in zip(names, problem.leaves(), strict=True)]
        options = {**problem.options, "bias": leaves[2], "beta": beta, "entropy_coef": entropy_coef}
        out = linear_policy_loss(
            *leaves[:2], problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
            workspace_bytes=workspace(20, 37), **options,
        )  # fmt: skip
        (loss, _), exact_leaves = problem.naive(beta=beta, entropy_coef=entropy_coef)
        exact = dict(zip(names, gradients(loss, exact_leaves), strict=True))
        ours = dict(zip(trained.split(), gradients(out.loss, [x for x in leaves if x.requires_grad]), strict=True))
        for name, gradient in ours.items():
            assert relative_error(gradient, exact[name]) < 1e-12, name


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > len(lengths)),
    objective=st.sampled_from(list(OBJECTIVES)),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    drift=st.sampled_from([-0.5, 0.0, 0.5]),
    by_token=st.booleans(),
    old=st.booleans(),
    beta=st.sampled_from([0.0, 0.3]),
    unbiased_kl=st.booleans(),
    dual_clip=st.sampled_from([None, 1.3]),
    sampler=st.sampled_from([None, "token", "sequence"]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from([None, "mean", "sum", "sequence_mean", "constant_length"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_random_packs(lengths, rows, vocabulary, ignored, drift, by_token, old, sampler, seed, **options):
    problem = make_policy_problem(
        lengths, V=vocabulary, ignored=ignored, drift=drift, seed=seed, by_token=by_token, ref=True,
        sampler=old and sampler is not None, sampler_level=sampler or "token", sampler_clip=1.5, **CLIPS, **options,
    )  # fmt: skip
    if not old:
        problem.behavior_logprobs = None
    if (problem.target >= 0).any():
        assert_matches_naive(problem, tolerance=1e-10, workspace_bytes=workspace(rows, vocabulary))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32(objective):
    problem = make_policy_problem(
        (40, 3, 200, 90), V=301, D=32, dtype=torch.float32, objective=objective, bias=True, ref=True, sampler=True,
        beta=0.1, sampler_clip=1.5,
    )  # fmt: skip
    out, leaves = problem.ours(workspace_bytes=workspace(70, 301, 4))
    assert out.loss.dtype == out.logprobs.dtype == out.weights.dtype == torch.float32
    assert_matches_naive(problem, tolerance=1e-5, workspace_bytes=workspace(70, 301, 4))


# ---- what a policy gradient is


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("old", ["none", "of this step"])
def test_on_policy_every_objective_is_the_policy_gradient(objective, old):
    problem = make_policy_problem((9, 14, 5), reduction="mean")
    plain, leaves = problem.ours(objective="reinforce")
    problem.behavior_logprobs = plain.logprobs if old == "of this step" else None
    out, our_leaves = problem.ours(objective=objective)
    assert out.stats["ratio_mean"] == out.stats["ratio_max"] == 1 and out.stats["kl_old"] == 0
    assert torch.equal(out.weights, plain.weights)
    for ours, exact in zip(gradients(out.loss, our_leaves), gradients(plain.loss, leaves), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_gradient_flows_to_other_policies(objective):
    problem = make_policy_problem((6, 5), objective=objective, beta=0.2, ref=True, sampler=True)
    others = [problem.behavior_logprobs, *(problem.options[n] for n in ("ref_logprobs", "sampler_logprobs"))]
    others.append(problem.options["advantages"])
    for tensor in others:
        tensor.requires_grad_()
    out, _ = problem.ours()
    assert torch.autograd.grad(out.loss, others, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_are_the_factors_of_the_gradient(objective):
    # sum_t weights_t * scale_t * -log p_t, the weights fixed, has the loss's gradient
    problem = make_policy_problem(objective=objective, beta=0.2, ref=True, sampler=True, reduction="sum", **CLIPS)
    out, leaves = problem.ours(workspace_bytes=workspace(5, 37))
    theirs = problem.leaves()
    logprobs, _ = categorical(theirs, problem.target)
    pairs = zip(gradients(out.loss, leaves), gradients(-(out.weights * logprobs).sum(), theirs), strict=True)
    for ours, exact in pairs:
        assert relative_error(ours, exact) < 1e-12


# ---- edges


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("far", [20.0, 900.0])  # e^900 is more than a float64 holds
def test_groups_without_an_advantage_have_no_gradient(objective, far):
    problem = make_policy_problem((9, 8, 7), objective=objective, sampler=True, sampler_level="sequence", ignored=0.0)
    problem.options["advantages"][1] = 0
    problem.behavior_logprobs[9:17] -= far
    problem.options["sampler_logprobs"][9:17] -= 3 * far
    out, leaves = problem.ours(workspace_bytes=workspace(10, 37))
    grads = gradients(out.loss, leaves)
    assert out.loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert not grads[0][9:17].any() and not out.weights[9:17].any() and grads[0][:9].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("far", [8.0, -8.0])
def test_ratios_far_outside_the_clip(objective, dual_clip, far):
    problem = make_policy_problem((9, 8, 7), objective=objective, dual_clip=dual_clip, ignored=0.0)
    problem.options["advantages"] = torch.tensor([1.5, -0.7, 0.9], dtype=torch.float64)
    logprobs, _ = categorical(problem.leaves(), problem.target)
    problem.behavior_logprobs = (logprobs.detach() - far).clamp(max=0)
    assert_matches_naive(problem, workspace_bytes=workspace(10, 37))
    out, leaves = problem.ours()
    # nothing flows where the clip holds: r too large with A > 0, or too small with A < 0
    held = problem.options["advantages"].repeat_interleave(torch.tensor([9, 8, 7])) * far > 0
    held &= ((logprobs - problem.behavior_logprobs).abs() > 1) if objective not in OF_SEQUENCES else True
    if objective in CLIPPED:
        assert held.any() and not gradients(out.loss, leaves)[0][held].any()


# ---- what it costs: rows that go through each product


@pytest.fixture
def products(monkeypatch):
    return count_products(monkeypatch)


LENGTHS = (10, 100, 5)  # one sequence is longer than a chunk of 20 rows


def products_of(counts, problem, trained, **options):
    """The counts of one call with these leaves trained, in units of the tokens that count."""
    leaves = [x.requires_grad_(name in trained) for name, x in zip(("hidden", "weight"), problem.leaves(), strict=True)]
    counts.update(dict.fromkeys(counts, 0))
    linear_policy_loss(
        *leaves, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
        workspace_bytes=workspace(20, 37), **{**problem.options, **options},
    )  # fmt: skip
    return {name: rows / int((problem.target >= 0).sum()) for name, rows in counts.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("by_token", [False, True])
def test_products(products, objective, by_token):
    # gspo_token's numbers differ within a sequence, and its first long sequence is seen twice
    problem = make_policy_problem(LENGTHS, objective=objective, by_token=by_token, sampler=True, D=64)
    both = ("hidden", "weight")
    twice = objective == "gspo_token" and by_token
    logits = products_of(products, problem, both)["logits"]
    seen_once = products_of(products, problem, both, sampler_logprobs=None)
    if not twice:
        assert seen_once == {"logits": 1, "hidden": 1, "weight": 1}
    else:
        assert 1 < seen_once["logits"] < 2 and seen_once["hidden"] == seen_once["weight"] == 1
    assert (logits > 1) == (objective == "gspo_token")  # the sampler's correction is a token's too
    assert products_of(products, problem, ("hidden",)) == {"logits": 1, "hidden": 1, "weight": 0}
    bonus = products_of(products, problem, both, entropy_coef=0.1)
    assert bonus["hidden"] == bonus["weight"] == 1
    # two coefficients a token, which have no common factor: long sequences are seen twice
    assert 1 < bonus["logits"] < 2 if objective in OF_SEQUENCES else bonus["logits"] == 1
    assert products_of(products, problem, ()) == {"logits": 1, "hidden": 0, "weight": 0}
    assert products_of(products, problem, (), entropy_coef=0.1) == {"logits": 1, "hidden": 0, "weight": 0}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("old", [True, False])
def test_products_with_a_kl(products, objective, beta, old):
    problem = make_policy_problem(LENGTHS, objective=objective, ref=True, ignored=0.0, D=64)
    problem.behavior_logprobs = problem.behavior_logprobs if old else None
    # its gradient differs from token to token: all of the long sequence but the chunk of 20 that completes it, twice
    twice = 80 if beta and old and objective in OF_SEQUENCES else 0
    counted = products_of(products, problem, ("hidden", "weight"), beta=beta)
    assert counted == {"logits": (115 + twice) / 115, "hidden": 1, "weight": 1}


def test_schedule_of_sequences_whose_tokens_differ():
    """dW cannot be rescaled once such a sequence is in it: none is deferred."""
    trained, frozen = Wanted(True, True, False), Wanted(True, False, False)

    def steps(wanted, separable):
        coupling = Coupling(separable, scalable=True, lengths=[10, 50, 5, 45])
        planned = schedule(110, wanted, row_bytes=1, workspace_bytes=20, coupling=coupling)
        assert sorted(chunk for _, chunks in planned.steps for chunk in chunks)[-1][1] == 110
        return [how for how, _ in planned.steps]

    assert steps(trained, True) == ["deferred", "twice", "visit", "visit"]
    assert steps(trained, False) == ["twice", "twice", "visit", "visit"]
    # rows of dX are scaled one by one, so a frozen head costs nothing more
    assert steps(frozen, False) == ["deferred", "deferred", "visit", "visit"]


# ---- statistics, faces


@pytest.mark.parametrize("objective", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("sampler_level", ["token", "sequence"])
def test_statistics_are_what_their_names_say(objective, sampler_level):
    problem = make_policy_problem(
        (30, 1, 0, 70, 50), objective=objective, drift=0.02, bias=True, ref=True, sampler=True, temperature=0.9,
        sampler_level=sampler_level, sampler_clip=1.2, ignored=0.2, clip_low=0.02, clip_high=0.01,
    )  # fmt: skip
    out, _ = problem.ours(workspace_bytes=workspace(20, 37))
    assert tuple(out.stats) == (*POLICY_STATS, "token_accuracy")
    valid = problem.target >= 0
    p, entropy = (x.detach()[valid] for x in categorical(problem.leaves(), problem.target, temperature=0.9))
    old, ref, sampler = (
        x[valid]
        for x in (problem.behavior_logprobs, problem.options["ref_logprobs"], problem.options["sampler_logprobs"])
    )
    sequence = torch.arange(5).repeat_interleave(problem.cu_seqlens.diff())[valid]

    def of_sequences(values, how):
        return torch.stack([getattr(values[sequence == s], how)() for s in sequence])

    ratio = ((p - old) if objective != "gspo" else of_sequences(p - old, "mean")).exp()
    sampler_ratio = (old - sampler).exp() if sampler_level == "token" else of_sequences(old - sampler, "sum").exp()
    A = problem.options["advantages"][sequence]
    expected = {
        "nll": -p.mean(),
        "kl_old": ((p - old).exp() - 1 - (p - old)).mean(),
        "kl_ref": ((ref - p).exp() - 1 - (ref - p)).mean(),
        "clip_low": ((ratio < 0.98) & (A < 0)).double().mean(),
        "clip_high": ((ratio > 1.01) & (A > 0)).double().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "sampler_ratio_mean": sampler_ratio.mean(),
        "sampler_clipped": (sampler_ratio > 1.2).double().mean(),
        "entropy": entropy.mean(),
        "tokens": valid.sum(),
    }
    assert 0 < expected["clip_low"] + expected["clip_high"] and 0 < expected["sampler_clipped"] < 1
    for name, value in expected.items():
        assert not out.stats[name].requires_grad and out.stats[name].dim() == 0
        assert out.stats[name].item() == pytest.approx(value.item(), rel=1e-11), name


def test_statistics_of_what_was_not_given():
    problem = make_policy_problem()
    problem.behavior_logprobs = None
    out, _ = problem.ours()
    neutral = dict(kl_old=0, kl_ref=0, clip_low=0, clip_high=0, ratio_mean=1, ratio_max=1)
    neutral |= dict(sampler_ratio_mean=1, sampler_clipped=0)
    assert {name: out.stats[name].item() for name in neutral} == neutral


# ---- static packs, as CUDA graphs need


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("trained", ["xw", "x", ""])
def test_static_packs_give_the_same_answers(objective, trained, monkeypatch):
    problem = make_policy_problem((7, 1, 0, 12, 5), objective=objective, by_token=True, ref=True, sampler=True)
    ignored = problem.target < 0
    for tensor in (
        problem.hidden,
        problem.behavior_logprobs,
        *(problem.options[n] for n in list(problem.options)[-3:]),
    ):
        tensor[ignored] = math.nan
    for options in ({}, {"beta": 0.1, "sampler_level": "sequence"}, {"entropy_coef": 0.1, "sampler_logprobs": None}):
        for rows in (3, 40):
            found = []
            for static in (False, True):
                monkeypatch.setattr(packing, "capturing", lambda static=static: static)
                leaves = [x.requires_grad_(n in trained) for n, x in zip("xw", problem.leaves(), strict=True)]
                out = linear_policy_loss(
                    *leaves, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
                    workspace_bytes=workspace(rows, 37), **{**problem.options, **options},
                )  # fmt: skip
                grads = gradients(2 * out.loss, [x for x in leaves if x.requires_grad]) if trained else []
                found.append([out.loss.detach(), out.logprobs, out.weights, *out.stats.values(), *grads])
            torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 80), (torch.float64, 700)])
@pytest.mark.parametrize("far", [1.0, 30.0, 60.0, 79.0, 120.0, 800.0, 5000.0])
@pytest.mark.parametrize("unbiased_kl", [False, True])
def test_a_token_far_from_the_reference(dtype, bound, far, unbiased_kl):
    """A head of two tokens, of which the target has log-prob -far: loss and gradient are finite, and the formula's."""
    hidden, weight = torch.tensor([[far]], dtype=dtype, requires_grad=True), torch.tensor([[0.0], [1.0]], dtype=dtype)
    old, ref = -far - 0.5, -1e-3
    out = linear_policy_loss(
        hidden, weight, torch.tensor([0]), torch.tensor([old], dtype=dtype), torch.zeros(1, dtype=dtype), beta=1.0,
        ref_logprobs=torch.tensor([ref], dtype=dtype), unbiased_kl=unbiased_kl, objective="reinforce",
    )  # fmt: skip
    logprob = -math.log1p(math.exp(-far)) - far
    log_ratio = ref - logprob
    excess = math.expm1(min(log_ratio, bound))
    r = math.exp(logprob - old) if unbiased_kl else 1.0
    assert out.loss.item() == pytest.approx(r * (excess - log_ratio), rel=3e-5)
    missed = 1 / (1 + math.exp(-far))  # d(-log p) / d hidden
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert grad.item() == pytest.approx(r * (log_ratio if unbiased_kl else excess) * missed, rel=3e-5)
    assert all(value.isfinite() for value in out.stats.values())


def policy_columns(problem, ref, sampler):
    return {
        "old_logprobs": problem.behavior_logprobs, "ref_logprobs": ref, "sampler_logprobs": sampler,
        "advantages": problem.options["advantages"], "cu_seqlens": problem.cu_seqlens,
        "sequence_scale": torch.ones(4, dtype=torch.float64),
    }  # fmt: skip


def policy_problem(pack, options, columns, weights=TorchWeights):
    given = {type(each): each for each in (options, PolicyReduction(), CallOptions())}
    return LossProblem(pack, given, columns, weights, torch.float64)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("rows", [5, 400])
def test_no_step_waits_for_the_device(objective, train_head, rows, monkeypatch):
    problem = make_policy_problem((40, 3, 0, 60), by_token=True, bias=True, ref=True, sampler=True)
    columns = policy_columns(problem, problem.options["ref_logprobs"], problem.options["sampler_logprobs"])
    for options in (
        PolicyOptions(objective=objective),
        PolicyOptions(objective=objective, beta=0.1, sampler_level="sequence"),
    ):
        with NoSync(), monkeypatch.context() as patch:
            as_on_a_device(patch)
            pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static=True)
            policy = PolicyObjective(policy_problem(pack, options, columns))
            head = Head(problem.weight, problem.options["bias"], 0.7, 3.0, torch.float64)
            wanted = Wanted(True, train_head, train_head)
            walk = Walk(problem.hidden, head, problem.target, pack, wanted, workspace(rows, 37), entropy=True)
            walk.run(policy)
            loss, _, _ = policy.finish(walk.logprobs, walk.entropy)
            dense_head = LogitsHead(problem.weight, problem.options["bias"], 0.7, 3.0, torch.float64)
            dense = LogitsWalk(
                problem.hidden, dense_head, problem.target, pack, wanted, workspace(rows, 37), entropy=True
            )
            policy.on_logits, policy.separable, policy.scalable = True, False, False  # as with an entropy bonus
            dense.run(policy)
        (exact, _), _ = problem.naive(temperature=0.7, softcap=3.0, **options.asdict())
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("objective", ["grpo", "gspo", "gspo_token"])
@pytest.mark.parametrize("rows", [40, 400])
def test_nothing_between_the_kernels_waits_for_the_device(objective, rows, monkeypatch):
    # launches are recorded, not run: this looks at the host's side of them
    pytest.importorskip("triton")
    from pear_kernels.backends.triton import launch
    from pear_kernels.backends.triton.head import Head
    from pear_kernels.backends.triton.logits_head import LogitsHead
    from pear_kernels.backends.triton.pear_weights import PEARWeights

    problem = make_policy_problem((40, 3, 0, 60), D=16, V=64, by_token=True, bias=True, dtype=torch.bfloat16)
    head_options = problem.weight, problem.options["bias"], 0.7, 3.0, torch.bfloat16
    head, dense_head = Head(*head_options), LogitsHead(*head_options)
    with NoSync(), monkeypatch.context() as patch:
        as_on_a_device(patch)
        patch.setattr(launch, "recorder", [])
        pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static=True)
        columns = policy_columns(problem, problem.behavior_logprobs, problem.behavior_logprobs)
        for options in (
            PolicyOptions(objective=objective),
            PolicyOptions(objective=objective, beta=0.1, sampler_level="sequence"),
        ):
            for wanted in (Wanted(True, True, True), Wanted(True, False, False)):
                policy = PolicyObjective(policy_problem(pack, options, columns, PEARWeights))
                walk = Walk(problem.hidden, head, problem.target, pack, wanted, rows * 600, entropy=True)
                walk.run(policy)
                policy.finish(walk.logprobs, walk.entropy)
                dense = LogitsWalk(problem.hidden, dense_head, problem.target, pack, wanted, rows * 600, entropy=True)
                policy.on_logits, policy.separable, policy.scalable = True, False, False  # as with an entropy bonus
                dense.run(policy)
        assert launch.recorder
