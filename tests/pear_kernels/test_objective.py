"""Losses of one's own: linear_objective_loss against naive float64 losses, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import UPSTREAM, make_problem, workspace

from pear_kernels import Coefficients, Objective, linear_objective_loss
from pear_kernels.options import HeadOptions

# ---- objectives, each with its naive loss of log-probs, entropies and sequences (n,) of the tokens that count


class Detached(Objective):
    """mean of (1 - p)^2 * -log p, the weight detached."""

    def coefficients(self, begin, end):
        return (1 - self.logprobs[begin:end].exp()) ** 2 / self.pack.counted

    @staticmethod
    def naive(logprobs, entropy, sequence, lengths):
        return ((1 - logprobs.detach().exp()) ** 2 * -logprobs).mean()


class Focal(Objective):
    """mean of (1 - p)^2 * -log p (arXiv 1708.02002, with gamma 2)."""

    stats = ("p_mean", "p_max")

    def coefficients(self, begin, end):
        p = self.logprobs[begin:end].exp()
        return ((1 - p) ** 2 - 2 * (1 - p) * p * self.logprobs[begin:end]) / self.pack.counted

    def finish(self, logprobs, entropy=None, divergence=None):
        p = self.pack.zero_ghosts(logprobs.exp())
        loss, total = self.pack.sums([(1 - p) ** 2 * -logprobs, p])
        n = self.pack.counted
        return loss / n, self.coefficients(0, self.pack.tokens), torch.stack([total / n, p.amax()])

    @staticmethod
    def naive(logprobs, entropy, sequence, lengths):
        return ((1 - logprobs.exp()) ** 2 * -logprobs).mean()


class SequenceLogistic(Objective):
    """sum over sequences of -log sigmoid(mean log-prob + 4)."""

    coupled = separable = scalable = True

    def margins(self):
        return self.pack.sequence_sums(self.logprobs) / self.pack.lengths.clamp(min=1) + 4

    def coefficients(self, begin, end):
        slope = torch.sigmoid(-self.margins()) / self.pack.lengths.clamp(min=1)
        return slope[self.pack.sequence[begin:end]]

    def finish(self, logprobs, entropy=None, divergence=None):
        losses = torch.nn.functional.softplus(-self.margins())[self.pack.lengths > 0]
        return losses.sum(), self.coefficients(0, self.pack.tokens), logprobs.new_zeros(0)

    @staticmethod
    def naive(logprobs, entropy, sequence, lengths):
        means = logprobs.new_zeros(len(lengths)).index_add(0, sequence, logprobs) / lengths.clamp(min=1)
        return torch.nn.functional.softplus(-means - 4)[lengths > 0].sum()


class OfTwoFactors(Objective):
    """p of the token times the mean log-prob of its sequence, both detached: coupled, and in no way separable."""

    coupled = True

    def coefficients(self, begin, end):
        means = self.pack.sequence_sums(self.logprobs) / self.pack.lengths.clamp(min=1)
        return self.logprobs[begin:end].exp() * means[self.pack.sequence[begin:end]]

    @staticmethod
    def naive(logprobs, entropy, sequence, lengths):
        known = logprobs.detach()
        means = known.new_zeros(len(lengths)).index_add(0, sequence, known) / lengths.clamp(min=1)
        return (known.exp() * means[sequence] * -logprobs).sum()


class Bonus(Objective):
    """mean of -log p - H p, with p detached."""

    on_logits = needs_entropy = True

    def coefficients(self, begin, end):
        p = self.logprobs[begin:end].exp()
        return Coefficients(torch.ones_like(p) / self.pack.counted, -p / self.pack.counted)

    @staticmethod
    def naive(logprobs, entropy, sequence, lengths):
        return (-logprobs - logprobs.detach().exp() * entropy).mean()


class CoupledBonus(OfTwoFactors):
    """The entropies alone, times two detached factors."""

    on_logits = needs_entropy = True

    def coefficients(self, begin, end):
        return Coefficients(None, super().coefficients(begin, end))

    @staticmethod
    def naive(logprobs, entropy, sequence, lengths):
        known = logprobs.detach()
        means = known.new_zeros(len(lengths)).index_add(0, sequence, known) / lengths.clamp(min=1)
        return (known.exp() * means[sequence] * entropy).sum()


OBJECTIVES = [Detached, Focal, SequenceLogistic, OfTwoFactors, Bonus, CoupledBonus]


def check(objective, lengths, rows, trained="xwb", seed=0, **options):
    problem = make_problem(lengths, seed=seed, bias=True)
    leaves, naive_leaves = problem.leaves(), problem.leaves()
    counts = problem.target != -100
    place = torch.searchsorted(problem.cu_seqlens[1:].long(), torch.arange(len(counts)), right=True)[counts]
    hidden, weight, bias = naive_leaves
    log_p = torch.log_softmax(hidden[counts] @ weight.T + bias, -1)
    logprobs, entropy = log_p.gather(1, problem.target[counts, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    expected = objective.naive(logprobs, entropy, place, torch.bincount(place, minlength=len(lengths)))
    wanted = ["xwb".index(name) for name in trained]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    found = linear_objective_loss(
        leaves[0], leaves[1], problem.target, objective, bias=leaves[2], cu_seqlens=problem.cu_seqlens,
        workspace_bytes=rows and workspace(rows, 37), **options,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.logprobs[counts], logprobs, rtol=1e-11, atol=1e-13)
    assert not found.logprobs[~counts].any() and not found.weights[~counts].any()
    if trained:
        ours = torch.autograd.grad(found.loss, [leaves[i] for i in wanted], torch.tensor(UPSTREAM, dtype=torch.float64))
        theirs = torch.autograd.grad(expected * UPSTREAM, [naive_leaves[i] for i in wanted])
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    return found, logprobs, entropy


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("trained", ["xwb", "x", "w", ""])
def test_against_the_naive_loss(objective, trained):
    for rows in (5, 20, None):
        check(objective, (7, 1, 0, 42, 5, 33), rows, trained)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5), rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_pack(objective, lengths, rows, seed):
    problem = make_problem(lengths, seed=seed)
    if (problem.target != -100).any():
        check(objective, lengths, rows, seed=seed)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_static_packs(objective, monkeypatch):
    monkeypatch.setattr("pear_kernels.engine.packing.capturing", lambda: True)
    for trained in ("xwb", "x", ""):
        for rows in (8, None):
            check(objective, (7, 1, 0, 42, 5, 33), rows, trained)


def test_statistics_and_options():
    found, logprobs, entropy = check(Focal, (20, 30), 16, return_entropy=True)
    assert list(found.stats) == ["p_mean", "p_max", "token_accuracy", "entropy"]
    expected = [logprobs.exp().mean(), logprobs.exp().max(), entropy.mean()]
    torch.testing.assert_close([found.stats[name] for name in ("p_mean", "p_max", "entropy")], expected)
    problem = make_problem((9,))
    tensors = problem.hidden, problem.weight, problem.target, Detached
    warm = linear_objective_loss(*tensors, temperature=2.0, valid_tokens=int((problem.target != -100).sum()))
    assert torch.equal(warm.loss, linear_objective_loss(*tensors, options=HeadOptions(temperature=2.0)).loss)
    assert not torch.equal(warm.loss, linear_objective_loss(*tensors).loss)
    nothing = linear_objective_loss(*tensors[:2], torch.full((9,), -100), Detached)
    assert nothing.loss == 0


def test_what_an_objective_must_be():
    problem = make_problem((9,), ignored=0.0)
    hidden, weight = problem.leaves()

    class Wide(Detached):
        def coefficients(self, begin, end):
            return super().coefficients(begin, end)[:, None]

    class Unnamed(Focal):
        stats = ("p_mean",)

    class OnE(Bonus):
        on_logits = False

    class OnLogits(Detached):
        on_logits = True

    class Early(CoupledBonus):
        scalable = True

    for objective, error, message in (
        (3, TypeError, "objective must be a function from a Pack"),
        (lambda pack: 3, TypeError, "objective must be a function from a Pack to a pear_kernels.Objective .* got int"),
        (Wide, ValueError, r"one coefficient per token, of shape \(9,\) for \[0, 9\), got \(9, 1\)"),
        (Unnamed, ValueError, r"Unnamed.finish must return one statistic for each of \('p_mean',\), got 2"),
        (OnE, TypeError, "must have on_logits = True"),
        (OnLogits, TypeError, "must return Coefficients, got Tensor"),
        (Objective, NotImplementedError, None),
    ):
        with pytest.raises(error, match=message):
            linear_objective_loss(hidden, weight, problem.target, objective)
    with pytest.raises(TypeError, match="must return Coefficients, got NoneType"):  # no part is known at once
        frozen = weight.detach(), problem.target, Early
        linear_objective_loss(hidden, *frozen, workspace_bytes=workspace(4, 37))


def test_an_attribute_of_the_caller_changes_no_statistic_of_all_losses():
    class Named(Detached):
        def __init__(self, pack):
            super().__init__(pack)
            self.right = torch.zeros(pack.tokens, dtype=torch.bool)  # as `LabelledObjective` has it

    problem = make_problem((9,))
    tensors = problem.hidden, problem.weight, problem.target
    found, plain = (linear_objective_loss(*tensors, made, return_entropy=True).stats for made in (Named, Detached))
    assert found == plain and found["entropy"] > 0


class Overwriting(Detached):
    def finish(self, logprobs, entropy=None, divergence=None):
        found = super().finish(logprobs)
        logprobs.zero_()
        return found


class OneNumber(Detached):
    def finish(self, logprobs, entropy=None, divergence=None):
        loss, weights, stats = super().finish(logprobs)
        return loss[None], weights, stats


class Unasked(Objective):
    """A bonus for an entropy that it does not ask for."""

    on_logits = True

    def coefficients(self, begin, end):
        ones = torch.ones_like(self.logprobs[begin:end])
        return Coefficients(ones, -ones)


@pytest.mark.parametrize("gradient", [True, False])
def test_what_an_objective_returns_is_checked_with_gradients_and_without(gradient):
    problem = make_problem((9,))
    tensors = problem.hidden.requires_grad_(gradient), problem.weight, problem.target
    kept = linear_objective_loss(*tensors, Overwriting).logprobs
    assert torch.equal(kept, linear_objective_loss(*tensors, Detached).logprobs)
    for objective, message in (
        (OneNumber, r"a loss of shape \(\) and weights of shape .* got \(1,\)"),
        (Unasked, "coefficient of the entropy, which is not made: set needs_entropy = True"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_objective_loss(*tensors, objective)


def test_tensors_without_values_are_refused():
    hidden, weight = torch.zeros(4, 3, device="meta"), torch.zeros(5, 3, device="meta")
    with pytest.raises(RuntimeError, match="tensors without values"):
        linear_objective_loss(hidden, weight, torch.zeros(4, device="meta").long(), Detached)


def test_under_compile():
    problem = make_problem((9, 20))
    leaves = problem.leaves()

    def loss(hidden, weight):
        return linear_objective_loss(2 * hidden, weight, problem.target, Focal, cu_seqlens=problem.cu_seqlens).loss * 3

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, backend="eager")(*leaves), leaves), expected)
