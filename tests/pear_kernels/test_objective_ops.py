"""The ops of weighted losses, negatives and distillation: as torch.library wants them, captured, and in any layout."""

import pytest
import torch
from problems import (
    gradients,
    make_distill_problem,
    make_policy_problem,
    make_problem,
    make_weighted_problem,
    random_blocks,
    relative_error,
    workspace,
)
from test_layouts import BACKENDS, HERE, expanded, misaligned, rows_apart, strided, transposed
from torch.utils.checkpoint import checkpoint

from pear_kernels import linear_logprobs, linear_topk_logprobs, linear_weighted_loss, pear_weights
from pear_kernels.engine import packing
from pear_kernels.losses import shared
from pear_kernels.ops import logprobs as logprobs_ops
from pear_kernels.ops.loss import compute

BLOCKS = dict(level="block", block_ids=random_blocks((7, 1, 0, 12, 5)))
OF_OURS = dict(clip_blocks=True, center=True, clip_length=5)
LABELS = dict(sequence_label=torch.tensor([True, False, True, False, True]))
PROBLEMS = {
    **{
        f"weighted, {name}": (make_weighted_problem, {"weighting": name})
        for name in ("tensor", "iw-sft", "idft", "anchored")
    },
    **{f"negatives, {level}": (make_problem, {"level": level, **LABELS}) for level in ("token", "sequence")},
    "blocks": (make_problem, {**BLOCKS, "normalize": "sequence"}),
    "blocks, options of ours": (make_problem, {**BLOCKS, **OF_OURS, "normalize": "batch"}),
    "blocks, negatives": (make_problem, {**BLOCKS, **OF_OURS, **LABELS}),
    "distill, blocks": (make_distill_problem, {**BLOCKS, **OF_OURS, "normalize": "batch"}),
    "distill, forward": (make_distill_problem, {"divergence": "forward"}),
    "distill, reverse, without weights": (make_distill_problem, {"divergence": "reverse", "weighted": False}),
    "distill, js, top-k": (make_distill_problem, {"divergence": "js", "top_k": 5, "level": "block", "nll_coef": 0.1}),
}
CASES = pytest.mark.parametrize("make, options", PROBLEMS.values(), ids=PROBLEMS.keys())
ALL_OPS = ((shared, "linear_loss"), (logprobs_ops, "linear_topk_logprobs"))


def on_meta(value):
    """A tensor, or the tensors of a teacher, on device "meta"."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_meta, value))
    if isinstance(value, list):
        return [on_meta(each) for each in value]
    return value.detach().to("meta") if isinstance(value, torch.Tensor) else value


@pytest.fixture
def called(monkeypatch):
    """(op, args, kwargs) of every op that a public function calls."""
    calls = []

    def recording(op):
        def recorded(*args, **kwargs):
            calls.append((op, args, kwargs))
            return op(*args, **kwargs)

        return recorded

    for module, name in ALL_OPS:
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    return calls


@CASES
def test_torch_library_opcheck(make, options, called):
    make(dtype=torch.float32, bias=True, **options).ours()
    (op, args, kwargs), *_ = called
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_torch_library_opcheck_of_topk(called):
    problem = make_problem(dtype=torch.float32, bias=True)
    linear_topk_logprobs(problem.hidden, problem.weight, problem.target, 3, bias=problem.options["bias"])
    (op, args, kwargs), *_ = called
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@CASES
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("rows", [9, None])
def test_a_captured_pass_reads_no_value(make, options, reduction, rows, called, monkeypatch):
    """The whole of each op on tensors of device "meta", which have no values: reading one raises, as in a capture."""
    scale = torch.ones(5)
    problem = make(dtype=torch.float32, bias=True, temperature=0.7, softcap=3.0, sequence_scale=scale, **options)
    for divisor in (torch.ones(()), None):
        called.clear()
        problem.ours(reduction=reduction, denominator=divisor, workspace_bytes=rows and workspace(rows, 37, 4))
        (_, args, _), *_ = called
        *tensors, numbers, spec, group, wanted = args
        with monkeypatch.context() as patch, torch.device("meta"):
            patch.setattr(packing, "capturing", lambda: True)
            loss, *_, dx, dw, db = compute(*map(on_meta, tensors), numbers, spec, group, wanted)
        assert loss.is_meta and dx.shape == problem.hidden.shape and dw.shape == problem.weight.shape
        assert db.shape == problem.options["bias"].shape


@pytest.mark.parametrize("make, options", [*PROBLEMS.values(), (make_policy_problem, {"entropy_coef": 0.1})])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(make, options):
    problem = make(dtype=torch.bfloat16, bias=True, **options)
    tensors = problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens
    shapes = type(problem)(*map(on_meta, tensors), {name: on_meta(value) for name, value in problem.options.items()})
    (real, leaves), (meta, meta_leaves) = problem.ours(), shapes.ours()
    found, expected = (
        [out.loss, out.logprobs, out.weights, *out.stats.values(), *gradients(out.loss, given)]
        for out, given in ((meta, meta_leaves), (real, leaves))
    )
    assert all(tensor.is_meta for tensor in found) and meta.stats.keys() == real.stats.keys()
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def test_log_probs_weights_and_functions_on_the_meta_device():
    problem = make_problem((7, 5), dtype=torch.float32)
    leaves = [leaf.to("meta").detach().requires_grad_() for leaf in problem.leaves()]
    target = problem.target.to("meta")
    logprobs, entropy = linear_logprobs(*leaves, target, return_entropy=True)
    assert [grad.shape for grad in gradients(logprobs.sum() + entropy.sum(), leaves)] == [x.shape for x in leaves]
    assert pear_weights(logprobs, logprobs, target >= 0).shape == (12,)
    assert linear_topk_logprobs(*leaves, target, 3).ids.shape == (12, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of another device
        assert linear_weighted_loss(*leaves, target, lambda logprobs: logprobs.exp()).loss.shape == ()


@CASES
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(make, options, use_reentrant):
    problem = make(dtype=torch.float32, **options)

    def loss(hidden, weight):
        extra = {**problem.options, "cu_seqlens": problem.cu_seqlens}
        return problem.loss(hidden * 1.5, weight, problem.target, problem.behavior_logprobs, **extra).loss * 2

    leaves, again = problem.leaves(), problem.leaves()
    value = loss(*leaves)
    value.backward()
    recomputed = checkpoint(loss, *again, use_reentrant=use_reentrant)
    recomputed.backward()
    assert torch.equal(value, recomputed)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, again, strict=True))


@CASES
def test_a_kept_graph_may_be_walked_twice(make, options):
    out, leaves = make(dtype=torch.float32, **options).ours()
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    second = torch.autograd.grad(5 * out.loss, leaves)
    torch.testing.assert_close(second, tuple(5 * grad for grad in first), rtol=1e-5, atol=1e-6)


# ---- layouts


def laid_out(value, layout):
    """A tensor, or the tensors of a teacher, in that layout on the device of these tests."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(laid_out(part, layout) for part in value))
    if not isinstance(value, torch.Tensor):
        return value
    return layout(value.to(HERE)) if value.dim() > 0 else value.to(HERE)


@CASES
@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("layout", [transposed, strided, rows_apart, misaligned])
def test_any_layout(make, options, which, layout):
    problem = make((7, 1, 0, 12, 5), D=16, dtype=torch.float32, bias=True, **options)
    (loss, logprobs, weights), exact_leaves = problem.naive()
    expected = gradients(loss, exact_leaves)
    problem.options["backend"] = which
    for name in ("hidden", "weight", "target", "behavior_logprobs"):
        setattr(problem, name, laid_out(getattr(problem, name), layout))
    problem.cu_seqlens = laid_out(problem.cu_seqlens, layout)
    given = {name: laid_out(value, layout) for name, value in problem.options.items()}
    leaves = [x.detach().requires_grad_() for x in (problem.hidden, problem.weight, given.pop("bias"))]
    out = problem.loss(
        *leaves[:2], problem.target, problem.behavior_logprobs, bias=leaves[2], cu_seqlens=problem.cu_seqlens,
        workspace_bytes=9 * 37 * 8, **given,
    )  # fmt: skip
    assert abs(out.loss.item() - loss.item()) < 2e-5 * max(1.0, abs(loss.item()))
    torch.testing.assert_close(out.logprobs.cpu().double(), logprobs, rtol=2e-5, atol=2e-5)
    for ours, exact in zip(gradients(out.loss, leaves), expected, strict=True):
        assert relative_error(ours.cpu(), exact) < 5e-5


@pytest.mark.parametrize("which", BACKENDS)
def test_one_teachers_row_for_all_tokens(which):
    """Expanded tensors, of stride 0."""
    for top_k in (None, 5):
        problem = make_distill_problem((7, 5), D=16, dtype=torch.float32, top_k=top_k, ignored=0.0)
        teacher = problem.options["teacher"]
        if top_k is None:
            one = teacher._replace(hidden=expanded(teacher.hidden))
        else:
            one = type(teacher)(expanded(teacher.ids), expanded(teacher.logprobs))
        problem.options["teacher"] = one
        (loss, _, _), exact_leaves = problem.naive()
        problem.options["teacher"] = laid_out(one, lambda x: x)
        for name in ("hidden", "weight", "target", "behavior_logprobs", "cu_seqlens"):
            setattr(problem, name, getattr(problem, name).to(HERE))
        out, leaves = problem.ours(backend=which)
        assert out.loss.item() == pytest.approx(loss.item(), rel=2e-5)
        for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
            assert relative_error(ours.cpu(), exact) < 2e-5
