"""PEAR weights against the paper's formula, token by token, and the properties that must always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from pear_kernels import pear_weights
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.formulas.pear_weights import PEARWeights
from pear_kernels.ops.call import spec_and_numbers
from pear_kernels.ops.pear_weights import pear_weights as pear_weights_op
from pear_kernels.options import CallOptions, HeadOptions, PEAROptions
from pear_kernels.reference import naive_weights

LEVELS = ["token", "block", "sequence"]


def random_logprobs(n: int, seed: int, drift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, generator=rng, dtype=torch.float64)
    behavior = (logprobs - drift + 0.3 * torch.randn(n, generator=rng, dtype=torch.float64)).clamp(max=0)
    return logprobs, behavior


packs = st.lists(st.lists(st.booleans(), max_size=14), min_size=1, max_size=6)  # sequences of response / ignored tokens


@given(
    pack=packs,
    level=st.sampled_from(LEVELS),
    block_size=st.integers(1, 16),
    gamma=st.floats(0.5, 1.0),
    ratio_clip=st.sampled_from([(-0.08, 0.3), (-1.0, 1.0), (-0.5, -0.1), (0.0, 0.0)]),
    weight_clip=st.sampled_from([(-10.0, 5.0), (-0.5, 0.2)]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_random_packs_match_the_paper(pack, level, block_size, gamma, ratio_clip, weight_clip, seed):
    mask = torch.tensor([token for sequence in pack for token in sequence], dtype=torch.bool)
    bounds = torch.tensor([0, *[len(s) for s in pack]]).cumsum(0)
    logprobs, behavior = random_logprobs(len(mask), seed)
    options = dict(
        level=level, block_size=block_size, gamma=gamma, log_ratio_clip=ratio_clip, log_weight_clip=weight_clip
    )
    weights = pear_weights(logprobs, behavior, mask, cu_seqlens=bounds, **options)
    expected = torch.zeros_like(weights)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        response = begin + mask[begin:end].nonzero().squeeze(-1)
        expected[response] = naive_weights(logprobs[response], behavior[response], **options)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


@given(
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    level=st.sampled_from(LEVELS[:2]),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_walking_in_chunks_changes_nothing(n, cuts, level, seed):
    logprobs, behavior = random_logprobs(n, seed)
    pack = pack_tokens(torch.ones(n, dtype=torch.bool), torch.tensor([0, n // 3, n // 3, n]))
    options = PEAROptions(level=level, block_size=5)
    whole = PEARWeights(behavior, pack, options)
    whole.observe(0, n, logprobs)
    walk = PEARWeights(behavior, pack, options)
    edges = sorted({0, n, *(c for c in cuts if c < n)})
    for begin, end in reversed(list(zip(edges[:-1], edges[1:], strict=True))):
        walk.observe(begin, end, logprobs[begin:end])
        # a chunk's weights are right as soon as it is observed: nothing to its left matters
        torch.testing.assert_close(walk.weights(begin, end), whole.weights(begin, end), rtol=1e-13, atol=0)


def test_last_token_has_weight_one_at_token_level():
    logprobs, behavior = random_logprobs(11, 0)
    assert pear_weights(logprobs, behavior)[-1] == 1.0


def test_equal_policies_leave_only_the_discount():
    logprobs, _ = random_logprobs(50, 0)
    weights = pear_weights(logprobs, logprobs, gamma=0.9)
    expected = 0.9 ** torch.arange(49, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(weights, expected.clamp(min=math.exp(-10)))


@pytest.mark.parametrize("level", LEVELS)
def test_equal_policies_without_discount_weigh_one(level):
    logprobs, _ = random_logprobs(50, 0)
    assert torch.equal(pear_weights(logprobs, logprobs, level=level, gamma=1.0), torch.ones_like(logprobs))


def test_block_of_one_is_the_token_level():
    logprobs, behavior = random_logprobs(30, 1)
    token = pear_weights(logprobs, behavior, level="token")
    assert torch.equal(pear_weights(logprobs, behavior, level="block", block_size=1), token)


@pytest.mark.parametrize("block_size", [30, 31, 10**9])
def test_a_block_as_long_as_the_sequence_weighs_one(block_size):
    logprobs, behavior = random_logprobs(30, 1)
    assert torch.equal(pear_weights(logprobs, behavior, level="block", block_size=block_size), torch.ones(30).double())


def test_a_block_longer_than_any_sequence_overflows_nothing():
    logprobs, behavior = random_logprobs(30, 1)
    bounds = torch.tensor([0, 10, 30])
    weights = pear_weights(logprobs, behavior, level="block", block_size=2**63 - 1, cu_seqlens=bounds)
    assert torch.equal(weights, torch.ones(30).double())


def test_the_floor_is_reached_after_123_tokens_at_the_lower_clip():
    # method.md: at -0.08 a token G sits on its floor e^-10 after 123 tokens; log G = -k (0.08 + 0.0010005)
    n = 200
    behavior = torch.zeros(n, dtype=torch.float64)
    weights = pear_weights(behavior - 1.0, behavior)
    after = torch.arange(n - 1, -1, -1)  # tokens after each
    on_floor = weights <= math.exp(-10)
    assert torch.equal(on_floor, after >= 124)  # 123 * 0.0810005 = 9.963, 124 * 0.0810005 = 10.044
    assert weights.min() == pytest.approx(math.exp(-10), rel=1e-12)


def test_weights_stop_at_the_ceiling():
    behavior = torch.full((100,), -5.0, dtype=torch.float64)
    assert pear_weights(behavior + 4.0, behavior)[0] == pytest.approx(math.exp(5), rel=1e-12)


def test_float32_ratios_do_not_drift_along_a_long_suffix():
    # 200,000 tokens whose ratios nearly cancel: sums in float32 would be off by far more than a weight's own rounding
    n = 200_000
    rng = torch.Generator().manual_seed(0)
    behavior = -torch.rand(n, generator=rng)
    logprobs = behavior + 0.05 * torch.randn(n, generator=rng)
    weights = pear_weights(logprobs, behavior, gamma=1.0, log_ratio_clip=(-1.0, 1.0), log_weight_clip=(-50.0, 50.0))
    delta = (logprobs - behavior).double().tolist()  # the float32 ratios, summed exactly
    for t in (0, 1, 1000, n // 2, n - 2):
        assert weights[t].item() == pytest.approx(math.exp(math.fsum(delta[t + 1 :])), rel=2e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_prompts_and_neighbours_change_nothing(level):
    logprobs, behavior = random_logprobs(6, 3)
    alone = pear_weights(logprobs, behavior, level=level)
    noise, other = random_logprobs(20, 4)
    for left, right in [(0, 3), (3, 0), (2, 5)]:
        row = torch.cat([noise[:left], logprobs, noise[left : left + right]])
        row_behavior = torch.cat([other[:left], behavior, other[left : left + right]])
        mask = torch.zeros(len(row), dtype=torch.bool)
        mask[left : left + 6] = True
        padded = pear_weights(row[None], row_behavior[None], mask[None], level=level)[0]
        torch.testing.assert_close(padded[mask], alone, rtol=1e-14, atol=0)
        assert not padded[~mask].any()
        bounds = torch.tensor([0, left, left + 6, len(row)])
        packed = pear_weights(row, row_behavior, cu_seqlens=bounds, level=level)
        torch.testing.assert_close(packed[left : left + 6], alone, rtol=1e-14, atol=0)


def test_a_gap_inside_a_response_carries_no_ratio_and_no_position():
    logprobs, behavior = random_logprobs(6, 5)  # tool output of two tokens after the third response token
    mask = torch.tensor([True, True, True, False, False, True, True, True])
    spread = torch.zeros(8, dtype=torch.float64)
    spread_behavior = torch.full((8,), math.nan, dtype=torch.float64)  # nobody scored the tool
    spread[mask], spread_behavior[mask] = logprobs, behavior
    gapped = pear_weights(spread, spread_behavior, mask, level="block", block_size=2)
    assert torch.equal(gapped[mask], pear_weights(logprobs, behavior, level="block", block_size=2))


def test_no_gradient_flows_through_the_weights():
    logprobs, behavior = random_logprobs(6, 5)
    assert not pear_weights(logprobs.requires_grad_(), behavior.requires_grad_()).requires_grad


def test_a_known_number_of_tokens_saves_the_list_of_them(monkeypatch):
    """And with it the host sync on a GPU."""
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    logprobs, mask, bounds = -torch.ones(6), torch.arange(6) > 1, torch.tensor([0, 6])
    for valid_tokens in (None, 4):
        options = PEAROptions(), HeadOptions(), CallOptions(valid_tokens=valid_tokens)
        columns = {"behavior_logprobs": logprobs, "cu_seqlens": bounds}
        spec, numbers = spec_and_numbers("pear_weights", columns, torch.float32, options)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            pear_weights_op._init_fn(logprobs, mask, list(columns.values()), numbers, spec)
        assert ("aten::nonzero" in {event.name for event in profiler.events()}) == (valid_tokens is None)
