"""What holds for every loss alike: one table of problems, and each property tested once over all of it."""

import functools
import math

import pytest
import torch
from problems import (
    UPSTREAM,
    assert_matches_naive,
    gradients,
    make_distill_problem,
    make_policy_problem,
    make_problem,
    make_weighted_problem,
    relative_error,
    workspace,
)  # fmt: skip

from pear_kernels import (
    LinearDistillLoss,
    LinearPEARLoss,
    LinearPolicyLoss,
    LinearWeightedLoss,
    LossOutput,
    Teacher,
    TopKTeacher,
)
from pear_kernels.engine import packing
from pear_kernels.options import OBJECTIVES

LEVELS = ["token", "block", "sequence"]
WEIGHTINGS = ["tensor", "none", "dft", "iw-sft", "psft", "asft", "idft"]
DIVERGENCES = ["forward", "reverse", "js"]
LENGTHS = (7, 1, 0, 12, 5)


def make_mixed_problem(lengths=LENGTHS, *, first: bool, **options):
    """Right and wrong sequences in turn."""
    return make_problem(lengths, sequence_label=(torch.arange(len(lengths)) % 2 == 0) == first, **options)


def make_on_policy_problem(lengths=LENGTHS, **options):
    problem = make_policy_problem(lengths, **options)
    problem.behavior_logprobs = None
    return problem


def table():
    """Name: the function that makes a problem of that kind. The name's first word is the loss."""
    for level in LEVELS:
        yield f"pear {level}", functools.partial(make_problem, level=level)
        for first in (True, False):
            name = f"negatives {level} {'right' if first else 'wrong'}-first"
            yield name, functools.partial(make_mixed_problem, level=level, first=first)
    for weighting in (*WEIGHTINGS, "anchored"):
        yield f"weighted {weighting}", functools.partial(make_weighted_problem, weighting=weighting)
    clips = dict(clip_low=0.1, clip_high=0.15)  # a sequence's ratio leaves these too
    for objective in OBJECTIVES:
        make = functools.partial(make_policy_problem, objective=objective, **clips)
        sampled = dict(by_token=True, ref=True, sampler=True, beta=0.1, sampler_level="sequence")
        yield f"policy {objective}", make
        yield f"policy {objective} sampled", functools.partial(make, **sampled)
        yield f"policy {objective} entropy", functools.partial(make, ref=True, beta=0.2, entropy_coef=0.1)
        on_policy = dict(objective=objective, ref=True, beta=0.2, **clips)
        yield f"policy {objective} on-policy", functools.partial(make_on_policy_problem, **on_policy)
    # how weights of a level couple tokens does not depend on the divergence
    for divergence, weights in (("forward", LEVELS), ("reverse", ["sequence"]), ("js", ["block", "unweighted"])):
        for top_k in (None, 5):  # a teacher's own head, or so many of its ids
            for level in weights:
                how = dict(weighted=False) if level == "unweighted" else dict(level=level)
                make = functools.partial(make_distill_problem, divergence=divergence, top_k=top_k, nll_coef=0.2, **how)
                yield f"distill {divergence} {'head' if top_k is None else 'top-k'} {level}", make


KINDS = dict(table())


def loss_of(kind: str) -> str:
    return kind.split()[0]


def kinds(*losses: str, without: tuple[str, ...] = ()):
    """Parametrize by the kinds of these losses, or of all; `without` are words of kinds left out."""
    chosen = [kind for kind in KINDS if not losses or loss_of(kind) in losses]
    return pytest.mark.parametrize("kind", [kind for kind in chosen if not set(kind.split()) & set(without)])


def exact(kind: str) -> float:
    """Tolerance in float64. A divergence is a difference of numbers as large as logits."""
    return {"distill": 1e-11, "pear": 5e-13}.get(loss_of(kind), 1e-12)


def low_floor(kind: str, floor: float) -> dict[str, float]:
    """An option below which no token lies; at or below the floor wrong tokens have no gradient."""
    return {"logprob_floor": floor} if loss_of(kind) == "negatives" else {}


def answers(problem, **options):
    """Loss, log-probs, weights and gradients."""
    out, leaves = problem.ours(**options)
    return [out.loss.detach(), out.logprobs, out.weights, *gradients(UPSTREAM * out.loss, leaves)]


@kinds(without=("on-policy",))
def test_sequences_that_end_on_a_chunk_edge_and_span_several(kind):
    problem = KINDS[kind]((4, 4, 16, 8, 5), ignored=0.0)
    assert_matches_naive(problem, exact(kind), workspace_bytes=workspace(4, 37))


@kinds()
def test_one_token(kind):
    assert_matches_naive(KINDS[kind]((1,), ignored=0.0, **low_floor(kind, -20.0)), exact(kind))


@kinds("pear", "weighted", "distill")
def test_a_vocabulary_of_two(kind):
    one = {"top_k": 1} if "top-k" in kind else {}
    assert_matches_naive(KINDS[kind](V=2, **one), exact(kind))


@kinds()
def test_all_ignored(kind):
    problem = KINDS[kind](ignored=1.0, bias=True)
    problem.hidden.fill_(math.nan)
    for coefficient in ({"entropy_coef": 0.0}, {"entropy_coef": 0.1}) if loss_of(kind) == "policy" else ({},):
        out, leaves = problem.ours(**coefficient)
        assert out.loss.item() == 0.0
        assert all(not grad.any() for grad in gradients(out.loss, leaves))
        counts = ["tokens", *(["wrong_tokens"] if loss_of(kind) == "negatives" else [])]
        assert [out.stats[name].item() for name in counts] == [0.0] * len(counts)
        assert all(value.isfinite() for value in out.stats.values())


@kinds()
def test_no_tokens_at_all(kind):
    problem = KINDS[kind]((0,))
    out, leaves = problem.ours(cu_seqlens=None)
    grad_hidden, grad_weight = gradients(out.loss, leaves)
    assert out.loss.item() == 0.0 and grad_hidden.shape == (0, 8) and not grad_weight.any()


@kinds(without=("on-policy",))
def test_padded_equals_packed(kind):
    """On the left or the right, with what would be an error or NaN elsewhere at the padding."""
    lengths, T, loss = (7, 2, 9), 13, loss_of(kind)
    tolerance = {"pear": 1e-13, "distill": 1e-11}.get(loss, 1e-12)
    of_grads = dict(rtol=1e-9, atol=1e-14) if loss == "distill" else dict(rtol=1e-10, atol=1e-15)
    of_lengths = {"max_length": T} if loss == "policy" else {}
    problem = KINDS[kind](lengths, ignored=0.0, **of_lengths)
    packed, leaves = problem.ours()
    expected = gradients(packed.loss, leaves)
    tensors, options = (problem.hidden, problem.target, problem.behavior_logprobs), problem.options
    for side in ("left", "right"):
        where = torch.zeros(3, T, dtype=torch.bool)
        for row, length in enumerate(lengths):
            where[row, slice(T - length, T) if side == "left" else slice(length)] = True

        def padded(value, filler=math.nan, where=where):
            """Values of tokens; any other stays."""
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*(padded(part) for part in value))
            if not isinstance(value, torch.Tensor) or len(value) != sum(lengths):
                return value
            filler = filler if value.is_floating_point() else -100
            return value.new_full((3, T, *value.shape[1:]), filler).index_put_((where,), value)

        problem.hidden, problem.target, problem.behavior_logprobs = (
            padded(value, filler) for value, filler in zip(tensors, (1e3, -100, math.nan), strict=True)
        )
        problem.options = {name: padded(value) for name, value in options.items()}
        out, leaves = problem.ours(cu_seqlens=None)
        assert out.logprobs.shape == out.weights.shape == (3, T)
        torch.testing.assert_close(out.loss, packed.loss, rtol=tolerance, atol=0 if loss == "pear" else 1e-15)
        torch.testing.assert_close(out.weights[where], packed.weights, rtol=min(tolerance, 1e-12), atol=1e-15)
        torch.testing.assert_close(out.stats, packed.stats, rtol=tolerance, atol=1e-15)
        grad_hidden, grad_weight = gradients(out.loss, leaves)
        torch.testing.assert_close(grad_hidden[where], expected[0], **of_grads)
        assert not grad_hidden[~where].any() and not out.weights[~where].any()
        torch.testing.assert_close(grad_weight, expected[1], **of_grads)


@kinds(without=("on-policy",))
def test_bitwise_repeatable(kind):
    problem = KINDS[kind]((60, 90), V=501, D=32, dtype=torch.float32, **low_floor(kind, -30.0))
    first, *others = (answers(problem, workspace_bytes=workspace(40, 501, 4)) for _ in range(3))
    for run in others:
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


@kinds("pear", "negatives", "weighted", "distill", without=("tensor",))
def test_nan_stays_in_its_sequence(kind):
    """A NaN of the model's or the teacher's hidden states."""
    make = functools.partial(KINDS[kind], (20, 30, 20), ignored=0.0)
    size = {"workspace_bytes": workspace(16, 37)}
    expected, others = answers(make(), **size), torch.ones(70, dtype=torch.bool)
    others[20:50] = False
    for whose in ("model", "teacher"):
        problem = make()
        spoiled = problem if whose == "model" else problem.options.get("teacher")
        if not hasattr(spoiled, "hidden"):
            continue
        spoiled.hidden[35] = math.nan
        loss, _, weights, grad_hidden, _ = answers(problem, **size)
        assert loss.isnan() and grad_hidden[35].isnan().all()
        torch.testing.assert_close(weights[others], expected[2][others], rtol=1e-13, atol=0)
        torch.testing.assert_close(grad_hidden[others], expected[3][others], rtol=1e-10, atol=1e-14)


@kinds("negatives", "weighted", "distill")  # PEAR's are in test_accuracy.py
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    problem = KINDS[kind]((40, 30), dtype=dtype, D=32, reduction="sum")
    problem.weight.mul_(0.3)
    out, leaves = problem.ours(workspace_bytes=workspace(16, 37, 4))
    (loss, _, weights), exact_leaves = problem.naive()
    assert out.loss.dtype == out.weights.dtype == torch.float32
    assert abs(out.loss.item() - loss.item()) < 1e-5 * max(1.0, abs(loss.item()))
    least = 1e-7 if loss_of(kind) == "weighted" else 0
    torch.testing.assert_close(out.weights.double(), weights, rtol=1e-4, atol=least)
    for ours, wanted in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == dtype and relative_error(ours, wanted) < torch.finfo(dtype).eps / 2


@kinds("negatives", "weighted", "distill", without=("anchored",))
def test_autocast_rounds_operands_and_keeps_float32_gradients(kind):
    """A teacher is in bfloat16, which that rounding leaves as it is."""
    more = {"teacher_dtype": torch.bfloat16} if loss_of(kind) == "distill" else low_floor(kind, -30.0)
    problem = KINDS[kind]((9, 17, 5), dtype=torch.float32, bias=True, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, leaves = problem.ours()
    grads = gradients(out.loss, leaves)
    assert out.loss.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)
    problem.hidden, problem.weight, problem.options["bias"] = (leaf.detach().bfloat16() for leaf in leaves)
    (loss, _, _), exact_leaves = problem.naive()
    assert abs(out.loss.item() - loss.item()) < 1e-5 * max(1.0, abs(loss.item()))
    for ours, wanted in zip(grads, gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, wanted) < (1e-5 if loss_of(kind) == "negatives" else 2e-5)


@kinds("negatives", "weighted")  # PEAR's are in test_static.py, others in the files of their losses
@pytest.mark.parametrize("trained", ["xw", "x", ""])
def test_static_packs_give_the_same_answers(kind, trained, monkeypatch):
    problem = KINDS[kind]()
    ignored = problem.target < 0
    for tensor in (problem.hidden, problem.behavior_logprobs, *problem.options.values()):
        if isinstance(tensor, torch.Tensor) and len(tensor) == len(ignored) and tensor.is_floating_point():
            tensor[ignored] = math.nan
    leaves = [leaf.requires_grad_(name in trained) for name, leaf in zip("xw", problem.leaves(), strict=True)]
    problem.leaves = lambda: leaves
    for rows in (3, 40):
        found = []
        for static in (False, True):
            monkeypatch.setattr(packing, "capturing", lambda static=static: static)
            out, _ = problem.ours(workspace_bytes=workspace(rows, 37))
            grads = gradients(2 * out.loss, [leaf for leaf in leaves if leaf.requires_grad]) if trained else []
            found.append([out.loss.detach(), out.logprobs, out.weights, *out.stats.values(), *grads])
        torch.testing.assert_close(found[1], found[0], rtol=10 * exact(kind), atol=1e-14)


# ---- modules and torch.compile

SHARED = dict(reduction="sequence_mean", temperature=0.7)
PEAR = dict(level="block", gamma=0.9, **SHARED)
WEIGHTED = dict(iw_tau=0.5, iw_max=2.0, psft_clip=0.1, asft_kl=0.3, idft_clip=(0.2, 1.5), **SHARED)
POLICY = dict(
    beta=0.1, entropy_coef=0.1, clip_low=0.05, clip_high=0.1, sampler_clip=1.1, dual_clip=2.0, max_length=30,
    sampler_level="sequence", sapo_temperatures=(0.5, 2.0), reduction="constant_length", temperature=0.7,
    unbiased_kl=True,
)  # fmt: skip
DISTILL = dict(js_beta=0.3, nll_coef=0.2, distill_temperature=1.5, **PEAR)
MODULES = [
    (LinearPEARLoss, make_problem, PEAR),
    (LinearPEARLoss, functools.partial(make_mixed_problem, first=True),
     dict(negative_lambda=0.3, logprob_floor=-6.0, **PEAR)),
    *((LinearWeightedLoss, functools.partial(make_weighted_problem, weighting=name), dict(weighting=name, **WEIGHTED))
      for name in WEIGHTINGS if name != "tensor"),
    *((LinearPolicyLoss, functools.partial(make_policy_problem, ref=True, sampler=True), dict(objective=name, **POLICY))
      for name in OBJECTIVES),
    *((LinearDistillLoss, functools.partial(make_distill_problem, top_k=top_k), dict(divergence=name, **DISTILL))
      for name in DIVERGENCES for top_k in (None, 5)),
]  # fmt: skip


@pytest.mark.parametrize("cls, make, options", MODULES)
def test_module_is_the_function(cls, make, options):
    problem = make()
    tensors = {n: v for n, v in problem.options.items() if isinstance(v, (torch.Tensor, Teacher, TopKTeacher))}
    problem.options = tensors
    expected = answers(problem, **options)
    module = cls(**options)
    assert not list(module.parameters()) and all(f"{name}={value!r}" in repr(module) for name, value in options.items())

    def call(hidden, weight, target, behavior, **given):
        teacher = [given.pop("teacher")] if "teacher" in given else []
        out = module(hidden, weight, *teacher, target, *([] if cls is LinearWeightedLoss else [behavior]), **given)
        assert isinstance(out, LossOutput)
        return out

    problem.loss = call
    assert all(torch.equal(a, b) for a, b in zip(expected, answers(problem), strict=True))


COMPILED = [  # a loss's tensors differ, and the paths that they take; names of options are strings to the op
    *("negatives token right-first", "negatives sequence wrong-first", "weighted tensor", "weighted iw-sft"),
    *("weighted asft", "weighted idft", "policy grpo entropy", "policy gspo sampled", "policy sapo", "policy dr_grpo"),
    *("distill forward head token", "distill js top-k unweighted", "distill js head unweighted"),
    "distill reverse top-k sequence",
]


@pytest.mark.parametrize("kind", COMPILED)
def test_compile_keeps_one_graph(kind):
    torch._dynamo.reset()
    problem = KINDS[kind](dtype=torch.float32, bias=loss_of(kind) == "negatives", denominator=17.0)

    def loss(*leaves):
        options = {**problem.options, "cu_seqlens": problem.cu_seqlens, **({"bias": leaves[2]} if leaves[2:] else {})}
        out = problem.loss(leaves[0] * 1.5, leaves[1], problem.target, problem.behavior_logprobs, **options)
        return out.loss * 2 + sum(0 * value for value in out.stats.values()) + 0 * out.weights.sum()

    leaves, compiled_leaves = problem.leaves(), problem.leaves()
    value = loss(*leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_leaves)
    torch.testing.assert_close(compiled, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(compiled, compiled_leaves), gradients(value, leaves), rtol=1e-5, atol=1e-6)
