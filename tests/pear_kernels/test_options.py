"""Options: keywords and objects say the same, reach the ops unchanged, and are data to torch.compile."""

import copy
import dataclasses
import enum
import inspect
import math
import pickle
import subprocess
import sys
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_distill_problem, make_problem

from pear_kernels import (
    LinearDistillLoss,
    LinearPEARLoss,
    LinearPolicyLoss,
    LinearWeightedLoss,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_policy_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels import options as all_options
from pear_kernels.options import (
    CLASSES,
    CallOptions,
    DivergenceOptions,
    HeadOptions,
    LabelOptions,
    PEAROptions,
    PolicyOptions,
    PolicyReduction,
    Reduction,
    TeacherOptions,
    WeightingOptions,
    decode,
    encode,
)

PROBLEM = make_problem(dtype=torch.float32)
BOUNDS, TARGET, BEHAVIOR = PROBLEM.cu_seqlens, PROBLEM.target, PROBLEM.behavior_logprobs
COUNTED = int((TARGET >= 0).sum())
ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7])
LABEL = torch.tensor([True, False, True, False, True])
TEACHER = make_distill_problem(dtype=torch.float32).options["teacher"]


def pear(hidden, weight, target=TARGET, **options):
    return linear_pear_loss(hidden, weight, target, BEHAVIOR, cu_seqlens=BOUNDS, sequence_label=LABEL, **options)


def weighted(hidden, weight, target=TARGET, **options):
    return linear_weighted_loss(hidden, weight, target, cu_seqlens=BOUNDS, ref_logprobs=BEHAVIOR, **options)


def policy(hidden, weight, target=TARGET, **options):
    columns = dict(ref_logprobs=BEHAVIOR, sampler_logprobs=BEHAVIOR - 0.1)
    return linear_policy_loss(hidden, weight, target, BEHAVIOR, ADVANTAGES, cu_seqlens=BOUNDS, **columns, **options)


def distill(hidden, weight, target=TARGET, **options):
    return linear_distill_loss(hidden, weight, TEACHER, target, BEHAVIOR, cu_seqlens=BOUNDS, **options)


def logprobs(hidden, weight, target=TARGET, **options):
    return linear_logprobs(hidden, weight, target, return_entropy=True, **options)


def topk(hidden, weight, target=TARGET, **options):
    return linear_topk_logprobs(hidden, weight, target, 3, **options)


def weights(hidden, weight, target=TARGET, **options):
    return pear_weights(hidden.sum(1).clamp(max=0), BEHAVIOR, target >= 0, cu_seqlens=BOUNDS, **options)


FUNCTIONS = {
    pear: linear_pear_loss, weighted: linear_weighted_loss, policy: linear_policy_loss, distill: linear_distill_loss,
    logprobs: linear_logprobs, topk: linear_topk_logprobs, weights: pear_weights,
}  # fmt: skip
MODULES = LinearPEARLoss, LinearWeightedLoss, LinearPolicyLoss, LinearDistillLoss
NAMED = dict(ids=lambda value: getattr(value, "__name__", None))


def flat(result) -> list[torch.Tensor]:
    """All tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in (part.values() if isinstance(part, dict) else [part])]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


# ---- keywords, classes and signatures


@pytest.mark.parametrize("taker", [*FUNCTIONS.values(), *MODULES], **NAMED)
def test_keywords_have_the_fields_and_types_of_the_classes(taker):
    function = taker.__init__ if inspect.isclass(taker) else taker
    typed = typing.get_type_hints(function)["keywords"]
    keywords = typing.get_type_hints(typing.get_args(typed)[0])
    expected = {}
    for cls in function.option_classes:
        hints = typing.get_type_hints(cls)
        expected |= {name: hints[name] for name in cls.names()}
        if cls is Reduction:
            expected["reduction"] = str  # None, the objective's own, is for `PolicyReduction`
    for name in inspect.getfullargspec(function).args:  # LinearWeightedLoss takes `weighting` by position too
        expected.pop(name, None)
    assert keywords == expected


@pytest.mark.parametrize("taker", [*FUNCTIONS.values(), *MODULES], **NAMED)
def test_signatures_show_each_option_with_its_default(taker):
    parameters = inspect.signature(taker).parameters
    classes = (taker.__init__ if inspect.isclass(taker) else taker).option_classes
    for field in (field for cls in classes for field in dataclasses.fields(cls)):
        parameter = parameters[field.name]
        assert parameter.default == field.default
        by_position = taker is LinearWeightedLoss and field.name == "weighting"
        assert by_position or parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("module", MODULES, **NAMED)
def test_forward_shows_the_functions_tensors(module):
    options = {name for cls in module.function.option_classes for name in cls.names()} | {"options"}
    expected = {k: p for k, p in inspect.signature(module.function).parameters.items() if k not in options}
    found = dict(inspect.signature(module().forward).parameters)
    assert found == expected and list(found)[:3] == ["hidden", "weight", list(expected)[2]]


@pytest.mark.parametrize("cls", CLASSES.values(), **NAMED)
def test_objects_are_frozen_and_made_by_keywords(cls):
    one = cls()
    name = cls.names()[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, name, getattr(one, name))
    with pytest.raises(TypeError, match="positional"):
        cls(getattr(one, name))
    assert one == cls(**one.asdict()) == one.replace() == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one)
    assert hash(one) == hash(cls())


# other values than the defaults, with what the function needs for them to matter
CHANGED = {
    HeadOptions: dict(temperature=1.5, softcap=9.0, ignore_index=-100, workspace_bytes=5000, backend="torch",
        gradient_tolerance=0.0),
    PEAROptions: dict(
        level="block", block_size=3, gamma=0.9, log_ratio_clip=(-0.2, 0.4), log_weight_clip=(-1.0, 0.5),
        clip_blocks=True, center=True, clip_length=5, normalize="sequence",
    ),
    LabelOptions: dict(negative_lambda=0.5, logprob_floor=-2.0),
    WeightingOptions: dict(
        weighting="idft", iw_tau=0.5, iw_max=3.0, psft_clip=0.1, asft_kl=0.3, idft_clip=(0.2, 1.0)
    ),
    PolicyOptions: dict(
        objective="dapo", beta=0.1, clip_low=0.1, clip_high=0.3, dual_clip=2.0, sapo_temperatures=(1.0, 2.0),
        sampler_clip=1.05, sampler_level="sequence", entropy_coef=0.01, max_length=9, unbiased_kl=True,
    ),
    DivergenceOptions: dict(divergence="js", js_beta=0.3, distill_temperature=2.0, nll_coef=0.5),
    Reduction: dict(reduction="sequence_mean"),
    PolicyReduction: dict(reduction="constant_length"),
}  # fmt: skip


@pytest.mark.parametrize("call", FUNCTIONS, **NAMED)
def test_keywords_and_objects_give_the_same_to_the_last_bit(call):
    classes, (hidden, weight) = FUNCTIONS[call].option_classes, PROBLEM.leaves()
    objects = [cls(**CHANGED[cls]) for cls in classes]
    keywords = {name: value for cls in classes for name, value in CHANGED[cls].items()}
    expected = call(hidden, weight, **keywords)
    assert all(set(CHANGED[cls]) == set(cls.names()) for cls in classes)
    assert same(call(hidden, weight, options=objects), expected)
    assert same(call(hidden, weight, options=tuple(reversed(objects))), expected)
    first, *others = classes  # some by object, others by keyword
    rest = {name: value for cls in others for name, value in CHANGED[cls].items()}
    assert same(call(hidden, weight, options=objects[0], **rest), expected)
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in keywords.items()}
    assert same(call(hidden, weight, **lists), expected)


@pytest.mark.parametrize("call", FUNCTIONS, **NAMED)
def test_an_option_is_given_once_and_by_a_known_name(call):
    (first, *_), name = FUNCTIONS[call].option_classes, FUNCTIONS[call].__name__
    one, (hidden, weight) = first(), PROBLEM.leaves()
    field = first.names()[0]
    with pytest.raises(TypeError, match=f"{name}: {field} is given, and {first.__name__} too, whose field it is"):
        call(hidden, weight, options=one, **{field: getattr(one, field)})
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'gama'"):
        call(hidden, weight, gama=0.9)
    wanted = f"options of {name} must be at most one object of each of .*{first.__name__}"
    for wrong in ([one, one], CallOptions(), [TeacherOptions()], first, None, [first]):
        with pytest.raises(TypeError, match=wanted):
            call(hidden, weight, options=wrong)


@pytest.mark.parametrize("module", MODULES, **NAMED)
def test_modules_hold_their_options_and_nothing_else(module):
    arguments = {
        LinearPEARLoss: (TARGET, BEHAVIOR), LinearWeightedLoss: (TARGET,), LinearDistillLoss: (TEACHER, TARGET),
        LinearPolicyLoss: (TARGET, BEHAVIOR, ADVANTAGES),
    }[module]  # fmt: skip
    options = dict(temperature=1.5, reduction="sum", **({"weighting": "dft"} if module is LinearWeightedLoss else {}))
    (hidden, weight), one = PROBLEM.leaves(), module(**options)
    expected = module.function(hidden, weight, *arguments, cu_seqlens=BOUNDS, **options)
    as_objects = module(options=one.options)
    for each in (one, as_objects, copy.deepcopy(one), pickle.loads(pickle.dumps(one)), module(**options).half().eval()):
        assert same(each(hidden, weight, *arguments, cu_seqlens=BOUNDS), expected)
        assert not each.state_dict() and not [*each.parameters()] and not [*each.buffers()]
    shown = {name for cls in module.function.option_classes for name in cls.names()}
    assert all(f"{name}=" in repr(one) for name in shown) and "temperature=1.5" in repr(one)
    with pytest.raises(TypeError, match="temperature is given, and HeadOptions too"):
        one(hidden, weight, *arguments, temperature=2.0)
    with pytest.raises(TypeError, match=rf"{module.__name__}\(\) got an unexpected keyword argument 'gama'"):
        module(gama=0.9)


@pytest.mark.parametrize("module", MODULES, **NAMED)
def test_modules_may_be_subclassed(module):
    class Plain(module):
        pass

    class Own(module):
        def __init__(self, scale):
            super().__init__(temperature=scale)

    assert inspect.signature(Plain) == inspect.signature(module)
    assert "temperature=2.0" in repr(Own(2.0)) and list(inspect.signature(Own).parameters) == ["scale"]


def test_a_weighted_module_takes_its_weighting_by_position_or_with_the_call():
    hidden, weight = PROBLEM.leaves()
    expected = linear_weighted_loss(hidden, weight, TARGET, weighting="dft")
    for module, given_weights in (
        (LinearWeightedLoss("dft"), ()), (LinearWeightedLoss(), ("dft",)), (LinearWeightedLoss(None), ("dft",)),
        (LinearWeightedLoss(options=WeightingOptions()), ("dft",)), (LinearWeightedLoss(weighting="dft"), (None,)),
        (LinearWeightedLoss(), (torch.exp,)),
    ):  # fmt: skip
        assert same(module(hidden, weight, TARGET, *given_weights).loss, expected.loss)
    with pytest.raises(ValueError, match="give one of weights and weighting, got both, weighting being 'dft'"):
        LinearWeightedLoss("dft")(hidden, weight, TARGET, "psft")


# ---- as arguments of the ops

positive = st.floats(1e-300, 1e300)
finite = st.floats(-1e300, 1e300)
at_least_0 = st.floats(0, 1e300) | st.integers(0, 2**53)
share = st.floats(0, 1, exclude_min=True)
count = st.integers(1, 2**53)
flag = st.booleans()


def ascending(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: tuple(sorted(pair)))


FIELDS = {
    HeadOptions: dict(
        temperature=positive, softcap=st.none() | positive, ignore_index=st.integers(-(2**53), 2**53),
        workspace_bytes=st.none() | count, backend=st.sampled_from([None, "torch", "triton"]), 
        gradient_tolerance=st.floats(0, 1, exclude_max=True),
    ),
    PEAROptions: dict(
        level=st.sampled_from(["token", "block"]), block_size=count, gamma=share | st.just(1),
        log_ratio_clip=ascending(-math.inf, math.inf), log_weight_clip=ascending(-math.inf, 1e300), clip_blocks=flag,
        center=flag, clip_length=st.none() | count, normalize=st.sampled_from([None, "sequence", "batch"]),
    ),
    LabelOptions: dict(negative_lambda=at_least_0, logprob_floor=st.floats(-math.inf, 0)),
    WeightingOptions: dict(
        weighting=st.sampled_from([None, *all_options.WEIGHTINGS]), iw_tau=finite, iw_max=at_least_0,
        psft_clip=at_least_0, asft_kl=at_least_0, idft_clip=ascending(0, 1e300),
    ),
    PolicyOptions: dict(
        objective=st.sampled_from(all_options.OBJECTIVES), beta=at_least_0, clip_low=share, clip_high=st.floats(0, 9),
        dual_clip=st.none() | st.floats(10, 1e300), sapo_temperatures=st.tuples(positive, positive),
        sampler_clip=st.none() | positive, sampler_level=st.sampled_from(["token", "sequence"]), entropy_coef=finite,
        max_length=st.none() | count, unbiased_kl=flag,
    ),
    DivergenceOptions: dict(
        divergence=st.sampled_from(all_options.DIVERGENCES), js_beta=st.floats(0.001, 0.999),
        distill_temperature=positive, nll_coef=at_least_0,
    ),
    TeacherOptions: dict(temperature=positive, softcap=st.none() | positive),
    CallOptions: dict(valid_tokens=st.none() | st.integers(0, 2**53), denominator=st.none() | positive),
    Reduction: dict(reduction=st.sampled_from(all_options.REDUCTIONS)),
    PolicyReduction: dict(reduction=st.sampled_from([None, *all_options.POLICY_REDUCTIONS])),
}  # fmt: skip


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("cls", CLASSES.values(), **NAMED)
def test_what_is_encoded_is_decoded(cls, data):
    assert set(FIELDS[cls]) == set(cls.names())
    one = data.draw(st.builds(cls, **FIELDS[cls]))
    spec, values = encode([one, CallOptions(denominator=3)])
    numbers = torch.tensor(values, dtype=torch.float64).tolist()  # as they travel
    found = decode(spec, tuple(numbers))
    if cls is not CallOptions:
        assert found == {cls: one, CallOptions: CallOptions(denominator=3)}
        assert [type(v) for v in found[cls].asdict().values() if not isinstance(v, float)] == [
            type(v) for v, f in zip(one.asdict().values(), found[cls].asdict().values(), strict=True)
            if not isinstance(f, float)
        ]  # fmt: skip
    assert all(f"{number!r}" not in spec for number in values if number > 9)  # numbers are data, not text


def test_members_of_enums_and_numpy_numbers_are_what_they_stand_for():
    numpy = pytest.importorskip("numpy")

    class Level(enum.StrEnum):
        BLOCK = "block"

    hidden, weight = PROBLEM.leaves()
    expected = pear(hidden, weight, level="block", block_size=3, log_ratio_clip=(-0.5, 0.25), temperature=2.0)
    found = pear(
        hidden, weight, level=Level.BLOCK, block_size=numpy.int64(3), temperature=2,
        log_ratio_clip=[numpy.float32(-0.5), numpy.float64(0.25)],
    )  # fmt: skip
    assert same(found, expected)


def test_lists_in_objects_are_tuples_and_false_is_no_number_of_a_clip():
    given = PEAROptions(log_ratio_clip=[-0.08, 0.3], log_weight_clip=[-10.0, 5.0])
    assert given == PEAROptions() and hash(given) == hash(PEAROptions())
    assert PolicyOptions(sapo_temperatures=[1.0, 1.05]) == PolicyOptions()
    assert WeightingOptions(idft_clip=[0.1, 2.0]) == WeightingOptions()
    behavior = -torch.ones(3)
    pear_weights(behavior, behavior, log_ratio_clip=(0, 0.3))  # equal to the next in a cache
    with pytest.raises(ValueError, match="log_ratio_clip must be two numbers"):
        pear_weights(behavior, behavior, log_ratio_clip=(False, 0.3))


def test_ops_are_kept_out_of_inductors_cuda_graphs():
    """They read their numbers on the host, which a replay would not."""
    ops = [op for op in vars(torch.ops.pear_kernels).values() if isinstance(op, torch._ops.OpOverloadPacket)]
    assert len(ops) >= 4 and all(torch.Tag.cudagraph_unsafe in op.default.tags for op in ops)


def test_the_package_may_be_imported_once_more():
    code = (
        "import sys, torch, pear_kernels\n"
        "for name in [name for name in sys.modules if name.startswith('pear_kernels')]: del sys.modules[name]\n"
        "import pear_kernels\n"
        "hidden = torch.ones(2, 3, requires_grad=True)\n"
        "pear_kernels.linear_weighted_loss(hidden, torch.ones(4, 3), torch.tensor([0, 1]), torch.exp).loss.backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ops_have_at_most_ten_arguments():
    ops = [op for op in vars(torch.ops.pear_kernels).values() if isinstance(op, torch._ops.OpOverloadPacket)]
    names = {op.__name__ for op in ops}
    assert {"linear_loss", "linear_logprobs", "linear_topk_logprobs", "pear_weights"} <= names
    assert all(len(op.default._schema.arguments) <= 10 for op in ops)


# ---- valid_tokens


@pytest.mark.parametrize("call", FUNCTIONS, **NAMED)
def test_valid_tokens_changes_nothing_and_must_be_right(call):
    extra = {"weighting": "iw-sft"} if call is weighted else {}
    hidden, weight = PROBLEM.leaves()
    expected, found = call(hidden, weight, **extra), call(hidden, weight, valid_tokens=COUNTED, **extra)
    assert same(found, expected)
    if call not in (topk, weights):
        grads = [torch.autograd.grad(flat(result)[0].sum(), (hidden, weight)) for result in (expected, found)]
        assert same(*grads)
    for wrong in (COUNTED - 1, COUNTED + 1, 0, len(TARGET) + 9):
        counted = "response tokens" if call is weights else "targets that are not ignore_index"
        message = f"number of {counted}, got {wrong} where there are {COUNTED}$"
        with pytest.raises(ValueError, match=f"^valid_tokens must be the {message}"):
            call(hidden, weight, valid_tokens=wrong, **extra)
    for wrong in (-1, 3.0, True, "3"):
        with pytest.raises(ValueError, match=f"valid_tokens must be an integer of at least 0, or None, got {wrong!r}"):
            call(hidden, weight, valid_tokens=wrong, **extra)
    none = torch.full_like(TARGET, -100)
    assert same(call(hidden, weight, none, valid_tokens=0, **extra), call(hidden, weight, none, **extra))


# ---- under torch.compile

KL, BLOCK = dict(beta=0.1), dict(level="block")
VALUES = {  # what changes: (call, other options, a value from a number in [0, 1))
    "gamma": (pear, {}, lambda x: 0.9 + 0.1 * x),
    "temperature": (logprobs, {}, lambda x: 0.5 + x),
    "softcap": (logprobs, {}, lambda x: 5 + x),
    "gradient_tolerance": (pear, {}, lambda x: x),
    "negative_lambda": (pear, {}, lambda x: x),
    "logprob_floor": (pear, {}, lambda x: -1 - 3 * x),
    "log_ratio_clip": (weights, {}, lambda x: (-0.1 - x, 0.1 + x)),
    "log_weight_clip": (weights, {}, lambda x: (-0.1 - x, 0.1 + x)),
    "denominator": (pear, {}, lambda x: 3 + x),
    "beta": (policy, {}, lambda x: 0.1 + x),
    "entropy_coef": (policy, {}, lambda x: x - 0.3),
    "clip_low": (policy, {}, lambda x: x / 2),
    "clip_high": (policy, {}, lambda x: x / 2),
    "dual_clip": (policy, {}, lambda x: 1.3 + x),
    "sampler_clip": (policy, {}, lambda x: 0.6 + x),
    "sapo_temperatures": (policy, dict(objective="sapo"), lambda x: (0.5 + x, 1.5 + x)),
    "iw_tau": (weighted, dict(weighting="iw-sft"), lambda x: 0.5 + x),
    "iw_max": (weighted, dict(weighting="iw-sft"), lambda x: 0.5 + x),
    "psft_clip": (weighted, dict(weighting="psft"), lambda x: 0.01 + x / 2),
    "asft_kl": (weighted, dict(weighting="asft"), lambda x: 0.01 + x),
    "idft_clip": (weighted, dict(weighting="idft"), lambda x: (0.1 + x, 1.5 + x)),
    "js_beta": (distill, dict(divergence="js"), lambda x: 0.01 + 0.9 * x),
    "distill_temperature": (distill, {}, lambda x: 0.5 + x),
    "nll_coef": (distill, {}, lambda x: x),
    # integers
    "block_size": (weights, BLOCK, lambda x: 2 + round(20 * x)),
    "clip_length": (weights, {}, lambda x: 2 + round(20 * x)),
    "max_length": (policy, dict(reduction="constant_length"), lambda x: 2 + round(20 * x)),
    "workspace_bytes": (logprobs, {}, lambda x: 5000 + round(2000 * x)),
}  # fmt: skip


def counting(call):
    """`call` compiled in one graph, and the list that gets a graph for each compilation."""
    torch._dynamo.reset()
    graphs = []
    return torch.compile(call, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph), graphs


def check_twenty(call, values, arguments=lambda i: ()):
    """`call(value, *arguments(i))` compiles at most twice for twenty values, and gives what it gives eagerly."""
    compiled, graphs = counting(call)
    assert len(set(values)) == 20
    for i, value in enumerate(values):
        found = compiled(value, *arguments(i))
        if i in (0, 13):
            torch.testing.assert_close(flat(found), flat(call(value, *arguments(i))), rtol=1e-6, atol=1e-7)
    assert len(graphs) <= 2, f"{len(graphs)} compilations"


@pytest.mark.parametrize("name", VALUES)
def test_twenty_values_of_a_number_compile_at_most_twice(name):
    call, others, value = VALUES[name]
    hidden, weight = PROBLEM.hidden, PROBLEM.weight
    check_twenty(lambda x: flat(call(hidden, weight, **others, **{name: x}))[0], [value(i / 20) for i in range(20)])


def test_twenty_numbers_of_valid_tokens_compile_at_most_twice():
    hidden, weight = PROBLEM.hidden, PROBLEM.weight
    targets = [torch.where(torch.arange(len(TARGET)) < 3 + i, 5, -100) for i in range(20)]
    check_twenty(
        lambda tokens, target: linear_pear_loss(hidden, weight, target, BEHAVIOR, valid_tokens=tokens).loss,
        range(3, 23), lambda i: (targets[i],),
    )  # fmt: skip


def test_twenty_objects_compile_at_most_twice():
    """Made in the compiled function of a number that changes, or outside it; and modules."""
    hidden, weight = PROBLEM.hidden, PROBLEM.weight
    gammas = [0.9 + 0.005 * i for i in range(20)]
    check_twenty(
        lambda x: pear(hidden, weight, options=[PEAROptions(gamma=x), HeadOptions(temperature=1 + x)]).loss, gammas
    )
    check_twenty(lambda given: weights(hidden, weight, options=given), [PEAROptions(gamma=x) for x in gammas])
    arguments = hidden, weight, TARGET, BEHAVIOR
    check_twenty(lambda module: module(*arguments).loss, [LinearPEARLoss(gamma=x) for x in gammas])
