"""Static packs, which CUDA graphs need: the answers of the usual packs, without a question to the device."""

import pytest
import torch
from problems import gradients, make_problem, pear_objective, workspace
from torch.utils._python_dispatch import TorchDispatchMode

from pear_kernels import linear_logprobs, linear_pear_loss
from pear_kernels.backends.torch.head import Head
from pear_kernels.engine import packing
from pear_kernels.engine.packing import pack_tokens, unpack
from pear_kernels.engine.schedule import Wanted
from pear_kernels.engine.sparsify import say_once_that_all_is_kept
from pear_kernels.engine.walk import LogitsWalk, Walk
from pear_kernels.objectives.base import FixedCoefficients
from pear_kernels.options import PEAROptions

LEVELS = ["token", "block", "sequence"]


@pytest.fixture
def static(monkeypatch):
    """Whether packs are static, as if a CUDA graph were being captured; call it with the answer."""
    return lambda answer: monkeypatch.setattr(packing, "capturing", lambda: answer)


def call(problem, trained, **options):
    """(loss, logprobs, weights, stats and gradients of what is trained) of one linear_pear_loss."""
    leaves = [leaf.requires_grad_(name in trained) for name, leaf in zip("xwb", problem.leaves(), strict=False)]
    out = linear_pear_loss(
        *leaves[:2], problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
        **{**problem.options, **options, **({"bias": leaves[2]} if len(leaves) > 2 else {})},
    )  # fmt: skip
    grads = gradients(2 * out.loss, [leaf for leaf in leaves if leaf.requires_grad]) if trained else []
    return [out.loss.detach(), out.logprobs, out.weights, torch.stack(list(out.stats.values())), *grads]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["xw", "x", "w", "xwb", "b", ""])
def test_same_answers(level, trained, static):
    scale = torch.tensor([0.5, 2.0, 7.0, -1.0, 3.0], dtype=torch.float64)
    problem = make_problem(level=level, block_size=3, bias="b" in trained, sequence_scale=scale)
    for reduction in ("mean", "sum", "sequence_mean"):
        for rows in (3, 12, None):
            options = dict(reduction=reduction, workspace_bytes=rows and workspace(rows, 37))
            static(False)
            expected = call(problem, trained, **options)
            static(True)
            torch.testing.assert_close(call(problem, trained, **options), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trained", ["xw", "x"])
def test_nan_at_ignored_tokens_stays_there(level, trained, static):
    problem = make_problem((20, 9, 30), level=level, softcap=5.0)
    ignored = problem.target < 0
    static(False)
    expected = call(problem, trained)
    problem.hidden[ignored] = torch.nan
    problem.behavior_logprobs[ignored] = torch.nan
    static(True)
    for rows in (7, None):
        found = call(problem, trained, workspace_bytes=rows and workspace(rows, 37))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
        assert not found[4][ignored].any() and not found[1][ignored].any() and not found[2][ignored].any()


@pytest.mark.parametrize("level", LEVELS)
def test_all_ignored_and_none_ignored(level, static):
    for ignored in (0.0, 1.0):
        problem = make_problem(level=level, ignored=ignored, bias=True)
        static(False)
        expected = call(problem, "xwb")
        static(True)
        torch.testing.assert_close(call(problem, "xwb"), expected, rtol=1e-11, atol=1e-14)


def test_nothing_is_left_out_of_a_static_pack(static):
    """Choosing takes a host sync. It is said once."""
    problem = make_problem((30, 20))
    static(True)
    expected = call(problem, "xw")
    say_once_that_all_is_kept.cache_clear()
    with pytest.warns(
        UserWarning, match="gradient_tolerance leaves nothing out while a CUDA graph is captured"
    ) as said:
        for _ in range(2):
            found = call(problem, "xw", gradient_tolerance=0.5, workspace_bytes=workspace(20, 37))
    assert len(said) == 1
    torch.testing.assert_close([*found[:3], *found[4:]], [*expected[:3], *expected[4:]], rtol=1e-11, atol=1e-14)
    assert found[3][-2:].tolist() == [1, 0]  # kept, left out


def test_logprobs(static):
    problem = make_problem(bias=True)
    weights = torch.linspace(-1, 1, len(problem.target), dtype=torch.float64)
    results = []
    for answer in (False, True):
        static(answer)
        for entropy in (False, True):
            leaves = problem.leaves()
            both = linear_logprobs(*leaves[:2], problem.target, bias=leaves[2], return_entropy=entropy)
            both = both if entropy else (both,)
            loss = sum((weights * value.square()).sum() for value in both)
            results.append([*(value.detach() for value in both), *gradients(loss, leaves)])
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-11, atol=1e-14)


# ---- nothing is asked of the device

SYNCING = {  # what needs a number, or a size, on the host
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "bincount", "masked_select", "unique", "_unique2",
    "unique_consecutive", "unique_dim", "repeat_interleave", "is_nonzero", "equal",
}  # fmt: skip


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in SYNCING, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def refuse_tolist(self):
    """In place of Tensor.tolist, which reads a CPU's memory without an op that a mode could see."""
    raise AssertionError("tolist waits for the device")


def as_on_a_device(patch):
    """A CPU's tensors stand for a device's: nothing may be read back."""
    patch.setattr(torch.Tensor, "tolist", refuse_tolist)
    patch.setattr("pear_kernels.backends.torch.head.may_read", lambda tensor: False)


def test_the_guard_sees_what_waits(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tolist", refuse_tolist)
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    for waits in (mask.nonzero, mask.tolist, lambda: values[mask], lambda: bool(mask.any()), lambda: values[0].item()):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            waits()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("rows", [5, 400])
def test_no_step_waits_for_the_device(level, train_head, rows, monkeypatch):
    problem = make_problem((40, 3, 0, 60), level=level, bias=True)
    scale = torch.ones(4, dtype=torch.float64)
    with NoSync(), monkeypatch.context() as patch:
        as_on_a_device(patch)
        pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static=True)
        head = Head(problem.weight, problem.options["bias"], 0.7, 3.0, torch.float64)
        behavior = pack.take(problem.behavior_logprobs)
        for reduction in ("mean", "sequence_mean"):
            objective = pear_objective(behavior, pack, PEAROptions(level=level), reduction, scale)
            wanted = Wanted(True, train_head, train_head)
            walk = Walk(problem.hidden, head, problem.target, pack, wanted, workspace(rows, 37))
            walk.run(objective)
            loss, *_ = objective.finish(walk.logprobs)
            logprobs = unpack(walk.logprobs, pack, len(problem.target))
        walk = Walk(
            problem.hidden, head, problem.target, pack, Wanted(False, False, False), workspace(rows, 37), entropy=True
        )
        walk.score_all(FixedCoefficients())
    (exact, exact_logprobs, _), _ = problem.naive(
        reduction="sequence_mean", temperature=0.7, softcap=3.0, level=level, sequence_scale=scale
    )
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(logprobs, exact_logprobs.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [40, 400])
def test_nothing_between_the_kernels_waits_for_the_device(level, dtype, rows, monkeypatch):
    # launches are recorded, not run: this looks at the host's side of them
    pytest.importorskip("triton")
    from pear_kernels.backends.triton import launch
    from pear_kernels.backends.triton.head import Head
    from pear_kernels.backends.triton.logits_head import LogitsHead

    problem = make_problem((40, 3, 0, 60), D=16, V=64, level=level, bias=True, dtype=dtype)
    head_options = problem.weight, problem.options["bias"], 0.7, 3.0, dtype
    options, dense_options = ((problem.hidden, kind(*head_options), problem.target) for kind in (Head, LogitsHead))
    with NoSync(), monkeypatch.context() as patch:
        as_on_a_device(patch)
        patch.setattr(launch, "recorder", [])
        pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static=True)
        behavior, ones = pack.take(problem.behavior_logprobs), torch.ones(pack.tokens)
        objective = pear_objective(behavior, pack, PEAROptions(level=level), "sequence_mean", torch.ones(4))
        for wanted in (Wanted(True, True, True), Wanted(True, False, False)):
            walk = Walk(*options, pack, wanted, rows * 600)
            walk.run(objective)
            objective.finish(walk.logprobs)
            dense = LogitsWalk(*dense_options, pack, wanted, rows * 600, entropy=True)
            dense.run(FixedCoefficients(ones, ones))
        Walk(*options, pack, Wanted(False, False, False), rows * 600, entropy=True).score_all(FixedCoefficients())
        assert launch.recorder


# ---- heads that keep the target's term apart


class Apart(Head):
    """E_y = 0, and the target's gradient as a term of its own: the other half of the protocol, in plain PyTorch."""

    def softmax(self, x, target, *, gradient, entropy=False):
        softmax = super().softmax(x, target, gradient=gradient, entropy=entropy)
        if not gradient:
            softmax.exp.fill_(torch.nan)  # no such buffer without a gradient
            return softmax
        mass = -softmax.exp.gather(1, target[:, None])[:, 0].double()
        softmax.exp.scatter_(1, target[:, None], 0.0)
        return softmax._replace(target_mass=mass)

    def write_grad_hidden_(self, into, index, factor, row_scale, target, target_mass, kept):
        if target_mass is not None:
            factor = factor.scatter(1, target[:, None], -target_mass[:, None].to(factor.dtype))
        super().write_grad_hidden_(into, index, factor, row_scale, target, None, kept)

    def subtract_targets_(self, grad_weight, grad_bias, hidden, index, target, scale):
        live = scale != 0
        if grad_weight is not None:
            grad_weight.index_add_(0, target[live], -scale[live, None] * hidden[index[live]])
        if grad_bias is not None:
            grad_bias.index_add_(0, target, -scale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("wanted", [Wanted(True, True, True), Wanted(True, False, True), Wanted(False, True, False)])
@pytest.mark.parametrize("D", [4, 64])  # at D = 4 long sequences get a dW of their own, at 64 they are seen twice
@pytest.mark.parametrize("static", [False, True])
def test_targets_kept_apart_end_in_the_gradient(level, wanted, D, static):
    problem = make_problem((70, 3, 50, 0, 60), D=D, bias=True, sequence_scale=torch.tensor([1.0, 0.0, -2.0, 1.0, 3.0]))
    problem.hidden[problem.target < 0] = torch.nan
    found = []
    for kind in (Head, Apart):
        pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static)
        head = kind(problem.weight, problem.options["bias"], 1.3, None, torch.float64)
        scale = problem.options["sequence_scale"]
        options = PEAROptions(level=level, log_ratio_clip=(-0.03, 0.03))
        objective = pear_objective(pack.take(problem.behavior_logprobs), pack, options, "mean", scale)
        walk = Walk(problem.hidden, head, problem.target, pack, wanted, workspace(20, 37))
        walk.run(objective)
        found.append([walk.logprobs, walk.grads.hidden, walk.grads.weight, walk.grads.bias])
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-14)
    assert all(gradient.any() for gradient, is_wanted in zip(found[1][1:], wanted, strict=True) if is_wanted)
