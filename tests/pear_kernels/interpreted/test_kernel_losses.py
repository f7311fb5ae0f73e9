"""linear_pear_loss on the kernels against the naive float64 loss on full logits."""

import math

import pytest
import torch
from kernel_problems import (
    DEVICE,
    HEADS,
    LENGTHS,
    LEVELS,
    PRODUCTS,
    TOLERANCE,
    assert_matches_naive,
    chunk_bytes,
    kernel_problem,
    naive,
)  # fmt: skip
from problems import gradients, relative_error

from pear_kernels import linear_pear_loss
from pear_kernels.backends.triton import gradients as gradient_kernels
from pear_kernels.backends.triton import head as triton_head
from pear_kernels.backends.triton import pear_weights as triton_weights
from pear_kernels.backends.triton import rows, tiles
from pear_kernels.backends.triton.product import exp_product
from pear_kernels.engine import packing
from pear_kernels.engine.walk import Walk
from pear_kernels.reference import naive_logprobs

SCALE = torch.tensor([0.5, 2.0, 7.0, 0.8, 0.0], device=DEVICE)
REDUCTION = {"token": "mean", "block": "sum", "sequence": "sequence_mean"}


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, in order."""
    kernels = []
    for module in (triton_head, triton_weights):

        def watched(kernel, *args, launch=module.launch, **options):
            kernels.append(kernel)
            launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", watched)
    return kernels


@pytest.fixture
def chunks(monkeypatch):
    """[begin, end) of the chunks whose softmax was made, in order."""
    seen = []
    softmax = Walk.softmax

    def watched(self, begin, end, **options):
        seen.append((begin, end))
        return softmax(self, begin, end, **options)

    monkeypatch.setattr(Walk, "softmax", watched)
    return seen


# ---- options


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head", HEADS)
def test_heads_levels_and_reductions(product, head, level, launched):
    problem = kernel_problem(level=level, block_size=3, reduction=REDUCTION[level], sequence_scale=SCALE, **HEADS[head])
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 18))
    first = {"fused": {exp_product, rows.finish}, "plain": {rows.softmax_rows}}[product]
    expected = {
        rows.target_logits, *first, gradient_kernels.write_grad_hidden, gradient_kernels.scale_rows,
        gradient_kernels.subtract_targets, triton_weights.scan_and_weigh,
    }  # fmt: skip
    if "bias" in HEADS[head]:
        expected.add(gradient_kernels.add_grad_bias)
    assert set(launched) == expected  # the kernels made these numbers, and those of this variant


def test_denominator_replaces_the_divisor():
    problem = kernel_problem((7, 4), reduction="mean")
    assert_matches_naive(problem, denominator=3.0)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1000.0])
def test_softcaps_far_below_and_far_above_the_logits(product, softcap):
    assert_matches_naive(kernel_problem((11, 8), softcap=softcap))


def test_columns_that_a_bias_of_minus_infinity_takes_out(product):
    problem = kernel_problem((11, 8), bias=True, ignored=0.0)
    out_of_play = torch.ones(75, dtype=torch.bool, device=DEVICE)
    out_of_play[problem.target] = False
    problem.options["bias"][out_of_play] = -math.inf
    out, leaves = problem.ours()
    (loss, _, _), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < TOLERANCE
    grads, expected = gradients(out.loss, leaves), gradients(loss, exact_leaves)
    for ours, exact in zip(grads, expected, strict=True):
        assert relative_error(ours, exact) < TOLERANCE
    assert not grads[1][out_of_play].any() and not grads[2][out_of_play].any()


# ---- shapes


@pytest.mark.parametrize("V", [2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96])
def test_vocabularies_of_any_remainder_to_a_tile(V):
    check_vocabulary(V)


@pytest.mark.parametrize("V", [2, 17, 1023, 1024, 1025, 2050])
def test_vocabularies_of_any_remainder_to_a_row_block(V, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, "plain")
    check_vocabulary(V, (5, 3) if V > 1000 else (14, 6))


def check_vocabulary(V, lengths=(14, 6)):
    """Targets on the first and last columns, and on both sides of the edges of tiles and of parts of tiles."""
    problem = kernel_problem(lengths, V=V, D=16, ignored=0.0)
    edges = torch.tensor([0, V - 1, 15, 16, 31, 32, V - 2, 47, 48, 1023, 1024], device=DEVICE)
    edges = edges[(edges >= 0) & (edges < V)]
    problem.target = edges.repeat(20)[: sum(lengths)]
    problem.behavior_logprobs = naive(problem)[0][1].float() - 0.02
    assert_matches_naive(problem)


def test_more_tiles_than_a_rows_sums_are_added_up_at_a_time():
    problem = kernel_problem((2, 1), V=4150, D=8, ignored=0.0)  # 130 tiles of 32, 128 at a time
    problem.target = torch.tensor([4149, 4100, 7], device=DEVICE)
    assert_matches_naive(problem)


@pytest.mark.parametrize(
    "D, dtype",
    [
        *[(D, torch.float32) for D in (1, 3, 8, 15, 16, 40, 72, 260, 1032)],
        *[(D, torch.bfloat16) for D in (3, 8, 12, 24, 72, 264)],
        *[(D, torch.float16) for D in (5, 8, 24)],
    ],
)
def test_hidden_sizes_of_any_remainder_to_a_block(D, dtype):
    # 8 and 24 of float32, and multiples of 8 of half precision, go through tensor descriptors, and no others
    problem = kernel_problem((6, 11) if D < 200 else (2, 3), V=35, D=D, dtype=dtype)
    problem.weight.mul_(2 / D**0.5)
    if dtype == torch.float32:
        assert_matches_naive(problem)
    else:
        assert_as_exact_as_the_naive_loss(problem)


def assert_as_exact_as_the_naive_loss(problem, **overrides):
    """Errors against float64 are at most twice those of full logits in the problem's own dtype."""
    (loss, logprobs, weights), exact_leaves = naive(problem, **overrides)
    expected = gradients(loss, exact_leaves)
    out, leaves = problem.ours(**overrides)
    grads = gradients(out.loss, leaves)
    theirs = [leaf.detach().to(problem.hidden.dtype).requires_grad_() for leaf in exact_leaves]
    options = {name: problem.options[name] for name in ("temperature", "softcap") if name in problem.options}
    bias = theirs[2] if len(theirs) > 2 else None
    their_logprobs = naive_logprobs(*theirs[:2], problem.target, bias=bias, **options)
    counted = (problem.target >= 0).sum()
    their_grads = gradients(-(weights.detach() * their_logprobs).sum() / counted, theirs)
    assert (out.logprobs.double() - logprobs).square().mean().sqrt() < 2e-6  # half-precision logits: 1e-3 and more
    assert relative_error(out.loss, loss) < 1e-5
    for ours, naive_one, exact in zip(grads, their_grads, expected, strict=True):
        assert ours.dtype == problem.hidden.dtype
        assert relative_error(ours, exact) <= 2 * relative_error(naive_one, exact)


@pytest.mark.parametrize(
    "which, level, dtype",
    [
        ("fused", "token", torch.bfloat16),
        ("plain", "block", torch.bfloat16),
        ("fused", "sequence", torch.bfloat16),
        ("plain", "token", torch.float16),
        ("plain", "sequence", torch.float16),
    ],
)
def test_half_precision(which, level, dtype, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, which)
    problem = kernel_problem(level=level, dtype=dtype, bias=True, softcap=9.0, temperature=0.8)
    problem.weight.mul_(0.4)
    problem.behavior_logprobs = (naive(problem)[0][1] - 0.05).float()
    assert_as_exact_as_the_naive_loss(problem, workspace_bytes=chunk_bytes(problem, 12))


def test_float16_gradients_are_not_rounded_before_the_upstream_gradient():
    problem = kernel_problem((10, 9), dtype=torch.float16)
    problem.weight.mul_(0.3)
    out, leaves = problem.ours(denominator=1e7)
    (loss, _, _), exact_leaves = naive(problem, denominator=1e7)
    scale = 2.0**18  # without it these gradients are below float16's range
    for ours, exact in zip(gradients(out.loss * scale, leaves), gradients(loss * scale, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 1e-3


# ---- edges


@pytest.mark.parametrize("level", LEVELS)
def test_all_ignored(level):
    problem = kernel_problem(level=level, ignored=1.0, bias=True)
    problem.hidden.fill_(math.nan)
    out, leaves = problem.ours()
    assert out.loss.item() == 0.0 and out.stats["tokens"].item() == 0.0
    assert all(grad.shape == leaf.shape and not grad.any()
               for grad, leaf in zip(gradients(out.loss, leaves), leaves, strict=True))  # fmt: skip
    assert not out.logprobs.any() and not out.weights.any()
    assert all(value.isfinite() for value in out.stats.values())


def test_no_tokens_at_all():
    hidden = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(5, 8, device=DEVICE, requires_grad=True)
    none = torch.zeros(0, device=DEVICE)
    out = linear_pear_loss(hidden, weight, none.long(), none, backend="triton")
    grads = gradients(out.loss, [hidden, weight])
    assert out.loss.item() == 0.0 and grads[0].shape == (0, 8) and not grads[1].any()


@pytest.mark.parametrize("level", LEVELS)
def test_one_token(product, level):
    assert_matches_naive(kernel_problem((1,), level=level, ignored=0.0, bias=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight bias", ""])
def test_sequences_that_end_on_a_chunk_edge_and_span_several(level, trained, chunks):
    problem = kernel_problem((6, 6, 18, 0, 12, 4), D=16, V=40, level=level, ignored=0.0, bias=True)
    gradient = bool(trained)
    leaves = [
        leaf.requires_grad_(name in trained.split())
        for name, leaf in zip(("hidden", "weight", "bias"), problem.leaves(), strict=True)
    ]
    out = call(problem, leaves, workspace_bytes=chunk_bytes(problem, 6, gradient))
    (loss, logprobs, weights), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < TOLERANCE
    assert relative_error(out.logprobs, logprobs) < TOLERANCE
    torch.testing.assert_close(out.weights.double(), weights, rtol=1e-4, atol=0)
    edges = {edge for chunk in chunks for edge in chunk}
    assert {6, 12, 30, 42} <= edges and all(end - begin <= 6 for begin, end in chunks)  # the third in 3 or more
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if wanted:
        exact = gradients(loss, exact_leaves)
        expected = [grad for grad, leaf in zip(exact, leaves, strict=True) if leaf.requires_grad]
        for ours, theirs in zip(gradients(out.loss, wanted), expected, strict=True):
            assert relative_error(ours, theirs) < TOLERANCE


def call(problem, leaves, **overrides):
    options = {**problem.options, "cu_seqlens": problem.cu_seqlens, **overrides}
    if len(leaves) > 2:
        options["bias"] = leaves[2]
    return linear_pear_loss(*leaves[:2], problem.target, problem.behavior_logprobs, **options)


def test_several_sequences_longer_than_a_chunk(chunks):
    """Sequence level: all but the first are visited twice."""
    problem = kernel_problem((14, 15), D=8, V=40, level="sequence", ignored=0.0, bias=True)
    assert_matches_naive(problem, workspace_bytes=5 * chunk_bytes(problem, 1))
    # of chunks of 5 the one that completes the sequence needs no second pass
    assert sum(end - begin for begin, end in chunks) == 29 + 2 * 5


def test_a_sequence_without_weight():
    scale = torch.tensor([1.0, 0.0], device=DEVICE)
    problem = kernel_problem((8, 16), ignored=0.0, sequence_scale=scale)
    assert_matches_naive(problem, workspace_bytes=chunk_bytes(problem, 8))
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 8))
    assert not gradients(out.loss, leaves)[0][8:].any()


# ---- tiles


@pytest.mark.parametrize("group, parts, persistent", [(1, 1, True), (2, 1, False), (3, 2, False), (3, 2, True)])
def test_any_order_of_the_tiles(monkeypatch, group, parts, persistent):
    """Four row tiles, in groups of which the last may be short; E in one piece or two; each tile once."""
    problem = kernel_problem((30, 26), D=16, V=70, ignored=0.0)
    softmax = tiles.INTERPRETED.softmax._replace(persistent=persistent, parts=parts)
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.INTERPRETED._replace(softmax=softmax))
    monkeypatch.setattr(triton_head, "CACHED_BYTES", group * 16 * 16 * 4)
    assert_matches_naive(problem, level="token")


# ---- what must not depend on chance or on neighbours


@pytest.mark.parametrize(
    "level, dtype", [("token", torch.float32), ("block", torch.bfloat16), ("sequence", torch.bfloat16)]
)
def test_bitwise_repeatable(level, dtype):
    problem = kernel_problem((14, 1, 10), level=level, dtype=dtype, bias=True)
    problem.target[::3] = 5  # many tokens share a row of dW
    runs = []
    for _ in range(2):
        out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 12))
        runs.append([out.loss.detach(), out.logprobs, out.weights, *gradients(out.loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_in_its_sequence(product, level):
    problem = kernel_problem((9, 10, 6), ignored=0.0, level=level)
    (_, exact_logprobs, exact_weights), _ = naive(problem)
    problem.hidden[15] = math.nan
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 12))
    grad_hidden, _ = gradients(out.loss, leaves)
    assert out.loss.isnan()
    others = torch.ones(25, dtype=torch.bool, device=DEVICE)
    others[9:19] = False
    assert relative_error(out.logprobs[others], exact_logprobs[others]) < TOLERANCE
    torch.testing.assert_close(out.weights[others].double(), exact_weights[others], rtol=1e-4, atol=0)
    assert grad_hidden[others].isfinite().all() and grad_hidden[others].any(1).all()
    assert out.weights[9:12].isnan().all()  # tokens before it look at it, but for those of its own block
    assert out.logprobs.isnan().nonzero().tolist() == [[15]]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("static", [False, True])
def test_nan_at_ignored_tokens_goes_nowhere(level, static, monkeypatch):
    """Also in static packs, as CUDA graphs need, where ignored tokens keep their rows."""
    problem = kernel_problem((12, 0, 1, 20), level=level, bias=True, block_size=3)
    ignored = problem.target < 0
    (loss, logprobs, weights), exact_leaves = naive(problem)
    expected = gradients(loss, exact_leaves)
    problem.hidden[ignored] = math.nan
    problem.behavior_logprobs[ignored] = math.nan
    monkeypatch.setattr(packing, "capturing", lambda: static)
    out, leaves = problem.ours(workspace_bytes=chunk_bytes(problem, 12))
    assert relative_error(out.loss, loss) < TOLERANCE
    assert relative_error(out.logprobs, logprobs) < TOLERANCE
    torch.testing.assert_close(out.weights.double(), weights, rtol=1e-4, atol=0)
    grads = gradients(out.loss, leaves)
    for ours, exact in zip(grads, expected, strict=True):
        assert relative_error(ours, exact) < TOLERANCE
    assert not grads[0][ignored].any()
    counted = problem.target >= 0
    nll, mean_weight = -logprobs[counted].mean().item(), weights[counted].mean().item()
    assert out.stats["nll"].item() == pytest.approx(nll, rel=1e-5)
    assert out.stats["weight_mean"].item() == pytest.approx(mean_weight, rel=1e-4)
    assert out.stats["tokens"].item() == int(counted.sum())


# ---- tensors as they come


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


def rows_apart(x):
    wider = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wider[..., 2:-1] = x
    return wider[..., 2:-1]


def misaligned(x):
    flat = x.new_zeros(x.numel() + 1)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


@pytest.mark.parametrize("layout", [transposed, rows_apart, misaligned])
@pytest.mark.parametrize("which, dtype", [("fused", torch.float32), ("plain", torch.bfloat16)])
def test_layouts(layout, which, dtype, monkeypatch):
    """Contiguous copies give the same bits, but for products that may sum in another order."""
    monkeypatch.setenv(tiles.VARIABLE, which)
    problem = kernel_problem(LENGTHS, dtype=dtype, bias=True, level="sequence")
    results = []
    for place in (lambda x: x, layout):
        leaves = [place(leaf.detach()).requires_grad_() for leaf in problem.leaves()]
        out = linear_pear_loss(
            *leaves[:2], place(problem.target), place(problem.behavior_logprobs), bias=leaves[2], level="sequence",
            cu_seqlens=problem.cu_seqlens, backend="triton", workspace_bytes=chunk_bytes(problem, 12),
        )  # fmt: skip
        results.append([out.loss, out.logprobs, out.weights, *gradients(out.loss, leaves)])
    torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_operands_and_keeps_float32_gradients(hidden_dtype, product):
    problem = kernel_problem((9, 17, 5), bias=True)
    leaves = [problem.hidden.to(hidden_dtype), problem.weight, problem.options["bias"]]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = call(problem, leaves)
    grads = gradients(out.loss, leaves)
    assert out.loss.dtype == out.logprobs.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [hidden_dtype, torch.float32, torch.float32]
    rounded = [leaf.detach().bfloat16() for leaf in leaves]
    problem.hidden, problem.weight, problem.options["bias"] = rounded
    (loss, logprobs, _), exact_leaves = naive(problem)
    assert relative_error(out.loss, loss) < 1e-5
    assert relative_error(out.logprobs, logprobs) < TOLERANCE  # logits are exact products of rounded operands
    for ours, exact in zip(grads, gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < 4e-3  # E and the scaled rows of product 3 are rounded
