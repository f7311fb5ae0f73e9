"""`token_accuracy` and `entropy` of every loss against argmax and entropy of full float64 logits."""

import pytest
import torch
from accuracy import KINDS, expected, hit_and_miss
from problems import gradients, make_problem, workspace

from pear_kernels import Teacher, TopKTeacher, linear_distill_loss, linear_weighted_loss
from pear_kernels.engine import packing


@pytest.mark.parametrize("options", [{}, {"bias": True, "temperature": 0.7, "softcap": 4.0}], ids=["plain", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_argmax_of_full_logits(kind, options):
    problem = hit_and_miss(kind, **options)
    accuracy, _ = expected(problem)
    assert 0.3 < accuracy < 0.7
    out, _ = problem.ours(workspace_bytes=workspace(7, 37))  # several chunks
    assert out.stats["token_accuracy"].item() == pytest.approx(accuracy, abs=1e-12)
    with torch.no_grad():
        assert problem.ours()[0].stats["token_accuracy"] == out.stats["token_accuracy"]
    assert not out.stats["token_accuracy"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_argmax_of_what_narrow_operands_say(dtype):
    problem = hit_and_miss("pear", dtype=dtype)
    assert problem.ours()[0].stats["token_accuracy"].item() == pytest.approx(expected(problem)[0], abs=1e-6)


@pytest.mark.parametrize("kind", ["pear", "weighted", "idft", "anchored", "teacher"])
@pytest.mark.parametrize("static", [False, True])
def test_entropy_where_it_is_asked_for_and_nothing_else_changes(kind, static, monkeypatch):
    problem = hit_and_miss(kind)
    plain, leaves = problem.ours()
    before = gradients(plain.loss, leaves)
    if static:  # as while a CUDA graph is captured: ignored tokens pass along, and do not count
        monkeypatch.setattr(packing, "capturing", lambda: True)
    out, leaves = problem.ours(return_entropy=True)
    accuracy, entropy = expected(problem)
    assert out.stats["entropy"].item() == pytest.approx(entropy, rel=1e-12)
    assert out.stats["token_accuracy"].item() == pytest.approx(accuracy, abs=1e-12)
    assert list(out.stats) == [*plain.stats, "entropy"]
    if not static:
        for ours, old in zip(gradients(out.loss, leaves), before, strict=True):
            assert torch.equal(ours, old)


def test_of_labelled_sequences_it_is_of_the_right_ones():
    problem = hit_and_miss("pear")
    labels = torch.tensor([True, False, True, False, True])
    sequence = torch.searchsorted(problem.cu_seqlens[1:], torch.arange(len(problem.target)), right=True)
    accuracy, entropy = expected(problem, labels[sequence])
    out, _ = problem.ours(sequence_label=labels, return_entropy=True)
    assert out.stats["token_accuracy"].item() == pytest.approx(accuracy, abs=1e-12)
    assert out.stats["entropy"].item() == pytest.approx(entropy, rel=1e-12)
    nothing, _ = problem.ours(sequence_label=torch.zeros(5, dtype=torch.bool))
    assert nothing.stats["token_accuracy"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["row scale", "dense", "top-k"])
def test_of_equal_logits_the_first_one_counts(loss, dtype):
    V = 11
    torch.manual_seed(0)
    hidden, weight = (torch.nn.functional.normalize(torch.randn(V, 6, dtype=dtype)) for _ in range(2))
    weight[7] = weight[3]  # of hidden states along it, both are the largest
    hidden[:] = 3 * weight[3]
    hidden[V // 2 :] = 0  # every logit is the same
    target = torch.arange(V) % 8
    target[8:] = torch.tensor([0, 3, 0])
    logits = hidden @ weight.T
    if loss == "row scale":
        out = linear_weighted_loss(hidden, weight, target, weighting="none")
    elif loss == "dense":
        out = linear_distill_loss(hidden, weight, target=target, teacher=Teacher(hidden, weight))
    else:
        ids = torch.tensor([7, 1, 3]).expand(V, 3).contiguous()  # both of the two, in another order
        teacher = TopKTeacher(ids, torch.tensor([-1.0, -1.5, -2.0]).expand(V, 3).contiguous())
        out = linear_distill_loss(hidden, weight, teacher, target)
    assert (logits.argmax(1) == target).sum() == 3
    assert out.stats["token_accuracy"].item() == pytest.approx(3 / V)


def test_without_a_token_that_counts_both_are_zero():
    out, _ = make_problem(ignored=1.0).ours(return_entropy=True)
    assert out.stats["token_accuracy"] == out.stats["entropy"] == 0


def test_a_teacher_of_top_k_has_no_entropy_of_the_student():
    problem = hit_and_miss("top-k")
    with pytest.raises(ValueError, match="return_entropy does not work with a TopKTeacher.*linear_logprobs"):
        problem.ours(return_entropy=True)
