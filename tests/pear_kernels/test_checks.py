"""Bad input: each rule once, tried on every function, module and class of options that takes the argument.

A rule is a name, the arguments that break it, and the error. In an error " ... " stands for any text.
"""

import inspect
import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pear_kernels import (
    LinearDistillLoss,
    LinearPEARLoss,
    LinearPolicyLoss,
    LinearWeightedLoss,
    Teacher,
    TopKTeacher,
    checks,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_policy_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels.options import CLASSES, TeacherOptions

N, D, V, K = 6, 4, 9, 3
BOUNDS, TARGET, LABEL = torch.tensor([0, 2, N]), torch.arange(N), torch.tensor([True, False])
inf, nan = math.inf, math.nan


def ones(*shape, **kind):
    return -torch.ones(shape or N, **kind)


def with_value(position, value, base=None):
    tensor = ones() if base is None else base.clone()
    tensor[position] = value
    return tensor


def teacher(**changes) -> Teacher:
    return Teacher(torch.randn(N, 5), torch.randn(V, 5))._replace(**changes)


def top_k(logprobs=None, ids=None, k=K) -> TopKTeacher:
    """K tokens at each position, all of them sound but for row 2, which holds these."""
    good = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005, 0.004][:k]).log()
    found = TopKTeacher(torch.arange(k).repeat(N, 1), good.repeat(N, 1))
    if logprobs is not None:
        found.logprobs[2] = torch.tensor(logprobs)
    if ids is not None:
        found.ids[2] = torch.tensor(ids)
    return found


def freed(tensor):
    """As FSDP1 leaves a parameter outside the forward: its shape, and no memory."""
    tensor.untyped_storage().resize_(0)
    return tensor


HEAD = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), target=TARGET)
FUNCTIONS = {  # with arguments that are right
    linear_pear_loss: dict(**HEAD, behavior_logprobs=ones(), cu_seqlens=BOUNDS),
    linear_weighted_loss: dict(**HEAD, weighting="dft", cu_seqlens=BOUNDS),
    linear_policy_loss: dict(**HEAD, old_logprobs=ones(), advantages=torch.ones(N), cu_seqlens=BOUNDS),
    linear_distill_loss: dict(**HEAD, teacher=teacher(), behavior_logprobs=ones(), cu_seqlens=BOUNDS),
    linear_logprobs: HEAD,
    linear_topk_logprobs: dict(**HEAD, k=K),
    pear_weights: dict(logprobs=ones(), behavior_logprobs=ones(), cu_seqlens=BOUNDS),
}
MODULES = LinearPEARLoss, LinearWeightedLoss, LinearPolicyLoss, LinearDistillLoss


def call(function, **changes):
    return function(**(FUNCTIONS.get(function, {}) | changes))


def raises(message):
    pattern = ".*".join(map(re.escape, message.split(" ... ")))
    return pytest.raises((ValueError, TypeError), match=f"(?s)^{pattern}")


def tried(rules, takers):
    """Each rule on each taker of all its arguments."""
    cases = []
    for name, changes, message in rules:
        matching = [taker for taker in takers if changes.keys() <= inspect.signature(taker).parameters.keys()]
        assert matching, f"nothing takes {[*changes]}"
        cases += [pytest.param(taker, changes, message, id=f"{taker.__name__}, {name}") for taker in matching]
    return pytest.mark.parametrize("taker, changes, message", cases)


# ---- options

BLOCK_SIZE = "block_size must be an integer of at least 1 (response tokens a block), got "
CLIP_LENGTH = "clip_length must be an integer of at least 1 (tokens with a log-ratio), or None, got "
DUAL_CLIP = "dual_clip must be a number of at least 1 + clip_high = 1.2, or None, got "
IGNORE_INDEX = "ignore_index must be an integer of at most 2**53 in size, got "
MAX_LENGTH = "max_length must be an integer of at least 1 (tokens), or None, got "
TAUS = "sapo_temperatures must be two positive numbers, for positive and for negative advantages, got "
WORKSPACE = "workspace_bytes must be a positive integer of bytes, or None, got "
FLOOR = "logprob_floor must be a log-prob, at most 0 (-inf for no bound), got "
OF_ONE = "{name} must be two numbers (low, high), got "
SWAP = "{name} must be (low, high) with low <= high, got "
JS_BETA = "js_beta must lie between 0 and 1, got "
AT_LEAST_0 = "{name} must be a number of at least 0, got "
FLAG = "{name} must be True or False, got "
OPTIONS = [  # a field, bad values of it, and the error before the value
    ("temperature", (0.0, nan, inf, "1", None, True), "{name} must be a positive number, got "),
    ("softcap", (-1.0, 0, inf, "1"), "softcap must be a positive number, or None for a head without one, got "),
    ("ignore_index", (-100.0, None, True, 2**60), IGNORE_INDEX),
    ("workspace_bytes", (0, 1e9), WORKSPACE),
    ("backend", ("cuda",), "backend must be 'triton' or 'torch', or unset to go by the device, got "),
    ("level", ("word", None), "level must be one of 'token', 'block', 'sequence', got "),
    ("block_size", (0, 2.5, True), BLOCK_SIZE),
    ("gamma", (0.0, 0, 1.01, nan, "0.9"), "gamma must be in (0, 1], got "),
    ("log_ratio_clip", (0.3, (0.3,), None), OF_ONE),
    ("log_ratio_clip", ((0.3, -0.08), (nan, 1)), SWAP),
    ("log_weight_clip", ((5.0, -10.0),), SWAP),
    ("log_weight_clip", ((0.0, inf),), "log_weight_clip must have a finite upper end, got "),
    ("clip_blocks", (1,), FLAG),
    ("center", ("yes", None), FLAG),
    ("clip_length", (0, -1, 64.0), CLIP_LENGTH),
    ("normalize", ("token",), "normalize must be None or one of 'sequence', 'batch', got "),
    ("negative_lambda", (-0.1, nan, inf, "0.1"), AT_LEAST_0),
    ("logprob_floor", (0.5, nan, inf, "-5"), FLOOR),
    (
        "weighting",
        ("dff",),
        "weighting must be one of 'none', 'dft', 'iw-sft', 'psft', 'asft', 'idft', got ",
    ),
    ("iw_tau", (nan, inf, "1"), "iw_tau must be a finite number, got "),
    ("iw_max", (-1.0, nan), AT_LEAST_0),
    ("psft_clip", (-0.1,), AT_LEAST_0),
    ("asft_kl", (-0.1, "0.1"), AT_LEAST_0),
    ("idft_clip", ((0.1,), 0.1), OF_ONE),
    ("idft_clip", ((2.0, 0.1), (-0.1, 1.0), (0.1, inf)), "idft_clip must be (low, high) with 0 <= low <= high, got "),
    ("objective", ("trpo", None), "objective must be one of 'ppo', 'grpo', ... got "),
    ("beta", (-0.1, nan, "0.1"), AT_LEAST_0),
    ("clip_low", (-0.2,), AT_LEAST_0),
    ("clip_low", (1.5,), "clip_low must be at most 1, got "),
    ("clip_high", (-0.2, inf), AT_LEAST_0),
    ("dual_clip", (1.1, nan), DUAL_CLIP),
    ("sampler_clip", (0.0,), "sampler_clip must be a positive number, or None for no cap, got "),
    ("sampler_level", ("word",), "sampler_level must be 'token' or 'sequence', got "),
    ("sapo_temperatures", (1.0, (1, 2, 3), (0.0, 1.0)), TAUS),
    ("entropy_coef", (nan, "0"), "entropy_coef must be a finite number, got "),
    ("max_length", (0, 8.0), MAX_LENGTH),
    ("unbiased_kl", (1, None), FLAG),
    ("divergence", ("kl",), "divergence must be one of 'forward', 'reverse', 'js', got "),
    ("js_beta", (0.0, 1.0, nan), JS_BETA),
    ("distill_temperature", (0.0, inf), "{name} must be a positive number, got "),
    ("nll_coef", (-0.1, nan), AT_LEAST_0),
    ("reduction", ("none",), "reduction must be one of 'mean', 'sum', 'sequence_mean', ... got "),
    ("valid_tokens", (-1, 3.0, True, "3"), "valid_tokens must be an integer of at least 0, or None, got "),
    ("denominator", (0.0, -1, nan, inf, "3", True), "denominator must be a positive number, got "),
]  # fmt: skip
OPTIONS = [
    (f"{name}={value!r}", {name: value}, message.format(name=name) + repr(value))
    for name, values, message in OPTIONS
    for value in values
]
ALL_1 = "a sequence's tokens share one weight there, and all of them would be 1"
TOGETHER = [
    ("center at level sequence", dict(center=True, level="sequence"),
     f"center must be off at level 'sequence', got True: {ALL_1}"),
    ("normalize at level sequence", dict(normalize="sequence", level="sequence"),
     f"normalize must be off at level 'sequence', got 'sequence': {ALL_1}"),
    ("the swap", dict(log_ratio_clip=(0.3, -0.08)), "log_ratio_clip ... got (0.3, -0.08): swap the two"),
    ("clip_low's reason", dict(clip_low=1.5), "clip_low ... got 1.5: ratios are kept above 1 - clip_low"),
    ("dual_clip's reason", dict(dual_clip=1.1), "dual_clip ... got 1.1: it is what a ratio counts for at most where"),
    ("js_beta's way out", dict(js_beta=1.0), "js_beta ... got 1.0: for either end take divergence 'forward' or 'rev"),
    ("logprob_floor's reason", dict(logprob_floor=0.5), "logprob_floor ... got 0.5: wrong tokens below it are not pu"),
]  # fmt: skip


# a teacher's options are checked with its tensors, by their names there
TAKERS = [*FUNCTIONS, *MODULES, *(cls for cls in CLASSES.values() if cls is not TeacherOptions)]


@tried(OPTIONS + TOGETHER, TAKERS)
def test_options(taker, changes, message):
    with raises(message):
        call(taker, **changes)


def test_reductions_of_each_loss():
    for function in (linear_pear_loss, linear_weighted_loss, linear_distill_loss):
        for wrong in ("constant_length", None):
            with raises(f"reduction must be one of 'mean', 'sum', 'sequence_mean', got {wrong!r}"):
                call(function, reduction=wrong)
    with raises("reduction must be one of 'mean', 'sum', 'sequence_mean', 'constant_length', got 'none'"):
        call(linear_policy_loss, reduction="none")
    assert call(linear_policy_loss, reduction=None).loss.isfinite()


# ---- shapes, dtypes, devices, and what goes together

OF_FLOATS = " must be float32, bfloat16, float16 or float64, got torch.int64"
FSDP = (
    ": FSDP or DeepSpeed has flattened it or taken it away, as they do ... patch_causal_lm does), or gather the weight"
)
META = " must be on the device of the other arguments, cpu, got meta: move it with "
ARGUMENTS = [
    ("int32", dict(target=TARGET.int()), "target must be torch.int64 token ids, got torch.int32: call target.long()"),
    ("floats", dict(target=torch.zeros(N)), "target must be torch.int64 token ids, got torch.float32"),
    ("target's length", dict(target=TARGET[1:]), "target must have hidden's leading shape (6,), got (5,)"),
    ("target None", dict(target=None), "target must be a tensor, got NoneType"),
    ("hidden (D,)", dict(hidden=torch.randn(D)), "hidden must be (N, D) or (B, T, D), got shape (4,)"),
    ("hidden of integers", dict(hidden=torch.ones(N, D).long()), "hidden" + OF_FLOATS),
    ("transposed", dict(weight=torch.randn(D, V)),
     "weight must be (V, D) with hidden's D = 4, got shape (4, 9): pass the LM head's weight as nn.Linear stores it"),
    ("flattened by FSDP", dict(weight=torch.randn(V * D)),
     "weight must be (V, D), whole, got shape (36,) with 36 numbers" + FSDP),
    ("emptied by ZeRO-3", dict(weight=torch.randn(0)), "weight ... got shape (0,) with 0 numbers" + FSDP),
    ("freed by FSDP", dict(weight=freed(torch.randn(V, D))), "weight ... got shape (9, 4) with 36 numbers" + FSDP),
    ("one token", dict(weight=torch.randn(1, D)), "weight must have a vocabulary of at least 2 rows, got shape (1, 4)"),
    ("weight of integers", dict(weight=torch.ones(V, D).long()), "weight" + OF_FLOATS),
    ("another dtype", dict(weight=torch.randn(V, D).bfloat16()),
     "hidden and weight must have one dtype outside autocast, got torch.float32 and torch.bfloat16: cast one of"),
    ("meta", dict(weight=torch.randn(V, D, device="meta")), f"weight{META}weight.to('cpu')"),
    ("bias' length", dict(bias=torch.zeros(V + 1)), "bias must have (V,) (9,), got (10,)"),
    ("bias' dtype", dict(bias=torch.zeros(V).half()), "hidden and bias must have one dtype outside autocast, got"),
    ("bias on meta", dict(bias=torch.zeros(V, device="meta")), f"bias{META}bias.to('cpu')"),
    ("of floats", dict(cu_seqlens=BOUNDS.float()), "cu_seqlens must be torch.int32 or torch.int64, got torch.float32"),
    ("of one", dict(cu_seqlens=torch.tensor([0])), "cu_seqlens must be (S+1,) with S >= 1, got shape (1,)"),
    ("list", dict(cu_seqlens=[0, N]), "cu_seqlens must be a tensor (S+1,) of int32 or int64, got list"),
    ("denominator of two", dict(denominator=torch.ones(2)), "denominator must hold one number, got a tensor of shape"),
    ("scale's length", dict(sequence_scale=torch.ones(3)), "sequence_scale must have (S,), ... (2,), got (3,)"),
    ("scale on meta", dict(sequence_scale=torch.ones(2, device="meta")), f"sequence_scale{META}sequence_scale.to("),
    *(
        rule
        for name in ("behavior_logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs")
        for rule in (
            (f"{name}' length", {name: ones(N + 1)}, f"{name} must have ... shape (6,), got (7,)"),
            (f"{name} a list", {name: [-1.0] * N}, f"{name} must be a tensor, got list"),
            *(
                (
                    f"{name} {half}",
                    {name: ones(dtype=half)},
                    f"{name} must be float32 (or float64), got {half}: half precision is too coarse for ratios, so",
                )
                for half in (torch.bfloat16, torch.float16)
            ),
            (f"{name} int", {name: ones().long()}, f"{name} must be float32 (or float64), got torch.int64"),
            (f"{name} meta", {name: ones(device="meta")}, f"{name}{META}{name}.to('cpu')"),
        )
    ),
    # blocks
    *(
        (f"block_ids {what}", dict(level="block", block_ids=ids), "block_ids must " + message)
        for what, ids, message in (
            ("length", torch.arange(N + 1), "have ... shape (6,), got (7,)"),
            ("list", [0] * N, "be a tensor, got list"),
            ("floats", torch.zeros(N), "be torch.int32 or torch.int64, got torch.float32: call block_ids.int()"),
            ("meta", torch.zeros(N, device="meta").int(), "be on the device of the other arguments, cpu, got meta"),
        )
    ),
    ("block_ids at token level", dict(block_ids=TARGET),
     "block_ids must be None at level 'token', where every token is its own block: use level 'block'"),
    ("block_ids without log-ratios", dict(teacher=teacher(), level="block", block_ids=TARGET, behavior_logprobs=None),
     "block_ids is given, but behavior_logprobs is None: there are no log-ratios to put into blocks"),
    # pear_weights' own
    ("logprobs' dtype", dict(logprobs=ones().half()), "logprobs must be float32 (or float64), got torch.float16: half"),
    ("logprobs' shape", dict(logprobs=ones(1, 1, N)), "logprobs must be (N,) or (B, T), got shape (1, 1, 6)"),
    ("mask of floats", dict(mask=torch.ones(N)),
     "mask must be torch.bool, True at response tokens, got torch.float32: call mask.bool()"),
    ("mask's length", dict(mask=torch.ones(5).bool()), "mask must have logprobs' shape (6,), got (5,)"),
    # labels
    ("label of integers", dict(sequence_label=LABEL.long()), "sequence_label must be torch.bool, ... got torch.int64"),
    ("label of floats", dict(sequence_label=LABEL.float()), "sequence_label must be torch.bool, ... got torch.float32"),
    ("label's length", dict(sequence_label=torch.ones(3).bool()), "sequence_label must have (S,), ... (2,), got (3,)"),
    ("of each token", dict(sequence_label=torch.ones(N).bool()), "sequence_label must have (S,), ... (2,), got (6,)"),
    ("label of a list", dict(sequence_label=[True, False]), "sequence_label must be a tensor, got list"),
    ("label on meta", dict(sequence_label=torch.ones(2, device="meta").bool()), "sequence_label" + META),
    ("normalize batch and labels", dict(normalize="batch", sequence_label=LABEL),
     "normalize must not be 'batch' beside sequence_label, ... use 'sequence', which is of right ones alone"),
    # policies
    ("advantages' length", dict(advantages=torch.ones(3)),
     "advantages must be (S,) = (2,), one per sequence, or have target's shape (6,), one per token, got (3,)"),
    ("advantages (S, 1)", dict(advantages=torch.ones(2, 1)), "advantages must be (S,) = (2,), ... got (2, 1)"),
    ("advantages of integers", dict(advantages=torch.ones(2).long()),
     "advantages must be floating-point, got torch.int64: call advantages.float()"),
    ("advantages of a list", dict(advantages=[1.0, 2.0]), "advantages must be a tensor, got list"),
    ("advantages on meta", dict(advantages=torch.ones(2, device="meta")), "advantages" + META),
    ("no reference policy", dict(beta=0.1),
     "beta is 0.1, but ref_logprobs is None: pass the reference policy's log-probs"),
    ("no old policy", dict(old_logprobs=None, sampler_logprobs=ones()),
     "sampler_logprobs needs old_logprobs: its correction is pi_old / pi_sampler, got None"),
    # weightings
    ("neither", dict(weighting=None, weights=None), "give one of weights and weighting, got neither"),
    ("both", dict(weights=torch.ones(N)), "give one of weights and weighting, got both, weighting being 'dft'"),
    ("two names", dict(weights="dft", weighting="psft"),
     "give one of weights and weighting, got both, weighting being 'psft'"),
    ("an unknown name", dict(weights="dff", weighting=None),
     "weighting must be one of 'none', 'dft', 'iw-sft', 'psft', 'asft', 'idft', got 'dff'"),
    *(
        (
            f"no reference for {name}",
            dict(weighting=name),
            f"weighting is {name!r}, but ref_logprobs is None: pass the targets' log-probs under the {whose}",
        )
        for name, whose in (("iw-sft", "initial model"), ("psft", "previous policy"), ("asft", "initial model"))
    ),
    *(
        (f"weights {what}", dict(weighting=None, weights=weights), "weights " + message)
        for what, weights, message in (
            ("length", torch.ones(N + 1), "must have target's shape (6,), got (7,)"),
            ("list", [1.0] * N, "must be a tensor, got list"),
            ("int", torch.ones(N).long(), "must be float32 (or float64), got torch.int64: call weights.float()"),
            ("half", torch.ones(N).bfloat16(), "must be float32 (or float64), got torch.bfloat16"),
            ("meta", torch.ones(N, device="meta"), "must be on the device of the other arguments, cpu, got meta"),
            ("too few", lambda lp: lp[1:], "must return a tensor of the log-probs' shape (6,), got shape (5,)"),
            ("none", lambda lp: None, "must return a tensor of the log-probs' shape (6,), got NoneType"),
            ("of three", lambda a, b, c: a, "must be a function ... got <lambda>(a, b, c)"),
            ("of nothing", lambda: 1, "must be a function ... got <lambda>()"),
            ("complex", lambda lp: lp + 0j, "must return real numbers, got torch.complex"),
        )
    ),
    *(
        (f"reference {what}", dict(weighting=weighting, weights=weights, reference=reference), message)
        for what, weighting, weights, reference, message in (
            ("for dft", "dft", None, teacher(), "reference is for weighting 'asft', whose ... got 'dft'"),
            ("for weights", None, torch.ones(N), teacher(), "reference is for weighting 'asft', whose ... got None"),
            ("of top-k", "asft", None, top_k(), "reference must be a pear_kernels.Teacher, got TopKTeacher"),
            ("of logits", "asft", None, torch.ones(N, V), "reference must be a pear_kernels.Teacher, got Tensor"),
            ("of 11 tokens", "asft", None, teacher(weight=torch.randn(V + 2, 5)),
             "reference.weight has a vocabulary of 11, and weight one of 9: a divergence needs the same tokens."),
        )
    ),
    # teachers
    *(
        (f"teacher {what}", dict(teacher=given), message)
        for what, given, message in (
            ("None", None, "teacher must be a pear_kernels.Teacher or TopKTeacher, got NoneType"),
            ("of logits", torch.randn(N, V), "teacher must be a pear_kernels.Teacher or TopKTeacher, got Tensor"),
            ("of 11 tokens", teacher(weight=torch.randn(V + 2, 5)),
             "teacher.weight has a vocabulary of 11, and weight one of 9: a divergence needs the same tokens."),
            ("length", teacher(hidden=torch.randn(7, 5)), "teacher.hidden must have target's shape (6,) ... (7, 5)"),
            ("of (N,)", teacher(hidden=torch.randn(N)), "teacher.hidden must have target's shape (6,) ... got (6,)"),
            ("transposed", teacher(weight=torch.randn(5, V)), "teacher.weight must be (V, D') with ... got (5, 9)"),
            ("dtypes", teacher(weight=torch.randn(V, 5).double()),
             "teacher.hidden and teacher.weight must have one dtype outside autocast, got torch.float32 and torch.f"),
            ("integers", teacher(hidden=torch.ones(N, 5).long()), "teacher.hidden" + OF_FLOATS),
            ("bias", teacher(bias=torch.zeros(V + 1)), "teacher.bias must have (V,) (9,), got (10,)"),
            ("temperature", teacher(temperature=0.0), "teacher.temperature must be a positive number, got 0.0"),
            ("softcap", teacher(softcap=-1.0), "teacher.softcap must be a positive number, or None, got -1.0"),
            ("meta", teacher(hidden=torch.randn(N, 5, device="meta")), "teacher.hidden" + META),
            ("list", teacher(hidden=[1.0]), "teacher.hidden must be a tensor, got list"),
            ("ids list", top_k()._replace(ids=[1]), "teacher.ids must be a tensor, got list"),
            ("ids of floats", top_k()._replace(ids=torch.zeros(N, K)),
             "teacher.ids must be torch.int64 or torch.int32, got torch.float32"),
            ("ids' length", top_k()._replace(ids=torch.zeros(5, K)),
             "teacher.ids must have target's shape (6,) and K last, got (5, 3)"),
            ("ids (N,)", TopKTeacher(TARGET, ones()), "teacher.ids must have target's shape (6,) and K last, got (6,)"),
            ("another K", top_k()._replace(logprobs=ones(N, K + 1)),
             "teacher.logprobs must have the shape of teacher.ids (6, 3), got (6, 4)"),
            ("half", top_k()._replace(logprobs=ones(N, K, dtype=torch.bfloat16)),
             "teacher.logprobs must be float32 (or float64), got torch.bfloat16"),
            ("K of the vocabulary", top_k(k=V),
             "teacher.ids must have a K of at least 1 and less than the vocabulary's 9 tokens, got 9"),
            ("K of zero", TopKTeacher(TARGET[:, None][:, :0], ones(N, 0)), "teacher.ids must have a K of ... got 0"),
            ("ids meta", top_k()._replace(ids=torch.zeros(N, K, device="meta").long()), "teacher.ids" + META),
        )
    ),
    ("return_entropy of top-k", dict(teacher=top_k(), return_entropy=True),
     "return_entropy does not work with a TopKTeacher, whose pass makes no entropy of the student: pass False,"),
    *(
        (f"k={k!r}", dict(k=k), f"k must have a K of at least 1 and less than the vocabulary's 9 tokens, got {k!r}")
        for k in (0, -1, V, V + 1, 2.5, "3", True)
    ),
]  # fmt: skip


@tried(ARGUMENTS, FUNCTIONS)
def test_arguments(taker, changes, message):
    with raises(message):
        call(taker, **changes)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_padded_rows(function):
    def padded(name, value):
        return (
            value.view(2, 3, *value.shape[1:])
            if getattr(value, "shape", ())[:1] == (N,) and name != "weight"
            else value
        )

    arguments = {name: padded(name, value) for name, value in FUNCTIONS[function].items()}
    if "teacher" in arguments:
        for wrong, field in ((teacher(), "hidden"), (top_k(), "ids")):
            with raises(
                f"teacher.{field} must have target's shape (2, 3) ... got (6, {getattr(wrong, field).shape[1]})"
            ):
                function(**arguments | {"teacher": wrong, "cu_seqlens": None})
        arguments["teacher"] = Teacher(torch.randn(2, 3, 5), torch.randn(V, 5))
    if "cu_seqlens" in arguments:
        with raises("cu_seqlens is for packs, but ... (B, T"):
            function(**arguments)
        del arguments["cu_seqlens"]
    if "advantages" in arguments:
        with raises("advantages must be (S,) = (2,), ... target's shape (2, 3), one per token, got (6,)"):
            function(**arguments | {"advantages": torch.ones(6)})
    if function is linear_pear_loss:
        assert function(**arguments, sequence_label=LABEL).loss.isfinite()
        with raises("sequence_label must have (S,), one flag per sequence (2,), got (2, 3)"):
            function(**arguments, sequence_label=torch.ones(2, 3, dtype=torch.bool))
    function(**arguments)


# ---- values

WHOSE = {
    "behavior_logprobs": "its behaviour policy",
    "old_logprobs": "the policy before the update",
    "ref_logprobs": "the reference policy",
    "sampler_logprobs": "the policy as it was sampled from",
}
AGAIN = ": write them again with `pear score --top_k`"
VALUES = [
    ("too large", dict(target=with_value(2, V, TARGET)),
     "target must be in [0, 9) or ignore_index (-100), got 9 at flat position 2"),
    ("negative", dict(target=with_value(2, -1, TARGET)),
     "target must be in [0, 9) or ignore_index (-100), got -1 at flat position 2"),
    ("not ascending", dict(cu_seqlens=torch.tensor([0, 4, 2, N])), "cu_seqlens must be ascending, got [0, 4, 2, 6]"),
    ("short", dict(cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must begin with 0 and end at N = 6, got 0 and 4: it"),
    ("not from 0", dict(cu_seqlens=torch.tensor([1, N])), "cu_seqlens must begin with 0 and end at N = 6, got 1 and 6"),
    ("zero, as a tensor", dict(denominator=torch.tensor(0)), "denominator must be a positive number, got 0"),
    ("nan, as a tensor", dict(denominator=torch.tensor(nan)), "denominator must be a positive number, got nan"),
    ("scale nan", dict(sequence_scale=torch.tensor([1, nan])), "sequence_scale must be finite, got [1.0, nan]"),
    ("valid_tokens", dict(valid_tokens=5, target=TARGET),
     "valid_tokens must be the number of targets that are not ignore_index, got 5 where there are 6"),
    ("valid_tokens of a mask", dict(valid_tokens=5, mask=TARGET > 1),
     "valid_tokens must be the number of response tokens, got 5 where there are 4"),
    ("valid_tokens of all", dict(valid_tokens=5, logprobs=ones()),
     "valid_tokens must be the number of response tokens, got 5 where there are 6"),
    *(
        (f"{name} {value}", {name: with_value(3, value)},
         f"{name} must be finite and at most 0, got {found} ... at flat position 3 (1 such tokens): score the data "
         f"again under {whose}")
        for name, whose in WHOSE.items()
        for value, found in ((nan, "nan"), (-inf, "-inf"), (2e-4, "0.000199"))
    ),
    *(
        (
            f"block_ids {ids}",
            dict(level="block", block_ids=torch.tensor(ids), cu_seqlens=None),
            "block_ids must " + message,
        )
        for ids, message in (
            ([0, 4, -1, 2, 2, 5], "not descend within a sequence, got 2 after 4 at flat position 3 (2 such)"),
            ([0, 1, -2, 3, 4, 5], "be in [0, 2147483648), or -1 for no log-ratio, got -2 at flat position 2 (1 such)"),
            ([0, 1, 2, 3, 4, 2**31],
             "be in [0, 2147483648), or -1 for no log-ratio, got 2147483648 at flat position 5"),
        )
    ),
    ("block_ids at level sequence", dict(level="sequence", block_ids=-TARGET), "block_ids must be in [0, 2147483648)"),
    ("nan where a block has a ratio", dict(level="block", block_ids=TARGET, behavior_logprobs=with_value(3, nan)),
     "behavior_logprobs must be finite and at most 0, got nan at flat position 3"),
    ("advantages nan", dict(advantages=torch.tensor([1.0, nan])),
     "advantages must be finite, got nan at flat position 1 (1 such): a reward was not finite, or was divided by"),
    ("advantages inf", dict(advantages=with_value(4, inf)), "advantages must be finite, got inf at flat position 4"),
    *(
        (
            f"weights {value}",
            dict(weighting=None, weights=with_value(3, value)),
            f"weights must be finite where a token counts, got {value} at flat position 3 (1 such)",
        )
        for value in (nan, -inf)
    ),
    *(
        (f"top-k of {row}", dict(teacher=top_k(**row)), f"teacher.{message} at flat position 2 (1 such){AGAIN}")
        for row, message in (
            (dict(ids=[0, V, 1]), "ids must be in [0, 9), got [0, 9, 1]"),
            (dict(ids=[0, -1, 1]), "ids must be in [0, 9), got [0, -1, 1]"),
            (dict(ids=[4, 1, 4]), "ids must be distinct tokens, got [4, 1, 4]"),
            (dict(logprobs=[-2.0, -1.0, -3.0]), "logprobs must be sorted, the largest first, got [-2.0, -1.0, -3.0]"),
            (dict(logprobs=[-0.5, -0.6, -0.7]), "logprobs must have a sum of probabilities of at most 1, got 1.65 ..."),
            (dict(logprobs=[-1.0, nan, -3.0]), "logprobs must be finite, got [-1.0, nan, -3.0]"),
            (dict(logprobs=[-1.0, -2.0, -inf]), "logprobs must be finite, got [-1.0, -2.0, -inf]"),
        )
    ),
]  # fmt: skip


@tried(VALUES, FUNCTIONS)
def test_values_and_their_switch(taker, changes, message, monkeypatch):
    with raises(message):
        call(taker, **changes)
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    try:
        call(taker, **changes)  # anything may come of it but our error
    except Exception as error:
        assert not isinstance(error, ValueError)


def test_switched_off_checks_change_no_result(monkeypatch):
    checked = call(linear_pear_loss, denominator=3.0)
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    assert torch.equal(call(linear_pear_loss, denominator=3.0).loss, checked.loss)
    with raises("gamma must be in (0, 1], got 2.0"):  # options stay checked
        call(linear_pear_loss, gamma=2.0)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_switch_itself_is_checked(function, monkeypatch):
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "no")
    with raises("PEAR_KERNELS_CHECK_VALUES must be 0 (no checks of values) or 1, got 'no'"):
        call(function)


# ---- values that do not matter


def test_what_stands_at_ignored_tokens_does_not_matter():
    head = dict(target=with_value(3, -100, TARGET))
    loaded, offline, losses = teacher(), top_k(), []
    for value, ids in ((-1.0, 1), (nan, -1), (7.0, V + 3), (inf, 0)):
        column = with_value(3, value)
        of_policies = dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages"), column)
        loaded.hidden[3], offline.ids[3], offline.logprobs[3] = value, ids, value
        outputs = (
            call(linear_pear_loss, **head, behavior_logprobs=column),
            call(linear_pear_loss, **head, behavior_logprobs=column, sequence_label=LABEL),
            call(linear_weighted_loss, **head, weights=column, weighting=None),
            call(linear_weighted_loss, **head, weighting="asft", ref_logprobs=column),
            call(linear_weighted_loss, **head, weighting="iw-sft", ref_logprobs=column),
            call(linear_policy_loss, **head, **of_policies, beta=0.1, entropy_coef=0.1),
            call(linear_distill_loss, **head, teacher=loaded, behavior_logprobs=column),
            call(linear_distill_loss, **head, teacher=offline, behavior_logprobs=column),
        )
        losses.append([out.loss.item() for out in outputs])
    assert losses[0] == losses[1] == losses[2] == losses[3] and all(map(math.isfinite, losses[0]))


def test_nor_where_a_token_has_no_ratio():
    blocks = dict(level="block", block_ids=with_value(3, -1, TARGET), cu_seqlens=None)
    losses = [
        call(linear_pear_loss, **blocks, behavior_logprobs=with_value(3, value), clip_blocks=clip_blocks).loss.item()
        for value in (-1.0, nan, 7.0, -inf)
        for clip_blocks in (False, True)
    ]
    assert len(set(losses)) == 1  # in blocks of one token


def test_ids_may_start_anew_in_each_sequence_and_hold_anything_at_ignored_tokens():
    options = dict(level="block", target=with_value(4, -100, TARGET), cu_seqlens=torch.tensor([0, 3, N]))
    ids = torch.tensor([1, 1, 2**31 - 1, 0, -77, 1])
    assert call(linear_pear_loss, **options, block_ids=ids).loss.isfinite()
    with raises("block_ids must not descend within a sequence, got 0 after 1 at flat position 5"):
        call(linear_pear_loss, **options, block_ids=torch.tensor([0, 0, 0, 1, 0, 0]).int())


def test_rounding_is_no_error():
    column = with_value(3, 5e-5)
    of_policies = dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_logprobs"), column)
    just_above_1 = torch.tensor([0.6, 0.3, 0.1 + 5e-5]).log().tolist()
    assert call(linear_pear_loss, behavior_logprobs=column).loss.isfinite()
    assert call(linear_policy_loss, **of_policies, beta=0.1).loss.isfinite()
    assert call(linear_distill_loss, teacher=top_k(logprobs=just_above_1)).loss.isfinite()
    assert call(linear_pear_loss, sequence_label=LABEL, logprob_floor=-inf).loss.isfinite()


# ---- off the CPU


class Asserts(TorchDispatchMode):
    """Lists the messages of asserts on the device."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._assert_async.msg:
            self.messages.append(args[1])
        return func(*args, **(kwargs or {}))


def test_checks_of_values_read_nothing_off_the_cpu():
    """A tensor of device "meta" has no values, so reading one raises, whichever way it is done."""
    big = 2**31 - 1
    floats, ids = torch.zeros(N, device="meta"), torch.zeros(N, dtype=torch.int64, device="meta")
    top = torch.zeros(N, K, device="meta")
    valid = ids == 0
    with Asserts() as asserts:
        checks.check_valid_tokens(big, valid)
        columns = {"cu_seqlens": ids, "target": ids, "denominator": floats[0], "block_ids": ids}
        names = (*checks.POLICY_OF, "sequence_scale", "sequence_advantages", "advantages", "weights")
        checks.check_values(columns | dict.fromkeys(names, floats), valid, big, -big)
        checks.check_top_k(top.long(), top, valid, V)
    names = ["valid_tokens", "cu_seqlens", "cu_seqlens", "target", "denominator", *WHOSE, "sequence_scale"]
    names += ["advantages"] * 2 + ["weights"] + ["block_ids"] * 2 + ["teacher.ids"] * 2 + ["teacher.logprobs"] * 3
    assert [message.split()[1] for message in asserts.messages] == names
    # CUDA's assert takes no longer message
    assert all(message.startswith("pear_kernels: ") and len(message.encode()) < 255 for message in asserts.messages)


@pytest.mark.parametrize("denominator", [None, 3.0, torch.ones])
@pytest.mark.parametrize("padded", [False, True])
def test_checks_of_arguments_read_nothing(denominator, padded):
    """Nor do the functions around them: PyTorch's fake tensors of a GPU raise where a value is asked for."""
    shape = (2, N // 2) if padded else (N,)
    with FakeTensorMode(), torch.device("cuda"):
        head = dict(hidden=torch.randn(*shape, D), weight=torch.randn(V, D), target=torch.zeros(shape).long())
        bounds = {} if padded else {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}
        divisor = denominator(()) if callable(denominator) else denominator
        common = dict(**head, **bounds, denominator=divisor, sequence_scale=torch.ones(2), valid_tokens=N)
        column, label = torch.zeros(shape), torch.zeros(2, dtype=torch.bool)
        blocks = dict(level="block", block_ids=torch.zeros(shape).int(), center=True, normalize="sequence")
        of_policies = dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_logprobs"), column)
        gspo = dict(objective="gspo", sampler_level="sequence", max_length=5, reduction="constant_length")
        teachers = (
            Teacher(torch.randn(*shape, 5), torch.randn(V, 5)),
            TopKTeacher(torch.zeros(*shape, K).long(), torch.zeros(*shape, K)),
        )
        outputs = [
            linear_pear_loss(**common, behavior_logprobs=column, **blocks),
            linear_pear_loss(**common, behavior_logprobs=column, sequence_label=label),
            linear_weighted_loss(**common, weights=column),
            *(
                linear_weighted_loss(**common, weighting=name, ref_logprobs=column)
                for name in ("none", "dft", "iw-sft", "psft", "asft", "idft")
            ),
            *(
                linear_policy_loss(**common, **of_policies, advantages=each, beta=0.1, entropy_coef=0.1, **gspo)
                for each in (torch.ones(shape), torch.ones(2))
            ),
            *(
                linear_distill_loss(**common, teacher=each, behavior_logprobs=given, divergence=divergence)
                for each in teachers
                for given in (None, column)
                for divergence in ("forward", "reverse", "js")
            ),
        ]
        results = [x for out in outputs for x in (out.logprobs, out.weights)]
        results += [linear_logprobs(**head), pear_weights(column, column, column < 1)]
        assert all(result.is_cuda and result.shape == shape for result in results)
        assert all(x.is_cuda and x.shape == (*shape, K) for x in linear_topk_logprobs(**head, k=K))
        with pytest.raises(DataDependentOutputException):
            bool(outputs[0].loss > 0)  # as it would there
