"""Bad input to linear_policy_loss: each a clear error that names the argument."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pear_kernels import LinearPolicyLoss, checks, linear_policy_loss

N, D, V = 6, 4, 9


def call(**changes):
    arguments = dict(
        hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.arange(N), old_logprobs=-torch.ones(N),
        advantages=torch.ones(2), cu_seqlens=torch.tensor([0, 2, N]),
    )  # fmt: skip
    arguments.update(changes)
    return linear_policy_loss(**arguments)


def with_value(position, value, base=None):
    tensor = -torch.ones(N) if base is None else base
    tensor[position] = value
    return tensor


BAD_OPTIONS = {
    "objective": (dict(objective="trpo"), "objective must be one of 'ppo', 'grpo', .*, got 'trpo'"),
    "objective of None": (dict(objective=None), "objective must be one of .*, got None"),
    "beta": (dict(beta=-0.1), "beta must be a number of at least 0, got -0.1"),
    "beta nan": (dict(beta=math.nan), "beta must be a number of at least 0, got nan"),
    "beta of text": (dict(beta="0.1"), "beta must be a number of at least 0, got '0.1'"),
    "clip_low": (dict(clip_low=-0.2), "clip_low must be a number of at least 0, got -0.2"),
    "clip_low above one": (dict(clip_low=1.5), "clip_low must be at most 1, got 1.5"),
    "clip_high": (dict(clip_high=-0.2), "clip_high must be a number of at least 0, got -0.2"),
    "clip_high without end": (dict(clip_high=math.inf), "clip_high must be a number of at least 0, got inf"),
    "dual_clip": (dict(dual_clip=1.1), r"dual_clip must be a number of at least 1 \+ clip_high = 1.2, .*got 1.1"),
    "dual_clip nan": (dict(dual_clip=math.nan), "dual_clip must be .*got nan"),
    "sampler_clip": (dict(sampler_clip=0.0), "sampler_clip must be a positive number, or None .*, got 0.0"),
    "sampler_level": (dict(sampler_level="word"), "sampler_level must be 'token' or 'sequence', got 'word'"),
    "sapo_temperatures of one": (dict(sapo_temperatures=1.0), "sapo_temperatures must be two positive .*got 1.0"),
    "sapo_temperatures of three": (dict(sapo_temperatures=(1, 2, 3)), r"sapo_temperatures must .*got \(1, 2, 3\)"),
    "sapo_temperatures of zero": (dict(sapo_temperatures=(0.0, 1.0)), r"sapo_temperatures must .*got \(0.0, 1.0\)"),
    "entropy_coef nan": (dict(entropy_coef=math.nan), "entropy_coef must be a finite number, got nan"),
    "entropy_coef of text": (dict(entropy_coef="0"), "entropy_coef must be a finite number, got '0'"),
    "max_length": (dict(max_length=0), r"max_length must be an integer of at least 1 \(tokens\), or None, got 0"),
    "max_length of a float": (dict(max_length=8.0), "max_length must be an integer .*got 8.0"),
    "reduction": (
        dict(reduction="none"),
        "reduction must be one of 'mean', 'sum', 'sequence_mean', 'constant_length', got 'none'",
    ),
    "temperature": (dict(temperature=0.0), "temperature must be a positive number, got 0.0"),
    "softcap": (dict(softcap=-1.0), "softcap must be a positive number.*got -1.0"),
    "workspace_bytes": (dict(workspace_bytes=0), "workspace_bytes must be a positive integer.*got 0"),
    "backend": (dict(backend="cuda"), "backend must be .*got 'cuda'"),
}

BAD_TENSORS = {
    "advantages of another length": (
        dict(advantages=torch.ones(3)),
        r"advantages must be \(S,\) = \(2,\), .*or have target's shape \(6,\), one per token, got \(3,\)",
    ),
    "advantages of two dimensions": (dict(advantages=torch.ones(2, 1)), r"advantages must be .*got \(2, 1\)"),
    "advantages of integers": (
        dict(advantages=torch.ones(2, dtype=torch.int64)),
        r"advantages must be floating-point, got torch.int64: call advantages.float\(\)",
    ),
    "advantages of a list": (dict(advantages=[1.0, 2.0]), "advantages must be a tensor, got list"),
    "advantages nan": (
        dict(advantages=torch.tensor([1.0, math.nan])),
        r"advantages must be finite, got nan at flat position 1 \(1 such\): a reward was not finite",
    ),
    "advantages inf, of a token": (
        dict(advantages=with_value(4, math.inf)),
        "advantages must be finite, got inf at flat position 4",
    ),
    "advantages on another device": (
        dict(advantages=torch.ones(2, device="meta")),
        "advantages must be on the device of .*cpu, got meta",
    ),
    "no reference policy": (dict(beta=0.1), "beta is 0.1, but ref_logprobs is None: pass the reference"),
    "no old policy for the sampler": (
        dict(old_logprobs=None, sampler_logprobs=-torch.ones(N)),
        "sampler_logprobs needs old_logprobs: .*got None",
    ),
    "denominator": (dict(denominator=0.0), "denominator must be a positive number, got 0.0"),
    "denominator zero, as a tensor": (dict(denominator=torch.tensor(0)), "denominator must be a positive .*got 0"),
    "sequence_scale of another length": (dict(sequence_scale=torch.ones(3)), r"sequence_scale must have .*got \(3,\)"),
    "sequence_scale nan": (dict(sequence_scale=torch.tensor([1.0, math.nan])), "sequence_scale must be finite, got"),
    "target too large": (
        dict(target=with_value(2, V, torch.arange(N))),
        "target must be in .*got 9 at flat position 2",
    ),
    "cu_seqlens short of N": (dict(cu_seqlens=torch.tensor([0, 2, 4])), "cu_seqlens must .*N = 6, got 0 and 4"),
}

WHOSE = {
    "old_logprobs": "the policy before the update",
    "ref_logprobs": "the reference policy",
    "sampler_logprobs": "the policy as it was sampled from",
}
for name, whose in WHOSE.items():
    BAD_TENSORS |= {
        f"{name} of another length": (
            {name: -torch.ones(N + 1)},
            rf"{name} must have target's shape \(6,\), got \(7,\)",
        ),
        f"{name} of a list": ({name: [-1.0] * N}, f"{name} must be a tensor, got list"),
        f"{name} in bfloat16": ({name: -torch.ones(N).bfloat16()}, f"{name} must be float32.*bfloat16.*too coarse"),
        f"{name} in float16": ({name: -torch.ones(N).half()}, f"{name} must be float32.*float16.*too coarse"),
        f"{name} nan": (
            {name: with_value(3, math.nan)},
            f"{name} must be finite and at most 0, got nan at flat position 3 .*under {whose}",
        ),
        f"{name} -inf": ({name: with_value(3, -math.inf)}, f"{name} must be finite and at most 0, got -inf"),
        f"{name} positive": (
            {name: with_value(3, 2e-4)},
            f"{name} must be finite and at most 0, got 0.000199.* position 3",
        ),
        f"{name} on another device": (
            {name: -torch.ones(N, device="meta")},
            f"{name} must be on the device of .*cpu, got meta",
        ),
    }

BAD = BAD_OPTIONS | BAD_TENSORS


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_linear_policy_loss(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changes)


@pytest.mark.parametrize("changes, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_the_module_checks_when_it_is_made(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LinearPolicyLoss(**changes)


def test_padded_input():
    head = dict(hidden=torch.randn(2, 3, D), weight=torch.randn(V, D), target=torch.zeros(2, 3).long())
    old = -torch.ones(2, 3)
    with pytest.raises(ValueError, match="cu_seqlens is for packs"):
        linear_policy_loss(**head, old_logprobs=old, advantages=torch.ones(2), cu_seqlens=torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match=r"advantages must be \(S,\) = \(2,\), .*shape \(2, 3\), .*got \(6,\)"):
        linear_policy_loss(**head, old_logprobs=old, advantages=torch.ones(6))


def test_what_stands_at_ignored_tokens_does_not_matter():
    torch.manual_seed(0)
    head = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), target=with_value(3, -100, torch.arange(N)))
    losses = []
    for value in (-1.0, math.nan, 7.0):
        columns = {name: with_value(3, value) for name in (*WHOSE, "advantages")}
        losses.append(call(**head, **columns, beta=0.1, entropy_coef=0.1).loss.item())
    assert losses[0] == losses[1] == losses[2]


def test_rounding_just_above_zero_is_no_error():
    columns = {name: with_value(3, 5e-5) for name in WHOSE}
    assert call(**columns, beta=0.1).loss.isfinite()


@pytest.mark.parametrize("name", ["advantages nan", "old_logprobs nan", "ref_logprobs nan", "sampler_logprobs nan"])
def test_checks_of_values_can_be_switched_off(name, monkeypatch):
    changes, message = BAD[name]
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    call(**changes)  # whatever comes of it
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_checks_of_values_read_nothing_off_the_cpu():
    """A tensor of device "meta" has no values, so reading one raises, whichever way it is done."""
    floats, valid = torch.zeros(N, device="meta"), torch.zeros(N, dtype=torch.bool, device="meta")
    checks.check_advantages(floats, None)
    checks.check_advantages(floats, valid)
    for name in WHOSE:
        checks.check_logprobs(name, floats, valid)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_checks_of_arguments_read_nothing(padded, by_token):
    """PyTorch's fake tensors of a GPU raise where a value is asked for."""
    shape = (2, N // 2) if padded else (N,)
    with FakeTensorMode(), torch.device("cuda"):
        logprobs = torch.zeros(shape)
        out = linear_policy_loss(
            torch.randn(*shape, D), torch.randn(V, D), torch.zeros(shape).long(), logprobs,
            torch.ones(shape if by_token else (2,)), cu_seqlens=None if padded else torch.zeros(3, dtype=torch.int32),
            ref_logprobs=logprobs, sampler_logprobs=logprobs, beta=0.1, entropy_coef=0.1, sampler_level="sequence",
            objective="gspo", max_length=5, reduction="constant_length", denominator=3.0,
        )  # fmt: skip
        assert all(result.is_cuda and result.shape == shape for result in (out.logprobs, out.weights))
