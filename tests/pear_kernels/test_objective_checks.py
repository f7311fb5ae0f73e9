"""Bad input to weighted losses, negatives and distillation: each a clear error that names the argument."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pear_kernels import (
    LinearDistillLoss,
    LinearPEARLoss,
    LinearWeightedLoss,
    Teacher,
    TopKTeacher,
    checks,
    linear_distill_loss,
    linear_pear_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
)

N, D, V, K = 6, 4, 9, 3
BOUNDS = torch.tensor([0, 2, N])


def with_value(position, value, base=None):
    tensor = -torch.ones(N) if base is None else base
    tensor[position] = value
    return tensor


def head(**changes):
    arguments = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.arange(N), cu_seqlens=BOUNDS)
    return arguments | changes


def check_raises(function, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        function(**arguments)


# ---- weighted losses

BAD_WEIGHTING = {
    "unknown weighting": (dict(weighting="dff"), "weighting must be one of 'none', 'dft', .*got 'dff'"),
    "iw_tau": (dict(weighting="dft", iw_tau=math.nan), "iw_tau must be .*got nan"),
    "iw_max": (dict(weighting="dft", iw_max=-1.0), "iw_max must be .*got -1.0"),
    "psft_clip": (dict(weighting="dft", psft_clip=-0.1), "psft_clip must be .*got -0.1"),
    "asft_kl": (dict(weighting="dft", asft_kl=-0.1), "asft_kl must be .*got -0.1"),
    "asft_kl of text": (dict(weighting="dft", asft_kl="0.1"), "asft_kl must be .*got '0.1'"),
    "idft_clip of one": (dict(weighting="dft", idft_clip=(0.1,)), r"idft_clip must be two numbers.*got \(0.1,\)"),
    "idft_clip reversed": (dict(weighting="dft", idft_clip=(2.0, 0.1)), r"idft_clip must be .*got \(2.0, 0.1\)"),
    "reduction": (dict(weighting="dft", reduction="none"), "reduction must be one of .*got 'none'"),
    "temperature": (dict(weighting="dft", temperature=0.0), "temperature must be a positive number, got 0.0"),
    "softcap": (dict(weighting="dft", softcap=-1.0), "softcap must be a positive number.*got -1.0"),
    "workspace_bytes": (dict(weighting="dft", workspace_bytes=0), "workspace_bytes must be a positive integer.*got 0"),
    "backend": (dict(weighting="dft", backend="cuda"), "backend must be .*got 'cuda'"),
}
BAD_WEIGHTED = BAD_WEIGHTING | {
    "neither weights nor weighting": (dict(), "weights and weighting"),
    "weights and weighting": (dict(weights=torch.ones(N), weighting="dft"), "weights and weighting.*'dft'"),
    "two names": (dict(weights="dft", weighting="psft"), "weights and weighting.*"),
    "unknown name as weights": (dict(weights="dff"), "weight.* must be one of 'none', 'dft', .*got 'dff'"),
    "weights of another length": (
        dict(weights=torch.ones(N + 1)),
        r"weights must have target's shape \(6,\), got \(7,\)",
    ),
    "weights of a list": (dict(weights=[1.0] * N), "weights must be .*got list"),
    "weights of integers": (dict(weights=torch.ones(N).long()), r"weights must be .*got torch.int64"),
    "weights in bfloat16": (dict(weights=torch.ones(N).bfloat16()), "weights must be float32.*got torch.bfloat16"),
    "weights nan": (dict(weights=with_value(3, math.nan)), "weights must be finite.*got nan at flat position 3"),
    "weights inf": (dict(weights=with_value(3, -math.inf)), "weights must be finite.*got -inf at flat position 3"),
    "weights on another device": (
        dict(weights=torch.ones(N, device="meta")),
        "weights must be on the device of .*cpu, got meta",
    ),
    "a function of another length": (dict(weights=lambda lp: lp[1:]), r"weights .*\(6,\).*got .*\(5,\)"),
    "a function without an answer": (dict(weights=lambda lp: None), "weights .*got NoneType"),
    "a function of three": (dict(weights=lambda a, b, c: a), r"weights must be a function .*got <lambda>\(a, b, c\)"),
    "a function of nothing": (dict(weights=lambda: 1), r"weights must be a function .*got <lambda>\(\)"),
    "complex weights": (dict(weights=lambda lp: lp + 0j), "weights must return real numbers, got torch.complex"),
    "target too large": (
        dict(weighting="dft", target=with_value(2, V, torch.arange(N))),
        "target must be in .*got 9 at flat position 2",
    ),
    "cu_seqlens short of N": (
        dict(weighting="dft", cu_seqlens=torch.tensor([0, 2, 4])),
        "cu_seqlens must .*N = 6, got 0 and 4",
    ),
    "sequence_scale of another length": (
        dict(weighting="dft", sequence_scale=torch.ones(3)),
        r"sequence_scale must have .*got \(3,\)",
    ),
    "denominator": (dict(weighting="dft", denominator=0.0), "denominator must be a positive number, got 0.0"),
}
for name in ("iw-sft", "psft", "asft"):
    BAD_WEIGHTED[f"no reference for {name}"] = (
        dict(weighting=name),
        rf"(?=.*'{name}')(?=.*ref_logprobs is None)",
    )
BAD_REF = {
    "of another length": (-torch.ones(N + 1), r"must have target's shape \(6,\), got \(7,\)"),
    "of a list": ([-1.0] * N, "must be a tensor, got list"),
    "in bfloat16": (-torch.ones(N).bfloat16(), "must be float32.*bfloat16.*too coarse"),
    "nan": (with_value(3, math.nan), "must be finite and at most 0, got nan at flat position 3"),
    "-inf": (with_value(3, -math.inf), "must be finite and at most 0, got -inf"),
    "positive": (with_value(3, 2e-4), "must be finite and at most 0, got 0.000199.* position 3"),
    "on another device": (-torch.ones(N, device="meta"), "must be on the device of .*cpu, got meta"),
}
BAD_WEIGHTED |= {
    f"ref_logprobs {what}": (dict(weighting="psft", ref_logprobs=value), f"ref_logprobs {message}")
    for what, (value, message) in BAD_REF.items()
}


@pytest.mark.parametrize("changes, message", BAD_WEIGHTED.values(), ids=BAD_WEIGHTED.keys())
def test_linear_weighted_loss(changes, message):
    check_raises(linear_weighted_loss, head(**changes), message)


@pytest.mark.parametrize("changes, message", BAD_WEIGHTING.values(), ids=BAD_WEIGHTING.keys())
def test_the_weighted_module_checks_when_it_is_made(changes, message):
    check_raises(LinearWeightedLoss, changes, message)


BAD_REFERENCE = {
    "reference for another weighting": (dict(weighting="dft", reference=True), "reference is for .*'asft'.*got 'dft'"),
    "reference for weights": (dict(weighting=None, weights=torch.ones(N), reference=True), "reference is for .*'asft'"),
    "reference of top-k": (dict(reference=False), "reference must be .*Teacher.*got TopKTeacher"),
    "reference of logits": (dict(reference=torch.randn(N, V)), "reference must be .*Teacher.*got Tensor"),
    "reference of another vocabulary": (dict(reference=V + 2), r"reference.weight .*11.*weight .*9"),
}


@pytest.mark.parametrize("changes, message", BAD_REFERENCE.values(), ids=BAD_REFERENCE.keys())
def test_a_reference(changes, message):
    given = changes["reference"]
    if given is True:
        given = teacher()
    elif given is False:
        given = top_k()
    elif isinstance(given, int):
        given = teacher(weight=torch.randn(given, 5))
    check_raises(linear_weighted_loss, head(**{"weighting": "asft", **changes, "reference": given}), message)


# ---- negatives

LABEL = torch.tensor([True, False])
BAD_NEGATIVE_OPTIONS = {
    "negative_lambda": (dict(negative_lambda=-0.1), "negative_lambda must be a number of at least 0, got -0.1"),
    "negative_lambda nan": (dict(negative_lambda=math.nan), "negative_lambda must be .*got nan"),
    "negative_lambda inf": (dict(negative_lambda=math.inf), "negative_lambda must be .*got inf"),
    "negative_lambda of text": (dict(negative_lambda="0.1"), "negative_lambda must be .*got '0.1'"),
    "logprob_floor": (dict(logprob_floor=0.5), "logprob_floor must be .*got 0.5"),
    "logprob_floor nan": (dict(logprob_floor=math.nan), "logprob_floor must be .*got nan"),
    "logprob_floor inf": (dict(logprob_floor=math.inf), "logprob_floor must be .*got inf"),
    "logprob_floor of text": (dict(logprob_floor="-5"), "logprob_floor must be .*got '-5'"),
}
BAD_NEGATIVES = BAD_NEGATIVE_OPTIONS | {
    "label of integers": (dict(sequence_label=LABEL.long()), "sequence_label must be torch.bool.*got torch.int64"),
    "label of floats": (dict(sequence_label=LABEL.float()), "sequence_label must be torch.bool.*got torch.float32"),
    "label of another length": (
        dict(sequence_label=torch.ones(3, dtype=torch.bool)),
        r"sequence_label must have \(S,\).*\(2,\), got \(3,\)",
    ),
    "label of each token": (
        dict(sequence_label=torch.ones(N, dtype=torch.bool)),
        r"sequence_label must have \(S,\).*\(2,\), got \(6,\)",
    ),
    "label of a list": (dict(sequence_label=[True, False]), "sequence_label must be a tensor, got list"),
    "label on another device": (
        dict(sequence_label=torch.ones(2, dtype=torch.bool, device="meta")),
        "sequence_label must be on the device of .*cpu, got meta",
    ),
}


@pytest.mark.parametrize("changes, message", BAD_NEGATIVES.values(), ids=BAD_NEGATIVES.keys())
def test_negatives(changes, message):
    labelled = dict(behavior_logprobs=-torch.ones(N), sequence_label=LABEL) | changes
    check_raises(linear_pear_loss, head(**labelled), message)


@pytest.mark.parametrize("changes, message", BAD_NEGATIVE_OPTIONS.values(), ids=BAD_NEGATIVE_OPTIONS.keys())
def test_the_pear_module_checks_them_when_it_is_made(changes, message):
    check_raises(LinearPEARLoss, changes, message)


def test_no_floor_is_minus_infinity():
    arguments = head(behavior_logprobs=-torch.ones(N), sequence_label=LABEL, logprob_floor=-math.inf)
    assert linear_pear_loss(**arguments).loss.isfinite()


def test_labels_of_padded_rows():
    padded = dict(hidden=torch.randn(2, 3, D), weight=torch.randn(V, D), target=torch.zeros(2, 3).long())
    padded["behavior_logprobs"] = -torch.ones(2, 3)
    assert linear_pear_loss(**padded, sequence_label=LABEL).loss.isfinite()
    check_raises(
        linear_pear_loss, padded | {"sequence_label": torch.ones(2, 3, dtype=torch.bool)}, r"sequence_label .*\(2, 3\)"
    )


# ---- distillation


def teacher(**changes) -> Teacher:
    return Teacher(torch.randn(N, 5), torch.randn(V, 5))._replace(**changes)


def top_k(row=None, logprobs=None, ids=None, k=K) -> TopKTeacher:
    """K tokens at each position, all of them sound but for row 2, which holds these."""
    good = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005, 0.004][:k]).log()
    found = TopKTeacher(torch.arange(k).repeat(N, 1), good.repeat(N, 1))
    if logprobs is not None:
        found.logprobs[2] = torch.tensor(logprobs)
    if ids is not None:
        found.ids[2] = torch.tensor(ids)
    return found


BAD_DIVERGENCE = {
    "divergence": (dict(divergence="kl"), "divergence must be one of 'forward', 'reverse', 'js', got 'kl'"),
    "js_beta zero": (dict(js_beta=0.0), "js_beta must .*got 0.0"),
    "js_beta one": (dict(js_beta=1.0), "js_beta must .*got 1.0"),
    "js_beta nan": (dict(js_beta=math.nan), "js_beta must .*got nan"),
    "distill_temperature": (dict(distill_temperature=0.0), "distill_temperature must be a positive .*got 0.0"),
    "distill_temperature inf": (dict(distill_temperature=math.inf), "distill_temperature must be .*got inf"),
    "nll_coef": (dict(nll_coef=-0.1), "nll_coef must be .*got -0.1"),
    "nll_coef nan": (dict(nll_coef=math.nan), "nll_coef must be .*got nan"),
    "level": (dict(level="word"), "level must be one of 'token', 'block', 'sequence', got 'word'"),
    "gamma": (dict(gamma=0.0), r"gamma must be in \(0, 1\], got 0.0"),
    "log_ratio_clip reversed": (dict(log_ratio_clip=(0.3, -0.08)), r"log_ratio_clip must be \(low, high\).*swap"),
    "reduction": (dict(reduction="none"), "reduction must be one of .*got 'none'"),
    "temperature": (dict(temperature=0.0), "temperature must be a positive number, got 0.0"),
}
BAD_DISTILL = BAD_DIVERGENCE | {
    "teacher of another vocabulary": (
        dict(teacher=teacher(weight=torch.randn(V + 2, 5))),
        r"teacher.weight .*11.*weight .*9",
    ),
    "teacher of another length": (
        dict(teacher=teacher(hidden=torch.randn(N + 1, 5))),
        r"teacher.hidden must .*\(6,\).*got \(7, 5\)",
    ),
    "teacher of one dimension": (dict(teacher=teacher(hidden=torch.randn(N))), r"teacher.hidden must .*got \(6,\)"),
    "teacher's weight transposed": (
        dict(teacher=teacher(weight=torch.randn(5, V))),
        r"teacher.weight must be \(V, D'\).*got \(5, 9\)",
    ),
    "teacher of two dtypes": (
        dict(teacher=teacher(weight=torch.randn(V, 5).double())),
        "teacher.hidden and teacher.weight must have one dtype outside autocast, got torch.float32 and torch.float64",
    ),
    "teacher of integers": (
        dict(teacher=teacher(hidden=torch.ones(N, 5).long())),
        "teacher.hidden must be float32.*got torch.int64",
    ),
    "teacher's bias": (dict(teacher=teacher(bias=torch.zeros(V + 1))), r"teacher.bias must have .*\(9,\), got \(10,\)"),
    "teacher's temperature": (dict(teacher=teacher(temperature=0.0)), "teacher.temperature must be .*got 0.0"),
    "teacher's softcap": (dict(teacher=teacher(softcap=-1.0)), "teacher.softcap must be .*got -1.0"),
    "teacher on another device": (
        dict(teacher=teacher(hidden=torch.randn(N, 5, device="meta"))),
        "teacher.hidden must be on the device of .*cpu, got meta",
    ),
    "teacher of a list": (dict(teacher=teacher(hidden=[1.0])), "teacher.hidden must be a tensor, got list"),
    "block_ids without log-ratios": (
        dict(teacher=teacher(), level="block", block_ids=torch.arange(N), behavior_logprobs=None),
        "block_ids is given, but behavior_logprobs is None",
    ),
    "no teacher": (dict(teacher=None), "teacher must be .*got NoneType"),
    "logits for a teacher": (dict(teacher=torch.randn(N, V)), "teacher must be .*got Tensor"),
    "ids out of range": (
        dict(teacher=top_k(ids=[0, V, 1])),
        rf"teacher.ids must be in \[0, 9\), got .*{V}.*position 2",
    ),
    "ids below 0": (dict(teacher=top_k(ids=[0, -1, 1])), r"teacher.ids must be in \[0, 9\), got .*-1.*position 2"),
    "ids repeated": (dict(teacher=top_k(ids=[4, 1, 4])), r"teacher.ids must be distinct.*got \[4, 1, 4\].*position 2"),
    "ids of floats": (
        dict(teacher=top_k()._replace(ids=torch.zeros(N, K))),
        "teacher.ids must be torch.int64 or torch.int32, got torch.float32",
    ),
    "ids of another length": (
        dict(teacher=top_k()._replace(ids=torch.arange(K).repeat(N - 1, 1))),
        r"teacher.ids must have target's shape \(6,\).*got \(5, 3\)",
    ),
    "ids of one dimension": (
        dict(teacher=TopKTeacher(torch.arange(N), -torch.ones(N))),
        r"teacher.ids must have target's shape \(6,\).*got \(6,\)",
    ),
    "log-probs of another K": (
        dict(teacher=top_k()._replace(logprobs=-torch.ones(N, K + 1))),
        r"teacher.logprobs must have .*\(6, 3\), got \(6, 4\)",
    ),
    "log-probs in bfloat16": (
        dict(teacher=top_k()._replace(logprobs=top_k().logprobs.bfloat16())),
        "teacher.logprobs must be float32.*got torch.bfloat16",
    ),
    "log-probs unsorted": (
        dict(teacher=top_k(logprobs=[-2.0, -1.0, -3.0])),
        r"teacher.logprobs must be sorted.*got \[-2.0, -1.0, -3.0\] at flat position 2",
    ),
    "a sum above 1": (
        dict(teacher=top_k(logprobs=[-0.5, -0.6, -0.7])),
        "teacher.logprobs must .*sum.*at most 1, got 1.65.* position 2",
    ),
    "log-probs nan": (
        dict(teacher=top_k(logprobs=[-1.0, math.nan, -3.0])),
        "teacher.logprobs must be finite, got .*nan.*position 2",
    ),
    "log-probs -inf": (
        dict(teacher=top_k(logprobs=[-1.0, -2.0, -math.inf])),
        "teacher.logprobs must be finite, got .*-inf.*position 2",
    ),
    "K of the vocabulary": (dict(teacher=top_k(k=V)), "teacher.ids must .*less than .*9 tokens, got 9"),
    "K of zero": (
        dict(teacher=TopKTeacher(torch.zeros(N, 0).long(), torch.zeros(N, 0))),
        "teacher.ids must .*at least 1 .*got 0",
    ),
    "ids on another device": (
        dict(teacher=top_k()._replace(ids=torch.zeros(N, K, device="meta").long())),
        "teacher.ids must be on the device of .*cpu, got meta",
    ),
    "behavior nan": (
        dict(behavior_logprobs=with_value(3, math.nan)),
        "behavior_logprobs must be finite and at most 0, got nan at flat position 3",
    ),
    "behavior in bfloat16": (
        dict(behavior_logprobs=-torch.ones(N).bfloat16()),
        "behavior_logprobs must be float32.*too coarse",
    ),
    "target too large": (
        dict(target=with_value(2, V, torch.arange(N))),
        "target must be in .*got 9 at flat position 2",
    ),
    "denominator zero, as a tensor": (dict(denominator=torch.tensor(0)), "denominator must be a positive .*got 0"),
    "sequence_scale nan": (dict(sequence_scale=torch.tensor([1.0, math.nan])), "sequence_scale must be finite, got"),
}


@pytest.mark.parametrize("changes, message", BAD_DISTILL.values(), ids=BAD_DISTILL.keys())
def test_linear_distill_loss(changes, message):
    check_raises(linear_distill_loss, head(**{"teacher": teacher(), **changes}), message)


@pytest.mark.parametrize("changes, message", BAD_DIVERGENCE.values(), ids=BAD_DIVERGENCE.keys())
def test_the_distillation_module_checks_when_it_is_made(changes, message):
    check_raises(LinearDistillLoss, changes, message)


def test_a_teacher_of_padded_rows():
    padded = dict(hidden=torch.randn(2, 3, D), weight=torch.randn(V, D), target=torch.zeros(2, 3).long())
    check_raises(linear_distill_loss, padded | {"teacher": teacher()}, r"teacher.hidden must .*\(2, 3\).*got \(6, 5\)")
    check_raises(linear_distill_loss, padded | {"teacher": top_k()}, r"teacher.ids must .*\(2, 3\).*got \(6, 3\)")


@pytest.mark.parametrize("k", [0, -1, V, V + 1, 2.5, "3", True])
def test_linear_topk_logprobs(k):
    arguments = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.arange(N))
    check_raises(linear_topk_logprobs, arguments | {"k": k}, rf"k must .*got {k!r}")


def test_linear_topk_logprobs_checks_its_target():
    arguments = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.full((N,), V), k=2)
    check_raises(linear_topk_logprobs, arguments, "target must be in .*got 9")


def test_a_sum_that_rounding_has_left_above_1_is_no_error():
    just_above = torch.tensor([0.6, 0.3, 0.1 + 5e-5]).log().tolist()
    assert linear_distill_loss(**head(teacher=top_k(logprobs=just_above))).loss.isfinite()


# ---- values that nobody looks at


def test_what_stands_at_ignored_tokens_does_not_matter():
    torch.manual_seed(0)
    arguments = head(target=with_value(3, -100, torch.arange(N)))
    loaded, offline = teacher(), top_k()
    losses = []
    for value, ids in ((-1.0, 1), (math.nan, -1), (7.0, V + 3), (math.inf, 0)):
        column = with_value(3, value)
        loaded.hidden[3], offline.ids[3], offline.logprobs[3] = value, ids, value
        losses.append(
            [
                linear_weighted_loss(**arguments, weights=column).loss.item(),
                linear_weighted_loss(**arguments, weighting="asft", ref_logprobs=column).loss.item(),
                linear_weighted_loss(**arguments, weighting="iw-sft", ref_logprobs=column).loss.item(),
                linear_pear_loss(**arguments, behavior_logprobs=column, sequence_label=LABEL).loss.item(),
                linear_distill_loss(**arguments, teacher=loaded, behavior_logprobs=column).loss.item(),
                linear_distill_loss(**arguments, teacher=offline, behavior_logprobs=column).loss.item(),
            ]
        )
    assert losses[0] == losses[1] == losses[2] == losses[3] and all(map(math.isfinite, losses[0]))


CALLS = {
    "weights nan": (linear_weighted_loss, BAD_WEIGHTED["weights nan"]),
    "ref_logprobs nan": (linear_weighted_loss, BAD_WEIGHTED["ref_logprobs nan"]),
    "ids repeated": (linear_distill_loss, BAD_DISTILL["ids repeated"]),
    "log-probs unsorted": (linear_distill_loss, BAD_DISTILL["log-probs unsorted"]),
    "log-probs nan": (linear_distill_loss, BAD_DISTILL["log-probs nan"]),
    "a sum above 1": (linear_distill_loss, BAD_DISTILL["a sum above 1"]),
}


@pytest.mark.parametrize("function, case", CALLS.values(), ids=CALLS.keys())
def test_checks_of_values_can_be_switched_off(function, case, monkeypatch):
    changes, message = case
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    function(**head(**changes))  # whatever comes of it
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "1")
    check_raises(function, head(**changes), message)


def test_checks_of_values_read_nothing_off_the_cpu():
    """A tensor of device "meta" has no values, so reading one raises, whichever way it is done."""
    with torch.device("meta"):
        valid = torch.zeros(N, dtype=torch.bool)
        checks.check_weights(torch.zeros(N), valid)
        checks.check_top_k(torch.zeros(N, K).long(), torch.zeros(N, K), valid, V)


@pytest.mark.parametrize("padded", [False, True])
def test_checks_of_arguments_read_nothing(padded):
    """PyTorch's fake tensors of a GPU raise where a value is asked for."""
    shape = (2, N // 2) if padded else (N,)
    with FakeTensorMode(), torch.device("cuda"):
        tensors = dict(hidden=torch.randn(*shape, D), weight=torch.randn(V, D), target=torch.zeros(shape).long())
        bounds = {} if padded else {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}
        column = torch.zeros(shape)
        teachers = (
            Teacher(torch.randn(*shape, 5), torch.randn(V, 5)),
            TopKTeacher(torch.zeros(*shape, K).long(), torch.zeros(*shape, K)),
        )
        outputs = [
            linear_weighted_loss(**tensors, **bounds, weights=column),
            linear_pear_loss(
                **tensors, **bounds, behavior_logprobs=column, sequence_label=torch.zeros(2, dtype=torch.bool)
            ),
            *(
                linear_weighted_loss(**tensors, **bounds, weighting=name, ref_logprobs=column)
                for name in ("none", "dft", "iw-sft", "psft", "asft", "idft")
            ),
            *(
                linear_distill_loss(**tensors, **bounds, teacher=each, behavior_logprobs=given, divergence=divergence)
                for each in teachers
                for given in (None, column)
                for divergence in ("forward", "reverse", "js")
            ),
        ]
        assert all(x.is_cuda and x.shape == shape for out in outputs for x in (out.logprobs, out.weights))
        top = linear_topk_logprobs(**tensors, k=K)
        assert all(x.is_cuda and x.shape == (*shape, K) for x in top)
